"""A shop's database on each engine, and sessions to put in it."""

import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pymysql

from core.settings import Settings
from local import mariadb


class Shop(Protocol):
    """A database with a shop's checkout_session table. Rows are returned as tuples."""

    @property
    def url(self) -> str: ...

    def run(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]: ...


@dataclass
class SQLiteShop:
    path: Path

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    def run(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.path)
        try:
            rows = connection.execute(sql.replace("%s", "?"), parameters).fetchall()
            connection.commit()
        finally:
            connection.close()
        return rows


@dataclass
class MySQLShop:
    server: str
    database: str

    @property
    def url(self) -> str:
        return f"{self.server.rstrip('/')}/{self.database}"

    def run(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        connection = connect(self.server, self.database)
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql, parameters or None)
                return list(cursor.fetchall())
        finally:
            connection.close()


def connect(server: str, database: str | None = None) -> pymysql.Connection:
    url = urlsplit(server)
    return pymysql.connect(
        host=url.hostname,
        port=url.port or 3306,
        user=url.username,
        password=url.password or "",
        database=database,
        charset="utf8mb4",
        autocommit=True,
        ssl_disabled=True,  # otherwise each connection spends 10 ms on reading the system's CAs
    )


def statements(engine: str) -> list[str]:
    """The statements of the shop's schema."""
    return mariadb.statements(mariadb.SCHEMA / f"{engine}.sql")


@contextmanager
def mysql_shop(server: str, schema: Iterable[str] | None = None) -> Iterator[MySQLShop]:
    """A new database on the server, dropped at the end."""
    shop = MySQLShop(server, f"monitor_test_{uuid.uuid4().hex[:12]}")
    with connect(server) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {shop.database} CHARACTER SET utf8mb4")
    try:
        for statement in statements("mysql") if schema is None else schema:
            shop.run(statement)
        yield shop
    finally:
        with connect(server) as connection, connection.cursor() as cursor:
            cursor.execute(f"DROP DATABASE {shop.database}")


def add_sessions(shop: Shop, sessions: Mapping[str, str | None], status: str = "open") -> None:
    """Add sessions to the shop's table, given billing checkout ids by session id."""
    items = list(sessions.items())
    for start in range(0, len(items), 500):
        some = items[start : start + 500]
        shop.run(
            "INSERT INTO checkout_session (id, billing_checkout_id, status) VALUES "
            + ", ".join(["(%s, %s, %s)"] * len(some)),
            [value for session, checkout in some for value in (session, checkout, status)],
        )


def numbered(count: int, word: str = "active") -> dict[str, str | None]:
    return {f"s{n}": f"checkout_{word}_{n}" for n in range(count)}


def settings_for(shop: Shop, **env: str) -> Settings:
    return Settings.from_env({"DATABASE_URL": shop.url, "APIKEY": "test-key", **env})

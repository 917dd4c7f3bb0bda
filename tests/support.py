"""What several test modules need: a shop's database, a clock, a billing service made of a table."""

import asyncio
import json
import re
import sqlite3
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import pymysql

from core.database.port import Database
from core.domain.model import Answer, Count, Outcome, Reason, Summary
from core.passes.check_pass import (
    PassOptions,
    check_open_checkout_sessions,
    trigger_checkout_session_check,
)
from core.settings import Settings
from core.store.store import Store
from core.worker import open_database
from local.mariadb import mariadb_server as mariadb_server  # noqa: PLC0414 (tests and bench use it)

if TYPE_CHECKING:
    from core.passes.scaling import StartWorker
    from core.store.status_changes import Publisher

EVENTS = Path(__file__).parents[1] / "events"
SCHEMA = Path(__file__).parents[1] / "local" / "schema"
NOON = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC)


class FakeClock:
    """A database clock that moves only when told to."""

    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class Shop(Protocol):
    """A database with a checkout_session table, as a shop has it; rows come back as tuples."""

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


def event(name: str) -> dict[str, Any]:
    """An event as users invoke the functions with it."""
    loaded: dict[str, Any] = json.loads((EVENTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


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
        ssl_disabled=True,  # else each connection reads the system's CAs, in 10 ms
    )


def statements(engine: str) -> list[str]:
    """The shop's schema, one statement each."""
    text = (SCHEMA / f"{engine}.sql").read_text(encoding="utf-8")
    return [s for s in re.sub(r"--.*", "", text).split(";") if s.strip()]


@contextmanager
def mysql_shop(server: str, schema: Iterable[str] | None = None) -> Iterator[MySQLShop]:
    """A database of one's own on the server, dropped at the end."""
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
    """Put sessions in the shop's table: billing checkout ids by session id."""
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


def database_of(shop: Shop, clock: FakeClock | None = None) -> Database:
    return open_database(settings_for(shop), clock=clock)


def census(store: Store, tick: datetime, session_ids: Sequence[str] | None = None) -> Count:
    """Adopt the new sessions, forget the closed ones, and count all, or those."""
    count = store.census(tick, session_ids)
    while count.next_piece():
        pass
    return count.count


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks and threads go on until the condition holds; for ten seconds at the most."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (what is waited for is often in a database)
            await asyncio.sleep(0.002)


class FakeBilling:
    """A billing service that answers from a table, 200 where there is no entry.

    A checkout id in `held` is not answered before its event is set. `asked` counts requests.
    """

    def __init__(self, answers: Mapping[str, Answer] | None = None) -> None:
        self.answers = dict(answers or {})
        self.held: dict[str | None, asyncio.Event] = {}
        self.asked: Counter[str | None] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0

    async def check(self, billing_checkout_id: str | None) -> Answer:
        self.asked[billing_checkout_id] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if event := self.held.get(billing_checkout_id):
                await event.wait()
            else:
                await asyncio.sleep(0)
        finally:
            self.in_flight -= 1
        return self.answers.get(billing_checkout_id or "", Answer(Outcome.ACTIVE, 200, 0.01))


class Passes:
    """Runs passes over a shop with an injected clock; one store and one database thread a pass.

    Without `billing` there is no API key.
    """

    def __init__(self, shop: Shop, clock: FakeClock, billing: FakeBilling | None) -> None:
        self.shop = shop
        self.clock = clock
        self.billing = billing
        self.choose = lambda _low, high: high
        self.publisher: Publisher | None = None
        self.start_worker: StartWorker | None = None
        store = Store(database_of(shop, clock))
        store.prepare()
        store.close()

    def recorded(self, attempts: int) -> bool:
        """Whether that many checks have been recorded in all."""
        return self.shop.run("SELECT SUM(attempts) FROM checkout_session_check") == [(attempts,)]

    async def run(self, options: PassOptions | None = None, **env: str) -> Summary:
        with self._store() as (store, thread):
            return await check_open_checkout_sessions(
                store,
                self.billing,
                settings_for(self.shop, **env),
                options or PassOptions(Reason.TICK, self.clock.now),
                database_thread=thread,
                start_worker=self.start_worker,
                choose=self.choose,
            )

    async def trigger(self, session_ids: Sequence[str] | None = None) -> Summary:
        with self._store() as (store, thread):
            return await trigger_checkout_session_check(
                store,
                self.billing,
                settings_for(self.shop),
                database_thread=thread,
                session_ids=session_ids,
            )

    @contextmanager
    def _store(self) -> Iterator[tuple[Store, ThreadPoolExecutor]]:
        with ThreadPoolExecutor(1) as thread:
            store = Store(database_of(self.shop, self.clock), self.publisher)
            try:
                yield store, thread
            finally:
                thread.submit(store.close).result()

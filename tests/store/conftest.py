from collections.abc import Callable, Iterator, Sequence

import pymysql
import pytest

from core.database.mysql import MySQLConnection
from core.database.port import Value
from core.store.store import Store
from testkit.clock import FakeClock
from testkit.shops import Shop
from tests.store.fake_bus import Bus, publishing_passes
from tests.support import FakeBilling, Passes, database_of


@pytest.fixture
def store(shop: Shop, clock: FakeClock) -> Iterator[Store]:
    """A store on each engine, with an injected clock."""
    store = Store(database_of(shop, clock))
    store.prepare()
    yield store
    store.close()


@pytest.fixture
def server_store(server_shop: Shop) -> Iterator[Store]:
    """A store on each server, with the server's clock."""
    store = Store(database_of(server_shop))
    store.prepare()
    yield store
    store.close()


@pytest.fixture
def mariadb_store(mariadb_shop: Shop) -> Iterator[Store]:
    """A store on MariaDB, with the server's clock."""
    store = Store(database_of(mariadb_shop))
    store.prepare()
    yield store
    store.close()


@pytest.fixture
def lose_an_answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Once called, an answer to such a statement is lost; returns the statements executed."""

    def begin(to: str = "") -> list[str]:
        executed, lost, execute = list[str](), list[str](), MySQLConnection.execute

        def lose_first(
            connection: MySQLConnection, sql: str, parameters: Sequence[Value] = ()
        ) -> int:
            changed = execute(connection, sql, parameters)
            executed.append(sql)
            if sql.startswith(to) and not lost:
                lost.append(sql)
                raise pymysql.OperationalError(2013, "Lost connection to MySQL server during query")
            return changed

        monkeypatch.setattr(MySQLConnection, "execute", lose_first)
        return executed

    return begin


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
def mariadb_passes(mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling, bus: Bus) -> Passes:
    """Passes over MariaDB that publish status changes on the bus."""
    return publishing_passes(mariadb_shop, clock, billing, bus)

import gc
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import pytest
import trustme

from core.passes import claims
from local.mariadb import mariadb_server
from testkit.clock import FakeClock
from testkit.shops import MySQLShop, Shop, SQLiteShop, mysql_shop, statements
from tests.kept_shop import KeptShop
from tests.support import FakeBilling, Passes

NO_SERVER = (
    "no MariaDB or MySQL server: install mariadb-server, or set TEST_DATABASE_URL, and "
    "TEST_MYSQL_URL for a MySQL beside it, to mysql://user:password@host:port/ "
    "(the tests make and drop databases of their own there)"
)

# A MySQL server beside the MariaDB one. Not every machine has both; CI must.
MYSQL = os.environ.get("TEST_MYSQL_URL")
SERVERS = ["mariadb", *(["mysql"] if MYSQL or os.environ.get("CI") else [])]

MEMORY = Path("/dev/shm")

# MariaDB prefers its anonymous user at localhost to a user at '%', so users are made at both.
PLACES = ("'%'", "localhost")


@pytest.fixture(scope="session", autouse=True)
def _one_ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The system trusts one CA: reading all of them takes 25 ms a connection."""
    file = tmp_path_factory.mktemp("ca") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(file))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(file))
        yield


@pytest.fixture(scope="session", autouse=True)
def _requests_leave_at_once() -> Iterator[None]:
    """Without a limit, they would be spread over a tenth of the interval: half a second a pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "MIN_PACE", math.inf)
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The event loop of async tests."""
    return "asyncio"


def without_a_server() -> None:
    """Skip the test for lack of a server, or fail it in CI."""
    if os.environ.get("CI"):
        pytest.fail(NO_SERVER)
    pytest.skip(NO_SERVER)


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """The URL of a MariaDB or MySQL: TEST_DATABASE_URL, or a MariaDB started for these tests."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
    elif shutil.which("mariadb-install-db"):
        no_waiting = "--innodb-flush-log-at-trx-commit=0"  # for the disk, at every commit
        with mariadb_server(tmp_path_factory.mktemp("mariadb"), no_waiting) as url:
            yield url
    else:
        yield None


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it again and again."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a database server; `make unit` leaves them out."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        callspec = getattr(item, "callspec", None)
        engines = callspec.params.values() if callspec else ()
        if {"mariadb", "mariadb_shop", "own_server"} & {*fixtures} or any(
            e in SERVERS for e in engines
        ):
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def kept_mariadb(mariadb: str | None) -> Iterator[KeptShop]:
    yield from kept_shop(mariadb)


@pytest.fixture(scope="session")
def kept_mysql() -> Iterator[KeptShop]:
    yield from kept_shop(MYSQL)


def kept_shop(server: str | None) -> Iterator[KeptShop]:
    if server is None:
        without_a_server()
    else:
        kept = KeptShop(server)
        yield kept
        kept.drop()


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, if there is one: on a disk, SQLite waits for it at every commit."""
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK):
        with TemporaryDirectory(dir=MEMORY) as directory:
            yield Path(directory)
    else:
        yield tmp_path


@contextmanager
def a_shop(request: pytest.FixtureRequest, engine: str) -> Iterator[Shop]:
    """An empty shop; if the test is marked `new_database`, without the monitor's tables."""
    if engine == "sqlite":
        embedded = SQLiteShop(request.getfixturevalue("sqlite_path") / "shop.db")
        for statement in statements("sqlite"):
            embedded.run(statement)
        yield embedded
        return
    kept: KeptShop = request.getfixturevalue(f"kept_{engine}")
    if request.node.get_closest_marker("new_database"):
        with mysql_shop(kept.server) as shop:
            yield shop
    else:
        yield kept.emptied()


@pytest.fixture(params=["sqlite", *SERVERS])
def shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """An empty shop on each engine."""
    with a_shop(request, request.param) as shop:
        yield shop


@pytest.fixture(params=SERVERS)
def server_shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    """An empty shop on each server."""
    with a_shop(request, request.param) as shop:
        yield shop


@pytest.fixture
def sqlite_shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    with a_shop(request, "sqlite") as shop:
        yield shop


@pytest.fixture
def mariadb_shop(request: pytest.FixtureRequest) -> Iterator[Shop]:
    with a_shop(request, "mariadb") as shop:
        yield shop


@pytest.fixture
def limited(mariadb_shop: MySQLShop) -> Iterator[Callable[..., MySQLShop]]:
    """Creates users of the shop's server that have only the rights given."""
    users: list[str] = []

    def make(*rights: str) -> MySQLShop:
        user = f"u{mariadb_shop.database[-12:]}{len(users)}"
        users.append(user)
        for place in PLACES:
            mariadb_shop.run(f"CREATE USER {user}@{place} IDENTIFIED BY 'limited-pass'")
            for right in rights:
                mariadb_shop.run(f"GRANT {right} TO {user}@{place}")
        host = urlsplit(mariadb_shop.server)
        return MySQLShop(
            f"mysql://{user}:limited-pass@{host.hostname}:{host.port}/", mariadb_shop.database
        )

    yield make
    for user in users:
        for place in PLACES:
            mariadb_shop.run(f"DROP USER {user}@{place}")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def billing() -> FakeBilling:
    return FakeBilling()


@pytest.fixture
def passes(sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling) -> Passes:
    return Passes(sqlite_shop, clock, billing)

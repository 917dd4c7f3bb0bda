"""Database faults at any statement: nothing is lost and nothing is recorded wrongly."""

import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

import pymysql
import pytest

from core.domain.model import Outcome
from local.mariadb import mariadb_server
from testkit.clock import FakeClock
from testkit.queue import claimed
from testkit.shops import MySQLShop, add_sessions, connect, mysql_shop, statements
from tests.chaos.billing import FaultyBilling
from tests.chaos.bus import Bus
from tests.chaos.conftest import Cases
from tests.chaos.proxy import Action, Cut, Statement, cut, refuse
from tests.chaos.world import SESSIONS, STATUSES, ProxiedWorld, World
from tests.conftest import MYSQL, SERVERS, without_a_server

# Selects the statements that are drawn at random; a failure names the statement.
SEED = int(os.environ.get("CHAOS_SEED", "1"))
on_mariadb = pytest.mark.parametrize("proxied", ["mariadb"], indirect=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_connection_cut_at_each_statement(proxied: ProxiedWorld, cases: Cases, when: str) -> None:
    """The worker reconnects, so that a pass survives one cut."""
    step = 1 if proxied.engine == "mariadb" else 5
    for number in range(1, proxied.statements_per_pass() + 1, step):
        proxied.reset()
        getattr(proxied.proxy, when)[number] = cut
        with cases.case(f"cut {when} statement {number}"):
            assert proxied.world.tick() is not None, proxied.world.errors
            proxied.world.crashed = True
            proxied.world.invariants()


@on_mariadb
def test_server_lost_at_some_statement_and_back_later(proxied: ProxiedWorld, cases: Cases) -> None:
    rng = random.Random(SEED)
    for number in proxied.sample_statements(10, rng):
        proxied.reset()

        def lose_server(statement: Statement) -> None:
            statement.proxy.refuses_connections = True
            raise Cut

        proxied.proxy.before[number] = lose_server
        with cases.case(f"no server from statement {number} on"):
            summary = proxied.world.tick()
            if proxied.proxy.count < number:
                continue  # this pass needed one write fewer
            assert summary is None
            [error] = proxied.world.errors
            assert error.startswith("The database 127.0.0.1:")
            assert proxied.world.tick() is None  # still no server
            proxied.proxy.refuses_connections = False
            proxied.world.crashed = True
            proxied.world.invariants()


CODES = {
    1213: "Deadlock found when trying to get lock",
    1205: "Lock wait timeout exceeded",
    1290: "The server is running with the --read-only option",
    1792: "Cannot execute statement in a READ ONLY transaction",
    1836: "Running in read-only mode",
    3024: "Query execution was interrupted, maximum statement execution time exceeded",
    1969: "Query execution was interrupted (max_statement_time exceeded)",
    1317: "Query execution was interrupted",
    1927: "Connection was killed",
    1053: "Server shutdown in progress",
    1040: "Too many connections",
    1226: "User has exceeded the 'max_updates' resource",
    1114: "The table is full",
    1030: "Got error 28 from storage engine",
    1142: "UPDATE command denied to user",
    1146: "Table doesn't exist",
    1054: "Unknown column",
    1020: "Record has changed since last read",
    1047: "WSREP has not yet prepared node for application use",
    9999: "An unknown error",
}


@on_mariadb
def test_server_error_at_some_statement(proxied: ProxiedWorld, cases: Cases) -> None:
    rng = random.Random(SEED)
    for code, message in CODES.items():
        for number in proxied.sample_statements(2, rng):
            proxied.reset()
            proxied.proxy.before[number] = refuse(code, message)
            with cases.case(f"{code} at statement {number}"):
                if proxied.world.tick() is None:
                    assert f"({code})" in proxied.world.errors[0]
                proxied.world.crashed = True
                proxied.world.invariants()


def shop_runs(sql: str, *closed: str) -> Callable[[ProxiedWorld], Action]:
    """An action that runs SQL on the shop's own connection; `closed` are sessions it closes."""

    def for_world(proxied: ProxiedWorld) -> Action:
        def run_statements() -> None:
            for statement in sql.split(";"):
                with suppress(pymysql.Error):  # a repeated DROP or INSERT fails
                    proxied.world.shop.run(statement)

        def action(_statement: Statement) -> None:
            proxied.world.closed_by_shop |= set(closed)
            # The SQL may wait for a row that the monitor has locked until its statement has run.
            proxied.shop_thread = threading.Thread(target=run_statements)
            proxied.shop_thread.start()
            proxied.shop_thread.join(0.1)

        return action

    return for_world


SHOP_ACTIONS: dict[str, Callable[[ProxiedWorld], Action]] = {
    "deletes a session": shop_runs("DELETE FROM checkout_session WHERE id = 'paid-1'"),
    "closes a session": shop_runs(
        "UPDATE checkout_session SET status = 'timeout' WHERE id = 'paid-1'", "paid-1"
    ),
    "gives a session another checkout": shop_runs(
        "UPDATE checkout_session SET billing_checkout_id = 'fine-9' WHERE id = 'paid-1'"
    ),
    "removes a session's checkout": shop_runs(
        "UPDATE checkout_session SET billing_checkout_id = NULL WHERE id = 'paid-1'"
    ),
    "deletes a session and creates it again": shop_runs(
        "DELETE FROM checkout_session WHERE id = 'paid-1';"
        "INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " VALUES ('paid-1', 'fine-9', 'open')"
    ),
    "opens a new session": shop_runs(
        "INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " VALUES ('new', 'fine-8', 'open')"
    ),
    "deletes every session": shop_runs("DELETE FROM checkout_session"),
    "has the queue emptied": shop_runs("DELETE FROM checkout_session_check"),
    "has every table of the monitor emptied": shop_runs(
        "DELETE FROM checkout_session_check; DELETE FROM checkout_session_pause;"
        "DELETE FROM checkout_session_run"
    ),
    "has the queue dropped": shop_runs("DROP TABLE checkout_session_check"),
    "has the pause table dropped": shop_runs("DROP TABLE checkout_session_pause"),
    "has the run table dropped": shop_runs("DROP TABLE checkout_session_run"),
}


@on_mariadb
def test_shop_acts_between_two_statements(proxied: ProxiedWorld, cases: Cases) -> None:
    rng = random.Random(SEED)
    for name, make_action in SHOP_ACTIONS.items():
        for number in proxied.sample_statements(3, rng):
            proxied.reset()
            proxied.proxy.before[number] = make_action(proxied)
            with cases.case(f"the shop {name} before statement {number}"):
                proxied.world.tick()
                if proxied.shop_thread is not None:
                    proxied.shop_thread.join()
                proxied.world.crashed = True
                proxied.world.invariants()


@on_mariadb
def test_status_change_waits_until_the_shop_unlocks_the_row(proxied: ProxiedWorld) -> None:
    shop = proxied.world.shop
    assert isinstance(shop, MySQLShop)
    proxied.reset()
    with connect(shop.server, shop.database) as other, other.cursor() as cursor:
        other.begin()
        cursor.execute("SELECT 1 FROM checkout_session WHERE id = 'paid-1' FOR UPDATE")
        assert proxied.world.tick() is not None
        assert "paid-1" in proxied.world.open_sessions()
        proxied.world.advance()
        assert proxied.world.tick() is not None
        assert proxied.world.billing.log["paid-1"].answered == 2  # checked again at the next tick
        other.rollback()
    proxied.world.advance()
    proxied.world.tick()
    assert "paid-1" not in proxied.world.open_sessions()
    proxied.world.invariants()


REFUSALS = {
    "a trigger": (
        "CREATE TRIGGER no BEFORE UPDATE ON checkout_session FOR EACH ROW"
        " IF NEW.id = 'paid-7' AND NEW.status <> 'open'"
        " THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'not this one'; END IF"
    ),
    "a CHECK": (
        "ALTER TABLE checkout_session ADD CONSTRAINT c CHECK (id <> 'paid-7' OR status = 'open')"
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_row_refused_by_the_shops_database_delays_no_other(
    proxied: ProxiedWorld, refusal: str
) -> None:
    world = proxied.world
    proxied.reset()
    world.shop.run("DELETE FROM checkout_session")
    add_sessions(world.shop, {f"paid-{n}": f"paid-{n}" for n in range(50)})
    world.billing.statuses = {f"paid-{n}": "paid" for n in range(50)}
    world.shop.run(REFUSALS[refusal])
    # The first backoff is one or two slots at random; in 18 ticks some of them are two.
    ticks = 18
    for _ in range(ticks):
        assert world.tick() is not None
        world.advance()
    assert world.open_sessions() == ["paid-7"]
    assert "paid-7" not in {event["session_id"] for event in world.bus.events}
    assert len(world.billing.log["paid-7"].requested_at) < ticks  # it backs off
    assert world.shop.run(
        "SELECT last_outcome, consecutive_failures FROM checkout_session_check"
        " WHERE session_id = 'paid-7'"
    ) == [("refused", len(world.billing.log["paid-7"].requested_at))]
    world.refused_sessions = frozenset({"paid-7"})
    world.invariants()


@on_mariadb
@pytest.mark.parametrize("fault", ["rejects", "fails"])
def test_status_changes_only_after_its_event_is_published(
    proxied: ProxiedWorld, fault: str
) -> None:
    world = proxied.world
    proxied.reset()
    setattr(world.bus, fault, True)
    for _ in range(3):
        summary = world.tick()
        assert summary is not None
        assert summary.unpublished
        world.advance()
    assert len(world.open_sessions()) == len(SESSIONS)
    world.invariants()
    assert len(world.open_sessions()) == len(SESSIONS) - len(STATUSES)


def test_database_unreachable_at_start_is_used_once_it_is_back(proxied: ProxiedWorld) -> None:
    world = proxied.world
    proxied.reset()
    proxied.proxy.refuses_connections = True
    proxied.proxy.cut_all()
    cold = world.worker()
    for _ in range(3):
        assert world.tick(cold) is None
        assert not cold.health().ok
    proxied.proxy.refuses_connections = False
    assert world.tick(cold) is not None
    world.crashed = True
    world.invariants()


@pytest.fixture(scope="module")
def old_primary(mariadb: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if mariadb is None:
        without_a_server()
    with mariadb_server(tmp_path_factory.mktemp("old")) as url:
        yield url


def test_failover_moves_every_worker_to_the_new_primary(
    proxied: ProxiedWorld, old_primary: str
) -> None:
    """The old server stays up, read-only; the host name points to one with the same data."""
    world, proxy = proxied.world, proxied.proxy
    new = world.shop
    assert isinstance(new, MySQLShop)
    url = urlsplit(old_primary)
    login = proxy._login.partition(":")
    with connect(old_primary) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {new.database} CHARACTER SET utf8mb4")
        cursor.execute("SET GLOBAL read_only = 0")
        for place in ("'%'", "localhost", "'127.0.0.1'"):
            user = f"'{login[0]}'@{place}"
            if login[0] != "root":
                cursor.execute(f"CREATE OR REPLACE USER {user} IDENTIFIED BY '{login[2]}'")
                cursor.execute(f"GRANT ALL ON {new.database}.* TO {user}")
    old = MySQLShop(f"mysql://root@{url.hostname}:{url.port}/", new.database)
    for statement in statements("mysql"):
        old.run(statement)
    add_sessions(old, SESSIONS)
    proxied.reset()
    proxy.connect_to(old_primary)
    proxy.cut_all()
    workers = [world.worker() for _ in range(3)]
    for worker in workers:
        assert world.tick(worker) is not None
    world.advance()
    old.run("SET GLOBAL read_only = 1")
    proxy.connect_to(new.server)
    world.billing.log.clear()
    world.bus.events.clear()
    if login[0] == "root":  # root may write to a read-only server
        proxy.cut_all()
    for worker in workers:
        assert world.tick(worker) is not None
    old.run("SET GLOBAL read_only = 0")
    world.crashed = True
    world.invariants()


IDS: dict[str, Sequence[str | int]] = {
    "VARCHAR(255) CHARACTER SET utf8mb4": [
        "it's",
        'quo"te',
        "back\\slash",
        "%s",
        "per%cent",
        "{brace}",
        "\0nul\0",
        "new\nline",
        "\x1b[31mred",
        "😀" * 255,
        "x" * 255,
        " leading",
        "-- comment",
        "'; DROP TABLE checkout_session; --",
        "☃\u202e",
        "0",
        "",
    ],
    "VARCHAR(64) CHARACTER SET latin1": ["café", "A", "ÿ"],
    "VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin": ["a", "A", "ä"],
    "VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci": ["a", "ß"],
    "VARCHAR(64) CHARACTER SET utf16": ["a", "😀"],
    "VARCHAR(64) CHARACTER SET cp1251": ["я"],
    "VARCHAR(64) CHARACTER SET gbk": ["中"],
    "INT": [-(2**31), -1, 0, 2**31 - 1],
    "BIGINT": [-(2**63), 2**63 - 1],
    "BIGINT UNSIGNED": [0, 2**64 - 1],
}


@pytest.mark.parametrize("id_type", IDS)
@pytest.mark.parametrize("engine", SERVERS)
def test_ids_of_every_column_type_are_checked_and_changed(  # noqa: PLR0917 (fixtures)
    engine: str,
    id_type: str,
    mariadb: str | None,
    clock: FakeClock,
    faulty_billing: FaultyBilling,
    bus: Bus,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server = mariadb if engine == "mariadb" else MYSQL
    if server is None:
        without_a_server()
        return
    table = (
        f"CREATE TABLE checkout_session (id {id_type} PRIMARY KEY, billing_checkout_id TEXT"
        " CHARACTER SET utf8mb4, billing_order_id BIGINT, status ENUM('open', 'success',"
        " 'failure', 'timeout'), KEY (status))"
    )
    with mysql_shop(server, [table]) as shop:
        world = World(shop, clock, faulty_billing, bus, lambda: "".join(capfd.readouterr()))
        ids = IDS[id_type]
        for n, session_id in enumerate(ids):
            shop.run(
                "INSERT INTO checkout_session (id, billing_checkout_id, status)"
                " VALUES (%s, %s, 'open')",
                (session_id, f"{session_id}-{n}"),
            )
        first = world.tick()
        assert first is not None
        assert first.outcomes == {Outcome.ACTIVE: len(ids)}
        faulty_billing.statuses = {f"{session_id}-{n}": "paid" for n, session_id in enumerate(ids)}
        world.advance()
        worker = world.workers[0]
        manual = worker.trigger_checkout_session_check([str(i) for i in ids[:2]])
        assert manual.status_changes == len(ids[:2])
        world.advance()
        world.tick()
        assert world.open_sessions() == []
        world.invariants()
        world.close()


@on_mariadb
def test_hundred_thousand_open_sessions(proxied: ProxiedWorld) -> None:
    """All are adopted, and a short pass checks or releases everything that it claims."""
    world = proxied.world
    proxied.reset()
    world.shop.run("DELETE FROM checkout_session")
    world.shop.run(
        "INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900)"
        " SELECT CONCAT(a.i, '-', b.i), CONCAT('fine-', a.i, '-', b.i), 'open'"
        " FROM n a, n b WHERE b.i <= 112"
    )
    counted = world.tick(world.worker(APIKEY=""))  # without a key it sends no request
    assert counted is not None
    assert counted.open == 900 * 112
    world.advance()
    summary = world.tick(seconds=6.5)
    assert summary is not None
    assert summary.checked > 0
    rows = world.shop.run("SELECT COUNT(*), COUNT(last_outcome) FROM checkout_session_check")
    assert rows == [(900 * 112, summary.checked)]
    assert claimed(world.shop) == 0


def test_clock_skew_of_hours_between_tick_and_worker_changes_nothing(proxied: ProxiedWorld) -> None:
    world = proxied.world
    for hours in (-24, -1, 1, 24, 24 * 365):
        proxied.reset()
        world.tick()
        for _ in range(2):
            world.advance()
            shifted = world.clock.now.timestamp() + hours * 3600
            world.tick(at=world.clock.now.fromtimestamp(shifted, world.clock.now.tzinfo))
        assert len(world.billing.log["fine-1"].requested_at) == 3
        world.invariants()


def test_concurrent_workers_never_check_a_session_twice(proxied: ProxiedWorld) -> None:
    world = proxied.world
    proxied.reset()
    world.shop.run("DELETE FROM checkout_session")
    add_sessions(world.shop, {f"s{n}": f"fine-{n}" for n in range(60)})
    world.billing.before_answer = lambda _checkout: threading.Event().wait(0.02)  # type: ignore[assignment]
    workers = [world.worker(MAX_CONCURRENCY="10") for _ in range(3)]
    for _ in range(3):
        threads = [threading.Thread(target=world.tick, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        world.advance()
    assert not world.errors
    assert all(len(world.billing.log[f"fine-{n}"].requested_at) == 3 for n in range(60))
    world.invariants()

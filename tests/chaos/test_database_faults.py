"""Whatever the database does, at whichever statement: nothing is lost, and nothing is wrong."""

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
from testkit.shops import MySQLShop, add_sessions, connect, mysql_shop, statements
from tests.chaos.billing import Misbehaving
from tests.chaos.bus import Bus
from tests.chaos.conftest import Cases
from tests.chaos.proxy import Action, Cut, Statement, cut, refuse
from tests.chaos.stage import SESSIONS, WORDS, Stage
from tests.chaos.world import World
from tests.conftest import MYSQL, SERVERS, without_a_server

# What is drawn at random is drawn anew with another seed; a failure shows the statement.
SEED = int(os.environ.get("CHAOS_SEED", "1"))
on_mariadb = pytest.mark.parametrize("stage", ["mariadb"], indirect=True)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_connection_is_cut_at_each_statement(stage: Stage, cases: Cases, when: str) -> None:
    """Retried where it can be; else the pass ends, and the next one makes up for it."""
    step = 1 if stage.engine == "mariadb" else 3
    for number in range(1, stage.statements_of_a_pass() + 1, step):
        stage.set()
        getattr(stage.proxy, when)[number] = cut
        with cases.case(f"cut {when} statement {number}"):
            assert stage.world.tick() is not None, stage.world.failed  # once is made good at once
            stage.world.crashed = True
            stage.world.invariants()


@on_mariadb
def test_the_server_goes_away_at_some_statement_and_comes_back(stage: Stage, cases: Cases) -> None:
    chance = random.Random(SEED)
    for number in stage.sometimes(10, chance):
        stage.set()

        def gone(statement: Statement) -> None:
            statement.proxy.refusing = True
            raise Cut

        stage.proxy.before[number] = gone
        with cases.case(f"away from statement {number} on"):
            assert stage.world.tick() is None
            [said] = stage.world.failed
            assert said.startswith("The database 127.0.0.1:")
            assert stage.world.tick() is None  # still away
            stage.proxy.refusing = False
            stage.world.crashed = True
            stage.world.invariants()


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
    9999: "What nobody has heard of",
}


@on_mariadb
def test_an_error_at_some_statement(stage: Stage, cases: Cases) -> None:
    chance = random.Random(SEED)
    for code, message in CODES.items():
        for number in stage.sometimes(3, chance):
            stage.set()
            stage.proxy.before[number] = refuse(code, message)
            with cases.case(f"{code} at statement {number}"):
                if stage.world.tick() is None:
                    assert f"({code})" in stage.world.failed[0]
                stage.world.crashed = True
                stage.world.invariants()


def shops(sql: str, **closes: str) -> Callable[[Stage], Action]:
    """The shop does that, at once, on a connection of its own."""

    def of(stage: Stage) -> Action:
        def deed() -> None:
            for one in sql.split(";"):
                with suppress(pymysql.Error):  # where it does so for the second time
                    stage.world.shop.run(one)

        def action(_statement: Statement) -> None:
            stage.world.closed_by_shop |= set(closes)
            # It may have to wait for a row that the monitor holds until this statement is through.
            stage.deed = threading.Thread(target=deed)
            stage.deed.start()
            stage.deed.join(0.1)

        return action

    return of


SHOPS: dict[str, Callable[[Stage], Action]] = {
    "deletes a session": shops("DELETE FROM checkout_session WHERE id = 'paid-1'"),
    "closes a session": shops(
        "UPDATE checkout_session SET status = 'timeout' WHERE id = 'paid-1'", **{"paid-1": ""}
    ),
    "gives a session another checkout": shops(
        "UPDATE checkout_session SET billing_checkout_id = 'fine-9' WHERE id = 'paid-1'"
    ),
    "takes a session's checkout away": shops(
        "UPDATE checkout_session SET billing_checkout_id = NULL WHERE id = 'paid-1'"
    ),
    "deletes a session and makes it anew": shops(
        "DELETE FROM checkout_session WHERE id = 'paid-1';"
        "INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " VALUES ('paid-1', 'fine-9', 'open')"
    ),
    "opens a session": shops(
        "INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " VALUES ('new', 'fine-8', 'open')"
    ),
    "deletes every session": shops("DELETE FROM checkout_session"),
    "has its operator empty the queue": shops("DELETE FROM checkout_session_check"),
    "has its operator empty every table of the monitor": shops(
        "DELETE FROM checkout_session_check; DELETE FROM checkout_session_pause;"
        "DELETE FROM checkout_session_run"
    ),
    "has its operator drop the queue": shops("DROP TABLE checkout_session_check"),
    "has its operator drop the shared row's table": shops("DROP TABLE checkout_session_pause"),
    "has its operator drop the run log": shops("DROP TABLE checkout_session_run"),
}


@on_mariadb
def test_the_shop_acts_between_two_statements(stage: Stage, cases: Cases) -> None:
    chance = random.Random(SEED)
    for deed, act in SHOPS.items():
        for number in stage.sometimes(5, chance):
            stage.set()
            stage.proxy.before[number] = act(stage)
            with cases.case(f"the shop {deed} before statement {number}"):
                stage.world.tick()
                if stage.deed is not None:
                    stage.deed.join()
                stage.world.crashed = True
                stage.world.invariants()


@on_mariadb
def test_the_shop_holds_a_row_while_its_status_is_to_be_changed(stage: Stage) -> None:
    shop = stage.world.shop
    assert isinstance(shop, MySQLShop)
    stage.set()
    with connect(shop.server, shop.database) as other, other.cursor() as cursor:
        other.begin()
        cursor.execute("SELECT 1 FROM checkout_session WHERE id = 'paid-1' FOR UPDATE")
        assert stage.world.tick() is not None
        assert "paid-1" in stage.world.open()
        stage.world.advance()
        assert stage.world.tick() is not None
        assert stage.world.billing.asked["paid-1"].answered == 2  # at the next tick, not later
        other.rollback()
    stage.world.advance()
    stage.world.tick()
    assert "paid-1" not in stage.world.open()
    stage.world.invariants()


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
def test_a_row_that_the_shops_database_refuses_holds_up_no_other(
    stage: Stage, refusal: str
) -> None:
    world = stage.world
    stage.set()
    world.shop.run("DELETE FROM checkout_session")
    add_sessions(world.shop, {f"paid-{n}": f"paid-{n}" for n in range(50)})
    world.billing.words = {f"paid-{n}": "paid" for n in range(50)}
    world.shop.run(REFUSALS[refusal])
    ticks = 24  # a wait of one slot or two is drawn each time; of so many, some are two
    for _ in range(ticks):
        assert world.tick() is not None
        world.advance()
    assert world.open() == ["paid-7"]
    assert "paid-7" not in {event["session_id"] for event in world.bus.events}
    assert len(world.billing.asked["paid-7"].at) < ticks  # it backs off
    assert world.shop.run(
        "SELECT last_outcome, consecutive_failures FROM checkout_session_check"
        " WHERE session_id = 'paid-7'"
    ) == [("refused", len(world.billing.asked["paid-7"].at))]
    world.refused = frozenset({"paid-7"})
    world.invariants()


@on_mariadb
@pytest.mark.parametrize("trouble", ["refuses", "breaks"])
def test_what_is_not_published_is_not_changed_until_it_is(stage: Stage, trouble: str) -> None:
    world = stage.world
    stage.set()
    setattr(world.bus, trouble, True)
    for _ in range(3):
        summary = world.tick()
        assert summary is not None
        assert summary.unpublished
        world.advance()
    assert len(world.open()) == len(SESSIONS)
    world.invariants()
    assert len(world.open()) == len(SESSIONS) - len(WORDS)


def test_a_database_that_is_away_at_the_start_is_used_when_it_is_there(stage: Stage) -> None:
    world = stage.world
    stage.set()
    stage.proxy.refusing = True
    stage.proxy.cut_all()
    cold = world.worker()
    for _ in range(3):
        assert world.tick(cold) is None
        assert not cold.health().ok
    stage.proxy.refusing = False
    assert world.tick(cold) is not None
    world.crashed = True
    world.invariants()


@pytest.fixture(scope="module")
def old_primary(mariadb: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if mariadb is None:
        without_a_server()
    with mariadb_server(tmp_path_factory.mktemp("old")) as url:
        yield url


def test_a_failover_leads_every_worker_to_the_new_primary(stage: Stage, old_primary: str) -> None:
    """The old one is up, and read-only; the name leads to the new one, whose data is the same."""
    world, proxy = stage.world, stage.proxy
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
    stage.set()
    proxy.lead_to(old_primary)
    proxy.cut_all()
    workers = [world.worker() for _ in range(3)]
    for worker in workers:
        assert world.tick(worker) is not None
    world.advance()
    old.run("SET GLOBAL read_only = 1")
    proxy.lead_to(new.server)
    world.billing.asked.clear()
    world.bus.events.clear()
    if login[0] == "root":  # who may write to a read-only server
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
    "VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin": ["a", "A", "b"],
    "VARCHAR(64) CHARACTER SET utf8mb3": ["日本", "a"],
    "VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin": ["a", "A", "ä"],
    "VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci": ["a", "ß"],
    "VARCHAR(64) CHARACTER SET utf16": ["a", "😀"],
    "VARCHAR(64) CHARACTER SET cp1251": ["я"],
    "VARCHAR(64) CHARACTER SET gbk": ["中"],
    "CHAR(36) CHARACTER SET ascii": ["0b9d9c1e-3f0c-4b6e-9d0f-0a1b2c3d4e5f", "short"],
    "INT": [-(2**31), -1, 0, 2**31 - 1],
    "INT UNSIGNED": [0, 2**32 - 1],
    "BIGINT": [-(2**63), 2**63 - 1],
    "BIGINT UNSIGNED": [0, 2**64 - 1],
}


@pytest.mark.parametrize("id_type", IDS)
@pytest.mark.parametrize("engine", SERVERS)
def test_ids_of_every_kind_are_checked_and_changed(  # noqa: PLR0917 (fixtures)
    engine: str,
    id_type: str,
    mariadb: str | None,
    clock: FakeClock,
    misbehaving: Misbehaving,
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
        world = World(shop, clock, misbehaving, bus, lambda: "".join(capfd.readouterr()))
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
        misbehaving.words = {f"{session_id}-{n}": "paid" for n, session_id in enumerate(ids)}
        world.advance()
        worker = world.workers[0]
        by_hand = worker.trigger_checkout_session_check([str(i) for i in ids[:2]])
        assert by_hand.status_changes == len(ids[:2])
        world.advance()
        world.tick()
        assert world.open() == []
        world.invariants()
        world.close()


@on_mariadb
def test_a_hundred_thousand_sessions_open_at_once(stage: Stage) -> None:
    """All are adopted, and what a short pass has claimed it has checked or given back."""
    world = stage.world
    stage.set()
    world.shop.run("DELETE FROM checkout_session")
    world.shop.run(
        "INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900)"
        " SELECT CONCAT(a.i, '-', b.i), CONCAT('fine-', a.i, '-', b.i), 'open'"
        " FROM n a, n b WHERE b.i <= 112"
    )
    counted = world.tick(world.worker(APIKEY=""))  # which asks nobody
    assert counted is not None
    assert counted.open == 900 * 112
    world.advance()
    summary = world.tick(seconds=6.5)
    assert summary is not None
    assert summary.checked > 0
    rows = world.shop.run(
        "SELECT COUNT(*), SUM(claimed_until IS NOT NULL), SUM(attempts) FROM checkout_session_check"
    )
    assert rows == [(900 * 112, 0, summary.checked)]


def test_clocks_that_are_an_hour_apart_change_nothing(stage: Stage) -> None:
    world = stage.world
    for hours in (-24, -1, 1, 24, 24 * 365):
        stage.set()
        world.tick()
        for _ in range(2):
            world.advance()
            shifted = world.clock.now.timestamp() + hours * 3600
            world.tick(at=world.clock.now.fromtimestamp(shifted, world.clock.now.tzinfo))
        assert len(world.billing.asked["fine-1"].at) == 3
        world.invariants()


def test_two_workers_on_the_same_rows_never_ask_twice(stage: Stage) -> None:
    world = stage.world
    stage.set()
    world.shop.run("DELETE FROM checkout_session")
    add_sessions(world.shop, {f"s{n}": f"fine-{n}" for n in range(60)})
    world.billing.before = lambda _checkout: threading.Event().wait(0.02)  # type: ignore[assignment]
    workers = [world.worker(MAX_CONCURRENCY="10") for _ in range(3)]
    for _ in range(3):
        threads = [threading.Thread(target=world.tick, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        world.advance()
    assert not world.failed
    assert all(len(world.billing.asked[f"fine-{n}"].at) == 3 for n in range(60))
    world.invariants()

"""What only a MySQL or MariaDB server can get wrong: types, rights, locks, connections."""

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import pymysql
import pytest

from core.database.address import MySQLAddress
from core.database.mysql import ATTEMPTS, MySQLDatabase
from core.database.port import Row, Value
from core.domain.model import Answer, Claim, Outcome, Reason, Result, Summary
from core.errors import StoreError
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.shops import MySQLShop, Shop, add_sessions, connect, mysql_shop, numbered, settings_for
from tests.support import census, database_of

LEASE = timedelta(seconds=20)


@pytest.fixture
def store(mariadb_shop: Shop) -> Iterator[Store]:
    store = Store(database_of(mariadb_shop))
    store.prepare()
    yield store
    store.close()


@pytest.fixture
def server_store(server_shop: Shop) -> Iterator[Store]:
    store = Store(database_of(server_shop))
    store.prepare()
    yield store
    store.close()


def address_of(shop: Shop) -> MySQLAddress:
    address = settings_for(shop).database
    assert isinstance(address, MySQLAddress)
    return address


@pytest.mark.parametrize(
    ("id_type", "session_id"),
    [
        ("VARCHAR(255) CHARACTER SET latin1 COLLATE latin1_swedish_ci", "café"),
        ("VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin", "Ab-1"),
        ("CHAR(36) CHARACTER SET ascii", "0b9d9c1e-3f0c-4b6e-9d0f-0a1b2c3d4e5f"),
        ("CHAR(36) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin", "padded"),
        ("VARCHAR(100) CHARACTER SET utf8mb3 COLLATE utf8mb3_unicode_ci", "日本"),
        ("VARCHAR(190) CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci", "😀"),
        ("BIGINT UNSIGNED", "18446744073709551615"),
    ],
)
def test_any_usual_type_and_collation_of_the_shops_id_works(
    mariadb_shop: MySQLShop, clock: FakeClock, id_type: str, session_id: str
) -> None:
    server = mariadb_shop.server
    table = (
        f"CREATE TABLE checkout_session (id {id_type} PRIMARY KEY, billing_checkout_id"
        " VARCHAR(255) CHARACTER SET latin1, status VARCHAR(20) CHARACTER SET ascii, KEY (status))"
    )
    with mysql_shop(server, [table]) as shop:
        add_sessions(shop, {session_id: "checkout_1"})
        store = Store(database_of(shop, clock))
        assert store.prepare() == []
        assert census(store, NOON, [session_id, "😀😀"]).open == 1
        [claim] = store.queue.claim_unchecked(
            store.now(), since=NOON, lease=LEASE, limit=5, session_ids=[session_id, "😀😀", "日"]
        )
        assert claim.session_id == session_id
        store.record([Result(claim, Answer(Outcome.ACTIVE, 200), NOON)], store.now())
        assert len(store.queue.claim_due(store.now(), tick=NOON, lease=LEASE, limit=5)) == 1
        types = shop.run(
            "SELECT column_type, collation_name FROM information_schema.columns"
            " WHERE table_schema = DATABASE() AND column_name IN ('id', 'session_id')"
            " AND table_name IN ('checkout_session', 'checkout_session_check')"
        )
        assert len(types) == 2
        assert types[0] == types[1]
        store.close()


def test_a_type_that_cannot_be_a_session_id_is_refused(mariadb_shop: MySQLShop) -> None:
    schema = ["CREATE TABLE checkout_session (id BINARY(16) PRIMARY KEY, status VARCHAR(20))"]
    with mysql_shop(mariadb_shop.server, schema) as shop:
        store = Store(database_of(shop))
        with pytest.raises(StoreError, match="of type binary; it must be one of char, varchar"):
            store.prepare()
        store.close()


def test_a_shop_that_changed_its_collation_is_told_what_to_do(
    store: Store, mariadb_shop: Shop
) -> None:
    mariadb_shop.run("ALTER TABLE checkout_session MODIFY id VARCHAR(255) CHARACTER SET latin1")
    again = Store(database_of(mariadb_shop))
    with pytest.raises(StoreError, match="DROP TABLE checkout_session_check;"):
        again.prepare()
    again.close()


def test_a_user_who_may_not_make_tables_is_told_which_statements_to_run(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop]
) -> None:
    every = f"SELECT, INSERT, UPDATE, DELETE ON {mariadb_shop.database}.*"
    shop = limited(every)
    store = Store(database_of(shop))
    with pytest.raises(StoreError, match=r"make or change them\. Run: CREATE TABLE") as refused:
        store.prepare()
    for statement in str(refused.value).partition("Run: ")[2].split(";")[:-1]:
        mariadb_shop.run(statement)
    assert store.prepare() == []
    store.close()


def test_reading_the_shops_table_is_all_the_monitor_needs_of_it(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop], store: Store
) -> None:
    shop = limited(
        f"SELECT ON {mariadb_shop.database}.checkout_session",
        f"SELECT, INSERT, UPDATE, DELETE ON {mariadb_shop.database}.checkout_session_check",
        f"SELECT, INSERT, UPDATE, DELETE ON {mariadb_shop.database}.checkout_session_run",
        f"SELECT, INSERT, UPDATE ON {mariadb_shop.database}.checkout_session_pause",
        f"SELECT, INSERT, DELETE ON {mariadb_shop.database}.checkout_session_change",
    )
    add_sessions(mariadb_shop, numbered(2))
    mine = Store(database_of(shop))
    assert mine.prepare() == []
    assert census(mine, mine.now()).open == 2
    claims = claim_due(mine)
    mine.record([Result(claim, Answer(Outcome.ACTIVE, 200), NOON) for claim in claims], mine.now())
    assert len(claims) == 2
    mine.close()


def test_a_connection_that_the_server_ended_is_replaced_unnoticed(
    store: Store, mariadb_shop: Shop
) -> None:
    store.now()
    for (number,) in mariadb_shop.run(
        "SELECT id FROM information_schema.processlist WHERE db = DATABASE()"
        " AND id <> CONNECTION_ID()"
    ):
        mariadb_shop.run(f"KILL {number}")
    assert census(store, store.now()).open == 0


@pytest.fixture
def breaking(server_store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """From its call on the answer to the first statement is lost; returns what was executed."""

    def begin() -> list[str]:
        database, executed = server_store._database, list[str]()
        execute = database.execute

        def break_once(sql: str, parameters: Sequence[Value] = ()) -> int:
            changed = execute(sql, parameters)
            executed.append(sql)
            if len(executed) == 1:
                raise pymysql.OperationalError(2013, "Lost connection to MySQL server during query")
            return changed

        monkeypatch.setattr(database, "execute", break_once)
        return executed

    return begin


def test_a_pass_that_begins_is_one_row_though_its_connection_breaks_behind_the_insert(
    server_store: Store, server_shop: Shop, breaking: Callable[[], list[str]]
) -> None:
    executed = breaking()
    server_store.runs.begin(Summary(Reason.TICK, NOON))
    assert len(executed) == 2
    assert server_shop.run("SELECT COUNT(*) FROM checkout_session_run WHERE reason = 'tick'") == [
        (1,)
    ]


def test_a_failure_counts_once_though_the_connection_breaks_behind_what_records_it(
    server_store: Store, server_shop: Shop, breaking: Callable[[], list[str]]
) -> None:
    add_sessions(server_shop, numbered(3))
    census(server_store, server_store.now())
    claims, now = claim_due(server_store), server_store.now()
    executed = breaking()
    server_store.record([Result(c, Answer(Outcome.TIMEOUT), now) for c in claims], now)
    assert len(executed) == 2
    assert (
        server_shop.run(
            "SELECT attempts, consecutive_failures, claimed_until FROM checkout_session_check"
        )
        == [(1, 1, None)] * 3
    )


def test_a_database_that_is_away_is_one_clear_error_and_works_again_when_it_is_back(
    mariadb_shop: MySQLShop,
) -> None:
    there = address_of(mariadb_shop)
    away = MySQLAddress("127.0.0.1", 1, there.user, "hidden-pass", there.database)
    current = [away]
    store = Store(MySQLDatabase(lambda *, refresh: current[0]))
    with pytest.raises(StoreError) as failed:
        store.prepare()
    assert str(failed.value) == (
        f"The database 127.0.0.1:1/{there.database} cannot be used: Can't connect to MySQL server "
        "on '127.0.0.1' ([Errno 111] Connection refused) (2003)."
    )
    current[0] = there
    assert store.prepare() == []
    store.close()


def test_a_wrong_password_is_asked_for_again_once_and_then_one_clear_error(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop]
) -> None:
    shop = limited(f"ALL ON {mariadb_shop.database}.*")
    right = address_of(shop)
    wrong = MySQLAddress(right.host, right.port, right.user, "hidden-pass", right.database)
    asked: list[bool] = []

    def rotated(*, refresh: bool) -> MySQLAddress:
        asked.append(refresh)
        return right if refresh else wrong

    store = Store(MySQLDatabase(rotated))
    store.prepare()
    assert asked == [False, True]
    store.close()
    with pytest.raises(StoreError, match="Access denied") as denied:
        Store(MySQLDatabase(lambda *, refresh: wrong)).prepare()
    assert "hidden-pass" not in str(denied.value)


@pytest.mark.parametrize(("locked_times", "works"), [(ATTEMPTS - 1, True), (ATTEMPTS, False)])
def test_a_deadlock_is_tried_again_a_bounded_number_of_times(
    mariadb_shop: MySQLShop, locked_times: int, works: bool
) -> None:
    slept: list[float] = []
    address = address_of(mariadb_shop)
    database = MySQLDatabase(lambda *, refresh: address, sleep=slept.append)
    tried = 0

    def work() -> str:
        nonlocal tried
        tried += 1
        if tried <= locked_times:
            raise pymysql.OperationalError(1213, "Deadlock found when trying to get lock")
        return "done"

    if works:
        assert database.transaction(work) == "done"
    else:
        with pytest.raises(StoreError, match="Deadlock"):
            database.transaction(work)
    assert tried == ATTEMPTS
    assert len(slept) == ATTEMPTS - 1
    database.close()


def test_a_real_deadlock_costs_neither_side_its_work(store: Store, mariadb_shop: Shop) -> None:
    add_sessions(mariadb_shop, numbered(2))
    census(store, store.now())
    both_hold_one = threading.Barrier(2)

    def crossing(first: str, second: str) -> None:
        database = database_of(mariadb_shop)
        met = False

        def work() -> None:
            nonlocal met
            sql = "UPDATE checkout_session_check SET attempts = attempts + 1 WHERE session_id = %s"
            database.execute(sql, (first,))
            if not met:
                met = True
                both_hold_one.wait(10)
            database.execute(sql, (second,))

        database.transaction(work)
        database.close()

    threads = [
        threading.Thread(target=crossing, args=order) for order in (("s0", "s1"), ("s1", "s0"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mariadb_shop.run("SELECT attempts FROM checkout_session_check") == [(2,), (2,)]


def test_rows_that_another_pass_is_claiming_are_passed_over(
    store: Store, mariadb_shop: MySQLShop
) -> None:
    add_sessions(mariadb_shop, numbered(3))
    census(store, store.now())
    with connect(mariadb_shop.server, mariadb_shop.database) as other, other.cursor() as cursor:
        other.begin()
        cursor.execute(
            "SELECT session_id FROM checkout_session_check WHERE session_id = 's1' FOR UPDATE"
        )
        claims = claim_due(store)
        other.rollback()
    assert sorted(claim.session_id for claim in claims) == ["s0", "s2"]


def test_the_shops_rows_are_never_locked(store: Store, mariadb_shop: MySQLShop) -> None:
    add_sessions(mariadb_shop, numbered(3))
    with connect(mariadb_shop.server, mariadb_shop.database) as other, other.cursor() as cursor:
        other.begin()
        cursor.execute("UPDATE checkout_session SET status = 'success' WHERE id = 's1'")
        census(store, store.now())
        claims = claim_due(store)
        other.rollback()
    assert len(claims) == 3


def claim_due(store: Store) -> list[Claim]:
    now = store.now()
    return store.queue.claim_due(now, tick=now, lease=LEASE, limit=500)


def rows_read(store: Store) -> int:
    """How many rows and index entries the store's connection has made the server read."""
    database = store._database
    sql = "SHOW SESSION STATUS WHERE variable_name LIKE %s OR variable_name = %s"
    counters = ("Handler_read_%", "Handler_icp_attempts")
    rows = database.run(lambda: database.query(sql, counters))
    return sum(int(str(count)) for _name, count in rows)


def test_an_idle_pass_never_reads_the_closed_sessions(
    server_store: Store, server_shop: MySQLShop
) -> None:
    server_shop.run(
        "INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900)"
        " SELECT CONCAT('closed-', a.i, '-', b.i), 'x', 'success' FROM n a, n b WHERE b.i <= 111"
    )
    server_shop.run("ANALYZE TABLE checkout_session")
    add_sessions(server_shop, numbered(3))
    census(server_store, server_store.now())
    before = rows_read(server_store)
    census(server_store, server_store.now())
    claim_due(server_store)
    assert rows_read(server_store) - before < 100


def test_no_statement_of_an_idle_pass_scans_the_shops_table(
    server_store: Store, server_shop: MySQLShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(server_shop, {f"closed-{n}": "x" for n in range(3000)}, status="success")
    add_sessions(server_shop, numbered(3))
    server_shop.run("ANALYZE TABLE checkout_session")
    census(server_store, server_store.now())
    claim_due(server_store)
    database = server_store._database
    query, access = database.query, {}

    def explained(sql: str, parameters: Sequence[Value] = ()) -> Sequence[Row]:
        for row in query(f"EXPLAIN FORMAT=TRADITIONAL {sql}", parameters):
            how = row[3] if len(row) == 10 else row[4]  # MySQL tells the partitions before it
            access[sql, row[2]] = how
        return query(sql, parameters)

    monkeypatch.setattr(database, "query", explained)
    census(server_store, server_store.now())
    assert claim_due(server_store) == []
    of_shop = {how for (_sql, table), how in access.items() if table in ("s", "checkout_session")}
    assert of_shop == {"ref", "eq_ref"}  # by the index on status, by key; "ALL" would be a scan


def test_a_claim_reads_the_sessions_claimed_and_not_every_open_one(
    server_store: Store, server_shop: MySQLShop
) -> None:
    """Also where the server's statistics are old: here they are of a smaller table."""
    server_shop.run("ALTER TABLE checkout_session STATS_AUTO_RECALC = 0")
    add_sessions(server_shop, numbered(100))
    server_shop.run("ANALYZE TABLE checkout_session")
    add_sessions(server_shop, {f"later-{n}": "checkout_1" for n in range(4900)})
    census(server_store, server_store.now())
    before = rows_read(server_store)
    claimed = claim_due(server_store)
    assert len(claimed) == 500
    assert rows_read(server_store) - before < 3000


def test_tls_is_used_and_verified_when_asked(mariadb_shop: MySQLShop) -> None:
    address = address_of(mariadb_shop)
    strict = MySQLAddress(
        address.host, address.port, address.user, address.password, address.database, ssl=True
    )
    with pytest.raises(StoreError, match=r"(?i)ssl|certificate"):
        Store(MySQLDatabase(lambda *, refresh: strict)).prepare()

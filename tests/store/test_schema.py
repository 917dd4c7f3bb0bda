"""The tables: what the shop's must look like, and how the monitor's are made and upgraded."""

from collections.abc import Callable

import pytest

from core.database import mysql_tables
from core.database.port import NO_STATUS_INDEX
from core.domain.model import Answer, OpenCounts, Outcome, Recheck
from core.errors import StoreError
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.shops import MySQLShop, Shop, add_sessions, mysql_shop, numbered
from tests.store.claims import (
    claim_all,
    claim_due,
    claim_unchecked,
    give_back,
    ids,
    rechecks,
    record,
)
from tests.store.fake_bus import PAID
from tests.support import FakeBilling, Passes, database_of, reconcile

pytestmark = pytest.mark.new_database


def test_the_monitors_tables_are_created_once(shop: Shop, clock: FakeClock) -> None:
    for _ in range(2):
        store = Store(database_of(shop, clock))
        assert store.prepare() == []
        assert store.prepare() == []
        store.close()
    assert shop.run("SELECT reason FROM checkout_session_run") == [("start",)]


def test_a_missing_index_on_status_is_reported_with_the_statement(
    shop: Shop, clock: FakeClock
) -> None:
    """Once per store, and any index on the column will do."""
    shop.run("ALTER TABLE checkout_session RENAME TO old_session")
    shop.run(
        "CREATE TABLE checkout_session (id VARCHAR(40) PRIMARY KEY,"
        " billing_checkout_id VARCHAR(40), status VARCHAR(10))"
    )
    store = Store(database_of(shop, clock))
    assert store.prepare() == [NO_STATUS_INDEX]
    assert store.prepare() == []
    statement = NO_STATUS_INDEX.partition("Run: ")[2]
    shop.run(statement.rstrip(";").replace("_status ON", "_by_status ON"))
    again = Store(database_of(shop, clock))
    assert again.prepare() == []
    store.close()
    again.close()


def test_a_missing_checkout_session_table_is_one_clear_error(shop: Shop, clock: FakeClock) -> None:
    shop.run("DROP TABLE checkout_session")
    store = Store(database_of(shop, clock))
    with pytest.raises(StoreError, match="no table checkout_session"):
        store.prepare()
    store.close()


def test_dropped_tables_are_created_again_by_the_next_pass(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    store = Store(database_of(sqlite_shop, clock))
    store.prepare()
    sqlite_shop.run("DROP TABLE checkout_session_check")
    with pytest.raises(StoreError, match="checkout_session_check"):
        reconcile(store, NOON)
    store.prepare()
    assert reconcile(store, NOON) == OpenCounts()
    store.close()


def test_dropped_tables_are_created_again_by_the_same_pass_on_a_server(
    server_store: Store, server_shop: Shop
) -> None:
    server_shop.run("DROP TABLE checkout_session_check")
    assert reconcile(server_store, NOON) == OpenCounts()


def test_the_shops_table_is_not_changed(store: Store, shop: Shop, clock: FakeClock) -> None:
    add_sessions(shop, numbered(5))
    before = shop.run("SELECT * FROM checkout_session ORDER BY id")
    reconcile(store, NOON)
    claims = claim_all(store, NOON)
    record(store, rechecks(claims[:3], NOON, Outcome.NOT_FOUND))
    give_back(store, claims[3:])
    assert shop.run("SELECT * FROM checkout_session ORDER BY id") == before


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
def test_any_common_type_and_collation_of_the_shops_id_works(
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
        assert reconcile(store, NOON, [session_id, "😀😀"]).open == 1
        [claim] = claim_unchecked(store, NOON, [session_id, "😀😀", "日"])
        assert claim.session_id == session_id
        record(store, [Recheck(claim, Answer(Outcome.ACTIVE, 200), NOON)])
        assert len(claim_all(store, NOON)) == 1
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


@pytest.mark.parametrize(
    "id_type",
    [
        "VARCHAR(255) CHARACTER SET latin1",
        "VARCHAR(191) COLLATE utf8mb4_bin",
        "VARCHAR(768) CHARACTER SET ascii",
        "CHAR(40) CHARACTER SET utf8mb4",
    ],
)
@pytest.mark.parametrize("warm", [True, False])
def test_a_changed_id_column_is_followed(server_shop: Shop, id_type: str, warm: bool) -> None:
    """By workers that start, and by workers that have used the old one."""
    store = Store(database_of(server_shop))
    add_sessions(server_shop, {"before": "checkout"})
    store.prepare()
    reconcile(store, store.now())
    server_shop.run(f"ALTER TABLE checkout_session MODIFY id {id_type} NOT NULL")
    add_sessions(server_shop, {"a-new-one": "checkout_2"})
    if not warm:
        store.close()
        store = Store(database_of(server_shop))
        store.prepare()
    assert reconcile(store, store.now()).open == 2
    assert ids(claim_due(store)) == ["a-new-one", "before"]
    store.close()


@pytest.mark.parametrize("warm", [True, False])
def test_a_wider_id_is_adopted_by_the_same_pass(server_shop: Shop, warm: bool) -> None:
    server_shop.run("ALTER TABLE checkout_session MODIFY id VARCHAR(20) NOT NULL")
    store = Store(database_of(server_shop))
    store.prepare()
    server_shop.run("ALTER TABLE checkout_session MODIFY id VARCHAR(64) NOT NULL")
    add_sessions(server_shop, {"x" * 40: "checkout"})
    if not warm:
        store = Store(database_of(server_shop))
        store.prepare()
    assert reconcile(store, store.now()).open == 1
    assert ids(claim_due(store)) == ["x" * 40]
    for table in ("checkout_session_check", "checkout_session_change"):
        [(length,)] = server_shop.run(
            "SELECT character_maximum_length FROM information_schema.columns"
            " WHERE table_schema = DATABASE() AND table_name = %s AND column_name = 'session_id'",
            (table,),
        )
        assert length == 64
    store.close()


def test_without_the_right_to_create_tables_the_error_lists_the_sql(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop]
) -> None:
    """Somebody with the right runs the statements, and the store works."""
    rights = f"SELECT, INSERT, UPDATE, DELETE ON {mariadb_shop.database}.*"
    shop = limited(rights)
    store = Store(database_of(shop))
    with pytest.raises(StoreError, match=r"make or change them\. Run: CREATE TABLE") as refused:
        store.prepare()
    for statement in str(refused.value).partition("Run: ")[2].split(";")[:-1]:
        mariadb_shop.run(statement)
    assert store.prepare() == []
    store.close()


def test_the_monitor_only_needs_to_read_the_shops_table(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop], mariadb_store: Store
) -> None:
    shop = limited(
        f"SELECT ON {mariadb_shop.database}.checkout_session",
        f"SELECT, INSERT, UPDATE, DELETE ON {mariadb_shop.database}.checkout_session_batch",
        f"SELECT, INSERT, UPDATE, DELETE ON {mariadb_shop.database}.checkout_session_check",
        f"SELECT, INSERT, UPDATE, DELETE ON {mariadb_shop.database}.checkout_session_run",
        f"SELECT, INSERT, UPDATE ON {mariadb_shop.database}.checkout_session_pause",
        f"SELECT, INSERT, DELETE ON {mariadb_shop.database}.checkout_session_change",
    )
    add_sessions(mariadb_shop, numbered(2))
    store = Store(database_of(shop))
    assert store.prepare() == []
    assert reconcile(store, store.now()).open == 2
    claims = claim_due(store)
    record(store, [Recheck(claim, Answer(Outcome.ACTIVE, 200), NOON) for claim in claims])
    assert len(claims) == 2
    store.close()


OLD_TABLES = """\
CREATE TABLE checkout_session_check (
  session_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE {collation} NOT NULL PRIMARY KEY,
  next_check_at DATETIME(3) NOT NULL, claimed_until DATETIME(3) NULL,
  first_seen_at DATETIME(3) NOT NULL, last_checked_at DATETIME(3) NULL,
  last_outcome VARCHAR(32) NULL, last_status_code SMALLINT NULL,
  attempts INT UNSIGNED NOT NULL DEFAULT 0,
  consecutive_failures INT UNSIGNED NOT NULL DEFAULT 0,
  KEY checkout_session_check_due (next_check_at));
CREATE TABLE checkout_session_run (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY, reason VARCHAR(16) NOT NULL,
  tick DATETIME(3) NULL, started_at DATETIME(3) NOT NULL, finished_at DATETIME(3) NOT NULL,
  duration_ms INT UNSIGNED NOT NULL, open_sessions INT UNSIGNED NOT NULL,
  checked INT UNSIGNED NOT NULL, errors INT UNSIGNED NOT NULL,
  status_changes INT UNSIGNED NOT NULL, outcomes VARCHAR(1000) NOT NULL,
  skipped VARCHAR(1000) NOT NULL, overdue_ms BIGINT UNSIGNED NOT NULL,
  latency_p50_ms DOUBLE NULL, latency_p95_ms DOUBLE NULL, latency_p99_ms DOUBLE NULL,
  latency_max_ms DOUBLE NULL, KEY checkout_session_run_finished (finished_at));
CREATE TABLE checkout_session_pause (
  id TINYINT UNSIGNED NOT NULL PRIMARY KEY, paused_until DATETIME(3) NOT NULL,
  pauses INT UNSIGNED NOT NULL);
CREATE TABLE checkout_session_change (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  session_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE {collation} NOT NULL,
  billing_checkout_id TEXT CHARACTER SET utf8mb4 NULL, new_status VARCHAR(16) NOT NULL,
  billing_status VARCHAR(255) CHARACTER SET utf8mb4 NOT NULL, changed_at DATETIME(3) NOT NULL,
  KEY checkout_session_change_changed (changed_at));
INSERT INTO checkout_session_pause VALUES (1, '2026-01-15 11:00:00', 0);
INSERT INTO checkout_session_run VALUES
  (7, 'tick', NULL, '2026-01-15 11:59:55', '2026-01-15 11:59:56', 1, 1, 1, 0, 0, '{{}}', '{{}}', 0,
   NULL, NULL, NULL, NULL);
INSERT INTO checkout_session_check VALUES
  ('s0', '2026-01-15 12:00:00', NULL, '2026-01-15 11:00:00', NULL, 'timeout', NULL, 3, 2)"""


def with_old_tables(shop: MySQLShop) -> None:
    [(collation,)] = shop.run(
        "SELECT collation_name FROM information_schema.columns WHERE table_schema = DATABASE()"
        " AND table_name = 'checkout_session' AND column_name = 'id'"
    )
    for statement in OLD_TABLES.format(collation=collation).split(";"):
        shop.run(statement)


async def test_tables_of_the_first_version_are_upgraded_with_their_rows(
    server_shop: MySQLShop, clock: FakeClock, billing: FakeBilling
) -> None:
    with_old_tables(server_shop)
    add_sessions(server_shop, numbered(1))
    summary = await Passes(server_shop, clock, billing).run()
    assert (summary.led, summary.checked) == (True, 1)
    kept = "SELECT last_outcome, attempts FROM checkout_session_check"
    assert server_shop.run(kept) == [("active", 3)]
    # A worker of the first version that is still running can write its row.
    server_shop.run(
        "INSERT INTO checkout_session_run (reason, started_at, finished_at, duration_ms,"
        " open_sessions, checked, errors, status_changes, outcomes, skipped, overdue_ms)"
        " VALUES ('tick', NOW(3), NOW(3), 1, 1, 1, 0, 0, '{}', '{}', 0)"
    )


def test_without_the_right_to_upgrade_tables_the_error_lists_the_sql(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop]
) -> None:
    with_old_tables(mariadb_shop)
    shop = limited(f"CREATE, SELECT, INSERT, UPDATE, DELETE ON {mariadb_shop.database}.*")
    store = Store(database_of(shop))
    with pytest.raises(StoreError, match="older than this version") as refused:
        store.prepare()
    statements = str(refused.value).partition("Run: ")[2].split(";")[:-1]
    assert [s.strip() for s in statements] == list(mysql_tables.UPGRADES.values())
    for statement in statements:
        mariadb_shop.run(statement)
    assert store.prepare() == []
    store.close()


@pytest.mark.parametrize("right", ["UPDATE", "UPDATE (status)"])
async def test_status_updates_only_need_to_update_the_status_column(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop], right: str, clock: FakeClock
) -> None:
    database = mariadb_shop.database
    shop = limited(
        f"SELECT ON {database}.checkout_session",
        f"{right} ON {database}.checkout_session",
        *(
            f"CREATE, SELECT, INSERT, UPDATE, DELETE ON {database}.checkout_session_{table}"
            for table in ("batch", "check", "run", "pause", "change")
        ),
    )
    add_sessions(mariadb_shop, numbered(1))
    passes = Passes(shop, clock, FakeBilling({"checkout_active_0": PAID}))
    assert (await passes.run()).status_changes == 1


def test_sqlites_tables_of_the_first_version_are_created_again(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    """SQLite cannot change a column; the next tick finds out again what they held."""
    sqlite_shop.run("CREATE TABLE checkout_session_check (session_id TEXT PRIMARY KEY)")
    add_sessions(sqlite_shop, numbered(1))
    store = Store(database_of(sqlite_shop, clock))
    assert store.prepare() == []
    assert reconcile(store, NOON).open == 1
    assert len(claim_all(store, NOON)) == 1
    store.close()


# What makes SQLite's tables those of version 0.2.0, with a row in each.
SQLITE_0_2 = """\
DROP TABLE checkout_session_batch;
DROP TABLE checkout_session_check;
CREATE TABLE checkout_session_check (
  rowid INTEGER PRIMARY KEY, session_id TEXT NOT NULL UNIQUE, next_check_at DATETIME NOT NULL,
  claimed_until DATETIME, first_seen_at DATETIME NOT NULL, last_checked_at DATETIME,
  last_outcome TEXT, last_status_code INTEGER, attempts INTEGER NOT NULL DEFAULT 0,
  consecutive_failures INTEGER NOT NULL DEFAULT 0, failing_since DATETIME);
CREATE INDEX checkout_session_check_due ON checkout_session_check (next_check_at);
DROP INDEX checkout_session_change_late;
DROP INDEX checkout_session_change_paid_late;
ALTER TABLE checkout_session_change DROP COLUMN late_check_at;
ALTER TABLE checkout_session_change DROP COLUMN paid_late_at;
ALTER TABLE checkout_session_pause DROP COLUMN budget;
ALTER TABLE checkout_session_run DROP COLUMN settings;
INSERT INTO checkout_session_check (session_id, next_check_at, first_seen_at, last_outcome,
  consecutive_failures) VALUES ('s0', '2026-01-15T12:00:00.000Z', '2026-01-15T11:00:00.000Z',
  'timeout', 2);
INSERT INTO checkout_session_change (session_id, new_status, billing_status, changed_at)
  VALUES ('gone', 'success', 'paid', '2026-01-15T11:59:00.000Z');
INSERT OR REPLACE INTO checkout_session_pause (id, paused_until, pauses, count_again_at)
  VALUES (1, '2026-01-15T11:00:00.000Z', 3, '2026-01-15T12:09:00.000Z')"""


async def test_sqlites_tables_of_version_0_2_are_upgraded_with_their_rows(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    passes = Passes(sqlite_shop, clock, billing)
    for statement in SQLITE_0_2.split(";"):
        sqlite_shop.run(statement)
    add_sessions(sqlite_shop, numbered(1))
    runs = sqlite_shop.run("SELECT COUNT(*) FROM checkout_session_run")[0][0]
    assert (await passes.run()).checked == 1
    kept = "SELECT last_outcome, first_seen_at FROM checkout_session_check"
    assert sqlite_shop.run(kept) == [("active", "2026-01-15T11:00:00.000Z")]
    assert sqlite_shop.run("SELECT session_id FROM checkout_session_change") == [("gone",)]
    paused = "SELECT paused_until FROM checkout_session_pause"
    assert sqlite_shop.run(paused) == [("2026-01-15T11:00:00.000Z",)]
    assert sqlite_shop.run("SELECT COUNT(*) FROM checkout_session_run") == [(runs + 1,)]

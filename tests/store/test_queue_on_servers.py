"""The queue on MySQL and MariaDB: locks, lost answers, and how many rows a pass reads."""

from collections.abc import Callable, Sequence

import pytest

from core.database.mysql import MySQLConnection
from core.database.port import Row, Value
from core.domain.model import Answer, Outcome, Recheck
from core.store import reconcile as reconciliation
from core.store.queue import Queue
from core.store.store import Store
from testkit.queue import claimed
from testkit.shops import MySQLShop, Shop, add_sessions, connect, numbered
from tests.store.claims import claim_due, record
from tests.support import reconcile


def test_a_failure_counts_once_if_the_answer_to_its_update_is_lost(
    server_store: Store, server_shop: Shop, lose_an_answer: Callable[..., list[str]]
) -> None:
    """The statement is sent again, and must not count a second time."""
    add_sessions(server_shop, numbered(3))
    reconcile(server_store, server_store.now())
    claims, now = claim_due(server_store), server_store.now()
    executed = lose_an_answer("COMMIT")
    record(server_store, [Recheck(c, Answer(Outcome.TIMEOUT), now) for c in claims])
    assert executed.count("COMMIT") == 2
    failures = "SELECT consecutive_failures FROM checkout_session_check"
    assert server_shop.run(failures) == [(1,)] * 3
    assert claimed(server_shop) == 0


def test_rows_that_another_pass_is_claiming_are_skipped(
    mariadb_store: Store, mariadb_shop: MySQLShop
) -> None:
    add_sessions(mariadb_shop, numbered(3))
    mariadb_store.queue = Queue(mariadb_store._database, batch_size=1)
    reconcile(mariadb_store, mariadb_store.now())
    with connect(mariadb_shop.server, mariadb_shop.database) as other, other.cursor() as cursor:
        other.begin()
        cursor.execute(
            "SELECT id FROM checkout_session_batch WHERE id ="
            " (SELECT batch_id FROM checkout_session_check WHERE session_id = 's1') FOR UPDATE"
        )
        claims = claim_due(mariadb_store)
        other.rollback()
    assert sorted(claim.session_id for claim in claims) == ["s0", "s2"]


def test_the_shops_rows_are_never_locked(mariadb_store: Store, mariadb_shop: MySQLShop) -> None:
    add_sessions(mariadb_shop, numbered(3))
    with connect(mariadb_shop.server, mariadb_shop.database) as other, other.cursor() as cursor:
        other.begin()
        cursor.execute("UPDATE checkout_session SET status = 'success' WHERE id = 's1'")
        reconcile(mariadb_store, mariadb_store.now())
        claims = claim_due(mariadb_store)
        other.rollback()
    assert len(claims) == 3


def rows_read(store: Store) -> int:
    """How many rows and index entries the store's connection has made the server read."""
    database = store._database
    sql = "SHOW SESSION STATUS WHERE variable_name LIKE %s OR variable_name = %s"
    counters = ("Handler_read_%", "Handler_icp_attempts")
    rows = database.run(lambda connection: connection.query(sql, counters))
    return sum(int(str(count)) for _name, count in rows)


def test_an_idle_pass_reads_no_closed_sessions(server_store: Store, server_shop: MySQLShop) -> None:
    server_shop.run(
        "INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900)"
        " SELECT CONCAT('closed-', a.i, '-', b.i), 'x', 'success' FROM n a, n b WHERE b.i <= 111"
    )
    server_shop.run("ANALYZE TABLE checkout_session")
    add_sessions(server_shop, numbered(3))
    reconcile(server_store, server_store.now())
    before = rows_read(server_store)
    reconcile(server_store, server_store.now())
    claim_due(server_store)
    assert rows_read(server_store) - before < 100


def test_an_idle_pass_does_not_scan_the_shops_table(
    server_store: Store, server_shop: MySQLShop, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(server_shop, {f"closed-{n}": "x" for n in range(3000)}, status="success")
    add_sessions(server_shop, numbered(3))
    server_shop.run("ANALYZE TABLE checkout_session")
    reconcile(server_store, server_store.now())
    claim_due(server_store)
    query, access = MySQLConnection.query, {}

    def explained(
        connection: MySQLConnection, sql: str, parameters: Sequence[Value] = ()
    ) -> Sequence[Row]:
        for row in query(connection, f"EXPLAIN FORMAT=TRADITIONAL {sql}", parameters):
            # MySQL has one more column, for partitions.
            access[sql, row[2]] = row[3] if len(row) == 10 else row[4]
        return query(connection, sql, parameters)

    monkeypatch.setattr(MySQLConnection, "query", explained)
    reconcile(server_store, server_store.now())
    assert claim_due(server_store) == []
    of_shop = {kind for (_sql, table), kind in access.items() if table in ("s", "checkout_session")}
    assert of_shop == {"ref"}  # by the status index; "ALL" would be a scan


@pytest.fixture
def walked(server_store: Store, server_shop: MySQLShop, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that has adopted 3,000 sessions, and walks in pieces of 100."""
    monkeypatch.setattr(reconciliation, "PIECE_SESSIONS", 100)
    add_sessions(server_shop, numbered(3000))
    server_shop.run("ANALYZE TABLE checkout_session")
    server_store.prepare()
    reconcile(server_store, server_store.now())
    return server_store


def rows_of_a_walk(store: Store) -> int:
    """How many rows and index entries it makes the server read."""
    before = rows_read(store)
    reconcile(store, store.now())
    return rows_read(store) - before


@pytest.mark.new_database  # in a table of which many rows were deleted, estimates may be far off
def test_each_piece_of_a_walk_reads_its_own_sessions_only(
    walked: Store, server_shop: MySQLShop
) -> None:
    """Left to itself, MariaDB reads all sessions for each piece: a million take many minutes."""
    server_shop.run("ANALYZE TABLE checkout_session_check, checkout_session_batch")
    assert rows_of_a_walk(walked) < 6 * 3000


@pytest.mark.new_database
def test_a_walk_is_quick_while_the_server_believes_the_queue_to_be_empty(
    walked: Store, server_shop: MySQLShop
) -> None:
    """So it is in the first walk. MySQL would then read all of the queue for each session."""
    for table in ("checkout_session_check", "checkout_session_batch"):
        server_shop.run(
            "UPDATE mysql.innodb_table_stats SET n_rows = 1"
            f" WHERE database_name = DATABASE() AND table_name = '{table}'"
        )
        server_shop.run(f"FLUSH TABLE {table}")  # so that the server reads these statistics
    # All of the queue is counted once for each piece.
    assert rows_of_a_walk(walked) < (6 + 3000 / 100) * 3000


STATUS_KEYS = {
    "KEY k (status)": "FORCE INDEX (`k`)",
    "KEY k (STATUS, Id, billing_order_id)": "FORCE INDEX (`k`)",
    "KEY k (status, billing_order_id)": "",
    "KEY k (status(3))": "",
    "KEY `k of 100%` (status)": "",
    "KEY k (status) NOT_USED": "",
}


@pytest.mark.parametrize(("key", "hint"), STATUS_KEYS.items(), ids=STATUS_KEYS)
def test_a_walk_reads_the_index_that_has_the_open_sessions_by_id(
    server_store: Store, server_shop: MySQLShop, key: str, hint: str
) -> None:
    [(version,)] = server_shop.run("SELECT VERSION()")
    key = key.replace("NOT_USED", "IGNORED" if "MariaDB" in str(version) else "INVISIBLE")
    server_shop.run(f"ALTER TABLE checkout_session DROP KEY checkout_session_status, ADD {key}")
    server_store.prepare()
    add_sessions(server_shop, numbered(3))
    reconcile(server_store, server_store.now())
    assert server_store._database.by_status == hint
    assert len(claim_due(server_store)) == 3


def test_a_walk_goes_on_when_the_shop_renames_its_index(
    server_store: Store, server_shop: MySQLShop
) -> None:
    server_store.prepare()
    add_sessions(server_shop, numbered(3))
    server_shop.run(
        "ALTER TABLE checkout_session DROP KEY checkout_session_status, ADD KEY other (status)"
    )
    reconcile(server_store, server_store.now())
    assert len(claim_due(server_store)) == 3


def test_a_claim_does_not_read_every_open_session(
    server_store: Store, server_shop: MySQLShop
) -> None:
    """Also with outdated statistics: here the server's are of a smaller table."""
    server_shop.run("ALTER TABLE checkout_session STATS_AUTO_RECALC = 0")
    add_sessions(server_shop, numbered(100))
    server_shop.run("ANALYZE TABLE checkout_session")
    add_sessions(server_shop, {f"later-{n}": "checkout_1" for n in range(4900)})
    reconcile(server_store, server_store.now())
    before = rows_read(server_store)
    claimed = claim_due(server_store)
    assert len(claimed) == 500
    assert rows_read(server_store) - before < 3000

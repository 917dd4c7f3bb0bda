"""What keeps a status from being written, or its event from being told, though billing said so."""

import asyncio
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta

import pytest

from core.database import mysql
from core.domain.model import Answer, Claim, Outcome, Result, SessionStatus, StatusChange, Summary
from core.errors import StoreError
from core.store.status_changes import Publisher
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.shops import MySQLShop, Shop, SQLiteShop, add_sessions, connect, numbered, settings_for
from tests.support import FakeBilling, Passes, census, database_of, until

PAID = Answer(Outcome.ACTIVE, 200, 0.01, status=SessionStatus.SUCCESS, billing_status="paid")
FAILED = Answer(Outcome.ACTIVE, 200, 0.01, status=SessionStatus.FAILURE, billing_status="canceled")


class Told:
    """A bus that takes everything, and keeps the ids."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def publish(self, changes: Sequence[StatusChange]) -> Collection[str]:
        self.ids += [change.session_id for change in changes]
        return [change.session_id for change in changes]


@pytest.fixture
def told() -> Told:
    return Told()


def checking(shop: Shop, clock: FakeClock, billing: FakeBilling, publisher: Publisher) -> Passes:
    passes = Passes(shop, clock, billing)
    passes.publisher = publisher
    return passes


def statuses(shop: Shop) -> dict[str, str]:
    return dict(shop.run("SELECT id, status FROM checkout_session"))


async def while_asked(
    passes: Passes, billing: FakeBilling, happens: Callable[[], object]
) -> Summary:
    """A pass that asks about one session, and what happens before billing answers."""
    held = billing.held["checkout_active_0"] = asyncio.Event()
    running = asyncio.create_task(passes.run(CHECK_CADENCE="5m", STATUS_UPDATES="true"))
    await until(lambda: billing.asked["checkout_active_0"] == 1)
    happens()
    held.set()
    return await running


@pytest.mark.parametrize("checkout", ["'checkout_active_9'", "NULL", "''"])
async def test_an_answer_about_an_old_checkout_closes_nothing_and_the_new_one_is_due_at_once(
    shop: Shop, clock: FakeClock, billing: FakeBilling, told: Told, checkout: str
) -> None:
    add_sessions(shop, numbered(1))
    billing.answers = {"checkout_active_0": FAILED}
    retry = f"UPDATE checkout_session SET billing_checkout_id = {checkout}"
    passes = checking(shop, clock, billing, told)
    summary = await while_asked(passes, billing, lambda: shop.run(retry))
    assert statuses(shop) == {"s0": "open"}
    assert (told.ids, summary.status_changes) == ([], 0)
    assert summary.outcomes[Outcome.DEFERRED] == 1
    store = Store(database_of(shop, clock))
    [claim] = store.queue.claim_due(store.now(), tick=NOON, lease=timedelta(seconds=20), limit=1)
    store.close()
    assert claim.billing_checkout_id != "checkout_active_0"


async def test_an_answer_about_a_session_that_was_deleted_and_opened_anew_closes_nothing(
    shop: Shop, clock: FakeClock, billing: FakeBilling, told: Told
) -> None:
    add_sessions(shop, numbered(1))
    billing.answers = {"checkout_active_0": FAILED}

    def anew() -> None:
        shop.run("DELETE FROM checkout_session")
        add_sessions(shop, {"s0": "checkout_active_1"})

    await while_asked(checking(shop, clock, billing, told), billing, anew)
    assert statuses(shop) == {"s0": "open"}
    assert told.ids == []


def test_a_claim_that_has_gone_to_another_worker_changes_nothing(
    shop: Shop, clock: FakeClock, told: Told
) -> None:
    add_sessions(shop, numbered(1))
    late, current = (Store(database_of(shop, clock), told) for _ in range(2))
    late.prepare()
    census(late, NOON)
    lease = timedelta(seconds=20)
    [lapsed] = late.queue.claim_due(late.now(), tick=NOON, lease=lease, limit=1)
    clock.advance(20)
    [valid] = current.queue.claim_due(current.now(), tick=clock.now, lease=lease, limit=1)
    result = Result(lapsed, FAILED, clock.now, SessionStatus.FAILURE, try_again_at=clock.now)
    recorded = late.record([result], late.now())
    assert (statuses(shop), told.ids, recorded.changed) == ({"s0": "open"}, [], [])
    valid_until = "SELECT COUNT(claimed_until) FROM checkout_session_check"
    assert shop.run(valid_until) == [(1,)]
    result = Result(valid, PAID, clock.now, SessionStatus.SUCCESS, try_again_at=clock.now)
    assert current.record([result], current.now()).changed == [result]
    assert (statuses(shop), told.ids) == ({"s0": "success"}, ["s0"])
    late.close()
    current.close()


def test_a_session_whose_change_is_being_made_goes_to_no_other_worker_though_its_lease_ends(
    server_shop: Shop, clock: FakeClock
) -> None:
    class Slow(Told):
        def publish(self, changes: Sequence[StatusChange]) -> Collection[str]:
            clock.advance(lease.total_seconds())
            claims.extend(other.queue.claim_due(other.now(), tick=clock.now, lease=lease, limit=1))
            return super().publish(changes)

    add_sessions(server_shop, numbered(1))
    told, claims, lease = Slow(), list[Claim](), timedelta(seconds=20)
    slow, other = (Store(database_of(server_shop, clock), told) for _ in range(2))
    slow.prepare()
    census(slow, NOON)
    [claim] = slow.queue.claim_due(slow.now(), tick=NOON, lease=lease, limit=1)
    result = Result(claim, PAID, NOON, SessionStatus.SUCCESS, try_again_at=NOON)
    assert slow.record([result], slow.now()).changed == [result]
    assert (claims, told.ids) == ([], ["s0"])
    slow.close()
    other.close()


def refusing(shop: Shop, session_id: str) -> None:
    """Have the shop's database refuse every change of one session's status."""
    if isinstance(shop, SQLiteShop):
        then = f"WHEN OLD.id = '{session_id}' BEGIN SELECT RAISE(ABORT, 'it is under audit'); END"
        timing = "UPDATE ON checkout_session"
    else:
        then = (
            f"FOR EACH ROW BEGIN IF OLD.id = '{session_id}' THEN SIGNAL SQLSTATE '45000'"
            " SET MESSAGE_TEXT = 'it is under audit'; END IF; END"
        )
        timing = "UPDATE ON checkout_session"
    shop.run(f"CREATE TRIGGER audit BEFORE {timing} {then}")


@pytest.mark.parametrize("publishes", [True, False])
async def test_a_row_that_the_database_refuses_backs_off_alone_and_is_never_told(
    shop: Shop,
    clock: FakeClock,
    told: Told,
    caplog: pytest.LogCaptureFixture,
    publishes: bool,
) -> None:
    add_sessions(shop, numbered(50))
    refusing(shop, "s17")
    paid = [f"s{n}" for n in range(0, 50, 4)] + ["s17"]
    billing = FakeBilling({f"checkout_active_{i[1:]}": PAID for i in paid})
    passes = Passes(shop, clock, billing)
    passes.publisher = told if publishes else None
    summary = await passes.run()
    closed = {i for i, status in statuses(shop).items() if status == "success"}
    assert closed == set(paid) - {"s17"}
    assert sorted(told.ids) == (sorted(closed) if publishes else [])
    assert summary.outcomes == {Outcome.ACTIVE: 36, Outcome.CLOSED: 13, Outcome.REFUSED: 1}
    assert summary.errors == 1
    recorded = "SELECT consecutive_failures, claimed_until FROM checkout_session_check"
    assert shop.run(f"{recorded} WHERE session_id = 's17'") == [(1, None)]
    assert next(m for m in caplog.messages if "refuses" in m).startswith(
        "❌ Checkout session s17 (checkout_active_17) cannot become success: "
        "the database refuses it: "
    )
    asked = []
    for _ in range(12):
        clock.advance(5)
        await passes.run()
        asked.append(billing.asked["checkout_active_17"])
    assert asked[-1] <= 5  # of the 13 ticks of a minute
    assert "s17" not in told.ids


async def test_a_status_that_a_check_constraint_forbids_is_refused_and_no_other(
    mariadb_shop: MySQLShop, clock: FakeClock, told: Told
) -> None:
    mariadb_shop.run("ALTER TABLE checkout_session ADD CHECK (id <> 's1' OR status <> 'success')")
    add_sessions(mariadb_shop, numbered(3))
    billing = FakeBilling({f"checkout_active_{n}": PAID for n in range(3)})
    summary = await checking(mariadb_shop, clock, billing, told).run()
    assert summary.outcomes == {Outcome.CLOSED: 2, Outcome.REFUSED: 1}
    assert sorted(told.ids) == ["s0", "s2"]


async def test_a_change_that_the_shop_has_locked_is_tried_at_the_next_slot_and_is_no_success(
    mariadb_shop: MySQLShop, clock: FakeClock, billing: FakeBilling, told: Told
) -> None:
    add_sessions(mariadb_shop, numbered(1))
    billing.answers = {"checkout_active_0": PAID}
    passes = checking(mariadb_shop, clock, billing, told)
    with connect(mariadb_shop.server, mariadb_shop.database) as shop, shop.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT * FROM checkout_session FOR UPDATE")
        summary = await passes.run(CHECK_CADENCE="5m", STATUS_UPDATES="true")
        cursor.execute("COMMIT")
    assert summary.outcomes == {Outcome.DEFERRED: 1}
    assert (summary.successes, summary.errors, told.ids) == (0, 1, [])
    clock.advance(5)
    assert (await passes.run(CHECK_CADENCE="5m")).status_changes == 1


async def test_a_change_that_is_not_published_is_tried_at_the_next_slot_whatever_the_cadence(
    shop: Shop, clock: FakeClock, billing: FakeBilling, told: Told
) -> None:
    class Deaf:
        def publish(self, changes: Sequence[StatusChange]) -> Collection[str]:
            return []

    add_sessions(shop, numbered(1))
    billing.answers = {"checkout_active_0": PAID}
    passes = checking(shop, clock, billing, Deaf())
    summary = await passes.run(CHECK_CADENCE="5m")
    assert (summary.outcomes, summary.unpublished) == ({Outcome.DEFERRED: 1}, 1)
    assert statuses(shop) == {"s0": "open"}
    clock.advance(5)
    passes.publisher = told
    assert (await passes.run(CHECK_CADENCE="5m")).status_changes == 1
    assert told.ids == ["s0"]


async def test_each_change_is_kept_in_the_log_of_changes_for_a_day(
    shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(shop, numbered(2))
    billing.answers = {"checkout_active_0": PAID}
    passes = Passes(shop, clock, billing)
    await passes.run()
    log = "SELECT session_id, billing_checkout_id, new_status, billing_status"
    log += " FROM checkout_session_change"
    assert shop.run(log) == [("s0", "checkout_active_0", "success", "paid")]
    clock.advance(timedelta(days=1, seconds=1).total_seconds())
    await passes.run()
    assert shop.run(log) == []


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


async def test_the_tables_of_the_first_version_are_upgraded_and_what_they_hold_is_kept(
    server_shop: MySQLShop, clock: FakeClock, billing: FakeBilling
) -> None:
    with_old_tables(server_shop)
    add_sessions(server_shop, numbered(1))
    summary = await Passes(server_shop, clock, billing).run()
    assert (summary.led, summary.checked) == (True, 1)
    assert server_shop.run("SELECT attempts FROM checkout_session_check") == [(4,)]
    # A worker of the first version that is still at work writes its row as ever.
    server_shop.run(
        "INSERT INTO checkout_session_run (reason, started_at, finished_at, duration_ms,"
        " open_sessions, checked, errors, status_changes, outcomes, skipped, overdue_ms)"
        " VALUES ('tick', NOW(3), NOW(3), 1, 1, 1, 0, 0, '{}', '{}', 0)"
    )


def test_a_user_who_may_not_upgrade_the_tables_is_told_the_statements(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop]
) -> None:
    with_old_tables(mariadb_shop)
    shop = limited(f"CREATE, SELECT, INSERT, UPDATE, DELETE ON {mariadb_shop.database}.*")
    store = Store(database_of(shop))
    with pytest.raises(StoreError, match="older than this version") as refused:
        store.prepare()
    statements = str(refused.value).partition("Run: ")[2].split(";")[:-1]
    assert [s.strip() for s in statements] == list(mysql.UPGRADES.values())
    for statement in statements:
        mariadb_shop.run(statement)
    assert store.prepare() == []
    store.close()


def test_settings_without_a_cadence_check_every_session_at_every_tick(sqlite_shop: Shop) -> None:
    assert settings_for(sqlite_shop, CHECK_INTERVAL_SECONDS="1").cadence.every_seconds(0) == 1
    assert settings_for(sqlite_shop, CHECK_INTERVAL_SECONDS="30").cadence.every_seconds(0) == 30

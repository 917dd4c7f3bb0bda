"""A status change: what billing says is written, published once and logged, or tried again."""

from collections.abc import Collection, Sequence
from datetime import timedelta

import httpx
import pytest

from core.domain.model import Outcome, StatusChangedEvent
from core.worker import Worker
from local.billing import running_billing
from testkit.clock import FakeClock
from testkit.shops import MySQLShop, Shop, SQLiteShop, add_sessions, connect, numbered, settings_for
from tests.store.fake_bus import PAID, Bus, publishing_passes, statuses
from tests.support import FakeBilling, Passes


def test_sessions_change_to_the_status_that_billing_reports(
    shop: Shop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = {w: f"checkout_{w}_30_1" for w in ("paid", "failed", "expired", "active", "text")}
    add_sessions(shop, sessions)
    with running_billing(clock=lambda: clock().timestamp()) as simulated:
        env = {"BILLING_API_URL": simulated.url, "STATUS_UPDATES": "true"}
        worker = Worker(settings_for(shop, **env), clock=clock)
        summaries = []
        for _ in range(8):
            summaries.append(worker.check_open_checkout_sessions())
            clock.advance(5)
        worker.close()
    assert statuses(shop) == {
        "paid": "success",
        "failed": "failure",
        "expired": "timeout",
        "active": "open",
        "text": "open",
    }
    assert [summary.status_changes for summary in summaries] == [0, 0, 0, 0, 0, 0, 3, 0]
    assert summaries[6].outcomes[Outcome.CLOSED] == 3
    assert "🏁 Checkout session paid (checkout_paid_30_1) is now success; billing says paid" in (
        caplog.messages
    )
    assert next(m for m in caplog.messages if "not in BILLING_STATUS_MAP" in m).endswith(
        "1 answers had a status that is not in BILLING_STATUS_MAP; their sessions stay open: "
        "a body that is not valid JSON (1)"
    )


def test_without_status_updates_no_status_is_written(shop: Shop, clock: FakeClock) -> None:
    add_sessions(shop, numbered(3, "paid"))
    answers = httpx.MockTransport(lambda _request: httpx.Response(200, json={"status": "paid"}))
    worker = Worker(settings_for(shop), transport=answers, clock=clock)
    summary = worker.check_open_checkout_sessions()
    worker.close()
    assert summary.outcomes == {Outcome.ACTIVE: 3}
    assert set(statuses(shop).values()) == {"open"}


async def test_a_change_is_published_once_and_its_session_dropped(
    mariadb_passes: Passes, bus: Bus, billing: FakeBilling
) -> None:
    shop = mariadb_passes.shop
    add_sessions(shop, numbered(25))
    shop.run("UPDATE checkout_session SET billing_order_id = CONCAT('order-', id)")
    billing.answers = {f"checkout_active_{n}": PAID for n in range(23)}
    for _ in range(3):
        await mariadb_passes.run()
        mariadb_passes.clock.advance(5)
    assert list(statuses(shop).values()).count("success") == 23
    assert sorted(change.session_id for change in bus.published) == sorted(
        f"s{n}" for n in range(23)
    )
    assert {change.billing_order_id for change in bus.published} >= {"order-s0"}
    assert shop.run("SELECT COUNT(*) FROM checkout_session_check") == [(2,)]


async def test_each_change_is_logged_for_a_day(
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


async def test_a_rejected_event_leaves_its_session_open_until_the_next_tick(
    mariadb_passes: Passes, bus: Bus, billing: FakeBilling
) -> None:
    shop = mariadb_passes.shop
    add_sessions(shop, numbered(10))
    billing.answers = dict.fromkeys(numbered(10).values(), PAID)  # type: ignore[arg-type]
    bus.rejects = {"s4"}
    summary = await mariadb_passes.run()
    assert (summary.status_changes, summary.unpublished) == (9, 1)
    assert [i for i, status in statuses(shop).items() if status == "open"] == ["s4"]
    bus.rejects = set()
    mariadb_passes.clock.advance(5)
    assert (await mariadb_passes.run()).status_changes == 1
    assert set(statuses(shop).values()) == {"success"}


async def test_an_unpublished_change_is_retried_in_the_next_slot(
    shop: Shop, clock: FakeClock, billing: FakeBilling, bus: Bus
) -> None:
    """It does not wait for the cadence, which is five minutes here."""

    class RejectingBus:
        def publish(self, changes: Sequence[StatusChangedEvent]) -> Collection[str]:
            return []

    add_sessions(shop, numbered(1))
    billing.answers = {"checkout_active_0": PAID}
    passes = publishing_passes(shop, clock, billing, RejectingBus())
    summary = await passes.run(CHECK_CADENCE="5m")
    assert (summary.outcomes, summary.unpublished) == ({Outcome.DEFERRED: 1}, 1)
    assert statuses(shop) == {"s0": "open"}
    clock.advance(5)
    passes.publisher = bus
    assert (await passes.run(CHECK_CADENCE="5m")).status_changes == 1
    assert bus.session_ids == ["s0"]


def refuse_changes(shop: Shop, session_id: str) -> None:
    """Make the shop's database refuse every change of one session's status."""
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


@pytest.mark.slow
@pytest.mark.parametrize("publishes", [True, False])
async def test_a_refused_row_backs_off_alone_and_is_not_published(
    shop: Shop,
    clock: FakeClock,
    bus: Bus,
    caplog: pytest.LogCaptureFixture,
    publishes: bool,
) -> None:
    add_sessions(shop, numbered(50))
    refuse_changes(shop, "s17")
    paid = [f"s{n}" for n in range(0, 50, 4)] + ["s17"]
    billing = FakeBilling({f"checkout_active_{i[1:]}": PAID for i in paid})
    passes = Passes(shop, clock, billing)
    passes.publisher = bus if publishes else None
    summary = await passes.run()
    closed = {i for i, status in statuses(shop).items() if status == "success"}
    assert closed == set(paid) - {"s17"}
    assert sorted(bus.session_ids) == (sorted(closed) if publishes else [])
    assert summary.outcomes == {Outcome.ACTIVE: 36, Outcome.CLOSED: 13, Outcome.REFUSED: 1}
    assert summary.errors == 1
    recorded = "SELECT consecutive_failures, claimed_until FROM checkout_session_check"
    assert shop.run(f"{recorded} WHERE session_id = 's17'") == [(1, None)]
    assert next(m for m in caplog.messages if "refuses" in m).startswith(
        "❌ Checkout session s17 (checkout_active_17) cannot become success: "
        "the database refuses it: "
    )
    requests = []
    for _ in range(12):
        clock.advance(5)
        await passes.run()
        requests.append(billing.asked["checkout_active_17"])
    assert requests[-1] <= 5  # in the 13 ticks of a minute
    assert "s17" not in bus.session_ids


async def test_a_check_constraint_refuses_only_its_own_row(
    mariadb_shop: MySQLShop, clock: FakeClock, bus: Bus
) -> None:
    mariadb_shop.run("ALTER TABLE checkout_session ADD CHECK (id <> 's1' OR status <> 'success')")
    add_sessions(mariadb_shop, numbered(3))
    billing = FakeBilling({f"checkout_active_{n}": PAID for n in range(3)})
    summary = await publishing_passes(mariadb_shop, clock, billing, bus).run()
    assert summary.outcomes == {Outcome.CLOSED: 2, Outcome.REFUSED: 1}
    assert sorted(bus.session_ids) == ["s0", "s2"]


async def test_a_locked_change_is_an_error_and_retried_in_the_next_slot(
    mariadb_shop: MySQLShop, clock: FakeClock, billing: FakeBilling, bus: Bus
) -> None:
    """The shop holds the row's lock; the monitor does not wait for it."""
    add_sessions(mariadb_shop, numbered(1))
    billing.answers = {"checkout_active_0": PAID}
    passes = publishing_passes(mariadb_shop, clock, billing, bus)
    with connect(mariadb_shop.server, mariadb_shop.database) as shop, shop.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT * FROM checkout_session FOR UPDATE")
        summary = await passes.run(CHECK_CADENCE="5m", STATUS_UPDATES="true")
        cursor.execute("COMMIT")
    assert summary.outcomes == {Outcome.DEFERRED: 1}
    assert (summary.successes, summary.errors, bus.session_ids) == (0, 1, [])
    clock.advance(5)
    assert (await passes.run(CHECK_CADENCE="5m")).status_changes == 1

"""What a pass leaves of sessions that are not open any more: log rows for a day, and no queue."""

from datetime import timedelta

import pytest

from core.domain.model import Answer, Outcome, SessionStatus, StatusChange
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.queue import claimed
from testkit.shops import Shop, add_sessions, numbered
from tests.store.claims import claim_all
from tests.store.fake_bus import PAID, Bus, publishing_passes, statuses
from tests.support import FakeBilling, Passes, note_statements, reconcile

DAY = timedelta(days=1).total_seconds()
LOGGED = "SELECT session_id FROM checkout_session_change ORDER BY session_id"


async def test_the_log_keeps_what_is_younger_than_a_day(
    shop: Shop, store: Store, clock: FakeClock, billing: FakeBilling
) -> None:
    """Three changes, an hour apart."""
    passes = Passes(shop, clock, billing)
    for number in range(3):
        add_sessions(shop, {f"s{number}": f"checkout_active_{number}"})
        billing.answers[f"checkout_active_{number}"] = PAID
        await passes.run()
        clock.advance(3600)
    left = []
    clock.now = NOON
    for seconds in (DAY, 0.001, 3599.999, 0.001, 3600):
        clock.advance(seconds)
        store.status_changes.forget_old()
        left.append([session_id for (session_id,) in shop.run(LOGGED)])
    assert left == [["s0", "s1", "s2"], ["s1", "s2"], ["s1", "s2"], ["s2"], []]


@pytest.mark.parametrize("close", ["UPDATE checkout_session SET status = 'failure'", "DELETE FROM"])
async def test_a_session_closed_by_the_shop_meanwhile_leaves_the_queue(
    shop: Shop,
    clock: FakeClock,
    billing: FakeBilling,
    monkeypatch: pytest.MonkeyPatch,
    close: str,
) -> None:
    """In the transaction of the other changes; nothing is published or logged about it."""
    bus = Bus()
    add_sessions(shop, numbered(3))
    billing.answers = dict.fromkeys(["checkout_active_0", "checkout_active_1"], PAID)
    check, statement = billing.check, close.replace("FROM", "FROM checkout_session")

    async def close_first(checkout_id: str | None) -> Answer:
        if checkout_id == "checkout_active_0":
            shop.run(f"{statement} WHERE id = 's0'")
        return await check(checkout_id)

    monkeypatch.setattr(billing, "check", close_first)
    passes = publishing_passes(shop, clock, billing, bus)
    statements = note_statements(shop, monkeypatch)
    summary = await passes.run()
    assert summary.outcomes == {Outcome.CLOSED: 2, Outcome.ACTIVE: 1}
    assert (summary.status_changes, bus.session_ids) == (1, ["s1"])
    assert statuses(shop).get("s0") in ("failure", None)
    assert shop.run("SELECT session_id FROM checkout_session_check") == [("s2",)]
    assert shop.run(LOGGED) == [("s1",)]
    dropped = [
        n
        for n, sql in enumerate(statements)
        if sql.startswith("DELETE FROM checkout_session_check")
    ]
    written = next(n for n, sql in enumerate(statements) if "SET status = " in sql)
    begun = max(n for n, sql in enumerate(statements[:written]) if sql.startswith("BEGIN"))
    assert begun < dropped[0] < written


def test_a_session_closed_meanwhile_is_not_dropped_by_an_expired_claim(
    shop: Shop, store: Store, clock: FakeClock
) -> None:
    """It belongs to the pass that has claimed it since."""
    add_sessions(shop, numbered(1))
    reconcile(store, NOON)
    [late] = claim_all(store, NOON)
    clock.advance(60)
    [_current] = claim_all(store, clock.now)
    shop.run("UPDATE checkout_session SET status = 'failure'")
    answer = Answer(Outcome.ACTIVE, 200, 0.1, status=SessionStatus.SUCCESS)
    change = StatusChange(
        late, answer, SessionStatus.SUCCESS, retry_at=NOON, retry_after_refusal_at=NOON
    )
    recorded = store.status_changes.make([change])
    assert recorded.outcomes == {Outcome.DEFERRED: 1}
    assert claimed(shop) == 1

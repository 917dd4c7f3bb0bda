"""How late the monitor is, and how much is due, as a leader reads both."""

from datetime import timedelta

import pytest

from core.domain.model import Outcome
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, numbered
from tests.store.claims import LEASE, claim_all, give_back, rechecks, record
from tests.support import reconcile


@pytest.fixture
def queued(store: Store, shop: Shop) -> Store:
    """Five sessions, due at noon."""
    add_sessions(shop, numbered(5))
    reconcile(store, NOON)
    return store


def overdue_seconds(store: Store) -> float:
    return store.look(None, interval_seconds=5).overdue_seconds


def test_a_session_whose_lease_has_expired_counts_as_late(queued: Store, clock: FakeClock) -> None:
    """It was claimed by a pass that was killed."""
    claim_all(queued, NOON)
    clock.advance(LEASE.total_seconds() - 0.001)
    assert overdue_seconds(queued) == 0
    clock.advance(0.001)
    assert overdue_seconds(queued) == LEASE.total_seconds()
    assert queued.look(None, interval_seconds=5).has_due


def test_a_session_claimed_in_the_future_counts_as_late(queued: Store, clock: FakeClock) -> None:
    clock.advance(3600)
    claim_all(queued, clock.now)
    clock.now = NOON + timedelta(seconds=7)
    assert overdue_seconds(queued) == 7


def test_sessions_due_by_now_or_by_the_tick_are_counted_up_to_a_limit(
    queued: Store, clock: FakeClock
) -> None:
    """Those that are being checked count too."""
    soon = NOON + timedelta(seconds=5)
    claims = claim_all(queued, NOON)
    record(queued, rechecks(claims[:2], soon, Outcome.ACTIVE))
    give_back(queued, claims[2:])

    def count(tick_seconds: float, limit: int = 10) -> int:
        tick = NOON + timedelta(seconds=tick_seconds)
        return queued.queue.count_due(tick=tick, limit=limit)

    assert [count(0), count(4.999), count(5)] == [3, 3, 5]
    claim_all(queued, NOON)
    assert [count(0), count(0, limit=2), count(5, limit=4), count(5, limit=5)] == [3, 2, 4, 5]
    clock.advance(4.999)
    assert count(0) == 3
    clock.advance(0.001)
    assert [count(0), count(-3600)] == [5, 5]

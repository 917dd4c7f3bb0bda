"""Leaders and helpers in any order, killed or slow: no session is lost or checked twice."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.domain.cadence import slot_at
from core.domain.model import Answer, Claim, Outcome, Recheck
from core.store.store import Store
from testkit.clock import FakeClock
from testkit.shops import Shop, add_sessions, numbered
from tests.support import database_of, reconcile

INTERVAL = timedelta(seconds=5)
LEASE = timedelta(seconds=20)
SESSIONS = 5

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), st.sampled_from("ABC"), st.sampled_from([0, -5, 3600])),
        st.tuples(st.just("is answered"), st.sampled_from("ABC")),
        st.tuples(st.just("is killed"), st.sampled_from("ABC")),
        st.tuples(st.just("stops"), st.sampled_from("ABC")),
        st.tuples(st.just("wait"), st.sampled_from([1, 5, 7, 25])),
    ),
    max_size=20,
)


class Workers:
    """Three workers on one queue, and when each session was last checked."""

    def __init__(self, shop: Shop, clock: FakeClock) -> None:
        self.shop, self.clock = shop, clock
        self.stores = {name: Store(database_of(shop, clock)) for name in "ABC"}
        self.stores["A"].prepare()

    def begin(self) -> None:
        for table in ("check", "pause"):
            self.shop.run(f"DELETE FROM checkout_session_{table}")
        self.shop.run("DELETE FROM checkout_session")
        add_sessions(self.shop, numbered(SESSIONS))
        self.claims: dict[str, list[Claim]] = {name: [] for name in "ABC"}
        self.held: dict[str, Claim] = {}
        self.checked: dict[str, datetime] = {}
        self.led: list[datetime] = []

    def do(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("tick", worker, offset):
                self.tick(worker, slot_at(self.clock.now, 5) + timedelta(seconds=offset))
            case ("is answered", worker):
                self.is_answered(worker)
            case ("is killed", worker):
                self.claims[worker] = []
            case ("stops", worker):
                for claim in self.claims[worker]:
                    if self.held.get(claim.session_id) is claim:
                        del self.held[claim.session_id]
                self.stores[worker].queue.release(self.claims[worker])
                self.claims[worker] = []
            case ("wait", seconds):
                self.clock.advance(seconds)

    def tick(self, worker: str, tick: datetime) -> None:
        store = self.stores[worker]
        view = store.look(tick, interval_seconds=5)
        if store.take_lead(view):
            self.led.append(view.tick)
            reconcile(store, view.tick)
        for claim in store.queue.claim_due(store.now(), tick=view.tick, lease=LEASE, limit=2):
            other = self.held.get(claim.session_id)
            assert other is None or other.claimed_until <= self.clock.now, "claimed twice"
            checked = self.checked.get(claim.session_id)
            slot = slot_at(self.clock.now, 5)
            assert checked is None or checked < slot, "checked twice within an interval"
            self.held[claim.session_id] = claim
            self.claims[worker].append(claim)

    def is_answered(self, worker: str) -> None:
        now = self.clock.now
        rechecks = []
        for claim in self.claims[worker]:
            if self.held.get(claim.session_id) is claim and claim.claimed_until > now:
                self.checked[claim.session_id] = now
                del self.held[claim.session_id]
            rechecks.append(Recheck(claim, Answer(Outcome.ACTIVE, 200), slot_at(now, 5) + INTERVAL))
        self.stores[worker].record(rechecks, [], self.stores[worker].now())
        self.claims[worker] = []


@pytest.fixture
def workers(shop: Shop, clock: FakeClock) -> Iterator[Workers]:
    workers = Workers(shop, clock)
    yield workers
    for store in workers.stores.values():
        store.close()


@given(STEPS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_order_of_events_loses_a_session_or_checks_one_twice(
    workers: Workers, steps: list[tuple[Any, ...]]
) -> None:
    """At the end every session is due again within a lease and an interval."""
    workers.begin()
    for step in steps:
        workers.do(step)
    assert len(set(workers.led)) == len(workers.led), "two leaders of one tick"
    workers.clock.advance((LEASE + INTERVAL).total_seconds())
    store = workers.stores["A"]
    view = store.look(None, interval_seconds=5)
    assert store.take_lead(view)
    reconcile(store, view.tick)
    claims = store.queue.claim_due(store.now(), tick=view.tick, lease=LEASE, limit=100)
    assert len(claims) == SESSIONS

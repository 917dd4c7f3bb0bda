"""Leaders and helpers in any order, killed or slow: no session is lost or checked twice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.domain.cadence import slot_at
from core.domain.model import Answer, Claim, Outcome, Recheck
from core.passes.held_claims import HOLD_SECONDS, HeldClaims
from core.store.queue import Claimed
from core.store.store import Store
from testkit.clock import FakeClock
from testkit.queue import OF_SESSIONS
from testkit.shops import Shop, add_sessions, numbered
from tests.support import database_of, reconcile

INTERVAL = timedelta(seconds=5)
LEASE = timedelta(seconds=20)
SESSIONS = 7
SOME = st.sets(st.integers(0, SESSIONS - 1), min_size=1)

WORKER = st.sampled_from("ABC")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), WORKER, st.sampled_from([0, 0, -5, 3600])),
        st.tuples(st.just("manual"), WORKER, st.none() | SOME),
        st.tuples(st.just("are answered"), WORKER, SOME),
        st.tuples(st.just("fail"), WORKER, SOME),
        st.tuples(st.just("gives back"), WORKER, SOME),
        st.tuples(st.just("writes"), WORKER, st.sampled_from([0.0, HOLD_SECONDS])),
        st.tuples(st.just("is killed"), WORKER),
        st.tuples(st.just("stops"), WORKER),
        st.tuples(st.just("shop closes"), SOME),
        st.tuples(st.just("shop opens"), SOME),
        st.tuples(st.just("wait"), st.sampled_from([1, 5, 7, 25])),
    ),
    max_size=25,
)

# `begin` empties the model for each order of events.
ONE_MODEL = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Worker:
    """One worker: what it is asking billing about, and what it holds."""

    def __init__(self, shop: Shop, clock: FakeClock) -> None:
        self.store = Store(database_of(shop, clock), batch_size=3)
        self.begin()

    def begin(self) -> None:
        self.held = HeldClaims()
        self.asking: dict[str, Claim] = {}
        self.outdated: set[str] = set()  # of these: closed since, and opened again
        self.at = 0.0  # by its event loop's clock


class Model:
    """Three workers on one queue, and what must be true of each session."""

    def __init__(self, shop: Shop, clock: FakeClock) -> None:
        self.shop, self.clock = shop, clock
        self.workers = {name: Worker(shop, clock) for name in "ABC"}
        self.workers["A"].store.prepare()

    def begin(self) -> None:
        for table in ("_batch", "_check", "_pause", ""):
            self.shop.run(f"DELETE FROM checkout_session{table}")
        self.clock.advance(3600)
        add_sessions(self.shop, numbered(SESSIONS))
        self.checked: dict[str, datetime] = {}
        self.closed: set[str] = set()
        self.led: list[datetime] = []
        for worker in self.workers.values():
            worker.begin()

    def do(self, step: tuple[Any, ...]) -> None:  # noqa: C901 (a case for each step)
        match step:
            case ("tick", name, offset):
                self.tick(name, slot_at(self.clock.now, 5) + timedelta(seconds=offset))
            case ("manual", name, numbers):
                self.manual(name, numbers)
            case ("are answered", name, numbers):
                self.answer(name, numbers, Outcome.ACTIVE)
            case ("fail", name, numbers):
                self.answer(name, numbers, Outcome.TIMEOUT)
            case ("gives back", name, numbers):
                worker = self.workers[name]
                worker.held.give_back(self.take(worker, numbers))
                self.write(name)
            case ("writes", name, seconds):
                self.workers[name].at += seconds
                self.write(name)
            case ("is killed", name):
                self.workers[name].begin()
            case ("stops", name):
                worker = self.workers[name]
                worker.asking.clear()
                worker.store.record(worker.held.take_all(), (), self.clock.now)
            case ("shop closes", numbers):
                self.set_status(numbers, "success")
                self.closed |= {f"s{number}" for number in numbers}
            case ("shop opens", numbers):
                self.open(numbers)
            case ("wait", seconds):
                self.clock.advance(seconds)
        self.assert_nothing_is_hidden()

    def set_status(self, numbers: Sequence[int], status: str) -> None:
        for number in numbers:
            self.shop.run(
                "UPDATE checkout_session SET status = %s WHERE id = %s", (status, f"s{number}")
            )

    def open(self, numbers: Sequence[int]) -> None:
        """One that was closed is a new session then: it may be asked about at once."""
        self.set_status(numbers, "open")
        for session_id in self.closed & {f"s{number}" for number in numbers}:
            self.closed.remove(session_id)
            self.checked.pop(session_id, None)
            for worker in self.workers.values():
                if session_id in worker.asking:
                    worker.outdated.add(session_id)

    def tick(self, name: str, tick: datetime) -> None:
        store = self.workers[name].store
        view = store.look(tick, interval_seconds=5)
        if store.take_lead(view):
            self.led.append(view.tick)
            reconcile(store, view.tick)
        claimed = store.queue.claim_due(store.now(), tick=view.tick, lease=LEASE, limit=6)
        for claim in self.hold(name, claimed):
            checked = self.checked.get(claim.session_id)
            slot = slot_at(self.clock.now, 5)
            assert checked is None or checked < slot, "checked twice within an interval"

    def manual(self, name: str, numbers: Sequence[int] | None) -> None:
        store, now = self.workers[name].store, self.clock.now
        ids = None if numbers is None else [f"s{number}" for number in numbers]
        reconcile(store, now, ids)
        claimed = store.queue.claim_unchecked(now, since=now, lease=LEASE, limit=6, session_ids=ids)
        self.hold(name, claimed)

    def hold(self, name: str, claimed: Claimed) -> list[Claim]:
        for claim in claimed.claims:
            for worker in self.workers.values():
                other = worker.asking.get(claim.session_id)
                if other is not None and claim.session_id not in worker.outdated:
                    assert other.claimed_until <= self.clock.now, "claimed twice"
            self.workers[name].asking[claim.session_id] = claim
            self.workers[name].outdated.discard(claim.session_id)
        self.workers[name].held.hold(claimed)
        return claimed.claims

    def take(self, worker: Worker, numbers: Sequence[int]) -> list[Claim]:
        found = [worker.asking.pop(f"s{number}", None) for number in numbers]
        return [claim for claim in found if claim is not None]

    def answer(self, name: str, numbers: Sequence[int], outcome: Outcome) -> None:
        worker, now = self.workers[name], self.clock.now
        claims = self.take(worker, numbers)
        for claim in claims:
            if claim.claimed_until > now and claim.session_id not in worker.outdated:
                self.checked[claim.session_id] = now
            worker.outdated.discard(claim.session_id)
        due = slot_at(now, 5) + INTERVAL
        worker.held.decide([Recheck(c, Answer(outcome, 200), due) for c in claims], worker.at)
        self.write(name)

    def write(self, name: str) -> None:
        worker, now = self.workers[name], self.clock.now
        worker.store.record(worker.held.take_ready(now, worker.at), (), now)

    def assert_nothing_is_hidden(self) -> None:
        """No session is due before its batch, which would hide it."""
        hidden = self.shop.run(
            f"SELECT c.session_id {OF_SESSIONS} WHERE b.due_at > CASE"
            " WHEN c.claimed_until > COALESCE(c.next_check_at, b.next_check_at)"
            " THEN c.claimed_until ELSE COALESCE(c.next_check_at, b.next_check_at) END"
        )
        assert hidden == []


@contextmanager
def a_model(shop: Shop, clock: FakeClock) -> Iterator[Model]:
    model = Model(shop, clock)
    yield model
    for worker in model.workers.values():
        worker.store.close()


@pytest.fixture
def model(shop: Shop, clock: FakeClock) -> Iterator[Model]:
    with a_model(shop, clock) as model:
        yield model


@pytest.fixture
def sqlite_model(sqlite_shop: Shop, clock: FakeClock) -> Iterator[Model]:
    with a_model(sqlite_shop, clock) as model:
        yield model


@given(STEPS)
@example(
    [
        ("manual", "A", None),
        ("shop closes", {0}),
        ("tick", "A", 0),
        ("shop opens", {0}),
        ("manual", "A", None),
    ]
)
# A claim lapses, another worker claims one of its sessions, and the first one writes.
@example(
    [
        ("tick", "A", 0),
        ("are answered", "A", {0}),
        ("wait", 25),
        ("manual", "B", {0}),
        ("are answered", "A", {1, 2}),
        *[("tick", "C", 0)] * 2,
    ]
)
# An answer comes when the rest of the batch is due again.
@example(
    [
        ("tick", "A", 0),
        ("are answered", "A", {0, 1}),
        ("gives back", "A", {2}),
        *[("wait", 1)] * 4,
        ("tick", "B", 0),
        *[("wait", 1)] * 2,
        ("are answered", "B", {2}),
        ("tick", "C", 0),
    ]
)
# A manual pass gives back a session that was not due.
@example(
    [
        ("tick", "C", 0),
        ("are answered", "C", {0, 1, 2}),
        ("wait", 1),
        ("manual", "B", {0}),
        ("stops", "B"),
        ("tick", "A", 0),
    ]
)
@settings(ONE_MODEL, max_examples=40)
def test_no_order_of_events_loses_a_session_or_checks_one_twice(
    model: Model, steps: list[tuple[Any, ...]]
) -> None:
    run(model, steps)


@pytest.mark.slow
@given(STEPS)
@settings(ONE_MODEL, max_examples=2000)
def test_none_of_many_orders_loses_a_session_or_checks_one_twice(
    sqlite_model: Model, steps: list[tuple[Any, ...]]
) -> None:
    """Rare orders, where they cost the least."""
    run(sqlite_model, steps)


def run(model: Model, steps: list[tuple[Any, ...]]) -> None:
    """At the end every open session is due again within a lease and an interval."""
    model.begin()
    for step in steps:
        model.do(step)
    assert len(set(model.led)) == len(model.led), "two leaders of one tick"
    model.clock.advance((LEASE + INTERVAL).total_seconds())
    store = model.workers["A"].store
    reconcile(store, model.clock.now)
    open_now = {i for (i,) in model.shop.run("SELECT id FROM checkout_session WHERE status='open'")}
    claimed: set[str] = set()
    while claims := store.queue.claim_due(
        model.clock.now, tick=model.clock.now, lease=LEASE, limit=6
    ).claims:
        claimed |= {claim.session_id for claim in claims}
    assert claimed == open_now

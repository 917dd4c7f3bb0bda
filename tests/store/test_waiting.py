"""Since when a session waits, on every engine."""

from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest

from core.domain.model import OpenCounts, Outcome
from core.domain.waiting import NOT_ASKED, Wait
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, numbered
from tests.store.claims import claim_all, rechecks, record, release_all
from tests.support import RULES, database_of, reconcile

SECOND = timedelta(seconds=1)
# When the sessions are due, and when billing still has not answered about one of them.
DUE, SILENT = NOON + 5 * SECOND, NOON + 15 * SECOND
TIMEOUT, FAILED = Outcome.TIMEOUT.value, Outcome.NETWORK_ERROR.value


def waits(store: Store, counts: OpenCounts | None = None) -> dict[str, Wait]:
    return dict(store.read_waiting(RULES, counts or OpenCounts()).causes)


@pytest.fixture
def silent(store: Store, shop: Shop, clock: FakeClock) -> Store:
    """Billing has answered about two of three sessions; the third is held by its own row."""
    add_sessions(shop, numbered(3))
    reconcile(store, NOON)
    record(store, rechecks(claim_all(store, NOON), DUE, Outcome.ACTIVE))
    clock.now = DUE + SECOND
    record(store, rechecks(claim_all(store, DUE)[:2], DUE + 5 * SECOND, Outcome.ACTIVE))
    clock.now = DUE + 4.6 * SECOND
    record(store)
    clock.now = SILENT
    return store


def test_a_session_waits_since_its_check_was_due(silent: Store, clock: FakeClock) -> None:
    """Also while billing has not answered yet; a failure changes nothing, a success ends it."""
    assert waits(silent) == {TIMEOUT: Wait(1, DUE)}
    clock.advance(60)
    claims = claim_all(silent, clock.now)
    [failing] = [claim for claim in claims if claim.has_due_time]
    others = [claim for claim in claims if claim is not failing]
    record(silent, rechecks(others, clock.now + 5 * SECOND, Outcome.ACTIVE))
    record(silent, rechecks([failing], clock.now + 5 * SECOND, Outcome.NETWORK_ERROR))
    assert waits(silent) == {Outcome.NETWORK_ERROR.value: Wait(1, DUE)}
    clock.advance(5)
    record(silent, rechecks(claim_all(silent, clock.now), clock.now + 5 * SECOND, Outcome.ACTIVE))
    assert waits(silent) == {}


def test_what_is_given_back_unanswered_waits_unasked(silent: Store) -> None:
    release_all(silent)
    assert waits(silent) == {NOT_ASKED: Wait(1, DUE)}


def test_a_failure_of_a_clock_that_was_ahead_counts_as_waiting(
    silent: Store, clock: FakeClock
) -> None:
    """Nobody knows for how long; the next failure begins it anew."""
    clock.now = NOON - timedelta(hours=1)
    assert waits(silent) == {
        NOT_ASKED: Wait(2, clock.now - 10 * SECOND),
        TIMEOUT: Wait(1, clock.now - 10 * SECOND),
    }
    reconcile(silent, clock.now)
    claims = claim_all(silent, clock.now)
    record(silent, rechecks(claims, clock.now + 5 * SECOND, Outcome.NETWORK_ERROR))
    assert waits(silent) == {}
    clock.advance(10)
    assert waits(silent) == {Outcome.NETWORK_ERROR.value: Wait(3, clock.now - 10 * SECOND)}


def test_under_a_limit_a_held_session_waits_for_its_turn(silent: Store) -> None:
    waiting = silent.read_waiting(RULES, OpenCounts(), is_limited=True)
    assert dict(waiting.causes) == {NOT_ASKED: Wait(1, DUE)}


@pytest.fixture
def small_batches(shop: Shop, clock: FakeClock) -> Iterator[Store]:
    """Batches of five: there are soon more of them than are read."""
    store = Store(database_of(shop, clock), batch_size=5)
    store.prepare()
    yield store
    store.close()


def open_sessions(store: Store, shop: Shop, word: str, count: int) -> None:
    add_sessions(shop, {f"{word}{n}": "c" for n in range(count)})
    reconcile(store, store.now())


def fail(store: Store, next_check_at: datetime, limit: int = 10_000) -> None:
    claims = claim_all(store, store.now(), limit)
    record(store, rechecks(claims, next_check_at, Outcome.NETWORK_ERROR))


def test_sessions_that_back_off_do_not_count_as_not_asked(
    small_batches: Store, shop: Shop, clock: FakeClock
) -> None:
    """Their batches are due later than a healthy session may be."""
    open_sessions(small_batches, shop, "fails", 100)
    fail(small_batches, NOON + 60 * SECOND)
    open_sessions(small_batches, shop, "new", 3)
    clock.advance(10)
    assert waits(small_batches) == {FAILED: Wait(100, NOON), NOT_ASKED: Wait(3, NOON)}


def test_overdue_sessions_that_fail_do_not_count_as_not_asked(
    small_batches: Store, shop: Shop, clock: FakeClock
) -> None:
    """Where most of what is due first was not asked about, and most of the rest fails."""
    open_sessions(small_batches, shop, "s", 250)
    fail(small_batches, DUE, limit=125)
    clock.now = SILENT
    many = OpenCounts(outcomes={"": 125, FAILED: 125, "active": 800})
    assert waits(small_batches, many)[NOT_ASKED].sessions == pytest.approx(125, rel=0.05)


def test_sessions_that_are_not_asked_are_found_behind_ones_that_fail(
    small_batches: Store, shop: Shop, clock: FakeClock
) -> None:
    open_sessions(small_batches, shop, "fails", 100)
    fail(small_batches, NOON + SECOND)
    clock.now = DUE
    open_sessions(small_batches, shop, "new", 100)
    clock.now = SILENT
    not_asked = waits(small_batches)[NOT_ASKED]
    assert not_asked == Wait(pytest.approx(100, rel=0.05), DUE)  # type: ignore[arg-type]


def test_no_more_wait_than_are_open(small_batches: Store, shop: Shop, clock: FakeClock) -> None:
    """How many were not asked about is an estimate."""
    open_sessions(small_batches, shop, "s", 250)
    fail(small_batches, DUE, limit=125)
    clock.now = SILENT
    counts = OpenCounts(outcomes={"": 125, FAILED: 125})
    found = waits(small_batches, counts)
    assert {cause: wait.sessions for cause, wait in found.items()} == {FAILED: 125, NOT_ASKED: 125}


def test_all_sessions_wait_that_a_clock_has_made_due_too_late(
    small_batches: Store, shop: Shop, clock: FakeClock
) -> None:
    open_sessions(small_batches, shop, "s", 250)
    claims = claim_all(small_batches, NOON)
    record(small_batches, rechecks(claims, NOON + timedelta(hours=1), Outcome.ACTIVE))
    clock.now = DUE
    assert waits(small_batches) == {NOT_ASKED: Wait(250, DUE - 10 * SECOND)}

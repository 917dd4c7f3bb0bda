"""Since when a session waits, on every engine."""

from datetime import timedelta

import pytest

from core.domain.model import OpenCounts, Outcome
from core.domain.waiting import NOT_ASKED, Wait
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, numbered
from tests.store.claims import claim_all, rechecks, record, release_all
from tests.support import RULES, reconcile

SECOND = timedelta(seconds=1)
# When the sessions are due, and when billing still has not answered about one of them.
DUE, SILENT = NOON + 5 * SECOND, NOON + 15 * SECOND
TIMEOUT = Outcome.TIMEOUT.value


def waits(store: Store) -> dict[str, Wait]:
    return dict(store.read_waiting(RULES, OpenCounts()).causes)


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

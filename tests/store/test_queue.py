"""The queue on every engine: what is claimed, recorded and given back."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import partial

import pytest

from core.domain.model import Outcome, Reason
from core.store.store import Store, View
from testkit.clock import NOON, FakeClock
from testkit.queue import claimed
from testkit.shops import Shop, add_sessions, numbered
from tests.store.claims import LEASE, claim_all, claim_unchecked, give_back, ids, rechecks, record
from tests.support import database_of, reconcile


def view(store: Store, tick: datetime | None = None) -> View:
    return store.look(tick, interval_seconds=5)


def test_a_session_closed_before_it_is_claimed_is_not_checked(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(2))
    reconcile(store, NOON)
    shop.run("UPDATE checkout_session SET status = 'failure' WHERE id = 's0'")
    claims = claim_all(store, NOON)
    assert ids(claims) == ["s1"]
    record(store, rechecks(claims, NOON, Outcome.ACTIVE))
    assert shop.run("SELECT session_id FROM checkout_session_check") == [("s1",)]


UNUSUAL_IDS = [
    ';|,"',
    'a\\"b\\\\u0041',
    "line\n\t\r",
    "\x01\x7f",
    "\u2028\U0001f3c1",
    "'%s' {}",
    "NULL",
]


def test_ids_are_claimed_as_the_shop_has_them(store: Store, shop: Shop) -> None:
    """A claim reads several columns as one text."""
    sessions = {id_: f"checkout {id_}" for id_ in UNUSUAL_IDS}
    add_sessions(shop, sessions)
    reconcile(store, NOON)
    claims = claim_all(store, NOON)
    assert {claim.session_id: claim.billing_checkout_id for claim in claims} == sessions


def test_an_sqlite_id_that_is_no_text_keeps_no_other_from_being_claimed(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    add_sessions(sqlite_shop, numbered(1))
    sqlite_shop.run("INSERT INTO checkout_session (id, status) VALUES (X'FF', 'open')")
    one = Store(database_of(sqlite_shop, clock))
    one.prepare()
    reconcile(one, NOON)
    assert sorted(ids(claim_all(one, NOON))) == ["s0", "\udcff"]
    one.close()


def test_a_late_result_does_not_restore_a_dropped_session(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    """The session was closed and dropped while the check was in flight."""
    add_sessions(shop, numbered(1))
    reconcile(store, NOON)
    claims = claim_all(store, NOON)
    shop.run("UPDATE checkout_session SET status = 'success'")
    reconcile(store, NOON)
    record(store, rechecks(claims, NOON, Outcome.ACTIVE))
    assert shop.run("SELECT session_id FROM checkout_session_check") == []


def test_a_late_result_is_not_kept_for_a_session_that_came_later(store: Store, shop: Shop) -> None:
    """Its row does not get the number of the one that was dropped."""
    add_sessions(shop, {"closed": "c"})
    reconcile(store, NOON)
    claims = claim_all(store, NOON)
    shop.run("UPDATE checkout_session SET status = 'success'")
    reconcile(store, NOON)
    add_sessions(shop, {"new": "c"})
    reconcile(store, NOON)
    record(store, rechecks(claims, NOON, Outcome.TIMEOUT))
    assert shop.run("SELECT session_id, last_outcome FROM checkout_session_check") == [
        ("new", None)
    ]


def check_all(store: Store, due_after: Mapping[str, int]) -> None:
    """Check every session; each is due again at NOON plus its number of seconds."""
    for claim in claim_all(store, NOON):
        due = NOON + timedelta(seconds=due_after[claim.session_id])
        record(store, rechecks([claim], due, Outcome.ACTIVE))


@pytest.mark.parametrize("reason", [Reason.TICK, Reason.MANUAL])
def test_the_longest_due_sessions_are_claimed_first(
    store: Store, shop: Shop, clock: FakeClock, reason: Reason
) -> None:
    add_sessions(shop, numbered(3))
    one = Store(database_of(shop, clock), batch_size=1)
    reconcile(one, NOON)
    check_all(one, {"s0": 15, "s1": 5, "s2": 10})
    clock.advance(20)
    claim = partial(one.queue.claim_due, clock.now, tick=clock.now)
    if reason is Reason.MANUAL:
        claim = partial(one.queue.claim_unchecked, clock.now, since=clock.now)
    order = [claim(lease=LEASE, limit=1).claims[0].session_id for _ in range(3)]
    one.close()
    assert order == ["s1", "s2", "s0"]


def test_closed_sessions_do_not_hide_due_ones_behind_them(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(3))
    reconcile(store, NOON)
    check_all(store, {"s0": 5, "s1": 10, "s2": 15})
    shop.run("UPDATE checkout_session SET status = 'success' WHERE id <> 's2'")
    clock.advance(20)
    assert [claim.session_id for claim in claim_all(store, clock.now, limit=1)] == ["s2"]


def test_a_session_is_not_claimed_again_before_its_lease_ends(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(1))
    reconcile(store, NOON)
    assert len(claim_all(store, NOON)) == 1
    clock.advance(LEASE.total_seconds() - 0.001)
    assert claim_all(store, clock.now) == []
    assert claim_unchecked(store, clock.now) == []
    assert reconcile(store, clock.now).in_flight == 1
    clock.advance(0.001)
    assert ids(claim_all(store, clock.now)) == ["s0"]


def test_recording_ends_the_claim_and_sets_the_next_check(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(2))
    reconcile(store, NOON)
    record(store, rechecks(claim_all(store, NOON), NOON + timedelta(seconds=5), Outcome.ACTIVE))
    row = "SELECT last_outcome, last_status_code, consecutive_failures FROM checkout_session_check"
    assert shop.run(row) == [("active", 200, 0)] * 2
    assert claimed(shop) == 0
    assert reconcile(store, NOON).not_due == 2
    assert claim_all(store, NOON) == []
    clock.advance(5)
    assert len(claim_all(store, clock.now)) == 2


def test_due_at_the_tick_is_claimed_though_the_clock_is_behind(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    """The database's clock may be a little behind the tick's."""
    add_sessions(shop, numbered(1))
    reconcile(store, NOON)
    tick = NOON + timedelta(seconds=5)
    record(store, rechecks(claim_all(store, NOON), tick, Outcome.ACTIVE))
    clock.advance(4.9)
    assert reconcile(store, tick).not_due == 0
    assert ids(claim_all(store, tick)) == ["s0"]


def test_consecutive_failures_are_counted_until_a_success(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(1))
    reconcile(store, NOON)
    for outcome, failures in (
        (Outcome.TIMEOUT, 1),
        (Outcome.NETWORK_ERROR, 2),
        (Outcome.NOT_FOUND, 0),
        (Outcome.TIMEOUT, 1),
    ):
        record(store, rechecks(claim_all(store, NOON), NOON, outcome))
        assert shop.run(
            "SELECT consecutive_failures, last_outcome FROM checkout_session_check"
        ) == [(failures, outcome.value)]
    assert claim_all(store, NOON)[0].consecutive_failures == 1


def test_released_claims_are_as_due_as_before(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(3))
    reconcile(store, NOON)
    before = claim_all(store, NOON)
    give_back(store, before[:2])
    assert ids(claim_all(store, NOON)) == ids(before[:2])


def test_a_result_after_the_lease_leaves_the_new_claim_alone(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(1))
    reconcile(store, NOON)
    late = claim_all(store, NOON)
    clock.advance(LEASE.total_seconds())
    [current] = claim_all(store, clock.now)
    record(store, rechecks(late, NOON, Outcome.TIMEOUT))
    give_back(store, late)
    assert claim_all(store, clock.now) == []
    record(store, rechecks([current], clock.now, Outcome.ACTIVE))
    row = "SELECT consecutive_failures, last_outcome FROM checkout_session_check"
    assert shop.run(row) == [(0, "active")]


def test_a_manual_pass_claims_sessions_that_are_not_due_once(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    """Not again after they were checked in the same pass."""
    add_sessions(shop, numbered(3))
    reconcile(store, NOON)
    record(store, rechecks(claim_all(store, NOON), NOON + timedelta(hours=1), Outcome.ACTIVE))
    clock.advance(1)
    since = clock.now
    claims = claim_unchecked(store, since)
    assert len(claims) == 3
    record(store, rechecks(claims, NOON + timedelta(hours=1), Outcome.ACTIVE))
    assert claim_unchecked(store, since) == []


def test_a_manual_pass_with_ids_claims_and_counts_only_those(store: Store, shop: Shop) -> None:
    add_sessions(shop, {"a": "1", "b": "2", "\u65e5\u672c": "3"})
    add_sessions(shop, {"done": "4"}, status="success")
    given = ["a", "\u65e5\u672c", "done", "nobody", "\U0001f600", "\ud800", "x' OR '1'='1"]
    assert reconcile(store, NOON, given).open == 2
    claims = claim_unchecked(store, NOON, given)
    assert ids(claims) == ["a", "\u65e5\u672c"]
    assert claim_unchecked(store, NOON, ["\ud800"]) == []


def test_overdue_is_that_of_the_most_overdue_unclaimed_session(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(3))
    reconcile(store, NOON)
    check_all(store, {"s0": 15, "s1": 5, "s2": 10})
    clock.advance(17.25)
    assert view(store).overdue_seconds == 12.25
    claim_all(store, clock.now)
    assert view(store).overdue_seconds == 0.0

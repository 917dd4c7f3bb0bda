"""Reconcile: new sessions are adopted, closed ones dropped, all counted."""

from datetime import timedelta

import pytest

from core.domain.model import Answer, OpenCounts, Outcome, Recheck
from core.passes import writer
from core.store import reconcile as reconcile_module
from core.store.reconcile import Reconciliation
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, numbered
from tests.due_sessions import add_due_sessions
from tests.store.claims import LEASE, claim_all, ids, record
from tests.store.fake_bus import PAID
from tests.support import RULES, FakeBilling, Passes, database_of, reconcile


def test_new_open_sessions_are_adopted_and_due_at_once(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(3))
    add_sessions(shop, {"done": "checkout_done"}, status="success")
    assert reconcile(store, NOON) == OpenCounts(3, 0, 0, outcomes={"": 3}, ages={"10m": 3})
    claims = claim_all(store, NOON)
    assert ids(claims) == ["s0", "s1", "s2"]
    assert {c.billing_checkout_id for c in claims} == {f"checkout_active_{n}" for n in range(3)}
    assert {c.first_seen_at for c in claims} == {NOON}
    assert {c.claimed_until for c in claims} == {NOON + LEASE}


def test_a_thousand_new_sessions_are_adopted_at_once(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(1201))
    assert reconcile(store, NOON).open == 1201
    assert len(claim_all(store, NOON)) == 1201


def test_sessions_that_are_no_longer_open_are_dropped(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(3))
    reconcile(store, NOON)
    shop.run("UPDATE checkout_session SET status = 'success' WHERE id = 's1'")
    shop.run("DELETE FROM checkout_session WHERE id = 's2'")
    assert reconcile(store, NOON).open == 1
    assert shop.run("SELECT session_id FROM checkout_session_check") == [("s0",)]


def test_sessions_due_too_late_are_found_although_their_batch_is_claimed(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    """A clock was ahead. One session of the batch is due, so each tick claims it first."""
    add_sessions(shop, numbered(3))
    reconcile(store, NOON)
    tomorrow = NOON + timedelta(days=1)
    shop.run("UPDATE checkout_session_batch SET next_check_at = %s", (tomorrow,))
    due = "UPDATE checkout_session_check SET next_check_at = %s WHERE session_id = %s"
    shop.run(due, (NOON, "s0"))
    shop.run(due, (tomorrow, "s1"))
    claims = claim_all(store, NOON)
    assert ids(claims) == ["s0"]
    reconcile(store, NOON)
    next_slot = NOON + timedelta(seconds=5)
    record(store, [Recheck(claims[0], Answer(Outcome.ACTIVE, 200), next_slot)])
    clock.now = next_slot
    assert ids(claim_all(store, next_slot)) == ["s0", "s1", "s2"]


@pytest.mark.parametrize("piece", [1, 3, 7, 100])
def test_reconcile_in_pieces_gives_the_same_result_as_at_once(
    shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(reconcile_module, "PIECE_SESSIONS", piece)
    add_due_sessions(shop, clock, 12)
    store = Store(database_of(shop, clock))
    claims = claim_all(store, NOON)
    shop.run("UPDATE checkout_session SET status = 'success' WHERE id IN ('s0', 's11', 's9')")
    add_sessions(shop, {"": "empty", "A": "new", "é": "new", "zz": "new"})
    clock.advance(1)
    counted = reconcile(store, NOON)
    still_claimed = sum(claim.session_id not in ("s0", "s11", "s9") for claim in claims)
    assert (counted.open, counted.in_flight, counted.not_due) == (13, still_claimed, 0)
    known = shop.run("SELECT session_id FROM checkout_session_check ORDER BY session_id")
    assert known == shop.run("SELECT id FROM checkout_session WHERE status = 'open' ORDER BY id")
    store.close()


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_walk_knows_how_many_sessions_are_ahead(
    shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    """By the order that the ids have in the shop, open or not."""
    monkeypatch.setattr(reconcile_module, "PIECE_SESSIONS", 1)
    ids = ["a", "B", "é", "zz"]
    add_sessions(shop, dict.fromkeys(ids, "c"))
    store = Store(database_of(shop, clock))
    store.prepare()
    walk = store.reconciliation(NOON, RULES)
    for _ in range(pieces):
        walk.reconcile_next_piece()
    shop.run("UPDATE checkout_session SET status = 'success'")
    assert walk.count_ahead([*ids, "\udcff"]) == len(ids) - pieces
    store.close()


async def test_sessions_closed_during_a_walk_count_once(
    passes: Passes, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile_module, "PIECE_SESSIONS", 1)
    monkeypatch.setattr(writer, "WRITE_EVERY_SECONDS", 0)  # between the pieces
    add_sessions(passes.shop, numbered(100))
    await passes.run()
    clock.advance(5)
    billing.answers = dict.fromkeys(map(str, numbered(100).values()), PAID)
    summary = await passes.run(STATUS_UPDATES="true")
    assert summary.outcomes == {Outcome.CLOSED: 100}
    assert (summary.open, summary.skipped) == (100, {})


async def test_a_slow_reconcile_is_done_less_often(
    passes: Passes, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most a tenth of the time: after two seconds of work come eighteen without."""
    add_sessions(passes.shop, numbered(2))
    next_piece = Reconciliation.reconcile_next_piece

    def slow(reconciliation: Reconciliation) -> bool:
        reconciliation.took += timedelta(seconds=2)
        return next_piece(reconciliation)

    monkeypatch.setattr(Reconciliation, "reconcile_next_piece", slow)
    counted = []
    for _ in range(9):
        summary = await passes.run()
        counted.append(summary.counted)
        assert (summary.led, summary.open, summary.checked) == (True, 2, 2)
        clock.advance(5)
    assert counted == [True, False, False, False, True, False, False, False, True]


async def test_sessions_without_a_batch_are_queued_however_slow_a_reconcile_is(
    passes: Passes, clock: FakeClock
) -> None:
    """The operator has upgraded the tables of a large shop by hand."""
    add_sessions(passes.shop, numbered(2))
    await passes.run()
    passes.shop.run("UPDATE checkout_session_check SET batch_id = NULL")
    passes.shop.run("DELETE FROM checkout_session_batch")
    passes.shop.run("UPDATE checkout_session_pause SET count_again_at = '2026-01-15T12:09:00Z'")
    clock.advance(5)
    assert (await passes.run()).checked == 2

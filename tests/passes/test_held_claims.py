"""What a pass holds, and when it gives a batch back."""

from datetime import timedelta

import pytest

from core.domain.model import Answer, BatchClaim, Claim, Outcome, Recheck
from core.passes.held_claims import HOLD_SECONDS, SETTLE_BEFORE, HeldClaims
from core.store.queue import Claimed
from core.store.results import Results
from testkit.clock import NOON

UNTIL = NOON + timedelta(seconds=20)
DUE = NOON + timedelta(seconds=5)


def claim(rowid: int, batch_id: int | None = 1) -> Claim:
    return Claim(rowid, f"s{rowid}", "c", NOON, 0, NOON, UNTIL, batch_id)


CLAIMS = [claim(1), claim(2), claim(3)]


def recheck(claim: Claim) -> Recheck:
    return Recheck(claim, Answer(Outcome.ACTIVE, 200), DUE)


@pytest.fixture
def held() -> HeldClaims:
    """A batch of three."""
    held = HeldClaims()
    held.hold(Claimed([BatchClaim(1, NOON, UNTIL, NOON, True, CLAIMS, ())]))
    return held


def test_a_batch_is_given_back_when_all_of_it_is_decided(held: HeldClaims) -> None:
    held.decide([recheck(CLAIMS[0]), recheck(CLAIMS[1])], at=0.0)
    assert not held.take_ready(NOON, at=HOLD_SECONDS / 2)
    held.decide([recheck(CLAIMS[2])], at=0.5)
    [settlement] = held.take_ready(NOON, at=0.5).settlements
    assert (len(settlement.rechecks), settlement.waiting, settlement.left) == (3, [], [])
    assert len(held) == 0


@pytest.mark.parametrize(
    ("seconds", "now"), [(HOLD_SECONDS, NOON), (0.1, DUE - SETTLE_BEFORE)], ids=["held", "due"]
)
def test_a_session_that_waits_is_then_held_by_itself(
    held: HeldClaims, seconds: float, now: object
) -> None:
    """After HOLD_SECONDS, or shortly before the others are due."""
    held.decide([recheck(CLAIMS[0])], at=0.0)
    [settlement] = held.take_ready(now, at=seconds).settlements  # type: ignore[arg-type]
    assert settlement.waiting == CLAIMS[1:]
    assert len(held) == 2
    held.decide([recheck(CLAIMS[1])], at=9.0)
    held.give_back([CLAIMS[2]])
    assert held.take_ready(NOON, at=9.0) == Results([], [recheck(CLAIMS[1])], [CLAIMS[2]])
    assert len(held) == 0


def test_a_batch_that_nobody_answers_about_stays(held: HeldClaims) -> None:
    assert not held.take_ready(UNTIL, at=3600.0)


def test_what_is_given_back_is_free_at_once(held: HeldClaims) -> None:
    held.decide([recheck(CLAIMS[0])], at=0.0)
    held.give_back([CLAIMS[1]])
    [settlement] = held.take_ready(NOON, at=0.0).settlements
    assert (settlement.left, settlement.waiting) == ([CLAIMS[1]], [CLAIMS[2]])


def test_a_session_with_a_status_change_leaves_its_batch(held: HeldClaims) -> None:
    held.forget(CLAIMS[:2], at=0.0)
    held.decide([recheck(CLAIMS[2])], at=0.0)
    [settlement] = held.take_ready(NOON, at=0.0).settlements
    assert [r.claim for r in settlement.rechecks] == CLAIMS[2:]


def test_a_status_change_is_a_decision_too(held: HeldClaims) -> None:
    """One that was deferred is due in the next slot, and does not wait for those that hang."""
    held.forget(CLAIMS[:1], at=5.0)
    assert not held.take_ready(NOON, at=5.0)
    [settlement] = held.take_ready(NOON, at=5.0 + HOLD_SECONDS).settlements
    assert settlement.waiting == CLAIMS[1:]


def test_at_the_end_of_a_pass_the_rest_is_given_back(held: HeldClaims) -> None:
    by_itself = claim(9, None)
    held.hold(Claimed(sessions=[by_itself]))
    held.decide([recheck(CLAIMS[0])], at=0.0)
    results = held.take_all()
    assert [s.left for s in results.settlements] == [CLAIMS[1:]]
    assert results.released == [by_itself]
    assert len(held) == 0


def test_an_answer_to_an_earlier_claim_does_not_end_the_current_one(held: HeldClaims) -> None:
    """The pass was frozen, and then claimed the same batch again."""
    earlier = recheck(claim(1))
    held.decide([earlier], at=0.0)
    assert held.take_ready(NOON, at=0.0) == Results([], [earlier], [])
    assert len(held) == 3

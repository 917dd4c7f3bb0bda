"""From which slot the next check counts: the tick's, or the claim's if that is later."""

from datetime import timedelta

import pytest

from core.domain.decision import decide
from core.domain.model import Answer, Claim, Outcome, Recheck
from core.settings import Settings
from testkit.clock import NOON


def due_after(*, claimed: float, tick: float, answered: float, cadence: str = "5s") -> float:
    """The seconds after NOON at which a session is due, by those at which it was claimed."""
    claimed_at = NOON + timedelta(seconds=claimed)
    claim = Claim(1, "s", "c", NOON, 0, claimed_at, claimed_at + timedelta(seconds=20))
    settings = Settings.from_env({"DATABASE_URL": "sqlite:///nowhere", "CHECK_CADENCE": cadence})
    decision = decide(
        claim,
        Answer(Outcome.ACTIVE, 200, 0.1),
        tick=NOON + timedelta(seconds=tick),
        answered_after=timedelta(seconds=round(answered - claimed, 6)).total_seconds(),
        rules=settings.check_rules(),
        choose=lambda _low, high: high,
    )
    assert isinstance(decision, Recheck)
    return (decision.next_check_at - NOON).total_seconds()


@pytest.mark.parametrize(
    ("claimed", "tick", "answered", "due"),
    [
        (0.1, 0, 0.3, 5),
        (4.9, 0, 4.95, 5),
        (4.8, 5, 5.1, 10),  # the database's clock is behind the loop's
        (0.1, 5, 0.3, 10),  # by almost an interval
        (12.3, 0, 12.5, 15),  # a long pass claimed it in a later slot
        (10.0, 0, 10.2, 15),
        (4.9, 0, 5.0, 10),  # the answer came in the next slot
        (4.9, 0, 10.1, 15),
    ],
)
def test_the_next_check_counts_from_the_later_of_tick_and_claim(
    claimed: float, tick: float, answered: float, due: float
) -> None:
    assert due_after(claimed=claimed, tick=tick, answered=answered) == due


def test_a_slow_cadence_counts_from_the_slot_of_the_claim() -> None:
    assert due_after(claimed=12.3, tick=0, answered=14, cadence="30s") == 40
    assert due_after(claimed=4.8, tick=5, answered=5.1, cadence="30s") == 35

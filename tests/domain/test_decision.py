"""What is recorded for an answer, and when the session is due again."""

from datetime import timedelta

from core.domain.decision import decide
from core.domain.model import Answer, Claim, Outcome, Recheck
from core.settings import Settings
from testkit.clock import NOON


def test_a_slow_answer_is_next_due_in_the_slot_after_it() -> None:
    """An answer that takes longer than the interval skips the slots that have passed."""
    claim = Claim(1, "s", "c", NOON, 0, NOON, NOON + timedelta(seconds=20))
    settings = Settings.from_env({"DATABASE_URL": "sqlite:///nowhere.db"})
    for took, due in ((0.4, 5), (4.999, 5), (5.0, 10), (7.2, 10), (10.1, 15)):
        result = decide(
            claim,
            Answer(Outcome.ACTIVE, 200, took),
            answered_after=took,
            tick=NOON,
            rules=settings.check_rules(),
            choose=lambda _low, high: high,
        )
        assert isinstance(result, Recheck)
        assert result.next_check_at == NOON + timedelta(seconds=due)

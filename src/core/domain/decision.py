"""What an answer means for its session: pure, from plain values, time included."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from core.domain.cadence import Cadence, next_check, slot_at
from core.domain.model import Answer, Claim, Decision, Recheck, SessionStatus, StatusChange


@dataclass(frozen=True, slots=True)
class CheckRules:
    """The settings that a decision depends on."""

    interval_seconds: int
    cadence: Cadence
    backoff_max_seconds: int
    expires_after_seconds: int | None  # None: a session never expires

    def longest_waits(self) -> Iterator["LongestWait"]:
        """How far ahead a session's next check can lie, for each step of the cadence."""
        # A tick may be an interval ahead of the database's clock, and an answer may come late.
        slack = timedelta(seconds=3 * self.interval_seconds)
        for every, until in self.cadence.steps:
            healthy = timedelta(seconds=max(every, self.interval_seconds)) + slack
            backoff = timedelta(seconds=self.backoff_max_seconds) + slack
            max_age = timedelta(seconds=until) if math.isfinite(until) else None
            yield LongestWait(healthy, max(healthy, backoff), max_age)


class LongestWait(NamedTuple):
    """The longest wait for the next check of sessions up to an age."""

    healthy: timedelta
    failing: timedelta
    max_age: timedelta | None  # None: no limit


def decide(
    claim: Claim,
    answer: Answer,
    *,
    tick: datetime,
    answered_at: datetime,
    rules: CheckRules,
    choose: Callable[[int, int], int],
) -> Decision:
    """Decide whether a session stays open, and when it is due again.

    The next due time counts from the tick, or from the slot of the claim if a long pass claimed the
    session later. It does not count from the end of the check, because then every session would
    miss its next slot. Only if billing took so long that this time has passed, the session is due
    in the first slot after the answer.

    The session's status follows billing's. An old session that billing has just said to be open,
    with no payment in progress, becomes `timeout` if the rules say so. `choose(low, high)` draws
    the backoff's jitter.
    """
    interval = rules.interval_seconds
    age_seconds = (claim.claimed_at - claim.first_seen_at).total_seconds()
    new_status = _new_status(answer, age_seconds, rules)
    failed = answer.outcome.is_error or new_status is not None
    next_check_at = next_check(
        slot_at(max(claim.claimed_at, tick), interval),
        interval_seconds=interval,
        every_seconds=rules.cadence.every_seconds(age_seconds),
        failures=claim.consecutive_failures + 1 if failed else 0,
        backoff_max_seconds=rules.backoff_max_seconds,
        choose=choose,
    )
    if new_status is None and next_check_at > answered_at:
        return Recheck(claim, answer, next_check_at)
    next_slot = slot_at(max(answered_at, tick), interval) + timedelta(seconds=interval)
    if next_check_at <= answered_at:
        next_check_at = next_slot
    if new_status is None:
        return Recheck(claim, answer, next_check_at)
    return StatusChange(
        claim, answer, new_status, retry_at=next_slot, retry_after_refusal_at=next_check_at
    )


def _new_status(answer: Answer, age_seconds: float, rules: CheckRules) -> SessionStatus | None:
    """The status that the session takes; None if it stays open."""
    if answer.status is not SessionStatus.OPEN:
        return answer.status
    if answer.in_progress:
        return None
    # A session expires only here, after billing has just said that it is not paid.
    expires_after = rules.expires_after_seconds
    expired = expires_after is not None and age_seconds >= expires_after
    return SessionStatus.TIMEOUT if expired else None

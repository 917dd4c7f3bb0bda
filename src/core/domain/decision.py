"""What an answer means for its session: pure, from plain values, time included."""

import math
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from core.domain.cadence import Cadence, next_check, slot_at
from core.domain.model import Answer, Claim, Decision, Recheck, SessionStatus, StatusChange


class CheckRules:  # not a tuple, whose hash is slow
    """The settings that a decision depends on."""

    def __init__(
        self,
        interval_seconds: int,
        cadence: Cadence,
        backoff_max_seconds: int,
        expires_after_seconds: int | None,  # None: a session never expires
    ) -> None:
        self.interval_seconds = interval_seconds
        self.cadence = cadence
        self.backoff_max_seconds = backoff_max_seconds
        self.expires_after_seconds = expires_after_seconds

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
    answered_after: float,
    rules: CheckRules,
    choose: Callable[[int, int], int],
) -> Decision:
    """Decide whether a session stays open, and when it is due again.

    The next due time counts from the tick, or from the slot of the claim if a long pass claimed the
    session later. It does not count from the end of the check, because then every session would
    miss its next slot. Only if billing took so long that this time has passed, the session is due
    in the first slot after the answer, which came `answered_after` seconds after the claim.

    The session's status follows billing's. An old session that billing has just said to be open,
    with no payment in progress, becomes `timeout` if the rules say so. `choose(low, high)` draws
    the backoff's jitter.
    """
    new_status = _new_status(claim, answer, rules)
    times = claim.claimed_at, claim.first_seen_at, tick
    if new_status is None and not answer.outcome.is_error:
        next_check_at, due_after = _due_if_healthy(*times, rules)
    else:
        next_check_at, due_after = _due(*times, rules, claim.consecutive_failures + 1, choose)
    if new_status is None and due_after > answered_after:
        return Recheck(claim, answer, next_check_at)
    interval = rules.interval_seconds
    answered_at = claim.claimed_at + timedelta(seconds=answered_after)
    next_slot = slot_at(max(answered_at, tick), interval) + timedelta(seconds=interval)
    if due_after <= answered_after:
        next_check_at = next_slot
    if new_status is None:
        return Recheck(claim, answer, next_check_at)
    return StatusChange(
        claim, answer, new_status, retry_at=next_slot, retry_after_refusal_at=next_check_at
    )


def _due(  # noqa: PLR0917 (called in two places)
    claimed_at: datetime,
    first_seen_at: datetime,
    tick: datetime,
    rules: CheckRules,
    failures: int,
    choose: Callable[[int, int], int],
) -> tuple[datetime, float]:
    """The due time, and how many seconds after the claim that is."""
    interval = rules.interval_seconds
    at = next_check(
        slot_at(max(claimed_at, tick), interval),
        interval_seconds=interval,
        every_seconds=rules.cadence.every_seconds((claimed_at - first_seen_at).total_seconds()),
        failures=failures,
        backoff_max_seconds=rules.backoff_max_seconds,
        choose=choose,
    )
    return at, (at - claimed_at).total_seconds()


@lru_cache(maxsize=1024)  # the sessions of a batch were first seen, and claimed, at the same times
def _due_if_healthy(
    claimed_at: datetime, first_seen_at: datetime, tick: datetime, rules: CheckRules
) -> tuple[datetime, float]:
    return _due(claimed_at, first_seen_at, tick, rules, 0, max)


def _new_status(claim: Claim, answer: Answer, rules: CheckRules) -> SessionStatus | None:
    """The status that the session takes; None if it stays open."""
    if answer.status is not SessionStatus.OPEN:
        return answer.status
    if answer.in_progress or rules.expires_after_seconds is None:
        return None
    # A session expires only here, after billing has just said that it is not paid.
    age_seconds = (claim.claimed_at - claim.first_seen_at).total_seconds()
    return SessionStatus.TIMEOUT if age_seconds >= rules.expires_after_seconds else None

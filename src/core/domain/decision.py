"""What an answer means for its session: pure, of plain values, time included."""

from collections.abc import Callable
from datetime import datetime, timedelta

from core.domain.cadence import next_check, slot_at
from core.domain.model import Answer, Claim, Result, SessionStatus
from core.settings import Settings


def decide(
    claim: Claim,
    answer: Answer,
    *,
    tick: datetime,
    answered_at: datetime,
    settings: Settings,
    choose: Callable[[int, int], int],
) -> Result:
    """What to record of an answer, and when the session is due again.

    The next due time counts from the tick, or the slot of the claim when a long pass made it later;
    not from the end of the check, which would cost every session its next slot. Only where it has
    passed by then, because billing took so long, it is the first slot after the answer.

    The session's status follows billing's, and an old session that billing has just said to be open
    becomes `timeout`, as far as the settings allow. `choose(low, high)` is the backoff's jitter.
    """
    interval = settings.interval_seconds
    age_seconds = (claim.claimed_at - claim.first_seen_at).total_seconds()
    new_status = answer.status
    expires_after = settings.expires_after_seconds
    if new_status is SessionStatus.OPEN:
        # Only here: billing has just said that the session is not paid.
        expired = expires_after is not None and age_seconds >= expires_after
        new_status = SessionStatus.TIMEOUT if expired else None
    failed = answer.outcome.is_error or new_status is not None
    next_check_at = next_check(
        slot_at(max(claim.claimed_at, tick), interval),
        interval_seconds=interval,
        every_seconds=settings.cadence.every_seconds(age_seconds),
        failures=claim.consecutive_failures + 1 if failed else 0,
        backoff_max_seconds=settings.backoff_max_seconds,
        choose=choose,
    )
    if new_status is None and next_check_at > answered_at:
        return Result(claim, answer, next_check_at)
    next_slot = slot_at(max(answered_at, tick), interval) + timedelta(seconds=interval)
    return Result(
        claim,
        answer,
        next_check_at if next_check_at > answered_at else next_slot,
        new_status,
        try_again_at=None if new_status is None else next_slot,
    )

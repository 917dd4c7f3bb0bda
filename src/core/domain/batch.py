"""What is written when a batch is given back: pure, from plain values.

A batch is up to MAX_BATCH sessions that are due together. Only what differs from the batch is
written to a session's own row, so that a check that finds nothing new writes nothing there.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from core.domain.model import BatchClaim, Claim, Outcome, Recheck

# A batch of 200 costs hardly less a session; a small one is held up by few, and found by helpers in
# small shops too.
MAX_BATCH = 50


class CheckRecord(NamedTuple):
    """What a session's own row keeps of one check."""

    claim: Claim
    outcome: Outcome
    status_code: int | None
    next_check_at: datetime | None  # None: with its batch


class Settlement(NamedTuple):
    """What becomes of a claimed batch and of its sessions."""

    batch: BatchClaim
    rechecks: Sequence[Recheck] = ()
    waiting: Sequence[Claim] = ()  # still being asked: they get claims of their own
    left: Sequence[Claim] = ()  # given back unasked: their due time stays


class BatchRecord(NamedTuple):
    """What a settlement writes."""

    batch: BatchClaim
    is_checked: bool  # all sessions that had no due time of their own were checked, or have one now
    next_check_at: datetime | None  # None: no checked session is with the batch
    records: Sequence[CheckRecord] = ()
    waiting: Sequence[Claim] = ()
    left: Sequence[Claim] = ()  # those that get a due time of their own


def settle(settlement: Settlement, now: datetime) -> BatchRecord:
    """Decide when the batch is due again, and which sessions differ from it; `now` is the write's.

    The batch is due with the earliest of its healthy sessions. Where some of its sessions were
    asked and some were not, the fewer get a due time of their own.
    """
    batch, rechecks = settlement.batch, settlement.rechecks
    left = [claim for claim in settlement.left if not claim.has_due_time]
    if batch.is_due and (not left or len(left) < _asked(rechecks)):
        due = _earliest(rechecks)
        records = [record for recheck in rechecks if (record := _changed(recheck, due))]
        return BatchRecord(batch, True, due, records, settlement.waiting, left)  # noqa: FBT003
    records = [_record(recheck, _own_due(recheck, batch, now)) for recheck in rechecks]
    return BatchRecord(batch, False, None, records, settlement.waiting)  # noqa: FBT003


def _asked(rechecks: Iterable[Recheck]) -> int:
    """How many of the sessions that were due with their batch were asked about."""
    return sum(not recheck.claim.has_due_time for recheck in rechecks)


def _earliest(rechecks: Iterable[Recheck]) -> datetime | None:
    healthy = [r.next_check_at for r in rechecks if not r.answer.outcome.is_error]
    return min(healthy or [r.next_check_at for r in rechecks], default=None)


def _changed(recheck: Recheck, batch_due: datetime | None) -> CheckRecord | None:
    """What the row keeps; None if it says so already, or its batch does."""
    claim, answer, next_check_at = recheck
    own_due = None if next_check_at == batch_due else next_check_at
    if (
        own_due is None
        and claim.last_outcome == answer.outcome
        and claim.last_status_code == answer.status_code
        and not (claim.has_due_time or claim.consecutive_failures or answer.outcome.is_error)
    ):
        return None
    return _record(recheck, own_due)


def _own_due(recheck: Recheck, batch: BatchClaim, now: datetime) -> datetime | None:
    """A healthy session is with its batch again if that is due soon enough, but not already."""
    healthy = not recheck.answer.outcome.is_error
    soon_enough = not batch.is_due and now < batch.next_check_at <= recheck.next_check_at
    return None if healthy and soon_enough else recheck.next_check_at


def _record(recheck: Recheck, next_check_at: datetime | None) -> CheckRecord:
    answer = recheck.answer
    return CheckRecord(recheck.claim, answer.outcome, answer.status_code, next_check_at)

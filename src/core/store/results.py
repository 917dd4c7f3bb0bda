"""What checks found is written, and their batches are given back."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import batched
from typing import NamedTuple

from core.database.port import (
    STATEMENT_ROWS,
    Database,
    Transaction,
    Value,
    as_datetime,
    as_datetime_or_none,
    as_int,
    number_list,
    numbers_by_value,
)
from core.domain.batch import BatchRecord, CheckRecord, Settlement, settle
from core.domain.model import BatchClaim, Claim, Recheck
from core.store.queue_rows import CLAIMED, MAX_LEASE, QueueRows, by_token, checked_at

# Batches that are due at the same time come in the order of their last checks. One of which only a
# part is due comes before them: that part was not checked with the rest, and has waited for longer.
PART_FIRST = timedelta(milliseconds=1)


class Results(NamedTuple):
    """What is written of some claims."""

    settlements: Sequence[Settlement] = ()
    rechecks: Sequence[Recheck] = ()  # of sessions whose own row is claimed
    released: Sequence[Claim] = ()  # of these sessions: given back, to be checked at once

    def __bool__(self) -> bool:
        return bool(self.settlements or self.rechecks or self.released)

    @property
    def all_rechecks(self) -> list[Recheck]:
        return [*(r for s in self.settlements for r in s.rechecks), *self.rechecks]


class _Contents(NamedTuple):
    """What a batch holds."""

    sessions: int
    with_batch: int  # those without a due time of their own
    first_due: datetime | None  # of the others


class _Free(NamedTuple):
    """A batch that is given back."""

    id: int
    sessions: int
    next_check_at: datetime
    due_at: datetime
    checked_at: datetime | None  # None: stays


class ResultWriter:
    """Writes results. Every method raises StoreError."""

    def __init__(self, database: Database, rows: QueueRows, batch_size: int) -> None:
        self._database = database
        self._rows = rows
        self._batch_size = batch_size

    def write(self, results: Results, now: datetime) -> None:
        """Keep what the checks found, free the claims, and set when each session is due again.

        A claim that expired and was taken over is left to its new owner. So is what was written
        already by a transaction whose connection then broke.
        """
        if results:
            self._database.transaction(partial(self._write, results=results, now=now))

    def _write(self, transaction: Transaction, results: Results, now: datetime) -> None:
        held = self._lock_batches(transaction, [s.batch for s in results.settlements])
        valid = [s for s in results.settlements if s.batch.id in held]
        batches = [settle(_as_it_is(s, held[s.batch.id]), now) for s in valid]
        self._rows.drop(transaction, [rowid for b in batches for rowid in b.batch.closed])
        records = [record for b in batches for record in b.records]
        self._rows.write(transaction, records, now)
        self._rows.claim_unanswered(transaction, [c for b in batches for c in b.waiting])
        left = [(claim, b.batch.next_check_at) for b in batches for claim in b.left]
        self._rows.give_due_time(transaction, left)
        if results.rechecks or results.released:
            self._write_sessions(transaction, results, now)
        self._free(transaction, batches, now)

    def _lock_batches(
        self, transaction: Transaction, batches: Iterable[BatchClaim]
    ) -> dict[int, datetime]:
        """The ids and due times of the batches whose claim is valid, locked until the commit."""
        tokens = {batch.id: batch.claimed_until for batch in batches}
        return {
            as_int(batch_id): as_datetime(due)
            for token, ids in numbers_by_value(tokens).items()
            for some in batched(ids, STATEMENT_ROWS, strict=False)
            for batch_id, due in transaction.query(
                "SELECT id, next_check_at FROM checkout_session_batch WHERE claimed_until = %s"
                f" AND id IN {number_list(some)} {self._database.lock_rows_or_wait}",
                (token,),
            )
        }

    def _write_sessions(self, transaction: Transaction, results: Results, now: datetime) -> None:
        """Write what became of sessions whose own row is claimed, where the claim is valid."""
        claims = [*(r.claim for r in results.rechecks), *results.released]
        valid = set[int]()
        for token, rowids in by_token(claims).items():
            for some in batched(rowids, STATEMENT_ROWS, strict=False):
                rows = transaction.query(
                    f"SELECT rowid FROM checkout_session_check {self._database.by_rowid}"
                    f" WHERE claimed_until = %s AND rowid IN {number_list(some)}"
                    f" {self._database.lock_rows_or_wait}",
                    (token,),
                )
                valid.update(as_int(rowid) for (rowid,) in rows)
        records = [
            CheckRecord(r.claim, r.answer.outcome, r.answer.status_code, r.next_check_at)
            for r in results.rechecks
            if r.claim.rowid in valid
        ]
        self._rows.write_records(transaction, records, now)
        released = [claim for claim in results.released if claim.rowid in valid]
        # What was given back keeps its place, and what was not due yet is not due now.
        due = [(claim, claim.due_at or now) for claim in released]
        self._rows.give_due_time(transaction, due)
        self._rows.bring_forward(transaction, {claim.rowid: at for claim, at in due})

    def _free(
        self, transaction: Transaction, batches: Sequence[BatchRecord], now: datetime
    ) -> None:
        """Free the batches, each due with the first of its sessions; delete those without any."""
        contents = self._contents(transaction, [b.batch.id for b in batches], now)
        frees = [free for b in batches if (free := _free_values(b, contents, now))]
        frees = self._merge(transaction, frees)
        values = {free.id: (free.next_check_at, free.due_at, free.checked_at) for free in frees}
        for (next_check_at, due_at, at), ids in numbers_by_value(values).items():
            checked, parameters = ("", ()) if at is None else (", checked_at = %s", (at,))
            for some in batched(ids, STATEMENT_ROWS, strict=False):
                transaction.execute(
                    "UPDATE checkout_session_batch SET claimed_until = NULL, next_check_at = %s,"
                    f" due_at = %s{checked} WHERE id IN {number_list(some)}",
                    (next_check_at, due_at, *parameters),
                )
        kept = {free.id for free in frees}
        for some in batched(
            [b.batch.id for b in batches if b.batch.id not in kept], STATEMENT_ROWS, strict=False
        ):
            transaction.execute(
                f"DELETE FROM checkout_session_batch WHERE id IN {number_list(some)}"
            )

    def _contents(
        self, transaction: Transaction, batch_ids: Iterable[int], now: datetime
    ) -> dict[int, _Contents]:
        claimed = CLAIMED.format("")
        contents: dict[int, _Contents] = {}
        for some in batched(batch_ids, STATEMENT_ROWS, strict=False):
            rows = transaction.query(
                "SELECT batch_id, COUNT(*),"
                f" SUM(CASE WHEN next_check_at IS NULL AND NOT COALESCE({claimed}, FALSE)"
                " THEN 1 ELSE 0 END),"
                f" MIN(CASE WHEN {claimed} THEN claimed_until ELSE next_check_at END)"
                f" FROM checkout_session_check {self._database.by_batch}"
                f" WHERE batch_id IN {number_list(some)} GROUP BY batch_id",
                (now, now + MAX_LEASE) * 2,
            )
            for batch_id, sessions, with_batch, first_due in rows:
                contents[as_int(batch_id)] = _Contents(
                    as_int(sessions), as_int(with_batch), as_datetime_or_none(first_due)
                )
        return contents

    def _merge(self, transaction: Transaction, frees: Sequence[_Free]) -> list[_Free]:
        """Merge small batches that are due together; returns those that are left."""
        groups: defaultdict[tuple[Value, Value], list[_Free]] = defaultdict(list)
        kept: list[_Free] = []
        for free in frees:
            small = free.sessions <= self._batch_size // 2
            if small and free.checked_at is not None:
                groups[free.next_check_at, free.checked_at].append(free)
            else:
                kept.append(free)
        for group in groups.values():
            target, *others = sorted(group, key=lambda free: free.id)
            moved: list[int] = []
            for free in others:
                if target.sessions + free.sessions > self._batch_size:
                    self._move(transaction, moved, target.id)
                    kept.append(target)
                    target, moved = free, []
                    continue
                moved.append(free.id)
                target = target._replace(
                    sessions=target.sessions + free.sessions,
                    due_at=min(target.due_at, free.due_at),
                )
            self._move(transaction, moved, target.id)
            kept.append(target)
        return kept

    def _move(self, transaction: Transaction, batch_ids: Sequence[int], to: int) -> None:
        if batch_ids:
            transaction.execute(
                f"UPDATE checkout_session_check {self._database.by_batch} SET batch_id = %s"
                f" WHERE batch_id IN {number_list(batch_ids)}",
                (to,),
            )


def _as_it_is(settlement: Settlement, next_check_at: datetime) -> Settlement:
    """With the due time that its batch has now: a reconciliation may have changed it."""
    if settlement.batch.next_check_at == next_check_at:
        return settlement
    return settlement._replace(batch=settlement.batch._replace(next_check_at=next_check_at))


def _free_values(
    record: BatchRecord, contents: Mapping[int, _Contents], now: datetime
) -> _Free | None:
    """When a batch is due again; None if it has no sessions."""
    batch = record.batch
    found = contents.get(batch.id)
    if found is None:
        return None
    next_check_at, checked = batch.next_check_at, None
    if record.is_checked:
        checked = checked_at(now, batch.claimed_at)
        next_check_at = record.next_check_at or found.first_due or now
    due = [next_check_at] if found.with_batch else []
    if found.first_due:
        is_part = bool(due) and found.first_due < next_check_at
        due.append(found.first_due - PART_FIRST if is_part else found.first_due)
    return _Free(batch.id, found.sessions, next_check_at, min(due), checked)

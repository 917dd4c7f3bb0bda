"""The rows of the queue: statements that claims, results and status changes share."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import batched

from core.database.port import (
    STATEMENT_ROWS,
    Connection,
    Database,
    Transaction,
    Value,
    as_int,
    number_list,
    numbers_by_value,
)
from core.domain.batch import CheckRecord
from core.domain.model import Claim

# A claim that is valid for longer came from a clock that was ahead. The settings allow requests of
# up to 30 s, and a lease lasts ten more.
MAX_LEASE_SECONDS = 60
MAX_LEASE = timedelta(seconds=MAX_LEASE_SECONDS)
# Conditions on a row or a batch, whose alias may stand before. Parameters: now, now plus MAX_LEASE.
CLAIMED = "({0}claimed_until > %s AND {0}claimed_until <= %s)"
UNCLAIMED = "({0}claimed_until IS NULL OR {0}claimed_until <= %s OR {0}claimed_until > %s)"

# When a session is due, and when it was checked last; of a row c and its batch b.
DUE = "COALESCE(c.next_check_at, b.next_check_at)"
LAST_CHECK = "CASE WHEN c.next_check_at IS NULL THEN b.checked_at ELSE c.last_checked_at END"

# A session counts as checked at least this long after its claim. A manual pass that begins in the
# very millisecond of a check can then tell earlier checks from its own.
_AFTER_CLAIM = timedelta(milliseconds=1)


class QueueRows:
    """Writes rows whose claim the caller holds. Every method raises StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def drop(self, connection: Connection, rowids: Iterable[int]) -> None:
        """Take sessions that are not open any more off the queue."""
        for some in batched(rowids, STATEMENT_ROWS, strict=False):
            connection.execute(
                f"DELETE FROM checkout_session_check WHERE rowid IN {number_list(some)}"
            )

    def lock_claimed(
        self, transaction: Transaction, claims: Iterable[Claim], now: datetime
    ) -> list[int]:
        """The numbers of the rows whose claim is still valid, locked until the commit."""
        locked: list[int] = []
        for token, rowids in by_token(claims).items():
            rows = transaction.query(
                f"SELECT c.rowid FROM checkout_session_check c {self._database.by_rowid}"
                f" {self._database.join_in_order} checkout_session_batch b ON b.id = c.batch_id"
                f" WHERE c.rowid IN {number_list(rowids)} AND (c.claimed_until = %s"
                f" OR (b.claimed_until = %s AND {UNCLAIMED.format('c.')}))"
                f" {self._database.lock_rows_or_wait}",
                (token, token, now, now + MAX_LEASE),
            )
            locked += [as_int(rowid) for (rowid,) in rows]
        return locked

    def write_records(
        self, transaction: Transaction, records: Sequence[CheckRecord], now: datetime
    ) -> None:
        """Write rows of sessions with a valid claim; frees the claims on the rows themselves."""
        self.write(transaction, records, now)
        self.bring_forward(
            transaction, {r.claim.rowid: r.next_check_at for r in records if r.next_check_at}
        )

    def write(
        self, transaction: Transaction, records: Iterable[CheckRecord], now: datetime
    ) -> None:
        """Write records with one statement for all rows that get the same values."""
        by_row = {
            claim.rowid: (
                outcome,
                code,
                next_check_at,
                claim.claimed_at,
                _asked_since(claim) if outcome.is_error else None,
            )
            for claim, outcome, code, next_check_at in records
        }
        groups = numbers_by_value(by_row)
        for (outcome, code, next_check_at, claimed_at, since), rowids in groups.items():
            at = checked_at(now, claimed_at)
            failing = "consecutive_failures = 0, failing_since = NULL"
            parameters: tuple[Value, ...] = ()
            if since is not None:
                failing = (
                    # A later time is of a clock that was ahead.
                    "consecutive_failures = consecutive_failures + 1, failing_since ="
                    " CASE WHEN failing_since <= %s THEN failing_since ELSE %s END"
                )
                parameters = (since,) * 2
            for some in batched(rowids, STATEMENT_ROWS, strict=False):
                transaction.execute(
                    f"UPDATE checkout_session_check {self._database.by_rowid}"
                    " SET last_checked_at = %s, last_outcome = %s, last_status_code = %s,"
                    f" next_check_at = %s, {failing}, claimed_until = NULL"
                    f" WHERE rowid IN {number_list(some)}",
                    (at, outcome.value, code, next_check_at, *parameters),
                )

    def claim(self, transaction: Transaction, claims: Iterable[Claim]) -> None:
        """Claim sessions on their own rows. If the claim ends unused, they are due."""
        self._set_times(transaction, ((c, c.claimed_until, c.claimed_until, None) for c in claims))

    def claim_unanswered(self, transaction: Transaction, claims: Iterable[Claim]) -> None:
        """The same for sessions that billing was asked about and has not answered yet.

        They wait since then, until a check succeeds or they are given back.
        """
        times = ((c, c.claimed_until, c.claimed_until, _asked_since(c)) for c in claims)
        self._set_times(transaction, times)

    def give_due_time(
        self, transaction: Transaction, due: Iterable[tuple[Claim, datetime]]
    ) -> None:
        """Give sessions a due time of their own, and free the claims on their rows."""
        self._set_times(transaction, ((claim, at, None, None) for claim, at in due))

    def _set_times(
        self,
        transaction: Transaction,
        # Due, claimed until, unanswered since.
        times: Iterable[tuple[Claim, datetime, datetime | None, datetime | None]],
    ) -> None:
        # A row that leaves its batch unchecked takes the time of its last check along.
        values = {
            claim.rowid: (due, until, None if claim.has_due_time else claim.last_checked_at, since)
            for claim, due, until, since in times
        }
        for value, rowids in numbers_by_value(values).items():
            since = "COALESCE(failing_since, %s)"
            if value[1] is None:  # given back: one that does not fail waits since it was due
                since = "CASE WHEN consecutive_failures > 0 THEN failing_since ELSE %s END"
            for some in batched(rowids, STATEMENT_ROWS, strict=False):
                transaction.execute(
                    f"UPDATE checkout_session_check {self._database.by_rowid}"
                    " SET next_check_at = %s, claimed_until = %s,"
                    f" last_checked_at = COALESCE(%s, last_checked_at), failing_since = {since}"
                    f" WHERE rowid IN {number_list(some)}",
                    value,
                )

    def bring_forward(self, transaction: Transaction, due: Mapping[int, datetime]) -> None:
        """Make the batches of rows due when the rows are, if that is earlier."""
        earliest: dict[int, datetime] = {}
        for some in batched(due, STATEMENT_ROWS, strict=False):
            for rowid, batch_id in transaction.query(
                f"SELECT rowid, batch_id FROM checkout_session_check {self._database.by_rowid}"
                f" WHERE batch_id IS NOT NULL AND rowid IN {number_list(some)}"
            ):
                at = due[as_int(rowid)]
                earliest[as_int(batch_id)] = min(at, earliest.get(as_int(batch_id), at))
        for at, batch_ids in numbers_by_value(earliest).items():
            transaction.execute(
                "UPDATE checkout_session_batch SET due_at = %s"
                f" WHERE due_at > %s AND id IN {number_list(batch_ids)}",
                (at, at),
            )


def checked_at(now: datetime, claimed_at: datetime) -> datetime:
    """When a check counts as made."""
    return max(now, claimed_at + _AFTER_CLAIM)


def _asked_since(claim: Claim) -> datetime:
    """When the check under this claim was due."""
    return min(claim.due_at or claim.claimed_at, claim.claimed_at)


def by_token(claims: Iterable[Claim]) -> dict[datetime, list[int]]:
    """The row numbers of some claims by their `claimed_until`."""
    return numbers_by_value({claim.rowid: claim.claimed_until for claim in claims})

"""The queue: `checkout_session_batch`, handed out by claims, and `checkout_session_check`.

Each open session has a row in `checkout_session_check` and belongs to a batch. The session is due
with its batch, unless its own row has a due time. A batch's `due_at` is when the first of its
sessions is due. A claim covers a batch, or the row of one session.

Whoever changes which sessions a batch has, or when they are due, holds the lock of the batch's row.

Claims and decisions name rows by their number. To compare ids by the shop's collation, at every
level of a key, takes MySQL up to as long as the rest of an UPDATE.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import batched
from typing import NamedTuple

from core.database.port import (
    STATEMENT_ROWS,
    Connection,
    Database,
    Row,
    Transaction,
    Value,
    as_datetime,
    as_datetime_or_none,
    as_int,
    as_text,
    as_text_or_none,
    number_list,
    placeholders,
)
from core.domain.batch import MAX_BATCH, BatchRecord, CheckRecord, Settlement, settle
from core.domain.model import BatchClaim, Claim, Outcome, Recheck

# A claim that is valid for longer came from a clock that was ahead. The settings allow requests of
# up to 30 s, and a lease lasts ten more.
MAX_LEASE_SECONDS = 60
MAX_LEASE = timedelta(seconds=MAX_LEASE_SECONDS)
# Parameters: now, and now plus MAX_LEASE.
UNCLAIMED = "({0}claimed_until IS NULL OR {0}claimed_until <= %s OR {0}claimed_until > %s)"

# A session counts as checked at least this long after its claim. A manual pass that begins in the
# very millisecond of a check can then tell earlier checks from its own.
_AFTER_CLAIM = timedelta(milliseconds=1)
# A check that was recorded further ahead is of a clock that was wrong. Less is a difference between
# two servers of a cluster.
_MAX_CLOCK_ERROR = timedelta(seconds=5)

# The checkout id of an open session, '' if the shop has none, NULL if there is no open session. A
# join would lock the shop's rows too (MariaDB has no FOR UPDATE OF); a subquery reads without a
# lock on every engine. The status is tested in the SELECT list and not in WHERE, so that the shop's
# row can only be found by its key, whatever the statistics of an index on status are. MAX is for a
# table whose ids are not unique: of its rows, an open one counts.
_SESSION = (
    "c.rowid, c.batch_id, c.session_id, c.first_seen_at, c.consecutive_failures, c.last_outcome,"
    " c.last_status_code, c.next_check_at, (SELECT"
    " MAX(CASE WHEN s.status = 'open' THEN COALESCE(s.billing_checkout_id, '') END)"
    " FROM checkout_session s WHERE s.id = c.session_id)"
)
_BATCH = "id, next_check_at, checked_at"


@dataclass(frozen=True, slots=True)
class Claimed:
    """What one claim hands out."""

    batches: Sequence[BatchClaim] = ()
    sessions: Sequence[Claim] = ()  # those whose own row is claimed

    @property
    def claims(self) -> list[Claim]:
        of_batches = [claim for batch in self.batches for claim in batch.claims]
        return [*of_batches, *self.sessions]


@dataclass(frozen=True, slots=True)
class Results:
    """What is written of some claims."""

    settlements: Sequence[Settlement] = ()
    rechecks: Sequence[Recheck] = ()  # of sessions whose own row is claimed
    released: Sequence[Claim] = ()  # of these sessions: given back, to be checked at once

    def __bool__(self) -> bool:
        return bool(self.settlements or self.rechecks or self.released)

    @property
    def all_rechecks(self) -> list[Recheck]:
        return [*(r for s in self.settlements for r in s.rechecks), *self.rechecks]


type _IsDue = Callable[[Row], bool]


class _Wanted(NamedTuple):
    """Which batches a claim takes, and which of their sessions."""

    batches: str  # a condition on the batch, and its parameters
    batch_parameters: Sequence[Value]
    sessions: str  # a condition on sessions with a due time of their own
    session_parameters: Sequence[Value]


class _Contents(NamedTuple):
    """What a batch holds."""

    sessions: int
    with_batch: int  # those without a due time of their own
    first_due: datetime | None  # of the others


class _BatchValues(NamedTuple):
    next_check_at: datetime
    due_at: datetime
    checked_at: datetime | None  # None: stays


class _Free(NamedTuple):
    """A batch that is given back."""

    id: int
    sessions: int
    values: _BatchValues


def oldest_due(database: Database) -> str:
    """An expression: the earliest due time of the batches that nobody is checking, or NULL.

    It skips claimed batches one by one: there are few of them, and they come first.
    """
    return (
        f"(SELECT due_at FROM checkout_session_batch {database.in_due_order}"
        f" WHERE claimed_until IS NULL OR claimed_until <= {database.now_sql()}"
        f" OR claimed_until > {database.now_sql(plus_seconds=MAX_LEASE_SECONDS)}"
        " ORDER BY due_at LIMIT 1)"
    )


class Queue:
    """Claims go out, results come in. Every method raises StoreError.

    `batch_size` is the most sessions of a new batch: no more than a worker has in flight.
    """

    def __init__(self, database: Database, batch_size: int = MAX_BATCH) -> None:
        self._database = database
        self._batch_size = min(batch_size, MAX_BATCH)

    def claim_due(self, now: datetime, *, tick: datetime, lease: timedelta, limit: int) -> Claimed:
        """Claim batches of about `limit` sessions due by now or by the tick, longest due first."""
        # Read without a lock. A locking read would look at every entry before it that is marked as
        # deleted: with a snapshot transaction open for minutes, at all that the checks have left.
        [(first_due,)] = self._database.run(
            lambda connection: connection.query(
                f"SELECT due_at FROM checkout_session_batch {self._database.in_due_order}"
                " ORDER BY due_at LIMIT 1"
            )
        ) or [(None,)]
        until = max(now, tick)
        if first_due is None or as_datetime(first_due) > until:
            return Claimed()
        wanted = _Wanted(
            "due_at BETWEEN %s AND %s",
            (as_datetime(first_due), until),
            "c.next_check_at <= %s",
            (until,),
        )
        return self._claim(wanted, lambda row: as_datetime(row[1]) <= until, now, lease, limit)

    def claim_unchecked(
        self,
        now: datetime,
        *,
        since: datetime,
        lease: timedelta,
        limit: int,
        session_ids: Sequence[str] | None = None,
    ) -> Claimed:
        """Claim about `limit` open sessions that were not checked after `since`, due or not.

        With `session_ids` only these, each on its own row. None, if the clock was set back since
        then: nobody could tell which ones were checked.
        """
        if now < since:
            return Claimed()
        latest = now + _MAX_CLOCK_ERROR  # a later check is of a clock that was ahead
        unchecked = "({0} IS NULL OR {0} <= %s OR {0} > %s)"
        if session_ids is not None:
            comparable = [i for i in session_ids if self._database.comparable(i)]
            return self._claim_sessions(unchecked, (since, latest), comparable, now, lease, limit)
        of_session = unchecked.format("c.last_checked_at")
        wanted = _Wanted(
            f"({unchecked.format('checked_at')} OR EXISTS (SELECT 1 FROM checkout_session_check c"
            f" {self._database.by_batch} WHERE c.batch_id = checkout_session_batch.id"
            f" AND c.next_check_at IS NOT NULL AND {of_session} AND {UNCLAIMED.format('c.')}))",
            (since, latest, since, latest, now, now + MAX_LEASE),
            f"c.next_check_at IS NOT NULL AND {of_session}",
            (since, latest),
        )

        def is_unchecked(row: Row) -> bool:
            checked_at = as_datetime_or_none(row[2])
            return checked_at is None or not since < checked_at <= latest

        return self._claim(wanted, is_unchecked, now, lease, limit)

    def write(self, results: Results, now: datetime) -> None:
        """Keep what the checks found, free the claims, and set when each session is due again.

        A claim that expired and was taken over is left to its new owner. So is what was written
        already by a transaction whose connection then broke.
        """
        if results:
            self._database.transaction(partial(self._write, results=results, now=now))

    def count_due(self, *, tick: datetime, limit: int) -> int:
        """Count the due sessions up to `limit`, including those whose check is under way."""

        def count(connection: Connection) -> int:
            until = max(connection.now(), tick)
            [(due,)] = connection.query(
                "SELECT COUNT(*) FROM (SELECT 1 FROM checkout_session_batch b"
                f" {self._database.join_in_order} checkout_session_check c"
                f" {self._database.by_batch} ON c.batch_id = b.id WHERE b.due_at <= %s"
                " AND COALESCE(c.next_check_at, b.next_check_at) <= %s"
                f" LIMIT {limit:d}) AS due",
                (until, until),
            )
            return as_int(due)

        return self._database.run(count)

    def adopt(self, transaction: Transaction, session_ids: Sequence[Value], now: datetime) -> None:
        """Queue new sessions in new batches, due at once."""
        chunks = [list(some) for some in batched(session_ids, self._batch_size, strict=False)]
        numbered = list(zip(self._new_batches(transaction, len(chunks), now), chunks, strict=True))
        rows = [(i, batch_id, now) for batch_id, chunk in numbered for i in chunk]
        for some in batched(rows, STATEMENT_ROWS, strict=False):
            transaction.execute(
                "INSERT INTO checkout_session_check (session_id, batch_id, first_seen_at)"
                f" VALUES {', '.join(['(%s, %s, %s)'] * len(some))}"
                f" {self._database.skip_duplicates.format(key='session_id')}",
                [value for row in some for value in row],
            )

    def form_batches(self, transaction: Transaction, rowids: Sequence[int], now: datetime) -> None:
        """Put rows that have no batch, as those of version 0.2.0, into new batches.

        What is claimed there is due when the claim ends.
        """
        chunks = [list(some) for some in batched(rowids, self._batch_size, strict=False)]
        claimed = "claimed_until > %s AND claimed_until <= %s"
        for batch_id, chunk in zip(
            self._new_batches(transaction, len(chunks), now), chunks, strict=True
        ):
            transaction.execute(
                f"UPDATE checkout_session_check {self._database.by_rowid} SET next_check_at ="
                f" CASE WHEN {claimed} THEN claimed_until WHEN next_check_at > %s"
                " THEN next_check_at END, batch_id = %s"
                f" WHERE rowid IN {number_list(chunk)} AND (batch_id IS NULL OR NOT EXISTS"
                " (SELECT 1 FROM checkout_session_batch b"
                " WHERE b.id = checkout_session_check.batch_id))",
                (now, now + MAX_LEASE, now, batch_id),
            )

    def drop(self, connection: Connection, rowids: Iterable[int]) -> None:
        """Take sessions that are not open any more off the queue."""
        for some in batched(rowids, STATEMENT_ROWS, strict=False):
            connection.execute(
                f"DELETE FROM checkout_session_check WHERE rowid IN {number_list(some)}"
            )

    def make_due(
        self,
        transaction: Transaction,
        rowids: Iterable[int],
        batch_ids: Iterable[int],
        now: datetime,
    ) -> None:
        """Make batches due at once, and sessions with a due time of their own; none in flight."""
        unclaimed = (now, now + MAX_LEASE)
        for some in batched(batch_ids, STATEMENT_ROWS, strict=False):
            transaction.execute(
                "UPDATE checkout_session_batch SET next_check_at = %s, due_at = %s"
                f" WHERE {UNCLAIMED.format('')} AND id IN {number_list(some)}",
                (now, now, *unclaimed),
            )
        for some in batched(rowids, STATEMENT_ROWS, strict=False):
            transaction.execute(
                f"UPDATE checkout_session_check {self._database.by_rowid} SET next_check_at = %s"
                f" WHERE {UNCLAIMED.format('')} AND next_check_at IS NOT NULL"
                f" AND rowid IN {number_list(some)}",
                (now, *unclaimed),
            )
            self._bring_forward(transaction, dict.fromkeys(some, now))

    def lock_claimed(
        self, transaction: Transaction, claims: Iterable[Claim], now: datetime
    ) -> list[int]:
        """The numbers of the rows whose claim is still valid, locked until the commit."""
        locked: list[int] = []
        for token, rowids in group_by_token(claims).items():
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
        self._write_rows(transaction, records, now)
        self._bring_forward(
            transaction, {r.claim.rowid: r.next_check_at for r in records if r.next_check_at}
        )

    def _claim(
        self,
        wanted: _Wanted,
        is_due: _IsDue,
        now: datetime,
        lease: timedelta,
        limit: int,
    ) -> Claimed:
        until = _in_milliseconds(now + lease)
        most = max(1, limit // self._batch_size)

        def claim(transaction: Transaction) -> list[BatchClaim]:
            rows = transaction.query(
                f"SELECT {_BATCH} FROM checkout_session_batch {self._database.in_due_order}"
                f" WHERE {wanted.batches} AND {UNCLAIMED.format('')}"
                f" ORDER BY due_at, checked_at LIMIT {most:d} {self._database.lock_rows}",
                (*wanted.batch_parameters, now, now + MAX_LEASE),
            )
            if not rows:
                return []
            # Before they are claimed: what cannot be read is then free for others.
            batches = self._read_sessions(transaction, rows, is_due, wanted, now, until)
            for some in batched((batch.id for batch in batches), STATEMENT_ROWS, strict=False):
                transaction.execute(
                    "UPDATE checkout_session_batch SET claimed_until = %s"
                    f" WHERE id IN {number_list(some)}",
                    (until,),
                )
            return batches

        seen = set[int]()
        while batches := self._database.transaction(claim):
            empty = [batch for batch in batches if not batch.claims]
            self.write(Results([Settlement(batch) for batch in empty]), now)
            if len(empty) < len(batches):
                return Claimed([batch for batch in batches if batch.claims])
            ids = {batch.id for batch in batches}
            if seen & ids:
                break
            seen |= ids  # all sessions were closed: look for due ones behind them
        return Claimed()

    def _read_sessions(  # noqa: PLR0917 (called in one place)
        self,
        connection: Connection,
        rows: Sequence[Row],
        is_due: _IsDue,
        wanted: _Wanted,
        now: datetime,
        until: datetime,
    ) -> list[BatchClaim]:
        """The sessions of locked batches; they and the shop's rows are read without a lock."""
        due = {as_int(row[0]): is_due(row) for row in rows}
        full = [batch_id for batch_id, covers in due.items() if covers]
        with_batch = f" OR (c.next_check_at IS NULL AND c.batch_id IN {number_list(full)})"
        sessions = connection.query(
            f"SELECT {_SESSION} FROM checkout_session_check c {self._database.by_batch}"
            f" WHERE c.batch_id IN {number_list(due)} AND {UNCLAIMED.format('c.')}"
            f" AND ({wanted.sessions}{with_batch if full else ''})",
            (now, now + MAX_LEASE, *wanted.session_parameters),
        )
        claims: defaultdict[int, list[Claim]] = defaultdict(list)
        closed: defaultdict[int, list[int]] = defaultdict(list)
        batch_due = {as_int(row[0]): as_datetime(row[1]) for row in rows}
        for row in sessions:
            batch_id = as_int(row[_BATCH_ID])
            if _is_open(row):
                claim = _claim_on(row, now, until, batch_id)
                due_at = claim.due_at or batch_due[batch_id]
                claims[batch_id].append(claim._replace(due_at=due_at))
            else:
                closed[batch_id].append(as_int(row[_ROWID]))
        return [
            BatchClaim(
                batch_id,
                now,
                until,
                as_datetime(next_check_at),
                due[batch_id],
                claims[batch_id],
                closed[batch_id],
            )
            for batch_id, next_check_at, _ in ((as_int(i), at, c) for i, at, c in rows)
        ]

    def _claim_sessions(  # noqa: PLR0917 (called in one place)
        self,
        unchecked: str,
        parameters: Sequence[Value],
        session_ids: Sequence[str],
        now: datetime,
        lease: timedelta,
        limit: int,
    ) -> Claimed:
        """Claim sessions by their ids, each on its own row, in batches that nobody holds."""
        if not session_ids:
            return Claimed()
        until = _in_milliseconds(now + lease)
        last_check = unchecked.format(LAST_CHECK)

        def claim(transaction: Transaction) -> tuple[int, list[Claim]]:
            rows = transaction.query(
                f"SELECT {_SESSION} FROM checkout_session_check c"
                " JOIN checkout_session_batch b ON b.id = c.batch_id"
                f" WHERE c.session_id IN {placeholders(session_ids)} AND {last_check}"
                f" AND {UNCLAIMED.format('c.')} AND {UNCLAIMED.format('b.')}"
                f" LIMIT {limit:d} {self._database.lock_rows}",
                (*session_ids, *parameters, *(now, now + MAX_LEASE) * 2),
            )
            self.drop(transaction, (as_int(row[_ROWID]) for row in rows if not _is_open(row)))
            claims = [_claim_on(row, now, until, None) for row in rows if _is_open(row)]
            self._claim_rows(transaction, claims)
            self._bring_forward(transaction, {claim.rowid: until for claim in claims})
            return len(rows), claims

        found, claims = limit, list[Claim]()
        while found == limit and not claims:  # all were closed: look for open ones behind them
            found, claims = self._database.transaction(claim)
        return Claimed(sessions=claims)

    def _write(self, transaction: Transaction, results: Results, now: datetime) -> None:
        held = self._lock_batches(transaction, [s.batch for s in results.settlements])
        batches = [settle(s) for s in results.settlements if s.batch.id in held]
        self.drop(transaction, [rowid for b in batches for rowid in b.batch.closed])
        records = [record for b in batches for record in b.records]
        self._write_rows(transaction, records, now)
        self._claim_rows(transaction, [claim for b in batches for claim in b.waiting])
        for b in batches:
            self._give_due_time(transaction, b.left, b.batch.next_check_at)
        if results.rechecks or results.released:
            self._write_sessions(transaction, results, now)
        self._free(transaction, batches, now)

    def _lock_batches(self, transaction: Transaction, batches: Iterable[BatchClaim]) -> set[int]:
        """The ids of the batches whose claim is still valid, locked until the commit."""
        by_token: defaultdict[datetime, list[int]] = defaultdict(list)
        for batch in batches:
            by_token[batch.claimed_until].append(batch.id)
        return {
            as_int(batch_id)
            for token, ids in by_token.items()
            for some in batched(ids, STATEMENT_ROWS, strict=False)
            for (batch_id,) in transaction.query(
                "SELECT id FROM checkout_session_batch WHERE claimed_until = %s"
                f" AND id IN {number_list(some)} {self._database.lock_rows_or_wait}",
                (token,),
            )
        }

    def _write_sessions(self, transaction: Transaction, results: Results, now: datetime) -> None:
        """Write what became of sessions whose own row is claimed, where the claim is valid."""
        claims = [*(r.claim for r in results.rechecks), *results.released]
        valid = set[int]()
        for token, rowids in group_by_token(claims).items():
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
        self.write_records(transaction, records, now)
        released = [claim for claim in results.released if claim.rowid in valid]
        # Longest due first: what was given back keeps its place.
        due = {claim.rowid: min(claim.due_at or now, now) for claim in released}
        for due_at in set(due.values()):
            due_then = [claim for claim in released if due[claim.rowid] == due_at]
            self._give_due_time(transaction, due_then, due_at)
        self._bring_forward(transaction, due)

    def _write_rows(
        self, transaction: Transaction, records: Iterable[CheckRecord], now: datetime
    ) -> None:
        """Write records with one statement for all rows that get the same values."""
        for values, rowids in _group_by_values(records).items():
            checked_at = max(now, values.claimed_at + _AFTER_CLAIM)
            failing = "consecutive_failures = 0, failing_since = NULL"
            parameters: tuple[Value, ...] = ()
            if values.outcome.is_error:
                failing = (
                    "consecutive_failures = consecutive_failures + 1,"
                    " failing_since = COALESCE(failing_since, %s)"
                )
                parameters = (checked_at,)
            for some in batched(rowids, STATEMENT_ROWS, strict=False):
                transaction.execute(
                    f"UPDATE checkout_session_check {self._database.by_rowid}"
                    " SET last_checked_at = %s, last_outcome = %s, last_status_code = %s,"
                    f" next_check_at = %s, {failing}, claimed_until = NULL"
                    f" WHERE rowid IN {number_list(some)}",
                    (
                        checked_at,
                        values.outcome.value,
                        values.status_code,
                        values.next_check_at,
                        *parameters,
                    ),
                )

    def _claim_rows(self, transaction: Transaction, claims: Iterable[Claim]) -> None:
        """Claim sessions on their own rows. If the claim ends unused, they are due."""
        for token, rowids in group_by_token(claims).items():
            self._set_rows(transaction, rowids, next_check_at=token, claimed_until=token)

    def _give_due_time(
        self, transaction: Transaction, claims: Iterable[Claim], due: datetime
    ) -> None:
        rowids = [claim.rowid for claim in claims]
        self._set_rows(transaction, rowids, next_check_at=due, claimed_until=None)

    def _set_rows(
        self,
        transaction: Transaction,
        rowids: Iterable[int],
        *,
        next_check_at: datetime,
        claimed_until: datetime | None,
    ) -> None:
        for some in batched(rowids, STATEMENT_ROWS, strict=False):
            transaction.execute(
                f"UPDATE checkout_session_check {self._database.by_rowid}"
                " SET next_check_at = %s, claimed_until = %s"
                f" WHERE rowid IN {number_list(some)}",
                (next_check_at, claimed_until),
            )

    def _bring_forward(self, transaction: Transaction, due: Mapping[int, datetime]) -> None:
        """Make the batches of rows due when the rows are, if that is earlier."""
        earliest: dict[int, datetime] = {}
        for some in batched(due, STATEMENT_ROWS, strict=False):
            for rowid, batch_id in transaction.query(
                f"SELECT rowid, batch_id FROM checkout_session_check {self._database.by_rowid}"
                f" WHERE batch_id IS NOT NULL AND rowid IN {number_list(some)}"
            ):
                at = due[as_int(rowid)]
                earliest[as_int(batch_id)] = min(at, earliest.get(as_int(batch_id), at))
        by_time: defaultdict[datetime, list[int]] = defaultdict(list)
        for batch_id, at in earliest.items():
            by_time[at].append(batch_id)
        for at, batch_ids in by_time.items():
            transaction.execute(
                "UPDATE checkout_session_batch SET due_at = %s"
                f" WHERE due_at > %s AND id IN {number_list(batch_ids)}",
                (at, at),
            )

    def _free(
        self, transaction: Transaction, batches: Sequence[BatchRecord], now: datetime
    ) -> None:
        """Free the batches, each due with the first of its sessions; delete those without any."""
        contents = self._contents(transaction, [b.batch.id for b in batches], now)
        frees = [free for b in batches if (free := _free_values(b, contents, now))]
        frees = self._merge(transaction, frees)
        groups: defaultdict[_BatchValues, list[int]] = defaultdict(list)
        for free in frees:
            groups[free.values].append(free.id)
        for values, ids in groups.items():
            checked = "" if values.checked_at is None else ", checked_at = %s"
            parameters = () if values.checked_at is None else (values.checked_at,)
            for some in batched(ids, STATEMENT_ROWS, strict=False):
                transaction.execute(
                    "UPDATE checkout_session_batch SET claimed_until = NULL, next_check_at = %s,"
                    f" due_at = %s{checked} WHERE id IN {number_list(some)}",
                    (values.next_check_at, values.due_at, *parameters),
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
        claimed = "claimed_until > %s AND claimed_until <= %s"
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
            if small and free.values.checked_at is not None:
                groups[free.values.next_check_at, free.values.checked_at].append(free)
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
                due_at = min(target.values.due_at, free.values.due_at)
                target = target._replace(
                    sessions=target.sessions + free.sessions,
                    values=target.values._replace(due_at=due_at),
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

    def _new_batches(self, transaction: Transaction, count: int, now: datetime) -> list[int]:
        """Add batches that are due at once; returns their ids, made of the time."""
        first = (round(now.timestamp() * 1000) << 20) + random.getrandbits(20)
        ids = list(range(first, first + count))
        for some in batched(ids, STATEMENT_ROWS, strict=False):
            transaction.execute(
                "INSERT INTO checkout_session_batch (id, next_check_at, due_at)"
                f" VALUES {', '.join(['(%s, %s, %s)'] * len(some))}"
                f" {self._database.skip_duplicates.format(key='id')}",
                [value for batch_id in some for value in (batch_id, now, now)],
            )
        return ids


# When a session was checked last.
LAST_CHECK = "CASE WHEN c.next_check_at IS NULL THEN b.checked_at ELSE c.last_checked_at END"

# Columns of _SESSION.
_ROWID, _BATCH_ID, _CHECKOUT_ID = 0, 1, 8


def _free_values(
    record: BatchRecord, contents: Mapping[int, _Contents], now: datetime
) -> _Free | None:
    """When a batch is due again; None if it has no sessions."""
    batch = record.batch
    found = contents.get(batch.id)
    if found is None:
        return None
    next_check_at, checked_at = batch.next_check_at, None
    if record.is_checked:
        checked_at = max(now, batch.claimed_at + _AFTER_CLAIM)
        next_check_at = record.next_check_at or found.first_due or now
    due = [found.first_due] if found.first_due else []
    if found.with_batch:
        due.append(next_check_at)
    return _Free(batch.id, found.sessions, _BatchValues(next_check_at, min(due), checked_at))


def _in_milliseconds(time: datetime) -> datetime:
    """The time as the database keeps it, rounded up: it identifies the claim."""
    return time + timedelta(microseconds=-time.microsecond % 1000)


def _is_open(row: Row) -> bool:
    return row[_CHECKOUT_ID] is not None


def _claim_on(
    row: Row, claimed_at: datetime, claimed_until: datetime, batch_id: int | None
) -> Claim:
    rowid, _, session_id, first_seen_at, failures, outcome, code, next_at, checkout_id = row
    return Claim(
        rowid=as_int(rowid),
        session_id=as_text(session_id),
        billing_checkout_id=as_text(checkout_id) or None,
        first_seen_at=as_datetime(first_seen_at),
        consecutive_failures=as_int(failures),
        claimed_at=claimed_at,
        claimed_until=claimed_until,
        batch_id=batch_id,
        last_outcome=as_text_or_none(outcome),
        last_status_code=None if code is None else as_int(code),
        has_due_time=next_at is not None,
        due_at=as_datetime_or_none(next_at),
    )


class _RecordValues(NamedTuple):
    outcome: Outcome
    status_code: int | None
    next_check_at: datetime | None
    claimed_at: datetime


def _group_by_values(records: Iterable[CheckRecord]) -> dict[_RecordValues, list[int]]:
    """Row numbers by what is written: most of them are one group, and so one statement."""
    groups: defaultdict[_RecordValues, list[int]] = defaultdict(list)
    for claim, outcome, status_code, next_check_at in records:
        values = _RecordValues(outcome, status_code, next_check_at, claim.claimed_at)
        groups[values].append(claim.rowid)
    return groups


def group_by_token(claims: Iterable[Claim]) -> dict[datetime, list[int]]:
    """The row numbers of some claims by their `claimed_until`."""
    groups: defaultdict[datetime, list[int]] = defaultdict(list)
    for claim in claims:
        groups[claim.claimed_until].append(claim.rowid)
    return groups

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
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
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
    number_list,
    placeholders,
)
from core.domain.batch import MAX_BATCH, Settlement
from core.domain.model import BatchClaim, Claim
from core.store.claim_rows import read_claims, session_columns
from core.store.queue_rows import (
    CLAIMED,
    DUE,
    LAST_CHECK,
    MAX_LEASE,
    MAX_LEASE_SECONDS,
    UNCLAIMED,
    QueueRows,
)
from core.store.results import Results, ResultWriter

# A check that was recorded further ahead is of a clock that was wrong. Less is a difference between
# two servers of a cluster.
_MAX_CLOCK_ERROR = timedelta(seconds=5)

_BATCH = "id, next_check_at, checked_at"


class Claimed(NamedTuple):
    """What one claim hands out."""

    batches: Sequence[BatchClaim] = ()
    sessions: Sequence[Claim] = ()  # those whose own row is claimed

    @property
    def claims(self) -> list[Claim]:
        of_batches = [claim for batch in self.batches for claim in batch.claims]
        return [*of_batches, *self.sessions]


type _IsDue = Callable[[Row], bool]


class _Wanted(NamedTuple):
    """Which batches a claim takes, and which of their sessions."""

    batches: str  # a condition on the batch, and its parameters
    batch_parameters: Sequence[Value]
    sessions: str  # a condition on sessions with a due time of their own
    session_parameters: Sequence[Value]


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
        self.rows = QueueRows(database)
        self._results = ResultWriter(database, self.rows, self._batch_size)

    def write(self, results: Results, now: datetime) -> None:
        self._results.write(results, now)

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

    def count_due(self, *, tick: datetime, limit: int) -> int:
        """Count the due sessions up to `limit`, including those whose check is under way."""

        def count(connection: Connection) -> int:
            until = max(connection.now(), tick)
            [(due,)] = connection.query(
                "SELECT COUNT(*) FROM (SELECT 1 FROM checkout_session_batch b"
                f" {self._database.join_in_order} checkout_session_check c"
                f" {self._database.by_batch} ON c.batch_id = b.id WHERE b.due_at <= %s"
                f" AND {DUE} <= %s LIMIT {limit:d}) AS due",
                (until, until),
            )
            return as_int(due)

        return self._database.run(count)

    def count_claimed(self, now: datetime) -> int:
        """How many batches are claimed, by whomever."""

        def count(connection: Connection) -> int:
            [(claimed,)] = connection.query(
                f"SELECT COUNT(*) FROM checkout_session_batch WHERE {CLAIMED.format('')}",
                (now, now + MAX_LEASE),
            )
            return as_int(claimed)

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
        for batch_id, chunk in zip(
            self._new_batches(transaction, len(chunks), now), chunks, strict=True
        ):
            transaction.execute(
                f"UPDATE checkout_session_check {self._database.by_rowid} SET next_check_at ="
                f" CASE WHEN {CLAIMED.format('')} THEN claimed_until WHEN next_check_at > %s"
                " OR failing_since IS NOT NULL THEN next_check_at END, batch_id = %s"
                f" WHERE rowid IN {number_list(chunk)} AND (batch_id IS NULL OR NOT EXISTS"
                " (SELECT 1 FROM checkout_session_batch b"
                " WHERE b.id = checkout_session_check.batch_id))",
                (now, now + MAX_LEASE, now, batch_id),
            )

    def make_due(
        self,
        transaction: Transaction,
        rows: Mapping[int, int],
        batch_ids: Collection[int],
        now: datetime,
    ) -> None:
        """Make batches due at once, and sessions with a due time of their own.

        `rows` are the numbers of these, with their batches. A claimed batch is due when it is given
        back; a session that is claimed by itself stays as it is.
        """
        for some in batched({*rows.values(), *batch_ids}, STATEMENT_ROWS, strict=False):
            transaction.query(
                f"SELECT id FROM checkout_session_batch WHERE id IN {number_list(some)}"
                f" {self._database.lock_rows_or_wait}"
            )
        for some in batched(batch_ids, STATEMENT_ROWS, strict=False):
            transaction.execute(
                "UPDATE checkout_session_batch SET next_check_at = %s, due_at = %s"
                f" WHERE id IN {number_list(some)}",
                (now, now),
            )
        for some in batched(rows, STATEMENT_ROWS, strict=False):
            transaction.execute(
                f"UPDATE checkout_session_check {self._database.by_rowid} SET next_check_at = %s"
                f" WHERE {UNCLAIMED.format('')} AND next_check_at IS NOT NULL"
                f" AND rowid IN {number_list(some)}",
                (now, now, now + MAX_LEASE),
            )
            self.rows.bring_forward(transaction, dict.fromkeys(some, now))

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
            f"SELECT {session_columns(self._database)}"
            f" FROM checkout_session_check c {self._database.by_batch}"
            f" WHERE c.batch_id IN {number_list(due)} AND {UNCLAIMED.format('c.')}"
            f" AND ({wanted.sessions}{with_batch if full else ''})",
            (now, now + MAX_LEASE, *wanted.session_parameters),
        )
        of_batch = {
            as_int(batch_id): (as_datetime(due_at), as_datetime_or_none(checked_at))
            for batch_id, due_at, checked_at in rows
        }
        claims: defaultdict[int, list[Claim]] = defaultdict(list)
        closed: defaultdict[int, list[int]] = defaultdict(list)
        for batch_id, rowid, claim in read_claims(sessions, now, until, of_batch):
            if claim is None:
                closed[batch_id].append(rowid)
            else:
                claims[batch_id].append(claim)
        return [
            BatchClaim(i, now, until, due_at, due[i], claims[i], closed[i])
            for i, (due_at, _) in of_batch.items()
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
                f"SELECT {session_columns(self._database)}, b.id, b.next_check_at, b.checked_at"
                " FROM checkout_session_check c"
                " JOIN checkout_session_batch b ON b.id = c.batch_id"
                f" WHERE c.session_id IN {placeholders(session_ids)} AND {last_check}"
                f" AND {UNCLAIMED.format('c.')} AND {UNCLAIMED.format('b.')}"
                f" LIMIT {limit:d} {self._database.lock_rows}",
                (*session_ids, *parameters, *(now, now + MAX_LEASE) * 2),
            )
            of_batch = {
                as_int(batch_id): (as_datetime(due_at), as_datetime_or_none(checked_at))
                for *_, batch_id, due_at, checked_at in rows
            }
            found = list(read_claims((r[:3] for r in rows), now, until, of_batch, on_rows=True))
            self.rows.drop(transaction, (rowid for _, rowid, claim in found if claim is None))
            claims = [claim for _, _, claim in found if claim is not None]
            if of_batch:
                # Of a claim that has lapsed. Its worker must not write what is another's now.
                transaction.execute(
                    "UPDATE checkout_session_batch SET claimed_until = NULL"
                    f" WHERE claimed_until IS NOT NULL AND id IN {number_list(of_batch)}"
                )
            self.rows.claim(transaction, claims)
            self.rows.bring_forward(transaction, {claim.rowid: until for claim in claims})
            return len(rows), claims

        found, claims = limit, list[Claim]()
        while found == limit and not claims:  # all were closed: look for open ones behind them
            found, claims = self._database.transaction(claim)
        return Claimed(sessions=claims)

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


def _in_milliseconds(time: datetime) -> datetime:
    """The time as the database keeps it, rounded up: it identifies the claim."""
    return time + timedelta(microseconds=-time.microsecond % 1000)

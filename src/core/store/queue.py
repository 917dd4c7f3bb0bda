"""`checkout_session_check`, the queue: one row for each open session, handed out by claims.

A session is due when its `next_check_at` has come and no claim on it is valid any more.

Claims and decisions name rows by their number. To compare ids by the shop's collation, at every
level of a key, takes MySQL up to as long as the rest of an UPDATE.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
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
    as_int,
    as_text,
    number_list,
    placeholders,
)
from core.domain.model import Claim, Outcome, Recheck

# A claim that is valid for longer came from a clock that was ahead. The settings allow requests of
# up to 30 s, and a lease lasts ten more.
MAX_LEASE_SECONDS = 60
# Parameters: now, and now plus MAX_LEASE. The second one is for joins: a shop's table may have a
# column of the same name.
_UNCLAIMED = "(claimed_until IS NULL OR claimed_until <= %s OR claimed_until > %s)"
UNCLAIMED_IN_JOIN = _UNCLAIMED.replace("claimed_until", "c.claimed_until")
MAX_LEASE = timedelta(seconds=MAX_LEASE_SECONDS)

# A session counts as checked at least this long after its claim. A manual pass that begins in the
# very millisecond of a check can then tell earlier checks from its own.
_AFTER_CLAIM = timedelta(milliseconds=1)
# A check that was recorded further ahead is of a clock that was wrong. Less is a difference between
# two servers of a cluster.
_MAX_CLOCK_ERROR = timedelta(seconds=5)


class CheckRecord(NamedTuple):
    """What the queue's row keeps of one check."""

    claim: Claim
    outcome: Outcome
    status_code: int | None
    next_check_at: datetime


def oldest_due(database: Database) -> str:
    """An expression: the earliest due time of the sessions that nobody is checking, or NULL.

    It skips claimed rows one by one: there are few of them, and they come first.
    """
    return (
        f"(SELECT next_check_at FROM checkout_session_check {database.in_due_order}"
        f" WHERE claimed_until IS NULL OR claimed_until <= {database.now_sql()}"
        f" OR claimed_until > {database.now_sql(plus_seconds=MAX_LEASE_SECONDS)}"
        " ORDER BY next_check_at LIMIT 1)"
    )


class Queue:
    """Claims go out, results come in. Every method raises StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim_due(
        self, now: datetime, *, tick: datetime, lease: timedelta, limit: int
    ) -> list[Claim]:
        """Claim up to `limit` sessions due by now or by the tick, the longest due first."""
        # Read without a lock. A locking read would look at every entry before it that is marked as
        # deleted: with a snapshot transaction open for minutes, at all that the checks have left.
        [(first_due,)] = self._database.run(
            lambda connection: connection.query(
                f"SELECT next_check_at FROM checkout_session_check {self._database.in_due_order}"
                " ORDER BY next_check_at LIMIT 1"
            )
        ) or [(None,)]
        if first_due is None:
            return []
        bounds = (as_datetime(first_due), max(now, tick))
        return self._claim("next_check_at BETWEEN %s AND %s", bounds, now, lease, limit)

    def claim_unchecked(
        self,
        now: datetime,
        *,
        since: datetime,
        lease: timedelta,
        limit: int,
        session_ids: Sequence[str] | None = None,
    ) -> list[Claim]:
        """Claim up to `limit` open sessions that were not checked after `since`, due or not.

        None, if the clock was set back since then: nobody could tell which ones were checked.
        """
        if now < since:
            return []
        # A check that was recorded in the future is of a clock that was ahead.
        condition = "(last_checked_at IS NULL OR last_checked_at <= %s OR last_checked_at > %s)"
        wanted: Sequence[str] = ()
        if session_ids is not None:
            wanted = [i for i in session_ids if self._database.comparable(i)]
            if not wanted:
                return []
            condition += f" AND session_id IN {placeholders(wanted)}"
        parameters: Sequence[Value] = (since, now + _MAX_CLOCK_ERROR, *wanted)
        return self._claim(condition, parameters, now, lease, limit)

    def record(self, rechecks: Iterable[Recheck], now: datetime) -> None:
        """Keep what the checks found, free the claims, and set when each session is due again.

        A claim that expired and was taken over is left to its new owner. So is a row that was
        recorded already by a statement whose connection then broke.
        """
        records = [
            CheckRecord(r.claim, r.answer.outcome, r.answer.status_code, r.next_check_at)
            for r in rechecks
        ]
        if records:
            self._database.run(partial(self.write_records, records=records, now=now))

    def write_records(
        self, connection: Connection, records: Iterable[CheckRecord], now: datetime
    ) -> None:
        """Write the records with one statement for all rows that get the same values."""
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
                connection.execute(
                    f"UPDATE checkout_session_check {self._database.by_rowid}"
                    " SET last_checked_at = %s,"
                    " last_outcome = %s, last_status_code = %s, next_check_at = %s,"
                    f" attempts = attempts + 1, {failing}, claimed_until = NULL"
                    f" WHERE claimed_until = %s AND rowid IN {number_list(some)}",
                    (
                        checked_at,
                        values.outcome.value,
                        values.status_code,
                        values.next_check_at,
                        *parameters,
                        values.claimed_until,
                    ),
                )

    def release(self, claims: Iterable[Claim]) -> None:
        """Give back sessions that were claimed and not checked; their due time stays."""
        if by_token := group_by_token(claims):
            self._database.run(partial(self._free, by_token=by_token))

    def count_due(self, *, tick: datetime, limit: int) -> int:
        """Count the due sessions up to `limit`, including those whose check is under way."""

        def count(connection: Connection) -> int:
            [(due,)] = connection.query(
                "SELECT COUNT(*) FROM (SELECT 1 FROM checkout_session_check"
                f" WHERE next_check_at <= %s LIMIT {limit:d}) AS due",
                (max(connection.now(), tick),),
            )
            return as_int(due)

        return self._database.run(count)

    def adopt(self, connection: Connection, session_ids: Iterable[Value], now: datetime) -> None:
        """Queue new sessions, due at once."""
        for some in batched(session_ids, STATEMENT_ROWS, strict=False):
            values = [value for session_id in some for value in (session_id, now, now)]
            connection.execute(
                "INSERT INTO checkout_session_check (session_id, next_check_at, first_seen_at)"
                f" VALUES {', '.join(['(%s, %s, %s)'] * len(some))}"
                f" {self._database.skip_duplicates.format(key='session_id')}",
                values,
            )

    def drop(self, connection: Connection, rowids: Iterable[int]) -> None:
        """Take sessions that are not open any more off the queue."""
        for some in batched(rowids, STATEMENT_ROWS, strict=False):
            connection.execute(
                f"DELETE FROM checkout_session_check WHERE rowid IN {number_list(some)}"
            )

    def make_due(self, connection: Connection, rowids: Iterable[int], now: datetime) -> None:
        """Make sessions due at once, unless they are being checked."""
        for some in batched(rowids, STATEMENT_ROWS, strict=False):
            connection.execute(
                f"UPDATE checkout_session_check {self._database.by_rowid} SET next_check_at = %s"
                f" WHERE {_UNCLAIMED} AND rowid IN {number_list(some)}",
                (now, now, now + MAX_LEASE),
            )

    def _claim(
        self,
        condition: str,
        parameters: Sequence[Value],
        now: datetime,
        lease: timedelta,
        limit: int,
    ) -> list[Claim]:
        until = _in_milliseconds(now + lease)

        def claim(transaction: Transaction) -> tuple[int, list[Claim]]:
            unclaimed = (now, now + MAX_LEASE)
            rows = self._lock_rows(transaction, condition, (*parameters, *unclaimed), limit)
            claims = [_claim_on(row, now, until) for row in rows if _is_open(row)]
            self._mark_claimed(transaction, claims, until)
            self.drop(transaction, (as_int(row[_ROWID]) for row in rows if not _is_open(row)))
            return len(rows), claims

        found, claims = limit, list[Claim]()
        while found == limit and not claims:  # all were closed: look for due sessions behind them
            found, claims = self._database.transaction(claim)
        return claims

    def _lock_rows(
        self, transaction: Transaction, condition: str, parameters: Sequence[Value], limit: int
    ) -> Sequence[Row]:
        """Lock unclaimed rows, in due order; the last column is NULL for a session not open.

        For an open session it is the checkout id, or '' if the shop has none: in a subquery's
        result, NULL already says that there is no open session.
        """
        # Only the monitor's own rows are locked. A join would lock the shop's rows too (MariaDB has
        # no FOR UPDATE OF); a subquery reads without a lock on every engine. The status is tested
        # in the SELECT list and not in WHERE, so that the shop's row can only be found by its key,
        # whatever the statistics of an index on status are. MAX is for a table whose ids are not
        # unique: of its rows, an open one counts.
        return transaction.query(
            "SELECT c.rowid, c.session_id, c.first_seen_at, c.consecutive_failures, (SELECT"
            " MAX(CASE WHEN s.status = 'open' THEN COALESCE(s.billing_checkout_id, '') END)"
            " FROM checkout_session s WHERE s.id = c.session_id)"
            f" FROM checkout_session_check c {self._database.in_due_order}"
            f" WHERE {condition} AND {_UNCLAIMED}"
            f" ORDER BY next_check_at LIMIT {limit:d} {self._database.lock_rows}",
            parameters,
        )

    def _mark_claimed(
        self, transaction: Transaction, claims: Iterable[Claim], until: datetime
    ) -> None:
        for some in batched(claims, STATEMENT_ROWS, strict=False):
            transaction.execute(
                f"UPDATE checkout_session_check {self._database.by_rowid} SET claimed_until = %s"
                f" WHERE rowid IN {number_list(claim.rowid for claim in some)}",
                (until,),
            )

    def _free(self, connection: Connection, by_token: dict[datetime, list[int]]) -> None:
        for claimed_until, rowids in by_token.items():
            for some in batched(rowids, STATEMENT_ROWS, strict=False):
                connection.execute(
                    f"UPDATE checkout_session_check {self._database.by_rowid}"
                    " SET claimed_until = NULL"
                    f" WHERE claimed_until = %s AND rowid IN {number_list(some)}",
                    (claimed_until,),
                )


# Columns of the rows that a claim locks.
_ROWID, _CHECKOUT_ID = 0, 4


def _in_milliseconds(time: datetime) -> datetime:
    """The time as the database keeps it, rounded up: it identifies the claim."""
    return time + timedelta(microseconds=-time.microsecond % 1000)


def _is_open(row: Row) -> bool:
    return row[_CHECKOUT_ID] is not None


def _claim_on(row: Row, claimed_at: datetime, claimed_until: datetime) -> Claim:
    rowid, session_id, first_seen_at, consecutive_failures, checkout_id = row
    return Claim(
        rowid=as_int(rowid),
        session_id=as_text(session_id),
        billing_checkout_id=as_text(checkout_id) or None,
        first_seen_at=as_datetime(first_seen_at),
        consecutive_failures=as_int(consecutive_failures),
        claimed_at=claimed_at,
        claimed_until=claimed_until,
    )


class _RecordValues(NamedTuple):
    outcome: Outcome
    status_code: int | None
    next_check_at: datetime
    claimed_at: datetime
    claimed_until: datetime


def _group_by_values(records: Iterable[CheckRecord]) -> dict[_RecordValues, list[int]]:
    """Row numbers by what is written: most of a batch is one group, and so one statement."""
    groups: defaultdict[_RecordValues, list[int]] = defaultdict(list)
    for claim, outcome, status_code, next_check_at in records:
        values = _RecordValues(
            outcome, status_code, next_check_at, claim.claimed_at, claim.claimed_until
        )
        groups[values].append(claim.rowid)
    return groups


def group_by_token(claims: Iterable[Claim]) -> dict[datetime, list[int]]:
    """The row numbers of some claims by their `claimed_until`."""
    groups: defaultdict[datetime, list[int]] = defaultdict(list)
    for claim in claims:
        groups[claim.claimed_until].append(claim.rowid)
    return groups

"""`checkout_session_check`, the queue: one row for each open session, handed out by claims.

Claims and results name rows by their number: to compare ids by the shop's collation, at every
level of a key, takes MySQL up to as long as all the rest of an UPDATE.

A session is due when its `next_check_at` has come and no claim on it is valid any more.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import batched

from core.database.port import STATEMENT_ROWS, Database, Value, integer, listed, marks, moment
from core.domain.model import Claim, Outcome, Result

UNCLAIMED = "(claimed_until IS NULL OR claimed_until <= %s)"

# So long after its claim, at the least, a session counts as checked: a manual pass that begins in
# the very millisecond of a check can tell the checks before it from its own.
_AFTER_CLAIM = timedelta(milliseconds=1)


def longest_due(database: Database) -> str:
    """An expression: when the longest due of the sessions that nobody is checking was due, or NULL.

    What is claimed is passed over one by one: there are few of them, and they come first.
    """
    return (
        f"(SELECT next_check_at FROM checkout_session_check {database.in_due_order}"
        f" WHERE claimed_until IS NULL OR claimed_until <= {database.now_sql}"
        " ORDER BY next_check_at LIMIT 1)"
    )


class Queue:
    """Claims out, results in. Every method raises StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim_due(
        self, now: datetime, *, tick: datetime, lease: timedelta, limit: int
    ) -> list[Claim]:
        """Claim up to `limit` sessions due by now or by the tick, least recently due first."""
        return self._claim("next_check_at <= %s", (max(now, tick),), now, lease, limit)

    def claim_unchecked(
        self,
        now: datetime,
        *,
        since: datetime,
        lease: timedelta,
        limit: int,
        session_ids: Sequence[str] | None = None,
    ) -> list[Claim]:
        """Claim up to `limit` open sessions not checked after that moment, due or not."""
        condition = "(last_checked_at IS NULL OR last_checked_at <= %s)"
        wanted: Sequence[str] = ()
        if session_ids is not None:
            wanted = [i for i in session_ids if self._database.comparable(i)]
            if not wanted:
                return []
            condition += f" AND session_id IN {marks(wanted)}"
        return self._claim(condition, (since, *wanted), now, lease, limit)

    def record(self, results: Iterable[Result], now: datetime) -> None:
        """Keep what the checks found, free the claims, and set when each session is due again.

        A claim that has lapsed and was taken over is left to whoever has it now; so is one that was
        recorded already, by a statement whose connection then broke.
        """
        if by_outcome := _by_outcome(results):
            self._database.run(partial(self.record_as, by_outcome, now))

    def record_as(self, results: Mapping[Outcome, Iterable[Result]], now: datetime) -> None:
        """The same by outcome. Within `Database.run`."""
        for outcome, those in results.items():
            for alike, rowids in _alike(those).items():
                status_code, next_check_at, claimed_at, claimed_until = alike
                checked_at = max(now, claimed_at + _AFTER_CLAIM)
                failing = "consecutive_failures = 0, failing_since = NULL"
                parameters: tuple[Value, ...] = ()
                if outcome.is_error:
                    failing = (
                        "consecutive_failures = consecutive_failures + 1,"
                        " failing_since = COALESCE(failing_since, %s)"
                    )
                    parameters = (checked_at,)
                for some in batched(rowids, STATEMENT_ROWS, strict=False):
                    self._database.execute(
                        f"UPDATE checkout_session_check {self._database.by_rowid}"
                        " SET last_checked_at = %s,"
                        " last_outcome = %s, last_status_code = %s, next_check_at = %s,"
                        f" attempts = attempts + 1, {failing}, claimed_until = NULL"
                        f" WHERE claimed_until = %s AND rowid IN {listed(some)}",
                        (
                            checked_at,
                            outcome.value,
                            status_code,
                            next_check_at,
                            *parameters,
                            claimed_until,
                        ),
                    )

    def release(self, claims: Iterable[Claim]) -> None:
        """Give back sessions that were claimed and not checked: they stay as due as they were."""
        by_claim = by_token(claims)

        def work() -> None:
            for claimed_until, rowids in by_claim.items():
                for some in batched(rowids, STATEMENT_ROWS, strict=False):
                    self._database.execute(
                        f"UPDATE checkout_session_check {self._database.by_rowid}"
                        " SET claimed_until = NULL"
                        f" WHERE claimed_until = %s AND rowid IN {listed(some)}",
                        (claimed_until,),
                    )

        if by_claim:
            self._database.run(work)

    def count_due(self, *, tick: datetime, most: int) -> int:
        """How many sessions are due, those included whose check is under way; `most` at most."""

        def work() -> int:
            due_by = max(self._database.now(), tick)
            [(due,)] = self._database.query(
                "SELECT COUNT(*) FROM (SELECT 1 FROM checkout_session_check"
                f" WHERE next_check_at <= %s LIMIT {most:d}) AS due",
                (due_by,),
            )
            return integer(due)

        return self._database.run(work)

    def adopt(self, session_ids: Iterable[Value], now: datetime) -> None:
        """Queue sessions that are new, due at once. Within `Database.run`."""
        for some in batched(session_ids, STATEMENT_ROWS, strict=False):
            values = [value for session_id in some for value in (session_id, now, now)]
            self._database.execute(
                f"{self._database.insert_or_ignore} INTO checkout_session_check"
                " (session_id, next_check_at, first_seen_at) VALUES "
                + ", ".join(["(%s, %s, %s)"] * len(some)),
                values,
            )

    def forget(self, session_ids: Iterable[Value]) -> None:
        """Take sessions that are not open any more off the queue. Within `Database.run`."""
        for some in batched(session_ids, STATEMENT_ROWS, strict=False):
            self._database.execute(
                f"DELETE FROM checkout_session_check WHERE session_id IN {marks(some)}", some
            )

    def _claim(
        self,
        condition: str,
        parameters: Sequence[Value],
        now: datetime,
        lease: timedelta,
        limit: int,
    ) -> list[Claim]:
        work = partial(self._claim_rows, condition, parameters, now, lease, limit)
        found, claims = limit, list[Claim]()
        while found == limit and not claims:  # all of them closed: what is due lies behind them
            found, claims = self._database.transaction(work)
        return claims

    def _claim_rows(
        self,
        condition: str,
        parameters: Sequence[Value],
        now: datetime,
        lease: timedelta,
        limit: int,
    ) -> tuple[int, list[Claim]]:
        """How many rows were found, and the claims on those whose session is open."""
        # Only the monitor's own rows are locked. A join would hold up the shop (MariaDB has no FOR
        # UPDATE OF); a subquery reads without a lock on every engine. The status is looked at in
        # what is selected, so that the shop's row can only be found by its key, whatever the
        # statistics make of an index on status.
        rows = self._database.query(
            "SELECT c.rowid, c.session_id, c.first_seen_at, c.consecutive_failures,"
            " (SELECT CASE WHEN s.status = 'open' THEN COALESCE(s.billing_checkout_id, '') END"
            " FROM checkout_session s WHERE s.id = c.session_id)"
            f" FROM checkout_session_check c {self._database.in_due_order}"
            f" WHERE {condition} AND {UNCLAIMED}"
            f" ORDER BY next_check_at LIMIT {limit:d} {self._database.lock_rows}",
            (*parameters, now),
        )
        until = now + lease
        claims = [
            Claim(
                integer(rowid),
                str(session_id),
                str(checkout) or None,
                moment(seen),
                integer(failures),
                now,
                until,
            )
            for rowid, session_id, seen, failures, checkout in rows
            if checkout is not None
        ]
        for some in batched(claims, STATEMENT_ROWS, strict=False):
            self._database.execute(
                f"UPDATE checkout_session_check {self._database.by_rowid} SET claimed_until = %s"
                f" WHERE rowid IN {listed(claim.rowid for claim in some)}",
                (until,),
            )
        self.forget(session_id for _rowid, session_id, *_, checkout in rows if checkout is None)
        return len(rows), claims


def _by_outcome(results: Iterable[Result]) -> dict[Outcome, list[Result]]:
    groups: defaultdict[Outcome, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.answer.outcome].append(result)
    return groups


type _Alike = tuple[int | None, datetime, datetime, datetime]


def _alike(results: Iterable[Result]) -> dict[_Alike, list[int]]:
    """Rows by what is recorded of them: most of a batch is one group, one statement."""
    groups: defaultdict[_Alike, list[int]] = defaultdict(list)
    for result in results:
        claim = result.claim
        alike = (
            result.answer.status_code,
            result.next_check_at,
            claim.claimed_at,
            claim.claimed_until,
        )
        groups[alike].append(claim.rowid)
    return groups


def by_token(claims: Iterable[Claim]) -> dict[datetime, list[int]]:
    """The rows of each claim, by its `claimed_until`."""
    groups: defaultdict[datetime, list[int]] = defaultdict(list)
    for claim in claims:
        groups[claim.claimed_until].append(claim.rowid)
    return groups

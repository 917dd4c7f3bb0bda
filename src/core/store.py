"""The database as the queue of checks: every statement of the monitor, written once.

Of the shop's `checkout_session` table only `status` is ever written, and only from `open`. The
monitor's own tables are `checkout_session_check`, one row for each open session,
`checkout_session_run`, one row for each pass, and `checkout_session_pause`, a single row: until
when billing asked to be left alone. A session is due when its `next_check_at` has come and no claim
on it is valid any more.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import batched
from typing import Protocol

from core.database import Database, Value
from core.model import (
    Claim,
    OpenSessions,
    Outcome,
    Pause,
    Reason,
    Recorded,
    Result,
    SessionStatus,
    Skip,
    StatusChange,
    Summary,
)

# Ids in one statement: about 20 KB of SQL. MariaDB turns an IN of 1,000 and more into a join with
# a temporary table (in_predicate_conversion_threshold), which is slower here.
STATEMENT_ROWS = 500

# Of one PutEvents call, so that a transaction whose events are published holds few of the shop's
# rows, and those for one call only.
EVENTS_AT_ONCE = 10

KEEP_RUNS = timedelta(days=1)

# Pauses in a row, where billing does not say how long: 1, 2, 4 … seconds.
LONGEST_BLIND_PAUSE = timedelta(seconds=60)

NO_STATUS_INDEX = (
    "checkout_session has no index on status, so every pass reads the whole table. Run: "
    "CREATE INDEX checkout_session_status ON checkout_session (status);"
)

# Beside ids. As a bare `status = 'open'` it makes MariaDB read every open session by the index on
# status instead of the few by their keys.
STILL_OPEN = "COALESCE(status, '') = 'open'"

UNCLAIMED = "(claimed_until IS NULL OR claimed_until <= %s)"


class Publisher(Protocol):
    """Tells others of status changes; see `core.events.EventBus`."""

    def publish(self, changes: Sequence[StatusChange]) -> Collection[str]:
        """Publish up to EVENTS_AT_ONCE changes; returns the session ids of those that were."""


class SqlStore:
    """The steps of a pass that need the database, on whichever engine `database` is.

    Every method raises StoreError.
    """

    def __init__(self, database: Database, publisher: Publisher | None = None) -> None:
        self._database = database
        self._publisher = publisher

    def prepare(self) -> list[str]:
        """Make the monitor's tables if need be; return warnings for the operator."""
        if self._database.prepared:
            return []
        indexed = self._database.prepare()
        self._database.run(self._add_pause_row)
        if self.last_run_at() is None:
            # A monitor that has just been installed is not late: its first row says since when.
            self.record_run(Summary(Reason.START, self.now()))
        return [] if indexed else [NO_STATUS_INDEX]

    def now(self) -> datetime:
        return self._database.run(self._database.now)

    def sync_open_sessions(
        self, tick: datetime, session_ids: Sequence[str] | None = None
    ) -> OpenSessions:
        """Adopt open sessions that are new, forget those no longer open, and count.

        `session_ids` narrows what is counted, not what is adopted or forgotten.
        """
        return self._database.run(lambda: self._sync_open_sessions(tick, session_ids))

    def claim_due(self, *, tick: datetime, lease: timedelta, limit: int) -> list[Claim]:
        """Claim up to `limit` sessions due by now or by the tick, least recently due first."""
        return self._claim("next_check_at <= %s", lambda now: (max(now, tick),), lease, limit)

    def claim_unchecked(
        self,
        *,
        since: datetime,
        lease: timedelta,
        limit: int,
        session_ids: Sequence[str] | None = None,
    ) -> list[Claim]:
        """Claim up to `limit` open sessions not checked since then, due or not."""
        condition = "(last_checked_at IS NULL OR last_checked_at < %s)"
        wanted: Sequence[str] = ()
        if session_ids is not None:
            wanted = [i for i in session_ids if self._database.comparable(i)]
            if not wanted:
                return []
            condition += f" AND session_id IN {_marks(wanted)}"
        return self._claim(condition, lambda _now: (since, *wanted), lease, limit)

    def record(self, results: Sequence[Result]) -> Recorded:
        """Keep what the checks found, free the claims, and set when each session is due again.

        A claim that has lapsed and was taken over is left to whoever has it now. A result with a
        `new_status` becomes the session's status, and is published first, unless the session is
        not open any more or the shop has its row locked; what is not published stays open, and its
        next check finds it again.
        """
        changed: list[Result] = []
        unpublished = 0
        staying = [result for result in results if result.new_status is None]
        if staying:
            self._database.transaction(lambda: self._record(staying))
        at_once = EVENTS_AT_ONCE if self._publisher else STATEMENT_ROWS
        leaving = [result for result in results if result.new_status is not None]
        for some in batched(leaving, at_once, strict=False):
            recorded = self._database.transaction(partial(self._change_status, some))
            changed += recorded.changed
            unpublished += recorded.unpublished
        return Recorded(changed, unpublished)

    def release(self, claims: Iterable[Claim]) -> None:
        """Give back sessions that were claimed and not checked: they stay as due as they were."""
        by_claim: defaultdict[datetime, list[str]] = defaultdict(list)
        for claim in claims:
            by_claim[claim.claimed_until].append(claim.session_id)

        def work() -> None:
            for claimed_until, session_ids in by_claim.items():
                for some in batched(session_ids, STATEMENT_ROWS, strict=False):
                    self._database.execute(
                        "UPDATE checkout_session_check SET claimed_until = NULL"
                        f" WHERE claimed_until = %s AND session_id IN {_marks(some)}",
                        (claimed_until, *some),
                    )

        self._database.transaction(work)

    def read_pause(self) -> Pause:
        """The pause that billing asked for last; it may be over."""
        return self._database.run(self._read_pause)

    def pause(self, seconds: float | None) -> Pause:
        """Keep every worker from asking billing for `seconds`.

        None: billing did not say how long; then it is a second, and twice as long after each pause
        that brought nothing, LONGEST_BLIND_PAUSE at most. A pause that lasts longer stands.
        """

        def work() -> Pause:
            # Whoever comes second waits here, and then sees the first one's pause.
            self._database.execute("UPDATE checkout_session_pause SET pauses = pauses")
            now = self._database.now()
            paused = self._read_pause()
            again = paused.until > now  # another request of the same wave
            count = paused.count if again else paused.count + 1
            if seconds is not None:
                until = now + timedelta(seconds=seconds)
            elif again:
                until = paused.until
            else:
                # 2**20 seconds are beyond the longest; the bound keeps the power small.
                until = now + min(timedelta(seconds=2 ** min(count - 1, 20)), LONGEST_BLIND_PAUSE)
            pause = Pause(max(until, paused.until), count)
            self._database.execute(
                "UPDATE checkout_session_pause SET paused_until = %s, pauses = %s",
                (pause.until, pause.count),
            )
            return pause

        return self._database.transaction(work)

    def end_pauses(self, pause: Pause) -> None:
        """Billing answers normally again after that pause; a newer one stands."""
        self._database.run(
            lambda: self._database.execute(
                "UPDATE checkout_session_pause SET pauses = 0 WHERE paused_until = %s",
                (pause.until,),
            )
        )

    def record_run(self, summary: Summary) -> None:
        """Keep the pass's row, the heartbeat, and drop rows older than a day."""
        latency = summary.latency_ms
        row: dict[str, Value] = {
            "reason": summary.reason.value,
            "tick": summary.tick,
            "started_at": summary.started_at,
            "finished_at": summary.finished_at,
            "duration_ms": round(summary.duration_seconds * 1000),
            "open_sessions": summary.open,
            "checked": summary.checked,
            "errors": summary.errors,
            "status_changes": summary.status_changes,
            "outcomes": _json(summary.outcomes),
            "skipped": _json(summary.skipped),
            "overdue_ms": round(summary.overdue_seconds * 1000),
            "latency_p50_ms": latency.get("p50"),
            "latency_p95_ms": latency.get("p95"),
            "latency_p99_ms": latency.get("p99"),
            "latency_max_ms": latency.get("max"),
        }

        def work() -> None:
            self._database.execute(
                f"INSERT INTO checkout_session_run ({', '.join(row)}) VALUES {_marks(row)}",
                tuple(row.values()),
            )
            self._database.execute(
                "DELETE FROM checkout_session_run WHERE finished_at < %s",
                (summary.finished_at - KEEP_RUNS,),
            )

        self._database.run(work)

    def last_run_at(self) -> datetime | None:
        """When the newest pass ended, or the monitor was installed; None before both."""
        rows = self._database.run(
            lambda: self._database.query(
                "SELECT finished_at FROM checkout_session_run ORDER BY finished_at DESC LIMIT 1"
            )
        )
        return _moment(rows[0][0]) if rows else None

    def close(self) -> None:
        self._database.close()

    def _sync_open_sessions(
        self, tick: datetime, session_ids: Sequence[str] | None
    ) -> OpenSessions:
        now = self._database.now()
        due_by = max(now, tick)
        counts = self._count(now, due_by)
        if counts["new"]:
            self._adopt_new_sessions(now)
        [(known,)] = self._database.query("SELECT COUNT(*) FROM checkout_session_check")
        if _integer(known) > counts["open"]:
            self._forget_closed_sessions()
        if session_ids is not None:
            counts = self._count(now, due_by, session_ids)
        oldest = self._database.query(
            f"SELECT next_check_at FROM checkout_session_check WHERE {UNCLAIMED}"
            " ORDER BY next_check_at LIMIT 1",
            (now,),
        )
        overdue = (now - _moment(oldest[0][0])).total_seconds() if oldest else 0.0
        return OpenSessions(
            counts["open"], counts["in_flight"], counts["not_due"], max(0.0, overdue)
        )

    def _add_pause_row(self) -> None:
        self._database.execute(
            f"{self._database.insert_or_ignore} INTO checkout_session_pause"
            " (id, paused_until, pauses) VALUES (1, %s, 0)",
            (self._database.now(),),
        )

    def _read_pause(self) -> Pause:
        [(until, count)] = self._database.query(
            "SELECT paused_until, pauses FROM checkout_session_pause"
        )
        return Pause(_moment(until), _integer(count))

    def _record(self, results: Iterable[Result]) -> None:
        now = self._database.now()
        for alike, claims in _alike(results).items():
            outcome, status_code, next_check_at, claimed_until = alike
            failures = "consecutive_failures + 1" if outcome.is_error else "0"
            for some in batched(claims, STATEMENT_ROWS, strict=False):
                self._database.execute(
                    "UPDATE checkout_session_check SET last_checked_at = %s,"
                    " last_outcome = %s, last_status_code = %s, next_check_at = %s,"
                    f" attempts = attempts + 1, consecutive_failures = {failures},"
                    " claimed_until = NULL"
                    f" WHERE claimed_until = %s AND session_id IN {_marks(some)}",
                    (now, outcome.value, status_code, next_check_at, claimed_until, *some),
                )

    def _change_status(self, results: Sequence[Result]) -> Recorded:
        by_id = {result.claim.session_id: result for result in results}
        # A row that the shop has locked is being written right now. The monitor neither waits for
        # the shop nor wins against it.
        still_open = self._database.query(
            "SELECT id, billing_order_id FROM checkout_session"
            f" WHERE {STILL_OPEN} AND id IN {_marks(by_id)} {self._database.lock_rows}",
            tuple(by_id),
        )
        orders = {str(i): None if order is None else str(order) for i, order in still_open}
        ids: Collection[str] = orders
        if self._publisher is not None and orders:
            now = self._database.now()
            changes = [_status_change(by_id[i], order, now) for i, order in orders.items()]
            ids = self._publisher.publish(changes)
        changed = [by_id[i] for i in ids]
        for status in SessionStatus:
            if into := [r.claim.session_id for r in changed if r.new_status is status]:
                self._database.execute(
                    "UPDATE checkout_session SET status = %s"
                    f" WHERE {STILL_OPEN} AND id IN {_marks(into)}",
                    (status.value, *into),
                )
        self._forget([result.claim.session_id for result in changed])
        self._record([result for i, result in by_id.items() if i not in ids])
        return Recorded(changed, len(orders) - len(changed))

    def _count(
        self, now: datetime, due_by: datetime, session_ids: Sequence[str] | None = None
    ) -> Counter[str]:
        condition = ""
        wanted: list[str] = []
        if session_ids is not None:
            wanted = [i for i in session_ids if self._database.comparable(i)]
            if not wanted:
                return Counter()
            condition = f" AND s.id IN {_marks(wanted)}"
        [row] = self._database.query(
            "SELECT COUNT(*),"
            " SUM(CASE WHEN c.session_id IS NULL THEN 1 ELSE 0 END),"
            " SUM(CASE WHEN c.claimed_until > %s THEN 1 ELSE 0 END),"
            f" SUM(CASE WHEN {UNCLAIMED} AND c.next_check_at > %s THEN 1 ELSE 0 END)"
            " FROM checkout_session s LEFT JOIN checkout_session_check c ON c.session_id = s.id"
            f" WHERE s.status = 'open'{condition}",
            (now, now, due_by, *wanted),
        )
        names = ("open", "new", "in_flight", "not_due")
        return Counter({n: _integer(value or 0) for n, value in zip(names, row, strict=True)})

    def _adopt_new_sessions(self, now: datetime) -> None:
        # Read first, without a lock, then insert by id: INSERT … SELECT may lock the shop's rows.
        new = self._database.query(
            "SELECT s.id FROM checkout_session s"
            " LEFT JOIN checkout_session_check c ON c.session_id = s.id"
            " WHERE s.status = 'open' AND c.session_id IS NULL"
        )
        for some in batched(new, STATEMENT_ROWS, strict=False):
            values = [value for (session_id,) in some for value in (session_id, now, now)]
            self._database.execute(
                f"{self._database.insert_or_ignore} INTO checkout_session_check"
                " (session_id, next_check_at, first_seen_at) VALUES "
                + ", ".join(["(%s, %s, %s)"] * len(some)),
                values,
            )

    def _forget_closed_sessions(self) -> None:
        closed = self._database.query(
            "SELECT c.session_id FROM checkout_session_check c"
            " LEFT JOIN checkout_session s ON s.id = c.session_id AND s.status = 'open'"
            " WHERE s.id IS NULL"
        )
        self._forget([str(session_id) for (session_id,) in closed])

    def _forget(self, session_ids: Sequence[str]) -> None:
        for some in batched(session_ids, STATEMENT_ROWS, strict=False):
            self._database.execute(
                f"DELETE FROM checkout_session_check WHERE session_id IN {_marks(some)}", some
            )

    def _claim(
        self,
        condition: str,
        parameters: Callable[[datetime], Sequence[Value]],
        lease: timedelta,
        limit: int,
    ) -> list[Claim]:
        claims = self._database.transaction(
            lambda: self._claim_rows(condition, parameters, lease, limit)
        )
        return self._database.run(lambda: self._with_checkout_ids(claims))

    def _claim_rows(
        self,
        condition: str,
        parameters: Callable[[datetime], Sequence[Value]],
        lease: timedelta,
        limit: int,
    ) -> list[Claim]:
        # Only the monitor's own rows are locked: MariaDB has no FOR UPDATE OF, and a join here
        # would hold up the shop.
        now = self._database.now()
        rows = self._database.query(
            "SELECT session_id, first_seen_at, consecutive_failures FROM checkout_session_check"
            f" {self._database.in_due_order} WHERE {condition} AND {UNCLAIMED}"
            f" ORDER BY next_check_at LIMIT {limit:d} {self._database.lock_rows}",
            (*parameters(now), now),
        )
        claims = [
            Claim(str(session_id), None, _moment(seen), _integer(failures), now, now + lease)
            for session_id, seen, failures in rows
        ]
        for some in batched(claims, STATEMENT_ROWS, strict=False):
            self._database.execute(
                "UPDATE checkout_session_check SET claimed_until = %s"
                f" WHERE session_id IN {_marks(some)}",
                (now + lease, *(claim.session_id for claim in some)),
            )
        return claims

    def _with_checkout_ids(self, claims: Sequence[Claim]) -> list[Claim]:
        """Add the billing ids; a session that was closed since the count is forgotten instead."""
        found: dict[str, str | None] = {}
        for some in batched(claims, STATEMENT_ROWS, strict=False):
            rows = self._database.query(
                "SELECT id, billing_checkout_id FROM checkout_session"
                f" WHERE {STILL_OPEN} AND id IN {_marks(some)}",
                tuple(claim.session_id for claim in some),
            )
            found |= {str(i): None if billing is None else str(billing) for i, billing in rows}
        closed = [claim.session_id for claim in claims if claim.session_id not in found]
        self._forget(closed)
        return [
            claim.asking(found[claim.session_id]) for claim in claims if claim.session_id in found
        ]


def _alike(
    results: Iterable[Result],
) -> dict[tuple[Outcome, int | None, datetime, datetime], list[str]]:
    """Session ids by what is recorded of them: most of a batch is one group, one statement."""
    groups: defaultdict[tuple[Outcome, int | None, datetime, datetime], list[str]]
    groups = defaultdict(list)
    for result in results:
        claim = result.claim
        alike = (result.outcome, result.status_code, result.next_check_at, claim.claimed_until)
        groups[alike].append(claim.session_id)
    return groups


def _status_change(result: Result, order_id: str | None, now: datetime) -> StatusChange:
    if result.new_status is None:
        raise TypeError("a result without a new status is no change")
    claim = result.claim
    return StatusChange(
        session_id=claim.session_id,
        billing_checkout_id=claim.billing_checkout_id,
        billing_order_id=order_id,
        new_status=result.new_status,
        billing_status=result.billing_status,
        first_seen_at=claim.first_seen_at,
        changed_at=now,
    )


def _marks(values: Iterable[object]) -> str:
    return f"({', '.join('%s' for _ in values)})"


def _json(counts: Counter[Outcome] | Counter[Skip]) -> str:
    return json.dumps({name.value: count for name, count in counts.items()})


def _integer(value: Value) -> int:
    if not isinstance(value, int | Decimal):
        raise TypeError(f"expected a whole number from the database, not {value!r}")
    return int(value)


def _moment(value: Value) -> datetime:
    if not isinstance(value, datetime):
        raise TypeError(f"expected a moment from the database, not {value!r}")
    return value

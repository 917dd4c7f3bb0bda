"""The leader's walk over the open sessions: adopt new ones, drop closed ones, count all.

It also makes sessions due that are due later than the settings allow: a database's clock was ahead,
or the cadence or the interval was made shorter.

It goes through the shop's open sessions in the order of their ids, a piece at a time. So it takes
the same memory for ten sessions as for a million, and holds up a claim or a record as briefly.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from core.database.port import Connection, Database, Value, as_int, placeholders
from core.domain.decision import CheckRules
from core.domain.model import AGES, OpenCounts
from core.store.queue import MAX_LEASE, UNCLAIMED_IN_JOIN, Queue

# About 5 ms of MariaDB's time, 12 of MySQL's: a claim may have to wait that long.
PIECE_SESSIONS = 2000


@dataclass(slots=True)
class _Totals:
    """What some pieces have found."""

    counts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    ages: Counter[str] = field(default_factory=Counter)
    made_due: int = 0
    not_open: int = 0

    def add(self, piece: "_Totals") -> None:
        self.counts += piece.counts
        self.outcomes += piece.outcomes
        self.ages += piece.ages
        self.made_due += piece.made_due
        self.not_open += piece.not_open


class Reconciliation:
    """One walk, from the first id to the last; or over some sessions only, in one piece.

    Every method raises StoreError.
    """

    def __init__(
        self,
        database: Database,
        queue: Queue,
        tick: datetime,
        rules: CheckRules,
        session_ids: Sequence[str] | None = None,
    ) -> None:
        self._database = database
        self._queue = queue
        self._tick = tick
        self._rules = rules
        self._only = None
        self._total = _Totals()
        if session_ids is not None:
            self._only = [i for i in session_ids if database.comparable(i)]
            self._total.not_open = len(set(session_ids)) - len(set(self._only))
        self._after: Value = None  # the last id of the previous piece
        self.took = timedelta(0)  # of the database's time

    @property
    def is_complete(self) -> bool:
        """Whether it covers all open sessions."""
        return self._only is None

    @property
    def counts(self) -> OpenCounts:
        """What has been counted so far."""
        total = self._total
        return OpenCounts(
            total.counts["open"],
            total.counts["in_flight"],
            total.counts["not_due"],
            dict(total.outcomes),
            dict(total.ages),
        )

    @property
    def made_due(self) -> int:
        """How many sessions were new, or due too late."""
        return self._total.made_due

    @property
    def not_open(self) -> int:
        """How many of the sessions asked for by id are not open."""
        return self._total.not_open

    def reconcile_next_piece(self) -> bool:
        """Adopt, drop and count one piece; returns whether there is another one."""
        began = time.perf_counter()
        piece, more = self._database.run(self._next_piece)
        self._total.add(piece)
        self.took += timedelta(seconds=time.perf_counter() - began)
        return more

    def _next_piece(self, connection: Connection) -> tuple[_Totals, bool]:
        piece = self._piece = _Totals()  # a new one each time: after a deadlock, this runs again
        now = connection.now()
        if self._only is not None:
            if self._only:
                self._piece.not_open += self._count_not_open(connection, self._only)
                self._count_and_adopt(connection, now, None)
            return piece, False
        last_id = self._last_id_of_piece(connection)
        queued = self._count_and_adopt(connection, now, last_id)
        if self._rows_in_queue(connection, last_id) > queued:
            self._drop_closed(connection, last_id)
        self._after = last_id
        return piece, last_id is not None

    def _count_not_open(self, connection: Connection, session_ids: Iterable[str]) -> int:
        """How many of the ids have no open session; several spellings may be one session's."""
        unique = list(set(session_ids))
        is_open = (
            "SELECT EXISTS (SELECT 1 FROM checkout_session WHERE id = %s AND status = 'open') AS o"
        )
        [(count,)] = connection.query(
            f"SELECT SUM(o) FROM ({' UNION ALL '.join([is_open] * len(unique))}) AS asked", unique
        )
        return len(unique) - as_int(count)

    def _last_id_of_piece(self, connection: Connection) -> Value:
        """None: the piece has no upper bound, because it is the last one."""
        condition, bounds = self._range("s.id")
        last = connection.query(
            f"SELECT s.id FROM checkout_session s WHERE s.status = 'open'{condition}"
            f" ORDER BY s.id LIMIT 1 OFFSET {PIECE_SESSIONS - 1:d}",
            bounds,
        )
        return last[0][0] if last else None

    def _count_and_adopt(self, connection: Connection, now: datetime, up_to: Value) -> int:
        """Count the open sessions of the piece, adopt the new; returns how many are queued now."""
        condition, bounds = self._range("s.id", up_to)
        ages = " ".join(f"WHEN c.first_seen_at > %s THEN '{name}'" for name in list(AGES)[:-1])
        claimed = (now, now + MAX_LEASE)
        too_late, late_parameters = self._due_too_late(now)
        young = [now - timedelta(seconds=seconds) for seconds in list(AGES.values())[:-1]]
        rows = connection.query(
            "SELECT COALESCE(c.last_outcome, ''),"
            f" CASE WHEN c.session_id IS NULL THEN '' {ages} ELSE '{list(AGES)[-1]}' END AS age,"
            " COUNT(*),"
            " SUM(CASE WHEN c.claimed_until > %s AND c.claimed_until <= %s THEN 1 ELSE 0 END),"
            f" SUM(CASE WHEN {UNCLAIMED_IN_JOIN} AND c.next_check_at > %s THEN 1 ELSE 0 END),"
            f" SUM(CASE WHEN {too_late} THEN 1 ELSE 0 END)"
            " FROM checkout_session s LEFT JOIN checkout_session_check c ON c.session_id = s.id"
            f" WHERE s.status = 'open'{condition} GROUP BY 1, 2",
            (*young, *claimed, *claimed, max(now, self._tick), *late_parameters, *bounds),
        )
        new = queued = late = 0
        for outcome, age, *numbers in rows:
            sessions, in_flight, not_due, due_too_late = map(as_int, numbers)
            late += due_too_late
            if age == "":
                new = sessions
            else:
                queued += sessions
            self._piece.counts += Counter(open=sessions, in_flight=in_flight, not_due=not_due)
            self._piece.outcomes[str(outcome)] += sessions
            self._piece.ages[str(age) or next(iter(AGES))] += sessions
        if late:
            self._make_due(connection, now, up_to)
        return queued + self._adopt_new(connection, now, up_to) if new else queued

    def _due_too_late(self, now: datetime) -> tuple[str, Sequence[Value]]:
        """The condition for sessions that are due later than the settings allow at their age."""
        steps, parameters = [], list[Value]()
        for wait in self._rules.longest_waits():
            step = "c.next_check_at > %s AND (c.consecutive_failures = 0 OR c.next_check_at > %s)"
            parameters += [now + wait.healthy, now + wait.failing]
            if wait.max_age is not None:
                step += " AND c.first_seen_at > %s"
                parameters.append(now - wait.max_age)
            steps.append(f"({step})")
        return f"({' OR '.join(steps)})", parameters

    def _make_due(self, connection: Connection, now: datetime, up_to: Value) -> None:
        condition, bounds = self._range("c.session_id", up_to)
        too_late, parameters = self._due_too_late(now)
        rows = connection.query(
            f"SELECT c.rowid FROM checkout_session_check c WHERE {too_late}{condition}",
            (*parameters, *bounds),
        )
        self._queue.make_due(connection, (as_int(rowid) for (rowid,) in rows), now)
        self._piece.made_due += len(rows)

    def _adopt_new(self, connection: Connection, now: datetime, up_to: Value) -> int:
        """Queue the open sessions of the piece that are not in the queue; returns how many."""
        # Read first, without a lock, then insert by id: INSERT … SELECT may lock the shop's rows.
        condition, bounds = self._range("s.id", up_to)
        ids = connection.query(
            "SELECT s.id FROM checkout_session s"
            " LEFT JOIN checkout_session_check c ON c.session_id = s.id"
            f" WHERE s.status = 'open' AND c.session_id IS NULL{condition}",
            bounds,
        )
        self._queue.adopt(connection, (session_id for (session_id,) in ids), now)
        self._piece.made_due += len(ids)
        return len(ids)

    def _rows_in_queue(self, connection: Connection, up_to: Value) -> int:
        condition, bounds = self._range("session_id", up_to)
        [(rows,)] = connection.query(
            f"SELECT COUNT(*) FROM checkout_session_check {self._database.by_session}"
            f" WHERE TRUE{condition}",
            bounds,
        )
        return as_int(rows)

    def _drop_closed(self, connection: Connection, up_to: Value) -> None:
        condition, bounds = self._range("c.session_id", up_to)
        closed = connection.query(
            f"SELECT c.rowid FROM checkout_session_check c {self._database.by_session}"
            " LEFT JOIN checkout_session s ON s.id = c.session_id AND s.status = 'open'"
            f" WHERE s.id IS NULL{condition}",
            bounds,
        )
        self._queue.drop(connection, (as_int(rowid) for (rowid,) in closed))

    def _range(self, column: str, up_to: Value = None) -> tuple[str, Sequence[Value]]:
        """The condition that selects this piece's ids, and its parameters."""
        if self._only is not None:
            return f" AND {column} IN {placeholders(self._only)}", self._only
        bounds = [(f" AND {column} > %s", self._after), (f" AND {column} <= %s", up_to)]
        given = [(text, value) for text, value in bounds if value is not None]
        return "".join(text for text, _ in given), [value for _, value in given]

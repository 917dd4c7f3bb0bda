"""The leader's walk over the open sessions: adopt new ones, drop closed ones, count all.

It also makes sessions due that are due later than the settings allow: a database's clock was ahead,
or the cadence or the interval was made shorter.

It goes through the shop's open sessions in the order of their ids, a piece at a time. So it takes
the same memory for ten sessions as for a million, and holds up a claim or a record as briefly.
"""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import batched

from core.database.port import (
    STATEMENT_ROWS,
    Connection,
    Database,
    Transaction,
    Value,
    as_int,
    placeholders,
)
from core.domain.decision import CheckRules
from core.domain.model import AGES, OpenCounts
from core.store.queue import Queue
from core.store.queue_rows import CLAIMED, DUE, MAX_LEASE, UNCLAIMED

# About 5 ms of MariaDB's time, 12 of MySQL's: a claim may have to wait that long.
PIECE_SESSIONS = 2000


# What a row of the queue should have.
_BATCH = "checkout_session_batch o ON o.id = c.batch_id"
_OPEN_SESSION = "checkout_session o ON o.id = c.session_id AND o.status = 'open'"


class _Piece:
    """What a piece of the walk has found, or all pieces so far."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self.outcomes = Counter[str]()
        self.ages = Counter[str]()
        self.made_due = 0
        self.not_open = 0
        # What has to change; not added up.
        self.new: Sequence[Value] = ()  # ids of sessions that are not in the queue
        self.without_batch: Sequence[int] = ()  # numbers of rows, as those that follow
        self.late: Mapping[int, int] = {}  # with the ids of their batches
        self.late_batches: Collection[int] = ()  # ids
        self.closed: Sequence[int] = ()

    @property
    def has_changes(self) -> bool:
        found = (self.new, self.without_batch, self.late, self.late_batches, self.closed)
        return any(found)

    def add(self, piece: "_Piece") -> None:
        self.counts += piece.counts
        self.outcomes += piece.outcomes
        self.ages += piece.ages
        self.made_due += piece.made_due + len(piece.new) + len(piece.without_batch)
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
        self._total = _Piece()
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

    def count_ahead(self, session_ids: Iterable[str]) -> int:
        """How many of these sessions of the shop the walk has yet to come to, open or not."""
        ids = [i for i in session_ids if self._database.comparable(i)]
        if self._after is None:  # it has not begun
            return len(ids)

        def count(connection: Connection) -> int:
            ahead = 0
            for some in batched(ids, STATEMENT_ROWS, strict=False):
                [(found,)] = connection.query(
                    "SELECT COUNT(*) FROM checkout_session"
                    f" WHERE id IN {placeholders(some)} AND id > %s",
                    (*some, self._after),
                )
                ahead += as_int(found)
            return ahead

        return self._database.run(count)

    def reconcile_next_piece(self) -> bool:
        """Adopt, drop and count one piece; returns whether there is another one."""
        began = time.perf_counter()
        piece, last_id = self._database.run(self._read_piece)
        if piece.has_changes:
            self._database.transaction(partial(self._change, piece=piece))
        self._total.add(piece)
        self._after = last_id
        self.took += timedelta(seconds=time.perf_counter() - began)
        return last_id is not None

    def _read_piece(self, connection: Connection) -> tuple[_Piece, Value]:
        """Count a piece, and find what has to change; also returns its last id."""
        piece = _Piece()
        now = connection.now()
        if self._only is not None:
            if self._only:
                piece.not_open += self._count_not_open(connection, self._only)
                self._count(connection, piece, now, None)
            return piece, None
        last_id = self._last_id_of_piece(connection)
        queued = self._count(connection, piece, now, last_id)
        if self._rows_in_queue(connection, last_id) > queued:
            piece.closed = self._find_without(connection, _OPEN_SESSION, last_id)
        return piece, last_id

    def _change(self, transaction: Transaction, piece: _Piece) -> None:
        now = transaction.now()
        self._queue.adopt(transaction, piece.new, now)
        self._queue.form_batches(transaction, piece.without_batch, now)
        self._queue.make_due(transaction, piece.late, piece.late_batches, now)
        self._queue.rows.drop(transaction, piece.closed)

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
            f"SELECT s.id FROM checkout_session s {self._database.by_status}"
            f" WHERE s.status = 'open'{condition}"
            f" ORDER BY s.id LIMIT 1 OFFSET {PIECE_SESSIONS - 1:d}",
            bounds,
        )
        return last[0][0] if last else None

    def _count(self, connection: Connection, piece: _Piece, now: datetime, up_to: Value) -> int:
        """Count the open sessions of the piece; returns how many are in the queue."""
        condition, bounds = self._range("s.id", up_to)
        ages = " ".join(f"WHEN c.first_seen_at > %s THEN '{name}'" for name in list(AGES)[:-1])
        valid = (now, now + MAX_LEASE)
        due_by = max(now, self._tick)
        wrong, wrong_parameters = self._due_at_wrong_time(now)
        young = [now - timedelta(seconds=seconds) for seconds in list(AGES.values())[:-1]]
        rows = connection.query(
            "SELECT COALESCE(c.last_outcome, ''),"
            f" CASE WHEN c.session_id IS NULL THEN '' {ages} ELSE '{list(AGES)[-1]}' END AS age,"
            " COUNT(*),"
            f" SUM(CASE WHEN {CLAIMED.format('c.')} OR ({CLAIMED.format('b.')} AND {DUE} <= %s)"
            " THEN 1 ELSE 0 END),"
            f" SUM(CASE WHEN {UNCLAIMED.format('c.')} AND {DUE} > %s THEN 1 ELSE 0 END),"
            " SUM(CASE WHEN c.rowid IS NOT NULL AND b.id IS NULL THEN 1 ELSE 0 END),"
            f" SUM(CASE WHEN {wrong} THEN 1 ELSE 0 END)"
            f" FROM checkout_session s {self._database.by_status}"
            f" LEFT JOIN checkout_session_check c {self._database.by_session}"
            " ON c.session_id = s.id"
            f" LEFT JOIN checkout_session_batch b {self._database.by_rowid} ON b.id = c.batch_id"
            f" WHERE s.status = 'open'{condition} GROUP BY 1, 2",
            (*young, *valid, *valid, due_by, *valid, due_by, *wrong_parameters, *bounds),
        )
        new = queued = without_batch = late = 0
        for outcome, age, *numbers in rows:
            sessions, in_flight, not_due, unbatched, due_wrong = map(as_int, numbers)
            without_batch += unbatched
            late += due_wrong
            if age == "":
                new = sessions
            else:
                queued += sessions
            piece.counts += Counter(open=sessions, in_flight=in_flight, not_due=not_due)
            piece.outcomes[str(outcome)] += sessions
            piece.ages[str(age) or next(iter(AGES))] += sessions
        if new:
            piece.new = self._find_new(connection, up_to)
        if without_batch:
            piece.without_batch = self._find_without(connection, _BATCH, up_to)
        if late:
            self._find_due_at_wrong_time(connection, piece, now, up_to)
        return queued

    def _due_at_wrong_time(self, now: datetime) -> tuple[str, Sequence[Value]]:
        """The condition for sessions that are due later than the settings allow at their age.

        Or earlier than their batch: workers of version 0.2.0 do not know of batches. The batch may
        be claimed because of other sessions, maybe at each tick.
        """
        steps, parameters = [], list[Value]()
        for wait in self._rules.longest_waits():
            step = f"{DUE} > %s AND (c.consecutive_failures = 0 OR {DUE} > %s)"
            parameters += [now + wait.healthy, now + wait.failing]
            if wait.max_age is not None:
                step += " AND c.first_seen_at > %s"
                parameters.append(now - wait.max_age)
            steps.append(f"({step})")
        return (
            f"({UNCLAIMED.format('c.')} AND ({DUE} < b.due_at OR {' OR '.join(steps)}))",
            [now, now + MAX_LEASE, *parameters],
        )

    def _find_due_at_wrong_time(
        self, connection: Connection, piece: _Piece, now: datetime, up_to: Value
    ) -> None:
        condition, bounds = self._range("c.session_id", up_to)
        wrong, parameters = self._due_at_wrong_time(now)
        rows = connection.query(
            "SELECT c.rowid, b.id, c.next_check_at"
            f" FROM checkout_session_check c {self._database.by_session}"
            f" JOIN checkout_session_batch b {self._database.by_rowid} ON b.id = c.batch_id"
            f" WHERE {wrong}{condition}",
            (*parameters, *bounds),
        )
        piece.late = {as_int(rowid): as_int(b) for rowid, b, due in rows if due is not None}
        piece.late_batches = {as_int(batch_id) for _, batch_id, due in rows if due is None}
        piece.made_due += len(rows)

    def _find_new(self, connection: Connection, up_to: Value) -> list[Value]:
        # Read without a lock, then inserted by id: INSERT … SELECT may lock the shop's rows.
        condition, bounds = self._range("s.id", up_to)
        ids = connection.query(
            f"SELECT s.id FROM checkout_session s {self._database.by_status}"
            f" LEFT JOIN checkout_session_check c {self._database.by_session}"
            " ON c.session_id = s.id"
            f" WHERE s.status = 'open' AND c.session_id IS NULL{condition}",
            bounds,
        )
        return [session_id for (session_id,) in ids]

    def _rows_in_queue(self, connection: Connection, up_to: Value) -> int:
        condition, bounds = self._range("session_id", up_to)
        [(rows,)] = connection.query(
            f"SELECT COUNT(*) FROM checkout_session_check {self._database.by_session}"
            f" WHERE TRUE{condition}",
            bounds,
        )
        return as_int(rows)

    def _find_without(self, connection: Connection, other: str, up_to: Value) -> list[int]:
        """The numbers of the piece's rows `c` without one in `other`, a table joined as `o`."""
        condition, bounds = self._range("c.session_id", up_to)
        rows = connection.query(
            f"SELECT c.rowid FROM checkout_session_check c {self._database.by_session}"
            f" LEFT JOIN {other} WHERE o.id IS NULL{condition}",
            bounds,
        )
        return [as_int(rowid) for (rowid,) in rows]

    def _range(self, column: str, up_to: Value = None) -> tuple[str, Sequence[Value]]:
        """The condition that selects this piece's ids, and its parameters."""
        if self._only is not None:
            return f" AND {column} IN {placeholders(self._only)}", self._only
        bounds = [(f" AND {column} > %s", self._after), (f" AND {column} <= %s", up_to)]
        given = [(text, value) for text, value in bounds if value is not None]
        # Where the shop's key allows it, NULL is an id of which nothing can be kept.
        texts = (f" AND {column} IS NOT NULL", *(text for text, _ in given))
        return "".join(texts), [value for _, value in given]

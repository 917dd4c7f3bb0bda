"""The leader's count of the open sessions: adopt the new ones, forget the closed ones, count all.

It goes through the shop's open sessions in the order of their ids, a piece at a time, so that it
takes the same memory and holds up a claim or a record as little whether they are ten or a million.
"""

import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta

from core.database.port import Database, Value, integer, marks
from core.domain.model import AGES, Count
from core.store.queue import Queue

# Some 5 ms of MariaDB's time, 12 of MySQL's: so long a claim may have to wait.
PIECE_SESSIONS = 2000


class Census:
    """One count, from the first id to the last; or of some sessions only, in one piece.

    Every method raises StoreError.
    """

    def __init__(
        self,
        database: Database,
        queue: Queue,
        tick: datetime,
        session_ids: Sequence[str] | None = None,
    ) -> None:
        self._database = database
        self._queue = queue
        self._tick = tick
        self._only = None
        if session_ids is not None:
            self._only = [i for i in session_ids if database.comparable(i)]
        self._after: Value = None  # the last id of the piece before
        self._counts: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._ages: Counter[str] = Counter()
        self.adopted = 0
        self.took = timedelta(0)  # of the database's time

    @property
    def is_whole(self) -> bool:
        """Whether it is of all open sessions."""
        return self._only is None

    @property
    def count(self) -> Count:
        """What has been counted so far."""
        counts = self._counts
        return Count(
            counts["open"],
            counts["in_flight"],
            counts["not_due"],
            dict(self._outcomes),
            dict(self._ages),
        )

    def next_piece(self) -> bool:
        """Count one piece; returns whether there is another one."""
        began = time.perf_counter()
        more = self._database.run(self._next_piece)
        self.took += timedelta(seconds=time.perf_counter() - began)
        return more

    def _next_piece(self) -> bool:
        now = self._database.now()
        if self._only is not None:
            if self._only:
                self._count(now, None)
            return False
        within, bounds = self._range("s.id")
        last = self._database.query(
            f"SELECT s.id FROM checkout_session s WHERE s.status = 'open'{within}"
            f" ORDER BY s.id LIMIT 1 OFFSET {PIECE_SESSIONS - 1:d}",
            bounds,
        )
        up_to = last[0][0] if last else None
        known = self._count(now, up_to)
        if self._kept(up_to) > known:
            self._forget_closed(up_to)
        self._after = up_to
        return up_to is not None

    def _count(self, now: datetime, up_to: Value) -> int:
        """Count the open sessions of the piece, adopt the new; returns how many are not new."""
        within, bounds = self._range("s.id", up_to)
        ages = " ".join(f"WHEN c.first_seen_at > %s THEN '{name}'" for name in list(AGES)[:-1])
        young = [now - timedelta(seconds=seconds) for seconds in list(AGES.values())[:-1]]
        rows = self._database.query(
            "SELECT COALESCE(c.last_outcome, ''),"
            f" CASE WHEN c.session_id IS NULL THEN '' {ages} ELSE '{list(AGES)[-1]}' END AS age,"
            " COUNT(*),"
            " SUM(CASE WHEN c.claimed_until > %s THEN 1 ELSE 0 END),"
            " SUM(CASE WHEN (c.claimed_until IS NULL OR c.claimed_until <= %s)"
            " AND c.next_check_at > %s THEN 1 ELSE 0 END)"
            " FROM checkout_session s LEFT JOIN checkout_session_check c ON c.session_id = s.id"
            f" WHERE s.status = 'open'{within} GROUP BY 1, 2",
            (*young, now, now, max(now, self._tick), *bounds),
        )
        new = 0
        for outcome, age, *counts in rows:
            sessions, in_flight, not_due = map(integer, counts)
            if age == "":
                new = sessions
            self._counts += Counter(open=sessions, in_flight=in_flight, not_due=not_due)
            self._outcomes[str(outcome)] += sessions
            self._ages[str(age) or next(iter(AGES))] += sessions
        known = sum(integer(row[2]) for row in rows) - new
        if new:
            # Read first, without a lock, then insert by id: INSERT … SELECT may lock the shop's
            # rows.
            ids = self._database.query(
                "SELECT s.id FROM checkout_session s"
                " LEFT JOIN checkout_session_check c ON c.session_id = s.id"
                f" WHERE s.status = 'open' AND c.session_id IS NULL{within}",
                bounds,
            )
            self._queue.adopt((session_id for (session_id,) in ids), now)
            self.adopted += len(ids)
            known += len(ids)
        return known

    def _kept(self, up_to: Value) -> int:
        within, bounds = self._range("session_id", up_to)
        [(kept,)] = self._database.query(
            f"SELECT COUNT(*) FROM checkout_session_check {self._database.by_session}"
            f" WHERE TRUE{within}",
            bounds,
        )
        return integer(kept)

    def _forget_closed(self, up_to: Value) -> None:
        within, bounds = self._range("c.session_id", up_to)
        closed = self._database.query(
            f"SELECT c.session_id FROM checkout_session_check c {self._database.by_session}"
            " LEFT JOIN checkout_session s ON s.id = c.session_id AND s.status = 'open'"
            f" WHERE s.id IS NULL{within}",
            bounds,
        )
        self._queue.forget(session_id for (session_id,) in closed)

    def _range(self, column: str, up_to: Value = None) -> tuple[str, Sequence[Value]]:
        """The condition that holds for this piece's ids, and its parameters."""
        if self._only is not None:
            return f" AND {column} IN {marks(self._only)}", self._only
        bounds = [(f" AND {column} > %s", self._after), (f" AND {column} <= %s", up_to)]
        given = [(text, value) for text, value in bounds if value is not None]
        return "".join(text for text, _ in given), [value for _, value in given]

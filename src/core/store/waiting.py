"""Reads which open sessions wait, by index, in a bounded number of rows whatever the size.

A session whose checks fail waits since `failing_since`, another one since it was due. A session of
which a time lies further ahead than the settings allow, because a clock was ahead or they were
changed, waits since its last check.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from core.database.port import (
    Connection,
    Database,
    Row,
    Value,
    as_datetime,
    as_datetime_or_none,
    as_int,
    as_shown_text,
    number_list,
)
from core.domain.decision import CheckRules
from core.domain.model import Outcome
from core.domain.waiting import (
    MAX_COUNTED,
    MAX_FIRST,
    NOT_ASKED,
    Wait,
    Waiting,
    WaitingSession,
    together,
    waits_from,
)
from core.store.queue_rows import DUE

# Batches whose sessions are counted. Where more are late, as many of the rest are taken to be like
# all of it.
MAX_BATCHES = 10
_IN_ORDER = "due_at, checked_at, id"  # of the index, so that nothing is sorted

_FAILED = tuple(outcome.value for outcome in Outcome if outcome.is_error)


# A later time than the settings allow is of a clock that was ahead.
_FAILING = "(failing_since <= %s OR failing_since > %s)"


# The first and the last of some times; None: there are none.
type _Range = tuple[datetime | None, datetime | None]


class WaitingReader:
    """Reads the queue by the rules of the settings; it locks no row.

    `is_limited`: billing allows fewer checks than the open sessions want. Then a session that is
    held without an answer waits for its turn.
    """

    def __init__(self, database: Database, rules: CheckRules, *, is_limited: bool = False) -> None:
        self._unanswered = NOT_ASKED if is_limited else Outcome.TIMEOUT.value
        self._in_due_order = database.in_due_order
        self._by_batch = database.by_batch
        self._waits_from = waits_from(rules.interval_seconds)
        self._max_ahead = max(wait.healthy for wait in rules.longest_waits())

    def read(self, connection: Connection, now: datetime, counted: Mapping[str, int]) -> Waiting:
        """`counted` are all open sessions by their last outcome, when they were last counted.

        Raises:
            StoreError: the database cannot be used.
        """
        before = now - self._waits_from
        due, failing, failed = self._ranges(connection)
        causes: dict[str, Wait] = {}
        first: list[WaitingSession] = []
        end = now + self._waits_from
        if _is_outside(failing, before, end):
            causes = self._count_failing(connection, before, end, counted)
            first = self._first_failing(connection, before, end)
        oldest = [time for time in (due[0], failing[0]) if time is not None and time <= now]
        most = sum(counted.values()) - max(failed, sum(wait.sessions for wait in causes.values()))
        if _is_outside(due, before, now + self._max_ahead) and (
            late := self._not_asked(connection, now, before, most if counted else None)
        ):
            wait, sessions = late
            held = [causes[NOT_ASKED]] if NOT_ASKED in causes else []
            causes[NOT_ASKED] = together([*held, wait])
            first += sessions
            oldest.append(wait.since)
        # Billing is not to blame for those without a checkout id.
        no_id = Outcome.INVALID_SESSION.value
        by_number = sorted(causes.items(), key=lambda c: (c[0] == no_id, -c[1].sessions, c[0]))
        first.sort(key=lambda one: one.since)
        longest = max(((now - time).total_seconds() for time in oldest), default=0.0)
        return Waiting(now, longest, dict(by_number), first[:MAX_FIRST], failed)

    def _cause(self, outcome: Value) -> str:
        """The cause of one that fails; billing has not yet answered about one that did not."""
        return str(outcome) if outcome in _FAILED else self._unanswered

    def _ranges(self, connection: Connection) -> tuple[_Range, _Range, int]:
        """The due times of batches, since when sessions fail, and how many do."""
        [(due, last_due, failing, last_failing, failed)] = connection.query(
            "SELECT (SELECT MIN(due_at) FROM checkout_session_batch),"
            " (SELECT MAX(due_at) FROM checkout_session_batch),"
            " (SELECT MIN(failing_since) FROM checkout_session_check),"
            " (SELECT MAX(failing_since) FROM checkout_session_check),"
            " (SELECT COUNT(*) FROM (SELECT 1 FROM checkout_session_check"
            f" WHERE failing_since IS NOT NULL LIMIT {MAX_COUNTED:d}) AS failing)"
        )
        of_batches = as_datetime_or_none(due), as_datetime_or_none(last_due)
        of_failing = as_datetime_or_none(failing), as_datetime_or_none(last_failing)
        return of_batches, of_failing, as_int(failed)

    def _count_failing(
        self, connection: Connection, before: datetime, end: datetime, counted: Mapping[str, int]
    ) -> dict[str, Wait]:
        rows = connection.query(
            "SELECT w.last_outcome, COUNT(*), MIN(w.failing_since) FROM (SELECT last_outcome,"
            f" failing_since FROM checkout_session_check WHERE {_FAILING}"
            f" ORDER BY failing_since LIMIT {MAX_COUNTED:d}) AS w GROUP BY w.last_outcome",
            (before, end),
        )
        by_cause: defaultdict[str, list[Wait]] = defaultdict(list)
        for outcome, number, since in rows:
            wait = Wait(as_int(number), min(before, as_datetime(since)))
            by_cause[self._cause(outcome)].append(wait)
        found = {cause: together(waits) for cause, waits in by_cause.items()}
        if sum(wait.sessions for wait in found.values()) < MAX_COUNTED:
            return found
        return {
            cause: wait._replace(sessions=max(wait.sessions, counted.get(cause, 0)))
            for cause, wait in found.items()
        }

    def _first_failing(
        self, connection: Connection, before: datetime, end: datetime
    ) -> list[WaitingSession]:
        rows = connection.query(
            "SELECT session_id, failing_since, last_outcome, last_status_code"
            f" FROM checkout_session_check WHERE {_FAILING}"
            f" ORDER BY failing_since LIMIT {MAX_FIRST:d}",
            (before, end),
        )
        return [
            WaitingSession(
                as_shown_text(session_id),
                min(before, as_datetime(since)),
                self._cause(outcome),
                as_int(code) if code is not None and outcome in _FAILED else None,
            )
            for session_id, since, outcome, code in rows
        ]

    def _not_asked(
        self, connection: Connection, now: datetime, before: datetime, most: int | None
    ) -> tuple[Wait, Sequence[WaitingSession]] | None:
        """Those of the batches that are due, claimed or not: a claim may end without a check.

        `most` is how many open sessions do not fail; None: not counted yet.
        """
        far = now + self._max_ahead
        # Each by itself: batches that back off are due later than healthy ones may be, and say
        # nothing about those that are overdue.
        stands_for = {
            **self._batches(connection, "due_at <= %s", before),
            **self._batches(connection, "due_at > %s", far),
        }
        rows = self._sessions_of(connection, stands_for, before, far) if stands_for else []
        if not rows:
            return None
        sessions = round(sum(stands_for[as_int(row[3])] for row in rows))
        if most is not None:
            sessions = max(len(rows), min(sessions, most))
        waits = sorted(
            ((_since(row, now, before), as_shown_text(row[0])) for row in rows),
            key=lambda wait: wait[0],
        )
        first = [WaitingSession(i, since, NOT_ASKED, None) for since, i in waits[:MAX_FIRST]]
        return Wait(sessions, waits[0][0]), first

    def _batches(self, connection: Connection, late: str, time: datetime) -> dict[int, float]:
        """The batches to read: the first ones, and some spread over the rest.

        With each, how many batches it stands for. Those that are due first are often unlike the
        rest: where sessions fail, they are the ones that nobody has asked about for long.
        """
        batches = f"FROM checkout_session_batch {self._in_due_order} WHERE {late}"
        first = connection.query(
            f"SELECT id {batches} ORDER BY {_IN_ORDER} LIMIT {MAX_BATCHES + 1:d}", (time,)
        )
        stands_for = {as_int(batch_id): 1.0 for (batch_id,) in first[:MAX_BATCHES]}
        if len(first) > MAX_BATCHES:
            [(all_late,)] = connection.query(f"SELECT COUNT(*) {batches}", (time,))
            rest = max(0, as_int(all_late) - MAX_BATCHES)
            # The middle one of each part of the rest.
            parts = {(2 * part + 1) * rest // (2 * MAX_BATCHES) for part in range(MAX_BATCHES)}
            places = number_list(MAX_BATCHES + 1 + part for part in parts)
            spread = connection.query(
                f"SELECT id FROM (SELECT id, ROW_NUMBER() OVER (ORDER BY {_IN_ORDER}) AS place"
                f" {batches}) AS late WHERE place IN {places}",
                (time,),
            )
            stands_for |= {as_int(batch_id): rest / len(parts) for (batch_id,) in spread}
        return stands_for

    def _sessions_of(
        self, connection: Connection, batch_ids: Iterable[int], before: datetime, far: datetime
    ) -> list[Row]:
        """The sessions of some batches that are due and do not fail."""
        return list(
            connection.query(
                f"SELECT c.session_id, {DUE}, b.checked_at, b.id FROM checkout_session_batch b"
                f" JOIN checkout_session_check c {self._by_batch} ON c.batch_id = b.id"
                f" WHERE b.id IN {number_list(batch_ids)} AND c.failing_since IS NULL"
                f" AND ({DUE} <= %s OR {DUE} > %s)",
                (before, far),
            )
        )


def _is_outside(times: _Range, begin: datetime, end: datetime) -> bool:
    """Whether one of the times is not after the begin, or is after the end."""
    first, last = times
    return (first is not None and first <= begin) or (last is not None and last > end)


def _since(row: Row, now: datetime, before: datetime) -> datetime:
    """Since when a session is due; one that is due too far ahead, since its last check."""
    due, checked_at = as_datetime(row[1]), as_datetime_or_none(row[2])
    if due <= now:
        return due
    return min(before, checked_at or before)

"""`checkout_session_pause`, one row: the state that all workers share.

It holds until when billing asked for a pause, the budget of requests if billing limits their rate,
the newest tick that has a leader, and the result of the last complete reconciliation.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple

from core.database.port import (
    Connection,
    Database,
    Row,
    Transaction,
    Value,
    as_datetime,
    as_datetime_or_none,
    as_int,
)
from core.domain.model import OpenCounts, Pause
from core.domain.rate import Budget

# Pauses in a row double, if billing does not say how long: 1, 2, 4 … seconds.
MAX_BLIND_PAUSE = timedelta(seconds=60)

# Longer ahead, a pause came from a clock that was wrong: billing's Retry-After is cut to 300 s.
MAX_PAUSE = timedelta(seconds=330)

# A leader spends at most a tenth of its time on reconciling: it rests nine times as long as the
# last reconciliation took.
REST_FACTOR = 9
MAX_REST = timedelta(minutes=10)

_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
_COLUMNS = "paused_until, pauses, last_tick, counts, counted_at, count_again_at, budget"
_SELECT = "SELECT {columns} FROM checkout_session_pause WHERE id = 1"


class StateRow(NamedTuple):
    """The row as it was when it was read."""

    now: datetime  # by the database's clock
    pause: Pause
    last_tick: datetime | None
    last_counts: OpenCounts  # zeros before the first reconciliation
    reconciled_at: datetime | None
    reconcile_after: datetime | None
    budget_text: str | None

    @property
    def budget(self) -> Budget | None:
        """None: billing does not limit the rate, as far as is known."""
        return Budget.from_json(self.budget_text) if self.budget_text else None

    @property
    def may_reconcile(self) -> bool:
        """Whether the last reconciliation is long enough ago for the time that it took."""
        ended, after = self.reconciled_at, self.reconcile_after
        if ended is None or after is None or ended > self.now:  # in the future: of a wrong clock
            return True
        return not self.now < after <= self.now + MAX_REST


class MonitorState:
    """Reads and changes the row, and creates it where it is missing. Methods raise StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read_or_create(self, connection: Connection, *expressions: str) -> tuple[StateRow, Row]:
        """The row, and the values of further expressions from the same statement."""
        columns = ", ".join((_COLUMNS, self._database.now_sql(), *expressions))
        select = _SELECT.format(columns=columns)
        rows = connection.query(select)
        if not rows:  # a new table, or somebody emptied it
            connection.execute(
                "INSERT INTO checkout_session_pause (id, paused_until, pauses) VALUES (1, %s, 0)"
                f" {self._database.skip_duplicates.format(key='id')}",
                (_LONG_AGO,),
            )
            rows = connection.query(select)
        [(until, pauses, last_tick, counts, ended, after, budget, now_value, *values)] = rows
        now, pause = as_datetime(now_value), Pause(as_datetime(until), as_int(pauses))
        row = StateRow(
            now,
            pause if pause.until <= now + MAX_PAUSE else Pause(_LONG_AGO, pause.in_a_row),
            as_datetime_or_none(last_tick),
            _open_counts(counts),
            as_datetime_or_none(ended),
            as_datetime_or_none(after),
            budget if isinstance(budget, str) else None,
        )
        return row, tuple(values)

    def read_pause(self) -> tuple[Pause, datetime]:
        """The last pause that billing asked for (it may be over), and the database's clock."""
        return self._database.run(self._pause_and_now)

    def last_counts(self) -> OpenCounts:
        """What the last complete reconciliation counted; zeros before it."""
        return self._database.run(lambda c: self.read_or_create(c)[0].last_counts)

    def exchange(self, change: Callable[[StateRow], Budget | None]) -> StateRow:
        """Read the row, and keep the budget that `change` makes of it, if that is another one.

        Workers may do so at the same time: `change` is called again if another one was faster. It
        costs an UPDATE of this row only where there is a budget. Returns the row as it was.
        """

        def work(connection: Connection) -> StateRow:
            while True:
                row, _ = self.read_or_create(connection)
                budget = change(row)
                text = budget.as_json() if budget else None
                if text == row.budget_text or _keep_budget(connection, row.budget_text, text):
                    return row

        return self._database.run(work)

    def take_lead(self, tick: datetime, *, not_after: datetime) -> bool:
        """Become the leader of the tick; returns whether this worker is it.

        A recorded tick later than `not_after` came from a clock that was wrong, and is ignored.
        """

        def take(connection: Connection) -> int:
            return connection.execute(
                "UPDATE checkout_session_pause SET last_tick = %s"
                " WHERE id = 1 AND (last_tick IS NULL OR last_tick < %s OR last_tick > %s)",
                (tick, tick, not_after),
            )

        return self._database.run(take) > 0

    def keep_counts(self, counts: OpenCounts, *, took: timedelta) -> None:
        """Keep the counts of a complete reconciliation, and when the next one may begin."""

        def keep(connection: Connection) -> None:
            now = connection.now()
            connection.execute(
                "UPDATE checkout_session_pause SET counts = %s, counted_at = %s,"
                " count_again_at = %s WHERE id = 1",
                (json.dumps(counts._asdict()), now, now + min(REST_FACTOR * took, MAX_REST)),
            )

        self._database.run(keep)

    def pause(self, seconds: float | None) -> Pause:
        """Keep every worker from asking billing for `seconds`; returns the pause in force.

        None: billing did not say how long. Then it is one second, and twice as long after each
        pause that did not help, up to MAX_BLIND_PAUSE. A pause that lasts longer stays.
        """
        return self._change_pause(partial(_extended, seconds=seconds))

    def end_pauses(self, ended: Pause) -> None:
        """Reset the pauses in a row, because billing answers again; a newer pause stays."""

        def reset(current: Pause, _now: datetime) -> Pause:
            return Pause(current.until, 0) if current.until == ended.until else current

        self._change_pause(reset)

    def _change_pause(self, change: Callable[[Pause, datetime], Pause]) -> Pause:
        def change_locked(transaction: Transaction) -> Pause:
            self.read_or_create(transaction)
            # This locks the row: whoever comes second waits here, and then reads the first one's.
            transaction.execute("UPDATE checkout_session_pause SET pauses = pauses WHERE id = 1")
            pause = change(*self._pause_and_now(transaction))
            transaction.execute(
                "UPDATE checkout_session_pause SET paused_until = %s, pauses = %s WHERE id = 1",
                (pause.until, pause.in_a_row),
            )
            return pause

        return self._database.transaction(change_locked)

    def _pause_and_now(self, connection: Connection) -> tuple[Pause, datetime]:
        row, _ = self.read_or_create(connection)
        return row.pause, row.now


def _extended(current: Pause, now: datetime, *, seconds: float | None) -> Pause:
    """The pause after one more request was rate limited."""
    same_wave = current.until > now  # another request already began this pause
    in_a_row = current.in_a_row if same_wave else current.in_a_row + 1
    if seconds is not None:
        until = now + timedelta(seconds=seconds)
    elif same_wave:
        until = current.until
    else:
        # 2**20 seconds is beyond the maximum; the bound keeps the power small.
        until = now + min(timedelta(seconds=2 ** min(in_a_row - 1, 20)), MAX_BLIND_PAUSE)
    return Pause(max(until, current.until), in_a_row)


def _keep_budget(connection: Connection, old: str | None, new: str | None) -> bool:
    """Write the budget unless another worker has; returns whether it is written."""
    unchanged = "budget IS NULL" if old is None else "budget = %s"
    statement = f"UPDATE checkout_session_pause SET budget = %s WHERE id = 1 AND {unchanged}"
    return connection.execute(statement, (new,) if old is None else (new, old)) > 0


def _open_counts(text: Value) -> OpenCounts:
    return OpenCounts(**json.loads(text)) if isinstance(text, str) else OpenCounts()

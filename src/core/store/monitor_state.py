"""`checkout_session_pause`, the monitor's single row: what all workers share.

It says until when billing asked to be left alone, which tick has had its leader, and what the last
whole count of the open sessions brought.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from core.database.port import Database, Row, Value, integer, moment, moment_or_none
from core.domain.model import Count, Pause

# Pauses in a row, where billing does not say how long: 1, 2, 4 … seconds.
LONGEST_BLIND_PAUSE = timedelta(seconds=60)

# A leader spends a tenth of the time on counting, at the most: after a count it rests nine times as
# long as the count took.
REST_AFTER_COUNT = 9

_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
_COLUMNS = "paused_until, pauses, last_tick, counts, count_again_at"


class Standing(NamedTuple):
    """The row, as it stood when it was read."""

    pause: Pause
    last_tick: datetime | None
    last_count: Count  # a whole one; zeros before the first
    count_again_at: datetime | None


class Shared:
    """Reads and writes the single row, and puts it there. Every method raises StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, *beside: str) -> tuple[Standing, Row]:
        """The row, and in the same statement the values of some more expressions.

        Within `Database.run`.
        """
        columns = ", ".join((_COLUMNS, *beside))
        query = f"SELECT {columns} FROM checkout_session_pause WHERE id = 1"
        rows = self._database.query(query)
        if not rows:  # a new table, or somebody emptied it
            self._database.execute(
                f"{self._database.insert_or_ignore} INTO checkout_session_pause"
                " (id, paused_until, pauses) VALUES (1, %s, 0)",
                (_LONG_AGO,),
            )
            rows = self._database.query(query)
        [(until, pauses, last_tick, counts, count_again_at, *rest)] = rows
        standing = Standing(
            Pause(moment(until), integer(pauses)),
            moment_or_none(last_tick),
            _count(counts),
            moment_or_none(count_again_at),
        )
        return standing, tuple(rest)

    def read_pause(self) -> tuple[Pause, datetime]:
        """The pause that billing asked for last (it may be over), and the database's clock."""
        return self._database.run(self._pause_and_now)

    def lead(self, tick: datetime, *, not_after: datetime) -> bool:
        """Whether this worker is the one that leads the tick; one is.

        A tick that is said to have been led, but is later than `not_after`, was of a clock that
        went wrong, and counts for nothing. Within `Database.run`.
        """
        led = self._database.execute(
            "UPDATE checkout_session_pause SET last_tick = %s"
            " WHERE id = 1 AND (last_tick IS NULL OR last_tick < %s OR last_tick > %s)",
            (tick, tick, not_after),
        )
        return led > 0

    def keep_count(self, count: Count, *, took: timedelta) -> None:
        """Keep a whole count, and with it when the next one may begin."""

        def work() -> None:
            now = self._database.now()
            self._database.execute(
                "UPDATE checkout_session_pause SET counts = %s, counted_at = %s,"
                " count_again_at = %s WHERE id = 1",
                (json.dumps(asdict(count)), now, now + REST_AFTER_COUNT * took),
            )

        self._database.run(work)

    def pause(self, seconds: float | None) -> Pause:
        """Keep every worker from asking billing for `seconds`.

        None: billing did not say how long; then it is a second, and twice as long after each pause
        that brought nothing, LONGEST_BLIND_PAUSE at most. A pause that lasts longer stands.
        """

        def pause(paused: Pause, now: datetime) -> Pause:
            again = paused.until > now  # another request of the same wave
            in_a_row = paused.in_a_row if again else paused.in_a_row + 1
            if seconds is not None:
                until = now + timedelta(seconds=seconds)
            elif again:
                until = paused.until
            else:
                # 2**20 seconds are beyond the longest; the bound keeps the power small.
                until = now + min(
                    timedelta(seconds=2 ** min(in_a_row - 1, 20)), LONGEST_BLIND_PAUSE
                )
            return Pause(max(until, paused.until), in_a_row)

        return self._change_pause(pause)

    def end_pauses(self, ended: Pause) -> None:
        """Billing answers normally again after that pause; a newer one stands."""
        self._change_pause(
            lambda paused, _now: Pause(paused.until, 0) if paused.until == ended.until else paused
        )

    def _change_pause(self, change: Callable[[Pause, datetime], Pause]) -> Pause:
        def work() -> Pause:
            self.read()  # puts the row there
            # Whoever comes second waits here, and then sees the first one's pause.
            self._database.execute("UPDATE checkout_session_pause SET pauses = pauses WHERE id = 1")
            pause = change(*self._pause_and_now())
            self._database.execute(
                "UPDATE checkout_session_pause SET paused_until = %s, pauses = %s WHERE id = 1",
                (pause.until, pause.in_a_row),
            )
            return pause

        return self._database.transaction(work)

    def _pause_and_now(self) -> tuple[Pause, datetime]:
        standing, (now,) = self.read(self._database.now_sql)
        return standing.pause, moment(now)


def _count(text: Value) -> Count:
    return Count(**json.loads(text)) if isinstance(text, str) else Count()

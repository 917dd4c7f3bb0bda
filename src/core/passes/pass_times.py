"""The times of one pass: the database's clock, and until when checks may begin."""

import asyncio
from datetime import datetime, timedelta

from core.domain.cadence import slot_at


class PassTimes:
    """Floats are times by the event loop's clock, datetimes by the database's.

    The pass began at `began`, when the database's clock said `started_at`.
    """

    def __init__(
        self, began: float, started_at: datetime, *, interval_seconds: int, start_seconds: float
    ) -> None:
        self.began = began
        self.begin_until = began + start_seconds  # no check begins later
        self._started_at = started_at
        self._interval_seconds = interval_seconds
        self._loop = asyncio.get_running_loop()

    def now(self) -> datetime:
        """The database's clock."""
        return self.at(self._loop.time())

    def at(self, time: float) -> datetime:
        return self._started_at + timedelta(seconds=time - self.began)

    def seconds_to_slot_after(self, time: datetime) -> float:
        """The seconds from now to the first slot after a time."""
        interval = self._interval_seconds
        next_slot = slot_at(time, interval) + timedelta(seconds=interval)
        return (next_slot - self.now()).total_seconds()

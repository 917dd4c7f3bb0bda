"""Clocks that take no time: a fake one for a database, a virtual one that threads share."""

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

NOON = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC)


class FakeClock:
    """A database clock that moves only when told to."""

    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class VirtualClock:
    """A clock that threads share; when all of them wait on it, it goes on to the next one's moment.

    One thread runs at a time, in the order of the moments they wait for, so a run repeats itself.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._waits: list[tuple[float, int, threading.Event]] = []
        self._number = itertools.count()
        self._waiting = threading.Event()

    def wait_until(self, moment: float) -> None:
        """Wait, in a thread of `run`, until `moment`; one that is past costs no time."""
        goes_on = self._wait(moment)
        self._waiting.set()
        goes_on.wait()

    def run(self, execution: Callable[[], None], begins: Iterable[float]) -> None:
        """Run `execution` from each moment of `begins` to its end, or raise what one raises."""
        raised: list[BaseException] = []

        def body(begin: threading.Event) -> None:
            begin.wait()
            try:
                execution()
            except BaseException as error:  # noqa: BLE001 (raised by run)
                raised.append(error)
            self._waiting.set()

        for moment in begins:
            begin = self._wait(moment)
            threading.Thread(target=body, args=(begin,), daemon=True).start()
        while self._waits and not raised:
            moment, _, goes_on = heapq.heappop(self._waits)
            self.now = max(self.now, moment)
            self._waiting.clear()
            goes_on.set()
            self._waiting.wait()
        if raised:
            raise raised[0]

    def _wait(self, moment: float) -> threading.Event:
        goes_on = threading.Event()
        heapq.heappush(self._waits, (moment, next(self._number), goes_on))
        return goes_on

"""Clocks for tests and simulations: a fake one for a database, a virtual one for threads."""

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

NOON = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC)


class FakeClock:
    """A database clock that only moves when it is advanced."""

    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class VirtualClock:
    """A clock that threads share. When all of them wait for it, it advances to the earliest time.

    One thread runs at a time, in the order of the times they wait for, so every run is the same.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._waits: list[tuple[float, int, threading.Event]] = []
        self._number = itertools.count()
        self._waiting = threading.Event()

    def wait_until(self, time: float) -> None:
        """Wait, in a thread of `run`, until `time`; a past one costs no time."""
        resume = self._wait(time)
        self._waiting.set()
        resume.wait()

    def run(self, execution: Callable[[], None], begins: Iterable[float]) -> None:
        """Run `execution` once from each time in `begins`, or raise what one of them raises."""
        raised: list[BaseException] = []

        def body(begin: threading.Event) -> None:
            begin.wait()
            try:
                execution()
            except BaseException as error:  # noqa: BLE001 (raised by run)
                raised.append(error)
            self._waiting.set()

        for time in begins:
            begin = self._wait(time)
            threading.Thread(target=body, args=(begin,), daemon=True).start()
        while self._waits and not raised:
            time, _, resume = heapq.heappop(self._waits)
            self.now = max(self.now, time)
            self._waiting.clear()
            resume.set()
            self._waiting.wait()
        if raised:
            raise raised[0]

    def _wait(self, time: float) -> threading.Event:
        resume = threading.Event()
        heapq.heappush(self._waits, (time, next(self._number), resume))
        return resume

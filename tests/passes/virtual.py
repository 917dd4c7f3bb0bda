"""A monitor in virtual time: its loop, its workers and billing, on an SQLite database in memory."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from core.domain.model import Answer, Outcome, Reason
from core.passes.check_pass import check_open_checkout_sessions
from core.passes.running_pass import PassOptions
from core.settings import Settings
from core.store.store import Store
from testkit.clock import NOON
from testkit.shops import statements
from testkit.virtual_time import DatabaseThread, MeteredDatabase, VirtualLoop

if TYPE_CHECKING:
    from core.domain.summary import Summary

LAMBDA_SECONDS = 55.0


class VirtualMonitor:
    """Billing answers about a session after `latency(checkout_id, its earlier requests)`.

    An answer that takes longer than REQUEST_TIMEOUT_SECONDS is a time-out.
    """

    def __init__(self, latency: Callable[[str, int], float], **env: str) -> None:
        self.settings = Settings.from_env(
            {"DATABASE_URL": "sqlite:///unused", "APIKEY": "none", **env}
        )
        self.loop = VirtualLoop()
        self.database = MeteredDatabase(Path(":memory:"), clock=self.now)
        self.asked: defaultdict[str, list[float]] = defaultdict(list)  # seconds since NOON
        self.summaries: list[Summary] = []
        self.start_seconds = 0.05  # from a tick until its worker runs
        self.workers_a_tick = 1  # besides those that a leader starts
        self.started = 0  # workers, by ticks and by leaders
        self._latency = latency
        self._passes: set[asyncio.Task[None]] = set()
        for statement in statements("sqlite"):
            self.execute(statement)

    def now(self) -> datetime:
        return NOON + timedelta(milliseconds=round(self.loop.now * 1000))

    def execute(self, sql: str) -> None:
        self.database.run(lambda connection: connection.execute(sql))

    def open(self, count: int) -> None:
        rows = ", ".join(f"('s{n}', 'checkout_{n}', 'open')" for n in range(count))
        columns = "(id, billing_checkout_id, status)"
        self.execute(f"INSERT INTO checkout_session {columns} VALUES {rows}")

    def run(self, ticks: int) -> None:
        """Start a worker at each tick; ends when the last pass has."""
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._run(ticks))
        self.database.close()

    def asked_in_slot(self, checkout_id: str) -> Counter[int]:
        """How often billing was asked about a session in each slot."""
        return Counter(int(at // self.settings.interval_seconds) for at in self.asked[checkout_id])

    async def _run(self, ticks: int) -> None:
        for number in range(ticks):
            await asyncio.sleep(number * self.settings.interval_seconds - self.loop.now)
            for _ in range(self.workers_a_tick):
                self._start(self.now(), helps=False)
        while self._passes:
            await asyncio.wait(self._passes)

    def _start(self, tick: datetime, *, helps: bool) -> None:
        self.started += 1
        task = self.loop.create_task(self._pass(tick, helps=helps))
        self._passes.add(task)
        task.add_done_callback(self._passes.discard)

    async def _pass(self, tick: datetime, *, helps: bool) -> None:
        await asyncio.sleep(self.start_seconds)
        summary = await check_open_checkout_sessions(
            Store(self.database),
            self if self.settings.has_api_key else None,
            self.settings,
            PassOptions(
                Reason.TICK,
                tick,
                helps=helps,
                start_seconds=LAMBDA_SECONDS - self.settings.request_timeout_seconds,
                total_seconds=LAMBDA_SECONDS,
            ),
            database_thread=DatabaseThread(self.loop, self.database.meter),
            start_worker=partial(self._start, helps=True),
            choose=lambda _low, high: high,
        )
        self.summaries.append(summary)

    async def check(self, billing_checkout_id: str | None) -> Answer:
        """Billing's answer; what a pass needs of the billing service."""
        checkout_id = str(billing_checkout_id)
        earlier = self.asked[checkout_id]
        seconds = self._latency(checkout_id, len(earlier))
        earlier.append(self.loop.now)
        timeout = self.settings.request_timeout_seconds
        await asyncio.sleep(min(seconds, timeout))
        if seconds > timeout:
            return Answer(Outcome.TIMEOUT, None, timeout)
        return Answer(Outcome.ACTIVE, 200, seconds)

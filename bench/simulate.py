"""`make simulate`: a million open sessions on a virtual clock.

A pass is the real code: leaders, helpers, claims, reconciling, deadlines, on an SQLite database in
memory. The simulation models what is around it: the loop, which starts a worker at every tick;
Lambda, which gives each worker a share of a processor and takes a while to start a new one;
billing, which always answers after the same time, or with --limit only so many requests a second;
and how long the database takes.
"""

import argparse
import asyncio
import itertools
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, override
from unittest import mock

from bench.arguments import amount, cadence, count
from core.domain.batch import MAX_BATCH
from core.domain.model import Answer, Outcome, Reason, Recorded, StatusChange
from core.passes.check_pass import check_open_checkout_sessions
from core.passes.running_pass import PassOptions
from core.settings import Settings
from core.store.results import Results
from core.store.store import Store
from core.worker import FINISH_SECONDS
from local.billing import Bucket
from testkit.shops import statements
from testkit.virtual_time import DatabaseThread, MeteredDatabase, VirtualLoop

if TYPE_CHECKING:
    from core.database.port import Value

OPEN = 1_000_000
LIVES_SECONDS = 24 * 3600  # every session is abandoned, and expires after a day
MINUTES = 10
CADENCE = "5s until 10m, 30s until 1h, 5m"
LATENCY_SECONDS = 0.1
MEMORY_MB, IN_FLIGHT, WORKERS = 384, 100, 10  # the stack's defaults
FULL_CPU_MB = 1769  # the memory size at which Lambda gives a whole vCPU, by its documentation
# Measured by make bench on MariaDB, two cores: a check's processor time in a full pass.
CHECK_CPU_SECONDS = 0.000_1
# An asynchronous Invoke until its handler runs, in a warm environment and in a new one.
WARM_START_SECONDS = 0.05
COLD_START_SECONDS = 0.6
LAMBDA_SECONDS = 60

START = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC)


@dataclass
class Outcomes:
    """What a simulation has shown. Lateness is in tenths of a second."""

    checks: int = 0
    limited: int = 0  # of them, those that billing answered 429
    late: Counter[int] = field(default_factory=Counter)  # of checks, since they were due
    first_late: Counter[int] = field(default_factory=Counter)  # of first checks, since it opened
    worker_seconds: float = 0.0
    workers_started: int = 0
    under_way: int = 0
    max_under_way: int = 0


class Simulation:
    """A shop, and the workers that check its sessions. Seconds are of the virtual clock."""

    def __init__(  # noqa: PLR0917 (as on the command line)
        self,
        open_sessions: int = OPEN,
        seconds: int = MINUTES * 60,
        memory_mb: int = MEMORY_MB,
        in_flight: int = IN_FLIGHT,
        workers: int = WORKERS,
        latency: float = LATENCY_SECONDS,
        cadence: str = CADENCE,
        limit: float | None = None,
    ) -> None:
        self.open = open_sessions
        self.seconds = seconds
        self.settings = Settings.from_env(
            {
                "DATABASE_URL": "sqlite:///unused",
                "APIKEY": "none",
                "CHECK_CADENCE": cadence,
                "MAX_CONCURRENCY": str(in_flight),
                "MAX_WORKERS": str(workers),
            }
        )
        self.interval = self.settings.interval_seconds
        self.latency = latency
        self.bucket = None if limit is None else Bucket(limit, limit)
        self.check_seconds = CHECK_CPU_SECONDS / min(1, memory_mb / FULL_CPU_MB)
        self.loop = VirtualLoop()
        self.database = MeteredDatabase(Path(":memory:"), clock=self.now)
        self.random = random.Random(1)
        self.due: dict[str, datetime] = {}
        self.opened: dict[str, datetime] = {}  # new sessions, until their first check
        self.numbers = itertools.count()
        self.oldest = itertools.count()
        self.warm = 0
        self.invocations: set[asyncio.Task[None]] = set()
        self.seen = Outcomes()

    def now(self) -> datetime:
        """The database's clock."""
        return START + timedelta(milliseconds=round(self.loop.now * 1000))

    def perf_counter(self) -> float:
        """A stopwatch within a step, during which the virtual clock stands still."""
        return self.loop.now + self.database.meter.seconds

    def prepare(self) -> None:
        """Make a day's sessions, each due at a random slot of its cadence."""
        for statement in statements("sqlite"):
            self._execute(statement)
        Store(self.database).prepare()
        # Without it SQLite walks the shop's sessions by their ids, as MySQL does with it.
        self._execute("DROP INDEX checkout_session_status")
        ages = (LIVES_SECONDS * (1 - n / self.open) for n in range(self.open))
        for some in itertools.batched(ages, 20_000, strict=False):
            self._queue([(age, self._slot_within(self._every(age))) for age in some])

    def run(self, each_tick: Callable[[float], None] = lambda _at: None) -> Outcomes:
        """Tick for the simulated time, then let the last passes end."""
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._tick(each_tick))
        return self.seen

    def close(self) -> None:
        self.database.close()

    def left(self) -> int:
        """How many sessions have been overdue for a minute: they are lost, or too many."""
        minute_ago = self.now() - timedelta(seconds=60)
        return sum(1 for due in self.due.values() if due < minute_ago)

    async def _tick(self, each_tick: Callable[[float], None]) -> None:
        for at in range(0, self.seconds, self.interval):
            await asyncio.sleep(at - self.loop.now)
            self._turn_over(at)
            self.start(self.now())
            each_tick(at)
        while self.invocations:
            await asyncio.wait(self.invocations)

    def start(self, tick: datetime, *, helps: bool = False) -> None:
        """Lambda's asynchronous Invoke."""
        task = self.loop.create_task(self._invocation(tick, helps=helps))
        self.invocations.add(task)
        task.add_done_callback(self.invocations.discard)

    async def _invocation(self, tick: datetime, *, helps: bool) -> None:
        seen = self.seen
        seen.workers_started += 1
        seen.under_way += 1
        seen.max_under_way = max(seen.max_under_way, seen.under_way)
        cold = seen.under_way > self.warm
        self.warm = max(self.warm, seen.under_way)
        await asyncio.sleep(COLD_START_SECONDS if cold else WARM_START_SECONDS)
        began = self.loop.now
        try:
            await check_open_checkout_sessions(
                _WatchedStore(self.database, self.due),
                _Billing(self),
                self.settings,
                PassOptions(
                    Reason.TICK,
                    tick,
                    helps=helps,
                    start_seconds=LAMBDA_SECONDS
                    - FINISH_SECONDS
                    - self.settings.request_timeout_seconds,
                    total_seconds=LAMBDA_SECONDS - FINISH_SECONDS,
                ),
                database_thread=DatabaseThread(self.loop, self.database.meter),
                start_worker=partial(self.start, helps=True),
                choose=self.random.randint,
            )
        finally:
            seen.under_way -= 1
            seen.worker_seconds += self.loop.now - began

    def _turn_over(self, at: float) -> None:
        """Open as many sessions as expire."""
        a_second = self.open / LIVES_SECONDS
        count = math.floor((at + self.interval) * a_second) - math.floor(at * a_second)
        for some in itertools.batched(range(count), 500, strict=False):
            expired = [f"s{next(self.oldest)}" for _ in some]
            for session_id in expired:
                self.due.pop(session_id, None)
                self.opened.pop(session_id, None)
            placeholders = ", ".join(["%s"] * len(expired))
            close = f"UPDATE checkout_session SET status = 'timeout' WHERE id IN ({placeholders})"
            self._execute(close, expired)
            opened = [f"s{next(self.numbers)}" for _ in some]
            self.opened |= dict.fromkeys(opened, self.now())
            self._open(opened)

    def _queue(self, sessions: list[tuple[float, datetime]]) -> None:
        """Make sessions that the monitor knows: their ages in seconds, and when each is due."""
        by_due = sorted(sessions, key=itemgetter(1))
        for due, same in itertools.groupby(by_due, key=itemgetter(1)):
            for some in itertools.batched(same, MAX_BATCH, strict=False):
                batch_id = next(self.numbers)
                rows: list[Value] = []
                for age, _ in some:
                    session_id = f"s{next(self.numbers)}"
                    self.due[session_id] = due
                    rows += [session_id, batch_id, self.now() - timedelta(seconds=age), "active"]
                self._execute(
                    "INSERT INTO checkout_session_batch (id, next_check_at, due_at)"
                    " VALUES (%s, %s, %s)",
                    (batch_id, due, due),
                )
                self._execute(
                    "INSERT INTO checkout_session_check"
                    " (session_id, batch_id, first_seen_at, last_outcome, last_status_code) VALUES "
                    + ", ".join(["(%s, %s, %s, %s, 200)"] * len(some)),
                    rows,
                )
                self._open([str(session_id) for session_id in rows[::4]])

    def _open(self, session_ids: Sequence[str]) -> None:
        insert = (
            "INSERT INTO checkout_session (id, billing_checkout_id, status) VALUES "
            + ", ".join(["(%s, %s, 'open')"] * len(session_ids))
        )
        values = [value for session_id in session_ids for value in (session_id, session_id)]
        self._execute(insert, values)

    def _execute(self, sql: str, parameters: Sequence["Value"] = ()) -> None:
        self.database.run(lambda connection: connection.execute(sql, parameters))

    def _every(self, age: float) -> float:
        return self.settings.cadence.every_seconds(age)

    def _slot_within(self, seconds: float) -> datetime:
        slots = self.random.randrange(max(1, round(seconds / self.interval)))
        return START + timedelta(seconds=slots * self.interval)


class _Billing:
    """Billing, and the share of a processor that one worker has to ask it."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._processor_free = 0.0

    async def check(self, billing_checkout_id: str | None) -> Answer:
        assert billing_checkout_id is not None
        simulation, seen = self._simulation, self._simulation.seen
        asked = simulation.loop.now
        leaves = self._processor_free = max(asked, self._processor_free) + simulation.check_seconds
        at = START + timedelta(seconds=leaves)
        seen.checks += 1
        if simulation.bucket is not None and not simulation.bucket.take(leaves):
            seen.limited += 1
            await asyncio.sleep(leaves + simulation.latency - asked)
            return Answer(Outcome.RATE_LIMITED, 429, simulation.loop.now - asked)
        if opened := simulation.opened.pop(billing_checkout_id, None):
            seen.first_late[round((at - opened).total_seconds() * 10)] += 1
        elif due := simulation.due.get(billing_checkout_id):
            seen.late[round((at - due).total_seconds() * 10)] += 1
        await asyncio.sleep(leaves + simulation.latency - asked)
        return Answer(Outcome.ACTIVE, 200, simulation.loop.now - asked)


class _WatchedStore(Store):
    """Notes when each session is due again."""

    def __init__(self, database: MeteredDatabase, due: dict[str, datetime]) -> None:
        super().__init__(database)
        self._due = due

    @override
    def record(self, results: Results, changes: Sequence[StatusChange], now: datetime) -> Recorded:
        self._due |= {r.claim.session_id: r.next_check_at for r in results.all_rechecks}
        return super().record(results, changes, now)


def not_later_than(lateness: Counter[int], share: float) -> float:
    """The seconds within which that share of the checks began."""
    left = share * lateness.total()
    for tenths in sorted(lateness):
        left -= lateness[tenths]
        if left <= 0:
            return tenths / 10
    raise ValueError("there were no checks")


@contextmanager
def simulated(*arguments: Any, **keywords: Any) -> Iterator[Simulation]:  # noqa: ANN401 (Simulation's own)
    """A simulation that is ready to run. Its passes write no log."""
    simulation = Simulation(*arguments, **keywords)
    logging.disable()
    try:
        simulation.prepare()
        with mock.patch.object(time, "perf_counter", simulation.perf_counter):
            yield simulation
    finally:
        logging.disable(logging.NOTSET)
        simulation.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    add = parser.add_argument
    add("--open", type=count, default=OPEN, help="open sessions")
    add("--minutes", type=count, default=MINUTES)
    add("--memory", type=count, default=MEMORY_MB, help="WorkerMemory, MB")
    add("--in-flight", type=count, default=IN_FLIGHT, help="MaxConcurrency")
    add("--workers", type=count, default=WORKERS, help="MaxWorkers")
    add("--latency", type=amount, default=LATENCY_SECONDS, help="billing's, seconds")
    add("--cadence", type=cadence, default=CADENCE, help="CHECK_CADENCE")
    add("--limit", type=amount, help="requests a second that billing allows")
    given = parser.parse_args()
    seconds = given.minutes * 60
    tell(f"Making {given.open:,} open sessions …")
    with simulated(
        given.open,
        seconds,
        given.memory,
        given.in_flight,
        given.workers,
        given.latency,
        given.cadence,
        given.limit,
    ) as simulation:
        prepared = simulation.database.meter.seconds

        def progress(at: float) -> None:
            if at % 30 == 0:
                checks = simulation.seen.checks
                tell(f"{at / 60:.1f} of {given.minutes} minutes, {checks:,} checks")

        seen = simulation.run(progress)
        left = simulation.left()
        database = (simulation.database.meter.seconds - prepared) / seconds
    print(
        f"{given.open:,} open sessions for {given.minutes} minutes,"
        f" CHECK_CADENCE={given.cadence!r}, {given.memory} MB, {given.in_flight} in flight,"
        f" at most {given.workers} workers, "
        f"billing answers after {given.latency * 1000:.0f} ms\n"
        f"checks: {seen.checks:,}, {seen.checks / seconds:,.0f} a second\n"
        f"{_limits(seen, given.limit, simulation.loop.now)}"
        f"sessions over a minute late at the end: {left:,}\n"
        f"seconds from a session's slot to its request: {_spread(seen.late)}\n"
        f"seconds from a session's opening to its first request: {_spread(seen.first_late)}\n"
        f"workers at once: {seen.worker_seconds / seconds:.1f} on average, "
        f"{seen.max_under_way} at most\n"
        f"connections busy at the database: {database:.1f} on average"
    )


def _limits(seen: Outcomes, limit: float | None, seconds: float) -> str:
    """What billing answered until the last pass ended."""
    if limit is None:
        return ""
    answered = (seen.checks - seen.limited) / seconds
    share = seen.limited / max(1, seen.checks)
    return (
        f"billing allows {limit:g} a second, answered {answered:.1f} a second, "
        f"and 429 to {share:.1%} of the requests\n"
    )


def _spread(lateness: Counter[int]) -> str:
    shares = {"median": 0.5, "99 %": 0.99, "99.9 %": 0.999, "max": 1.0}
    return ", ".join(
        f"{name} {not_later_than(lateness, share):.1f}" for name, share in shares.items()
    )


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

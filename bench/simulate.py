"""`make simulate`: a million open sessions, on a virtual clock.

Everything that a pass does is the real code: leaders, helpers, claims, the count, deadlines, on an
SQLite database in memory. What is modelled is around it: the loop, which starts a worker at every
tick; Lambda, which gives each worker a share of a processor and takes a while to start a new one;
billing, which always answers after the same time; and how long a step on the database takes.
"""

import argparse
import asyncio
import itertools
import logging
import math
import random
import selectors
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

from core.database.port import STATEMENT_ROWS
from core.database.sqlite import SQLiteDatabase
from core.domain.model import Answer, Outcome, Reason, Recorded, Result
from core.passes.check_pass import PassOptions, check_open_checkout_sessions
from core.settings import Settings
from core.store.store import Store
from core.worker import FINISH_SECONDS
from testkit.shops import statements

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
# What a step on the database takes in a pass at full speed (DEBUG logs it), MariaDB's thread and
# its wait for the interpreter included: a claim of 500 or fewer and as much for each 500 more, a
# record likewise, a piece of the count.
STEP_SECONDS = {"claim_unless_paused": 0.02, "_record": 0.01, "_count_piece": 0.01}
SMALL_STEP_SECONDS = 0.002  # any other: a statement or two
# An asynchronous Invoke until its handler runs, in a warm environment and in a new one.
WARM_START_SECONDS = 0.05
COLD_START_SECONDS = 0.6
LAMBDA_SECONDS = 60

START = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on which waiting takes no time: where nothing is ready, the clock goes on."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_NoWait(self))
        self.set_default_executor(_Inline())

    @override
    def time(self) -> float:
        return self.now


class _NoWait(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing will ever come")
        self._loop.now += timeout
        return super().select(0)


class _Inline(ThreadPoolExecutor):
    """Runs what it is given at once, on the loop's own thread."""

    @override
    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _CountingDatabase(SQLiteDatabase):
    """Knows how many rows were inserted, changed or deleted by now."""

    changed = 0

    @override
    def execute(self, sql: str, parameters: Sequence["Value"] = ()) -> int:
        changed = super().execute(sql, parameters)
        self.changed += max(0, changed)
        return changed


class _DatabaseThread(ThreadPoolExecutor):
    """A worker's database thread: each step takes its STEP_SECONDS, one after the other."""

    def __init__(self, loop: VirtualLoop, database: _CountingDatabase) -> None:
        super().__init__(1)
        self._loop = loop
        self._database = database
        self._steps = deque[Callable[[], None]]()  # the first one is under way

    @override
    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        name = fn.func.__name__ if isinstance(fn, partial) else fn.__name__

        def step() -> None:
            before = self._database.changed
            try:
                done = partial(future.set_result, fn(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 (it is the caller's)
                done = partial(future.set_exception, error)
            statements = max(1, (self._database.changed - before) / STATEMENT_ROWS)
            takes = statements * STEP_SECONDS.get(name, SMALL_STEP_SECONDS)
            self._loop.call_later(takes, self._end, done)

        self._steps.append(step)
        if len(self._steps) == 1:
            step()
        return future

    def _end(self, done: Callable[[], None]) -> None:
        done()
        self._steps.popleft()
        if self._steps:
            self._steps[0]()


@dataclass
class Outcomes:
    """What a simulation has shown; lateness is counted in tenths of a second."""

    checks: int = 0
    late: Counter[int] = field(default_factory=Counter)  # of checks that were due
    first_late: Counter[int] = field(default_factory=Counter)  # of first ones, since it opened
    worker_seconds: float = 0.0
    workers_started: int = 0
    under_way: int = 0
    most_at_once: int = 0


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
    ) -> None:
        self.open = open_sessions
        self.seconds = seconds
        self.settings = Settings.from_env(
            {
                "DATABASE_URL": "sqlite:///unused",
                "APIKEY": "none",
                "CHECK_CADENCE": CADENCE,
                "MAX_CONCURRENCY": str(in_flight),
                "MAX_WORKERS": str(workers),
            }
        )
        self.interval = self.settings.interval_seconds
        self.latency = latency
        self.check_seconds = CHECK_CPU_SECONDS / min(1, memory_mb / FULL_CPU_MB)
        self.loop = VirtualLoop()
        self.database = _CountingDatabase(Path(":memory:"), clock=self.now)
        self.random = random.Random(1)
        self.due: dict[str, datetime] = {}
        self.opened: dict[str, datetime] = {}  # not checked yet
        self.numbers = itertools.count()
        self.oldest = itertools.count()
        self.warm = 0
        self.invocations: set[asyncio.Task[None]] = set()
        self.seen = Outcomes()

    def now(self) -> datetime:
        """The database's clock."""
        return START + timedelta(milliseconds=round(self.loop.now * 1000))

    def prepare(self) -> None:
        """A day's sessions, each somewhere in its own interval."""
        for statement in statements("sqlite"):
            self.database.run(partial(self.database.execute, statement))
        Store(self.database).prepare()
        ages = (LIVES_SECONDS * (1 - n / self.open) for n in range(self.open))
        for some in itertools.batched(ages, 1000, strict=False):
            self._queue([(age, self._slot_within(self._every(age))) for age in some])

    def run(self, each_tick: Callable[[float], None] = lambda _at: None) -> Outcomes:
        """Tick for the simulation's time, and let the last passes end."""
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._tick(each_tick))
        return self.seen

    def close(self) -> None:
        self.database.close()

    def left(self) -> int:
        """Sessions that were due over a minute ago: lost, or too many."""
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

    def start(self, tick: datetime) -> None:
        """Lambda's asynchronous Invoke."""
        task = self.loop.create_task(self._invocation(tick))
        self.invocations.add(task)
        task.add_done_callback(self.invocations.discard)

    async def _invocation(self, tick: datetime) -> None:
        seen = self.seen
        seen.workers_started += 1
        seen.under_way += 1
        seen.most_at_once = max(seen.most_at_once, seen.under_way)
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
                    start_seconds=LAMBDA_SECONDS
                    - FINISH_SECONDS
                    - self.settings.request_timeout_seconds,
                    total_seconds=LAMBDA_SECONDS - FINISH_SECONDS,
                ),
                database_thread=_DatabaseThread(self.loop, self.database),
                start_worker=self.start,
                choose=self.random.randint,
            )
        finally:
            seen.under_way -= 1
            seen.worker_seconds += self.loop.now - began

    def _turn_over(self, at: float) -> None:
        """As many sessions begin as expire."""
        a_second = self.open / LIVES_SECONDS
        count = math.floor((at + self.interval) * a_second) - math.floor(at * a_second)
        for some in itertools.batched(range(count), 500, strict=False):
            expired = [f"s{next(self.oldest)}" for _ in some]
            for session_id in expired:
                self.due.pop(session_id, None)
                self.opened.pop(session_id, None)
            marks = ", ".join(["%s"] * len(expired))
            close = f"UPDATE checkout_session SET status = 'timeout' WHERE id IN ({marks})"
            self.database.run(partial(self.database.execute, close, expired))
            opened = [f"s{next(self.numbers)}" for _ in some]
            self.opened |= dict.fromkeys(opened, self.now())
            self._open(opened)

    def _queue(self, sessions: list[tuple[float, datetime]]) -> None:
        """Sessions that the monitor knows, by age in seconds and when they are due."""
        rows: list[Value] = []
        for age, due in sessions:
            session_id = f"s{next(self.numbers)}"
            self.due[session_id] = due
            rows += [session_id, due, self.now() - timedelta(seconds=age)]
        insert = (
            "INSERT INTO checkout_session_check (session_id, next_check_at, first_seen_at) VALUES "
            + ", ".join(["(%s, %s, %s)"] * len(sessions))
        )
        self.database.run(partial(self.database.execute, insert, rows))
        self._open([str(session_id) for session_id in rows[::3]])

    def _open(self, session_ids: Sequence[str]) -> None:
        insert = (
            "INSERT INTO checkout_session (id, billing_checkout_id, status) VALUES "
            + ", ".join(["(%s, %s, 'open')"] * len(session_ids))
        )
        values = [value for session_id in session_ids for value in (session_id, session_id)]
        self.database.run(partial(self.database.execute, insert, values))

    def _every(self, age: float) -> float:
        return self.settings.cadence.every_seconds(age)

    def _slot_within(self, seconds: float) -> datetime:
        slots = self.random.randrange(max(1, round(seconds / self.interval)))
        return START + timedelta(seconds=slots * self.interval)


class _Billing:
    """Billing, and the share of a processor of the worker that asks it."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._processor_free = 0.0

    async def check(self, billing_checkout_id: str | None) -> Answer:
        assert billing_checkout_id is not None
        simulation, seen = self._simulation, self._simulation.seen
        asked = simulation.loop.now
        leaves = self._processor_free = max(asked, self._processor_free) + simulation.check_seconds
        at = START + timedelta(seconds=leaves)
        if opened := simulation.opened.pop(billing_checkout_id, None):
            seen.first_late[round((at - opened).total_seconds() * 10)] += 1
        elif due := simulation.due.get(billing_checkout_id):
            seen.late[round((at - due).total_seconds() * 10)] += 1
        seen.checks += 1
        await asyncio.sleep(leaves + simulation.latency - asked)
        return Answer(Outcome.ACTIVE, 200, simulation.loop.now - asked)


class _WatchedStore(Store):
    """Tells when each session is due again."""

    def __init__(self, database: SQLiteDatabase, due: dict[str, datetime]) -> None:
        super().__init__(database)
        self._due = due

    @override
    def record(self, results: Sequence[Result], now: datetime) -> Recorded:
        self._due |= {result.claim.session_id: result.next_check_at for result in results}
        return super().record(results, now)


def not_later_than(lateness: Counter[int], share: float) -> float:
    """Seconds within which that share of the checks began."""
    left = share * lateness.total()
    for tenths in sorted(lateness):
        left -= lateness[tenths]
        if left <= 0:
            return tenths / 10
    raise ValueError("there were no checks")


@contextmanager
def simulated(*arguments: Any, **keywords: Any) -> Iterator[Simulation]:  # noqa: ANN401 (Simulation's own)
    """A simulation of a shop that is ready, without the log lines of its passes."""
    simulation = Simulation(*arguments, **keywords)
    logging.disable()
    try:
        simulation.prepare()
        yield simulation
    finally:
        logging.disable(logging.NOTSET)
        simulation.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    parser.add_argument("--open", type=int, default=OPEN, help="open sessions")
    parser.add_argument("--minutes", type=int, default=MINUTES)
    parser.add_argument("--memory", type=int, default=MEMORY_MB, help="WorkerMemory, MB")
    parser.add_argument("--in-flight", type=int, default=IN_FLIGHT, help="MaxConcurrency")
    parser.add_argument("--workers", type=int, default=WORKERS, help="MaxWorkers")
    parser.add_argument("--latency", type=float, default=LATENCY_SECONDS, help="billing's, seconds")
    given = parser.parse_args()
    seconds = given.minutes * 60
    tell(f"Making {given.open:,} open sessions …")
    with simulated(
        given.open, seconds, given.memory, given.in_flight, given.workers, given.latency
    ) as simulation:

        def progress(at: float) -> None:
            if at % 30 == 0:
                checks = simulation.seen.checks
                tell(f"{at / 60:.1f} of {given.minutes} minutes, {checks:,} checks")

        seen = simulation.run(progress)
        left = simulation.left()
    late = {"median": 0.5, "99 %": 0.99, "99.9 %": 0.999, "most": 1.0}
    print(
        f"{given.open:,} open sessions for {given.minutes} minutes, CHECK_CADENCE={CADENCE!r}, "
        f"{given.memory} MB, {given.in_flight} in flight, {given.workers} workers at most, "
        f"billing after {given.latency * 1000:.0f} ms\n"
        f"checks: {seen.checks:,}, {seen.checks / seconds:,.0f} a second\n"
        f"sessions over a minute late at the end: {left:,}\n"
        "a request leaves so many seconds after its tick: "
        + ", ".join(
            f"{name} {not_later_than(seen.late, share):.1f}" for name, share in late.items()
        )
        + "\na new session's first, so many after it opened: "
        + ", ".join(
            f"{name} {not_later_than(seen.first_late, share):.1f}" for name, share in late.items()
        )
        + f"\nworkers at once: {seen.worker_seconds / seconds:.1f} on average, "
        f"{seen.most_at_once} at the most"
    )


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""`make simulate`: an hour with a million open sessions, on a virtual clock.

The store's claims and records, and the cadence, are the real ones, on an SQLite database in memory.
What is modelled: the loop starts a worker every interval; a worker first counts the open sessions,
then takes a batch at a time until nothing is due or its time is over, at the pace that its share of
a processor and its requests in flight allow. Billing answers every time.
"""

import argparse
import heapq
import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from core.cadence import slot_at
from core.model import Answer, Claim, Outcome
from core.monitor import (
    CLAIMS_PER_REQUEST,
    RECORD_WITHIN_SECONDS,
    START_WITHIN_SECONDS,
    decide,
)
from core.settings import Settings
from core.sqlite import SQLiteDatabase
from core.store import Store
from core.worker import FINISH_SECONDS
from tests.support import FakeClock, statements

if TYPE_CHECKING:
    from core.database import Value

OPEN = 1_000_000
LIVES_SECONDS = 24 * 3600  # every session is abandoned, and expires after a day
HOUR_SECONDS = 3600
CADENCE = "5s until 10m, 30s until 1h, 5m"
LATENCY_SECONDS = 0.1
MEMORY_MB, IN_FLIGHT = 512, 100  # the stack's defaults
FULL_CPU_MB = 1769  # the memory size at which Lambda gives a whole vCPU, by its documentation
# Measured by make bench: a check's processor time in a full pass, and what an idle pass takes for
# each open session, which is the count.
CHECK_CPU_SECONDS = 0.000_2
COUNT_SECONDS = 0.000_001_6
COLD_START_SECONDS = 0.6
LAMBDA_TIMEOUT_SECONDS = 60

# US$ in us-east-1, x86_64.
GB_SECOND = 0.000_016_666_7
INVOCATION = 0.20 / 1_000_000
BESIDES = 21.00  # the loop, logs, metrics, alarms, traces, secrets: see the README's table
MONTH_SECONDS = 30 * 24 * 3600

START = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC)


@dataclass
class Worker:
    """One Lambda invocation."""

    tick: datetime
    started: float  # seconds since the beginning, as every time here
    claims: list[Claim] = field(default_factory=list)


@dataclass
class Outcomes:
    """What an hour showed."""

    checks: int = 0
    lateness: Counter[int] = field(default_factory=Counter)  # checks by tenths of a second
    worker_seconds: float = 0.0
    workers_started: int = 0
    most_at_once: int = 0


class Simulation:
    """Events in the order of their virtual time: ticks, and the batches of each worker."""

    def __init__(
        self,
        open_sessions: int = OPEN,
        seconds: int = HOUR_SECONDS,
        memory_mb: int = MEMORY_MB,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        self.open = open_sessions
        self.seconds = seconds
        self.settings = Settings.from_env(
            {
                "DATABASE_URL": "sqlite:///unused",
                "APIKEY": "none",
                "CHECK_CADENCE": CADENCE,
                "MAX_CONCURRENCY": str(in_flight),
            }
        )
        self.interval = self.settings.interval_seconds
        self.clock = FakeClock(START)
        self.database = SQLiteDatabase(Path(":memory:"), clock=self.clock)
        self.store = Store(self.database)
        self.random = random.Random(1)
        self.batch = CLAIMS_PER_REQUEST * self.settings.max_concurrency
        # Seconds a check takes of a worker: of its share of a processor, or of its free hands.
        self.pace = max(
            CHECK_CPU_SECONDS / min(1, memory_mb / FULL_CPU_MB),
            LATENCY_SECONDS / self.settings.max_concurrency,
        )
        self.lease = timedelta(
            seconds=START_WITHIN_SECONDS
            + self.settings.request_timeout_seconds
            + RECORD_WITHIN_SECONDS
        )
        self.start_within = (
            LAMBDA_TIMEOUT_SECONDS - FINISH_SECONDS - self.settings.request_timeout_seconds
        )
        self.due: dict[str, datetime] = {}
        self.numbers = itertools.count()
        self.oldest = itertools.count()
        self.workers = 0
        self.warm = 0
        self.seen = Outcomes()

    def prepare(self) -> None:
        """A day's sessions, each somewhere in its own interval."""
        for statement in statements("sqlite"):
            self.database.run(partial(self.database.execute, statement))
        self.store.prepare()
        ages = (LIVES_SECONDS * (1 - n / self.open) for n in range(self.open))
        for some in itertools.batched(ages, 1000, strict=False):
            self._add([(age, self._slot_within(self._every(age))) for age in some])

    def run(self) -> Iterator[float]:
        """Yields the virtual seconds that have passed, at each tick."""
        events: list[tuple[float, int, Worker | None]] = []
        order = itertools.count()
        for tick in range(0, self.seconds, self.interval):
            heapq.heappush(events, (tick, next(order), None))
        while events:
            at, _, worker = heapq.heappop(events)
            self.clock.now = START + timedelta(seconds=at)
            if worker is None:
                self._turn_over(at)
                worker, ready = self._start(at)
                heapq.heappush(events, (ready, next(order), worker))
                yield at
                continue
            self._record(worker)
            again = self._claim(worker, at)
            if again is not None:
                heapq.heappush(events, (again, next(order), worker))

    def close(self) -> None:
        self.store.close()

    def left(self) -> int:
        """Sessions that were due over a minute ago: lost, or too many."""
        now = self.clock.now
        return sum(1 for due in self.due.values() if (now - due).total_seconds() > 60)

    def _start(self, at: float) -> tuple[Worker, float]:
        self.workers += 1
        self.seen.workers_started += 1
        self.seen.most_at_once = max(self.seen.most_at_once, self.workers)
        cold = COLD_START_SECONDS if self.workers > self.warm else 0.0
        self.warm = max(self.warm, self.workers)
        counting = COUNT_SECONDS * len(self.due)
        return Worker(slot_at(self.clock.now, self.interval), at), at + cold + counting

    def _claim(self, worker: Worker, at: float) -> float | None:
        """When the batch is done; None: this worker has ended."""
        if at - worker.started < self.start_within:
            worker.claims = self.store.queue.claim_due(
                tick=worker.tick, lease=self.lease, limit=self.batch
            )
        if not worker.claims:
            self.workers -= 1
            self.seen.worker_seconds += at - worker.started
            return None
        for nth, claim in enumerate(worker.claims):
            late = (claim.claimed_at - self.due[claim.session_id]).total_seconds()
            self.seen.lateness[round((late + nth * self.pace) * 10)] += 1
        return at + max(LATENCY_SECONDS, len(worker.claims) * self.pace)

    def _record(self, worker: Worker) -> None:
        claims, worker.claims = worker.claims, []
        answer = Answer(Outcome.ACTIVE, 200, LATENCY_SECONDS)
        results = [
            decide(
                claim,
                answer,
                tick=worker.tick,
                answered_at=self.clock.now,
                settings=self.settings,
                choose=self.random.randint,
            )
            for claim in claims
        ]
        if results:
            self.store.record(results)
        self.seen.checks += len(results)
        for result in results:
            if result.claim.session_id in self.due:  # not expired meanwhile
                self.due[result.claim.session_id] = result.next_check_at

    def _turn_over(self, at: float) -> None:
        """As many sessions begin as expire; the worker's count would adopt and forget them."""
        a_second = self.open / LIVES_SECONDS
        count = math.floor((at + self.interval) * a_second) - math.floor(at * a_second)
        if not count:
            return
        expired = [f"s{next(self.oldest)}" for _ in range(count)]
        marks = ", ".join(["%s"] * count)

        def forget() -> None:
            for column in ("checkout_session_check WHERE session_id", "checkout_session WHERE id"):
                self.database.execute(f"DELETE FROM {column} IN ({marks})", expired)

        self.database.transaction(forget)
        for session_id in expired:
            del self.due[session_id]
        self._add([(0.0, self.clock.now)] * count)

    def _add(self, sessions: list[tuple[float, datetime]]) -> None:
        """Open sessions, by age in seconds and when they are due."""
        rows: list[Value] = []
        for age, due in sessions:
            session_id = f"s{next(self.numbers)}"
            self.due[session_id] = due
            rows += [session_id, due, self.clock.now - timedelta(seconds=age)]
        ids = rows[::3]
        check = ", ".join(["(%s, %s, %s)"] * len(ids))
        shop = ", ".join(["(%s, %s, 'open')"] * len(ids))

        def work() -> None:
            self.database.execute(
                "INSERT INTO checkout_session_check (session_id, next_check_at, first_seen_at)"
                f" VALUES {check}",
                rows,
            )
            self.database.execute(
                f"INSERT INTO checkout_session (id, billing_checkout_id, status) VALUES {shop}",
                [value for id_ in ids for value in (id_, id_)],
            )

        self.database.transaction(work)

    def _every(self, age: float) -> float:
        return self.settings.cadence.every_seconds(age)

    def _slot_within(self, seconds: float) -> datetime:
        slots = self.random.randrange(max(1, round(seconds / self.interval)))
        return self.clock.now + timedelta(seconds=slots * self.interval)


def not_later_than(lateness: Counter[int], share: float) -> float:
    """Seconds within which that share of the checks began."""
    left = share * lateness.total()
    for tenths in sorted(lateness):
        left -= lateness[tenths]
        if left <= 0:
            return tenths / 10
    raise ValueError("there were no checks")


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make simulate", description=__doc__)
    parser.add_argument("--minutes", type=int, default=HOUR_SECONDS // 60)
    parser.add_argument("--memory", type=int, default=MEMORY_MB, help="WorkerMemory, MB")
    parser.add_argument("--in-flight", type=int, default=IN_FLIGHT, help="MaxConcurrency")
    given = parser.parse_args()
    seconds = given.minutes * 60
    tell(f"Making {OPEN:,} open sessions …")
    with closing(Simulation(OPEN, seconds, given.memory, given.in_flight)) as simulation:
        simulation.prepare()
        for at in simulation.run():
            if at % 300 == 0:
                tell(f"{at / 60:.0f} of {given.minutes} minutes, {simulation.seen.checks:,} checks")
    seen = simulation.seen
    gb_seconds = seen.worker_seconds * given.memory / 1024
    a_month = MONTH_SECONDS / seconds
    workers = gb_seconds * GB_SECOND + seen.workers_started * INVOCATION
    print(
        f"{OPEN:,} open sessions for {given.minutes} minutes, CHECK_CADENCE={CADENCE!r}, "
        f"{given.memory} MB, {given.in_flight} in flight, "
        f"billing after {LATENCY_SECONDS * 1000:.0f} ms\n"
        f"checks: {seen.checks:,}, {seen.checks / seconds:,.0f} a second\n"
        f"sessions over a minute late at the end: {simulation.left():,}\n"
        "lateness of a check, seconds: "
        + ", ".join(
            f"{name} {not_later_than(seen.lateness, share):.1f}"
            for name, share in (
                ("median", 0.5),
                ("95 %", 0.95),
                ("99 %", 0.99),
                ("99.9 %", 0.999),
                ("most", 1.0),
            )
        )
        + f"\nworkers at once: {seen.worker_seconds / seconds:.1f} on average, "
        f"{seen.most_at_once} at the most\n"
        f"a month: ${workers * a_month:,.0f} for workers, and ${BESIDES:,.0f} for the rest"
    )


if __name__ == "__main__":
    main()

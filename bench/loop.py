"""The loop with many sessions: template.yaml's loop on the real clock, warm processes for Lambda.

A tick starts a pass in a free process, as an asynchronous Invoke does. So does a leader that needs
helpers. Everything is at the stack's defaults.
"""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median

from bench.jobs import Job
from bench.machine import Machine, wait
from bench.nginx import Request
from bench.programs import MARIADB, Client, Program
from bench.report import Results, progress
from core.domain.summary import percentile
from local import loop
from testkit.shops import numbered

INTERVAL_SECONDS = 5
LAMBDA_SECONDS = 60.0
# Execution environments; ten workers may be under way at once.
PROCESSES = 20
# Until new sessions are adopted and connections open.
SETTLE_SECONDS = 20
MEASURE_SECONDS = 60
OPEN = (1000, 5000, 10_000)


class Fleet:
    """Stands in for Lambda: a pool of warm worker processes that share the machine's cores."""

    def __init__(self, clients: Sequence[Client], job: Job) -> None:
        self._job = job
        self._free = list(clients)
        self._lock = threading.Lock()
        self.started = 0
        self.throttled = 0
        for client in clients:
            client.start({**job, "warm_up": True})
        for client in clients:
            client.report()

    def start(self, tick: datetime, *, helps: bool = False) -> None:
        """Start a pass in a free process and return at once; without one, count it as throttled."""
        with self._lock:
            self.started += 1
            if not self._free:
                self.throttled += 1
                return
            client = self._free.pop()  # the most recently used, as Lambda does
        at = tick.isoformat()
        client.start({**self._job, "tick": at, "helps": helps, "seconds": LAMBDA_SECONDS})
        threading.Thread(target=self._follow, args=(client,), daemon=True).start()

    def _follow(self, client: Client) -> None:
        try:
            while "start" in (message := client.line()):
                self.start(datetime.fromisoformat(message["start"]), helps=True)
        except RuntimeError:
            return  # killed at the end of the case
        with self._lock:
            self._free.append(client)


@dataclass(frozen=True, slots=True)
class Seen:
    """What billing and the database saw of the loop in some whole intervals."""

    made: float  # share of the checks due that were made
    lateness: Sequence[float]  # seconds from tick to request, sorted
    max_in_flight: int
    database: float  # share of a core
    throttled: int

    def late(self, share: float) -> float:
        return percentile(self.lateness, share)


def at_size(machine: Machine, results: Results) -> None:
    """Billing answers; with the most sessions, also a case in which it hangs."""
    sizes = OPEN[:1] if machine.quick else OPEN
    for open_ in sizes:
        for program in machine.versions(MARIADB):
            seen = _watch(machine, program, numbered(open_), "100ms")
            _report(seen, results, program, open_)
            if open_ == sizes[-1]:
                hangs = _watch(machine, program, numbered(open_), "hang")
                _compare_in_flight(seen, hangs, results, program, open_)


def _report(seen: Seen, results: Results, program: Program, open_: int) -> None:
    what = f"the loop, {open_:,} open, billing after 100 ms, {_version(program)}"
    measured = (
        f"{seen.made:.1%} of the checks due; requests leave within {seen.late(0.5):.1f} s"
        f" of their tick (50 %), {seen.late(0.99):.1f} s (99 %); at most"
        f" {seen.max_in_flight:,} in flight; MariaDB {seen.database:.0%} of a core"
    )
    if program is MARIADB:
        met = seen.made >= 0.999 and round(seen.late(0.99), 1) <= 1.3
        results.target(what, "≥ 99.9 %, 99 % within 1.3 s", measured, met=met)
    else:
        results.state(what, measured)


def _compare_in_flight(
    well: Seen, hangs: Seen, results: Results, program: Program, open_: int
) -> None:
    what = f"maximum in flight while billing hangs, {open_:,} open, {_version(program)}"
    measured = f"{hangs.max_in_flight:,}; {well.max_in_flight:,} when it answers"
    if program is MARIADB:
        met = hangs.max_in_flight <= well.max_in_flight
        results.target(what, "not more than when it answers", measured, met=met)
    else:
        results.state(what, measured)


def gaps(machine: Machine, results: Results) -> None:
    """How regularly healthy sessions are checked while a tenth of the sessions hang."""
    sessions = {f"s{n}": f"checkout_{'hang' if n % 10 == 0 else 'ok'}_{n}" for n in range(1000)}
    seconds = 15 if machine.quick else MEASURE_SECONDS
    with _looping(machine, MARIADB, sessions, "at-once"):
        wait(seconds, "the loop, 100 of 1,000 sessions hang")
        requests = machine.billing.requests()
    times: dict[str, list[float]] = defaultdict(list)
    for request in requests:
        if "_ok_" in request.checkout_id:
            times[request.checkout_id].append(request.began)
    between = sorted(b - a for those in times.values() for a, b in pairwise(those))
    middle, late = median(between), percentile(between, 0.99)
    results.target(
        "gap between checks of a healthy session, 10 % of 1,000 hang 10 s",
        "median 5.0 s, 99th percentile 5.5 s",
        f"median {middle:.2f} s, 99th percentile {late:.2f} s ({len(between):,} gaps)",
        met=abs(middle - 5) < 0.05 and late <= 5.5 and len(times) == 900,
    )


def _watch(
    machine: Machine, program: Program, sessions: Mapping[str, str | None], delay: str
) -> Seen:
    what = f"the loop, {len(sessions):,} open, billing {delay}, {_version(program)}"
    with _looping(machine, program, sessions, delay) as fleet:
        wait(SETTLE_SECONDS, f"{what}: settling")
        time.sleep(-time.time() % INTERVAL_SECONDS)  # whole intervals
        began, cpu = time.time(), machine.mariadb_cpu_seconds()
        wait(2 * INTERVAL_SECONDS if machine.quick else MEASURE_SECONDS, what)
        ended = began + (time.time() - began) // INTERVAL_SECONDS * INTERVAL_SECONDS
        busy = (machine.mariadb_cpu_seconds() - cpu) / (time.time() - began)
        if delay == "hang":
            wait(12, "nginx logs a hanging request when it ends")
        requests = machine.billing.requests()
    inside = [request for request in requests if began <= request.began < ended]
    due = len(sessions) * (ended - began) / INTERVAL_SECONDS
    lateness = sorted(request.began % INTERVAL_SECONDS for request in inside)
    return Seen(
        len(inside) / due, lateness, _max_in_flight(requests, began, ended), busy, fleet.throttled
    )


@contextlib.contextmanager
def _looping(
    machine: Machine, program: Program, sessions: Mapping[str, str | None], delay: str
) -> Iterator[Fleet]:
    """Run the loop over a new shop, with an empty billing log."""
    with contextlib.ExitStack() as stack:
        shop = stack.enter_context(machine.shop("mariadb", sessions))
        progress(f"starting {PROCESSES} worker processes")
        clients = [
            stack.enter_context(machine.client(program, *machine.cores)) for _ in range(PROCESSES)
        ]
        job = Job(
            url=machine.billing.url(delay, logged=True),
            sessions=len(sessions),
            in_flight=100,
            warm_up=False,
            env={"DATABASE_URL": shop.url},
        )
        machine.billing.forget_requests()
        fleet = Fleet(clients, job)
        stopping = threading.Event()
        ticking = threading.Thread(target=loop.run, args=(fleet.start, INTERVAL_SECONDS, stopping))
        ticking.start()
        try:
            yield fleet
        finally:
            stopping.set()
            ticking.join()
            if fleet.throttled:
                progress(f"{fleet.throttled} of {fleet.started} starts found no free process")


def _max_in_flight(requests: Sequence[Request], began: float, ended: float) -> int:
    """The maximum number of requests in flight between two times."""
    changes = sorted([(r.began, 1) for r in requests] + [(r.ended, -1) for r in requests])
    in_flight = maximum = 0
    for at, change in changes:
        in_flight += change
        if began <= at < ended:
            maximum = max(maximum, in_flight)
    return maximum


def _version(program: Program) -> str:
    return program.label.partition(",")[0]

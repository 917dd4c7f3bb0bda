"""Rate limits: how much of what a billing service allows is used, and what it answers with 429.

The monitor is `make run`; the service is a token bucket that answers after 50 ms. The second of two
minutes counts, as the first one is for finding out the limit.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple, cast, override

from bench.machine import Machine, wait
from bench.report import Results, progress
from local.billing import Bucket
from local.mariadb import free_port
from testkit.shops import numbered

LATENCY_SECONDS = 0.05
INTERVAL_SECONDS = 5
SETTLE_SECONDS = MEASURE_SECONDS = 60
CASES_AT_ONCE = 3
MONITOR = ("-m", "local", "--share-database")


@dataclass(frozen=True, slots=True)
class Limit:
    """A service that allows `per_second` requests, `burst` at once, and a shop's open sessions."""

    per_second: int
    burst: int
    open: int
    retry_after: int | None = None

    def __str__(self) -> str:
        retry = f", Retry-After: {self.retry_after}" if self.retry_after else ""
        return f"{self.per_second} a second, bursts of {self.burst}{retry}, {self.open:,} open"


LIMITS = (
    Limit(25, 25, 1000),
    Limit(25, 25, 1000, 1),
    Limit(100, 100, 1000),
    Limit(100, 100, 300),
    Limit(100, 100, 300, 1),
    Limit(400, 400, 1000),
    Limit(25, 25, 50),
    Limit(4, 8, 15, 1),
    Limit(50, 10, 400),
)


class Request(NamedTuple):
    at: float
    checkout_id: str
    answered: bool


class Service:
    """The stub, on a free port; `allows(checkout_id)` says what is answered with 200."""

    def __init__(self, allows: Callable[[str], bool], retry_after: int | None = None) -> None:
        self.requests: list[Request] = []
        self._allows = allows
        head = f"Retry-After: {retry_after}\r\n" if retry_after else ""
        self._limited = f"HTTP/1.1 429 Too Many Requests\r\n{head}Content-Length: 0\r\n\r\n"
        self._answer = 'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"status":"open"}'

    def answer(self, checkout_id: str) -> bytes:
        answered = self._allows(checkout_id)
        self.requests.append(Request(time.monotonic(), checkout_id, answered))
        return (self._answer if answered else self._limited).encode()

    @contextlib.contextmanager
    def listening(self) -> Iterator[str]:
        """Listen in a thread; gives the value for BILLING_API_URL."""
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(
            loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=4096)
        )
        port = server.sockets[0].getsockname()[1]
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


class _Connection(asyncio.Protocol):
    def __init__(self, service: Service) -> None:
        self._service = service
        self._received = b""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            answer = self._service.answer(path.rpartition("/")[2])
            loop = asyncio.get_running_loop()
            loop.call_later(LATENCY_SECONDS, self._transport.write, answer)


def measure(machine: Machine, results: Results) -> None:
    """Every limit with one worker a tick and with four; then limits that change, and the others."""
    trials: list[Callable[[Machine, Results], None]] = []
    for limit in LIMITS[:1] if machine.quick else LIMITS:
        trials.append(partial(_use, limit=limit, engine="sqlite", workers=1))
        if not machine.quick:
            trials.append(partial(_use, limit=limit, engine="mariadb", workers=4))
            if machine.mysql:
                trials.append(partial(_use, limit=limit, engine="mysql", workers=4))
    if not machine.quick:
        trials += [_changing, _single_sessions]
    with ThreadPoolExecutor(CASES_AT_ONCE) as pool:
        for trial in [pool.submit(trial, machine, results) for trial in trials]:
            trial.result()
    if not machine.quick:
        _known(machine, results)  # alone: its requests may be late by milliseconds only


def _use(machine: Machine, results: Results, *, limit: Limit, engine: str, workers: int) -> None:
    bucket = Bucket(limit.per_second, limit.burst)
    service = Service(lambda _id: bucket.take(time.monotonic()), limit.retry_after)
    what = f"{limit}; {workers} workers a tick, {engine}"
    with _monitors(machine, service, limit.open, engine, workers):
        wait(SETTLE_SECONDS + MEASURE_SECONDS, what)
        end = time.monotonic()
    begin = end - MEASURE_SECONDS
    requests = list(service.requests)
    second = [r.answered for r in requests if begin <= r.at < end]
    possible = min(limit.per_second, limit.open / INTERVAL_SECONDS) * MEASURE_SECONDS
    used, limited = sum(second) / possible, second.count(False) / max(1, len(second))
    times: dict[str, list[float]] = defaultdict(list)
    for request in requests:
        if request.answered:
            times[request.checkout_id].append(request.at)
    gap = max(
        (b - a for of in times.values() for a, b in pairwise([*of, end]) if b >= begin), default=0
    )
    max_gap = max(1.5 * limit.open / limit.per_second, 2 * INTERVAL_SECONDS)
    never = limit.open - len(times)
    results.target(
        what,
        f"≥ 95 % used, ≤ 3 % limited, none never answered, gaps ≤ {max_gap:.0f} s",
        f"{used:.1%} used, {limited:.1%} limited, {never} never answered, longest gap {gap:.1f} s",
        met=used >= 0.95 and limited <= 0.03 and never == 0 and gap <= max_gap,
    )


def _changing(machine: Machine, results: Results) -> None:
    """A limit of 25 becomes one of 100, and then one of 25 again."""
    bucket = Bucket(25, 25)
    service = Service(lambda _id: bucket.take(time.monotonic()))
    with _monitors(machine, service, 1000, "sqlite", 1):
        wait(SETTLE_SECONDS, "a limit that changes: 25 a second")
        bucket.per_second = bucket.burst = 100
        rose = time.monotonic()
        wait(SETTLE_SECONDS, "a limit that changes: 100 a second")
        bucket.per_second = bucket.burst = 25
        fell = time.monotonic()
        wait(30, "a limit that changes: 25 a second again")
    requests = list(service.requests)
    up = next((s for s in range(60) if _in_second(requests, rose + s, answered=True) >= 90), 60)
    down = next((s for s in range(26) if _limited_share(requests, fell + s, 5) <= 0.03), 30)
    results.target(
        "a limit rises from 25 to 100, until 90 are used; it falls, until 3 % are limited",
        "30 s; 10 s",
        f"{up} s; {down} s",
        met=up <= 30 and down <= 10,
    )


def _known(machine: Machine, results: Results) -> None:
    service = Service(lambda _id: True)
    with _monitors(machine, service, 1000, "mariadb", 8, BILLING_MAX_PER_SECOND="50"):
        wait(SETTLE_SECONDS, "BILLING_MAX_PER_SECOND=50, eight workers a tick")
    times = sorted(request.at for request in service.requests)
    most = max(bisect_left(times, at + 1) - n for n, at in enumerate(times))
    used = len([at for at in times if at >= times[-1] - 40]) / 40 / 50
    results.target(
        "BILLING_MAX_PER_SECOND=50, eight workers a tick: most requests in any second",
        "50, and 95 % used",
        f"{most}, and {used:.1%} used",
        met=most <= 50 and used >= 0.95,
    )


def _single_sessions(machine: Machine, results: Results) -> None:
    locked = {f"checkout_active_{n}" for n in range(0, 200, 20)}
    service = Service(lambda checkout_id: checkout_id not in locked)
    what = "10 of 200 sessions are always limited"
    with _monitors(machine, service, 200, "sqlite", 1):
        wait(SETTLE_SECONDS / 2, f"{what}: settling")
        begin = time.monotonic()
        wait(MEASURE_SECONDS, what)
    times: dict[str, list[float]] = defaultdict(list)
    for request in service.requests:
        if request.at >= begin:
            times[request.checkout_id].append(request.at)
    gaps = [b - a for i, of in times.items() if i not in locked for a, b in pairwise(of)]
    results.target(
        "10 of 200 sessions always limited: gaps between the checks of the others",
        "median 5.0 s, longest under two intervals",
        f"median {median(gaps):.1f} s, longest {max(gaps):.1f} s",
        met=len(times) == 200
        and abs(median(gaps) - INTERVAL_SECONDS) < 0.05
        and max(gaps) < 2 * INTERVAL_SECONDS,
    )


def _in_second(requests: Sequence[Request], begin: float, *, answered: bool) -> int:
    return sum(r.answered is answered for r in requests if begin <= r.at < begin + 1)


def _limited_share(requests: Sequence[Request], begin: float, seconds: float) -> float:
    found = [r.answered for r in requests if begin <= r.at < begin + seconds]
    return found.count(False) / max(1, len(found))


@contextlib.contextmanager
def _monitors(
    machine: Machine, service: Service, open_: int, engine: str, count: int, **env: str
) -> Iterator[None]:
    """Run so many monitors over a new shop: each starts a worker at every tick."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(service.listening())
        shop = stack.enter_context(machine.shop(engine, numbered(open_)))
        on_both = ("taskset", "--cpu-list", ",".join(str(core) for core in machine.cores))
        for _ in range(count):
            monitor = subprocess.Popen(
                [*on_both, sys.executable, *MONITOR, "--api-port", str(free_port())],
                env=os.environ
                | {"DATABASE_URL": shop.url, "BILLING_API_URL": url, "APIKEY": "bench", **env},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(monitor.wait)
            stack.callback(monitor.terminate)
        progress(f"started {count} monitors, {open_:,} open, {engine}")
        yield

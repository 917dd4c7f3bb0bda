"""The Python clients of `make bench`, each in a process of its own.

`python -m bench.clients NAME` reads one job a line from stdin, as JSON, and answers each with
one line: how many sessions were checked, in how many seconds, with how much processor time and
memory (the process's peak), and, of a pass, how long its database steps took. `loop` runs until it
is killed.
"""

import asyncio
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypedDict

import aiohttp
import httpx

from core import observability
from core.billing import BillingClient
from core.model import Claim, OpenSessions, Outcome, Pause, Reason, Recorded, Result, Summary
from core.monitor import PassOptions, Store, check_open_checkout_sessions
from core.settings import Settings
from core.store import Store
from core.worker import open_database
from local import loop
from local.workers import Workers

HEADERS = {"x-api-key": "bench", "accept": "application/json"}
TIMEOUT_SECONDS = 10
NOT_AGAIN = "1d"  # so that a pass which takes longer than an interval checks nothing twice


class Job(TypedDict):
    """What to do, and where."""

    url: str
    sessions: int
    in_flight: int
    database: str  # of a pass; its sessions are due
    warm_up: bool


type Check = Callable[[str], Awaitable[bool]]  # whether the session with that id got its answer
type Run = Callable[[Job], dict[str, float]]


def checkout_id(number: int) -> str:
    return f"checkout_active_{number}"


async def bounded(check: Check, job: Job) -> int:
    """Check each session once, `in_flight` of them at a time; returns how many were."""
    numbers = iter(range(job["sessions"]))

    async def worker() -> int:
        return sum([await check(checkout_id(number)) for number in numbers])

    return sum(await asyncio.gather(*(worker() for _ in range(job["in_flight"]))))


def ours(job: Job) -> Check:
    client = BillingClient(api_url=job["url"], api_key="bench", timeout_seconds=TIMEOUT_SECONDS)

    async def check(id_: str) -> bool:
        return (await client.check(id_)).outcome is Outcome.ACTIVE

    return check


def with_aiohttp(job: Job) -> Check:
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=job["in_flight"], ssl=_authority()),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
        headers=HEADERS,
    )

    async def check(id_: str) -> bool:
        try:
            async with session.get(f"{job['url']}/{id_}") as response:
                await response.read()
        except aiohttp.ClientError:
            return False
        return response.status == httpx.codes.OK

    return check


def with_httpx(job: Job) -> Check:
    many = job["in_flight"]
    client = httpx.AsyncClient(
        headers=HEADERS,
        timeout=TIMEOUT_SECONDS,
        limits=httpx.Limits(max_connections=many, max_keepalive_connections=many),
        verify=_authority(),
    )

    async def check(id_: str) -> bool:
        try:
            response = await client.get(f"{job['url']}/{id_}")
        except httpx.TransportError:
            return False
        return response.status_code == httpx.codes.OK

    return check


def in_parallel(make: Callable[[Job], Check]) -> Run:
    """A client kept, with its connections, from job to job."""
    runner = asyncio.Runner()
    kept: list[Check] = []

    async def run(job: Job) -> int:
        if not kept:
            kept.append(make(job))
        return await bounded(kept[0], job)

    return lambda job: {"checked": runner.run(run(job))}


def sequential() -> Run:
    client = httpx.Client(headers=HEADERS, timeout=TIMEOUT_SECONDS, verify=_authority())

    def run(job: Job) -> dict[str, float]:
        urls = (f"{job['url']}/{checkout_id(n)}" for n in range(job["sessions"]))
        return {"checked": sum(client.get(url).status_code == httpx.codes.OK for url in urls)}

    return run


def wrk() -> Run:
    def run(job: Job) -> dict[str, float]:
        seconds = 1 if job["warm_up"] else 2
        command = ["wrk", "-t1", f"-c{job['in_flight']}", f"-d{seconds}", "-H", "x-api-key: bench"]
        done = subprocess.run(
            [*command, f"{job['url']}/{checkout_id(1)}"], check=True, capture_output=True, text=True
        )
        [rate] = [line.split()[1] for line in done.stdout.splitlines() if "Requests/sec" in line]
        return {"checked": float(rate) * seconds, "seconds": seconds}

    return run


class TimedThread(ThreadPoolExecutor):
    """A pass's database thread that adds up how long it worked."""

    def __init__(self) -> None:
        super().__init__(1)
        self.seconds = 0.0

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            began = time.perf_counter()
            try:
                return fn(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return super().submit(timed, *args, **kwargs)


class NoDatabase:
    """A store in memory, all of whose sessions are due: a pass costs what is not the database's."""

    def __init__(self) -> None:
        self.due: deque[int] = deque()

    def prepare(self) -> list[str]:
        return []

    def now(self) -> datetime:
        return datetime.now(UTC)

    def sync_open_sessions(
        self,
        tick: datetime,
        session_ids: Sequence[str] | None = None,
    ) -> OpenSessions:
        return OpenSessions(len(self.due), 0, 0, 0.0)

    def claim_due(self, *, tick: datetime, lease: timedelta, limit: int) -> list[Claim]:
        numbers = [self.due.popleft() for _ in range(min(limit, len(self.due)))]
        return [Claim(f"s{n}", checkout_id(n), tick, 0, tick, tick + lease) for n in numbers]

    def claim_unchecked(
        self,
        *,
        since: datetime,
        lease: timedelta,
        limit: int,
        session_ids: Sequence[str] | None = None,
    ) -> list[Claim]:
        return self.claim_due(tick=since, lease=lease, limit=limit)

    def record(self, results: Sequence[Result]) -> Recorded:
        return Recorded()

    def read_pause(self) -> Pause:
        return Pause(datetime.fromtimestamp(0, UTC), 0)

    def pause(self, seconds: float | None) -> Pause:
        raise NotImplementedError(seconds)

    def end_pauses(self, pause: Pause) -> None: ...

    def release(self, claims: Sequence[Claim]) -> None:
        raise NotImplementedError(claims)

    def record_run(self, summary: Summary) -> None: ...


def full_pass() -> Run:
    """Whole passes, as the worker runs them; the store and the client are kept from job to job."""
    runner = asyncio.Runner()
    database_thread = TimedThread()
    kept: list[tuple[Settings, Store, BillingClient]] = []

    async def make(job: Job) -> tuple[Settings, Store, BillingClient]:
        settings = _settings(job["url"], job["database"], job["in_flight"])
        store = Store(open_database(settings)) if job["database"] else NoDatabase()
        client = BillingClient(
            api_url=job["url"], api_key="bench", timeout_seconds=settings.request_timeout_seconds
        )
        return settings, store, client

    async def run(job: Job) -> Summary:
        if not kept:
            kept.append(await make(job))
        [(settings, store, client)] = kept
        if isinstance(store, NoDatabase):
            store.due.extend(range(job["sessions"]))
        database_thread.seconds = 0.0
        return await check_open_checkout_sessions(
            store,
            client,
            settings,
            PassOptions(Reason.TICK, start_seconds=300, total_seconds=300),
            database_thread=database_thread,
        )

    def one(job: Job) -> dict[str, float]:
        summary = runner.run(run(job))
        return {
            "checked": summary.successes,
            "database_seconds": database_thread.seconds,
        }

    return one


def run_loop(job: Job) -> None:
    """The monitor as `make run` has it, without its API, until the process is killed."""
    settings = Settings.from_env(
        {
            "APIKEY": "bench",
            "BILLING_API_URL": job["url"],
            "DATABASE_URL": job["database"],
            "MAX_CONCURRENCY": str(job["in_flight"]),
        }
    )
    with closing(Workers(settings, 25)) as workers:
        loop.run(workers.start_check, settings.interval_seconds, threading.Event())


def _settings(url: str, database: str, in_flight: int) -> Settings:
    env = {"APIKEY": "bench", "BILLING_API_URL": url, "MAX_CONCURRENCY": str(in_flight)}
    return Settings.from_env(
        {**env, "CHECK_CADENCE": NOT_AGAIN, "DATABASE_URL": database or "sqlite:///unused"}
    )


def _authority() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])


def peak_mb() -> float:
    """The most memory ever resident; getrusage would count the parent's from before the exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kilobytes) / 1024


CLIENTS: dict[str, Callable[[], Run]] = {
    "http": lambda: in_parallel(ours),
    "pass": full_pass,
    "sequential": sequential,
    "httpx": lambda: in_parallel(with_httpx),
    "aiohttp": lambda: in_parallel(with_aiohttp),
    "wrk": wrk,
}


def main() -> None:
    name = sys.argv[1]
    # What a pass logs goes where Lambda's does, into a pipe; the reports go to the real stdout.
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    observability.set_level(debug=False)
    if name == "loop":
        run_loop(json.loads(sys.stdin.readline()))
    run = CLIENTS[name]()
    for line in sys.stdin:
        job: Job = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        report = {"seconds": 0.0} | run(job)
        report["seconds"] = report["seconds"] or time.perf_counter() - began
        report["cpu_seconds"] = time.process_time() - cpu
        report["peak_mb"] = peak_mb()
        reports.write(json.dumps(report) + "\n")
    os._exit(0)  # connections are the kernel's to close; nothing here needs an orderly end


if __name__ == "__main__":
    main()

"""The Python clients of `make bench`, each in a process of its own.

`python -m bench.clients NAME` reads one JSON job per line from stdin and answers each with one JSON
line. Of the monitor it uses only `Worker`, `BillingClient` and `Settings`, in the same way for
every version, so that the `core` of another checkout can be measured beside this one.
"""

import asyncio
import gc
import json
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from inspect import signature
from pathlib import Path
from typing import IO, Any, NotRequired, TypedDict

import aiohttp
import httpx

from core.settings import Settings
from core.worker import Worker

try:
    from core import log
    from core.billing.client import BillingClient
except ImportError:  # an earlier checkout, in which core has no packages
    from core import observability as log  # type: ignore[attr-defined, no-redef]
    from core.billing import BillingClient  # type: ignore[attr-defined, no-redef]

# An earlier checkout knows only the key.
KEY: dict[str, Any] = {"credentials": {"APIKEY": "bench"}}
if "api_key" in signature(BillingClient).parameters:
    KEY = {"api_key": "bench"}
# In an earlier checkout, the leader and its helpers are started in the same way.
KNOWS_HELPERS = "helps" in signature(Worker.check_open_checkout_sessions).parameters
HEADERS = {"x-api-key": "bench", "accept": "application/json"}
TIMEOUT_SECONDS = 10


class Job(TypedDict):
    """What to do, and where."""

    url: str
    sessions: int
    in_flight: int
    warm_up: bool
    env: dict[str, str]  # a worker's settings
    tick: NotRequired[str]  # of a pass; by default now, so that the pass is the leader
    helps: NotRequired[bool]  # started by the leader
    seconds: NotRequired[float]  # that a pass may take


type Report = dict[str, Any]
type Check = Callable[[str], Awaitable[bool]]  # whether billing answered
type Run = Callable[[Job], Report]


def checkout_id(number: int) -> str:
    return f"checkout_active_{number}"


async def bounded(check: Check, job: Job) -> int:
    """Check each session once, `in_flight` at a time; returns how many were answered."""
    numbers = iter(range(job["sessions"]))

    async def worker() -> int:
        return sum([await check(checkout_id(number)) for number in numbers])

    return sum(await asyncio.gather(*(worker() for _ in range(job["in_flight"]))))


def http_part() -> Run:
    """The monitor's client alone, on the event loop of its worker."""
    kept: list[tuple[asyncio.Runner, BillingClient]] = []

    async def client(job: Job) -> BillingClient:
        return BillingClient(api_url=job["url"], timeout_seconds=TIMEOUT_SECONDS, **KEY)

    def run(job: Job) -> Report:
        if not kept:
            runner = _worker(job, None)._runner  # noqa: SLF001 (the event loop of this version)
            kept.append((runner, runner.run(client(job))))
        [(runner, billing)] = kept

        async def check(id_: str) -> bool:
            return (await billing.check(id_)).outcome == "active"

        return {"checked": runner.run(bounded(check, job))}

    return run


def with_aiohttp() -> Run:
    runner = asyncio.Runner()
    kept: list[aiohttp.ClientSession] = []

    async def run(job: Job) -> int:
        if not kept:
            authority = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=job["in_flight"], ssl=authority),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
                headers=HEADERS,
            )
            kept.append(session)
        [session] = kept

        async def check(id_: str) -> bool:
            try:
                async with session.get(f"{job['url']}/{id_}") as response:
                    await response.read()
            except aiohttp.ClientError:
                return False
            return response.status == httpx.codes.OK

        return await bounded(check, job)

    return lambda job: {"checked": runner.run(run(job))}


def wrk() -> Run:
    def run(job: Job) -> Report:
        seconds = 1 if job["warm_up"] else 2
        command = ["wrk", "-t1", f"-c{job['in_flight']}", f"-d{seconds}", "-H", "x-api-key: bench"]
        done = subprocess.run(
            [*command, f"{job['url']}/{checkout_id(1)}"], check=True, capture_output=True, text=True
        )
        [rate] = [line.split()[1] for line in done.stdout.splitlines() if "Requests/sec" in line]
        return {"checked": float(rate) * seconds, "seconds": seconds}

    return run


def full_pass(reports: IO[str]) -> Run:
    """A warm worker: each job is a pass. To start another worker, it writes a line."""
    kept: list[Worker] = []

    def start(tick: datetime) -> None:
        reports.write(json.dumps({"start": tick.isoformat()}) + "\n")

    def run(job: Job) -> Report:
        if not kept:
            kept.append(_worker(job, start))
        [worker] = kept
        if job["warm_up"]:
            worker.health()  # connects
            return {}
        tick = datetime.fromisoformat(job["tick"]) if "tick" in job else datetime.now(UTC)
        began = time.time()
        helps = {"helps": True} if job.get("helps") and KNOWS_HELPERS else {}
        summary = worker.check_open_checkout_sessions(
            tick, seconds=job.get("seconds", 300), **helps
        )
        return {"checked": summary.successes, "began": began, "open": summary.open}

    return run


def _worker(job: Job, start: Callable[[datetime], None] | None) -> Worker:
    settings = Settings.from_env(
        {
            "APIKEY": "bench",
            "BILLING_API_URL": job["url"],
            "MAX_CONCURRENCY": str(job["in_flight"]),
            "DATABASE_URL": "sqlite:///unused",
            **job["env"],
        }
    )
    return Worker(settings, start_worker=start)


def peak_mb() -> float:
    """The peak resident memory. That of getrusage includes the parent's, from before the exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kilobytes) / 1024


def main() -> None:
    # Reports go to the real stdout; what a pass logs goes to /dev/null.
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    log.set_level(debug=False)
    clients: dict[str, Callable[[], Run]] = {
        "http": http_part,
        "pass": lambda: full_pass(reports),
        "aiohttp": with_aiohttp,
        "wrk": wrk,
    }
    run = clients[sys.argv[1]]()
    gc.freeze()  # as Lambda's entry points do
    for line in sys.stdin:
        job: Job = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        report = run(job)
        report.setdefault("seconds", time.perf_counter() - began)
        report["cpu_seconds"] = time.process_time() - cpu
        report["peak_mb"] = peak_mb()
        reports.write(json.dumps(report) + "\n")
    os._exit(0)  # the kernel closes the connections faster


if __name__ == "__main__":
    main()

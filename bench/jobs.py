"""What the measured programs are asked to do, and how the Python ones answer."""

import asyncio
import gc
import json
import os
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any, NotRequired, TypedDict

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


def serve(run: Run, reports: IO[str]) -> None:
    """Read one JSON job per line from stdin, and answer each with one JSON line."""
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


def peak_mb() -> float:
    """The peak resident memory. That of getrusage includes the parent's, from before the exec."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kilobytes) / 1024

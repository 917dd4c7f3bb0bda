"""The monitor as a client that is measured: its requests alone (`http`), and whole passes (`pass`).

`python -m bench.clients NAME` reads one JSON job per line from stdin and answers each with one JSON
line. Of the monitor it uses only `Worker`, `BillingClient` and `Settings`, in the same way for
every version, so that the `core` of another checkout can be measured beside this one. Its process
has only the packages that the monitor ships with.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from inspect import signature
from typing import IO, TYPE_CHECKING, Any

from bench.jobs import TIMEOUT_SECONDS, Job, Report, Run, bounded, serve
from core.settings import Settings
from core.worker import Worker

if TYPE_CHECKING:
    import asyncio

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


def main() -> None:
    # Reports go to the real stdout; what a pass logs goes to /dev/null.
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    log.set_level(debug=False)
    serve(full_pass(reports) if sys.argv[1] == "pass" else http_part(), reports)


if __name__ == "__main__":
    main()

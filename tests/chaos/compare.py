"""Compare this monitor with the algorithm it replaces, in Node, under the same billing faults.

`python -m tests.chaos.compare` runs both and writes the table in docs/reliability.md. To save time,
the interval is 0.4 s and the timeout 0.8 s, in the same proportion as 5 s and 10 s.
"""

import json
import logging
import os
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from core.log import logger
from core.settings import Settings
from core.worker import Worker
from testkit.clock import FakeClock
from testkit.shops import SQLiteShop, add_sessions, statements
from tests.chaos.billing import FAULTS, LIMITS, FaultyBilling
from tests.chaos.world import KEY

INTERVAL, TIMEOUT, TICKS = 0.4, 0.8, 3
HEALTHY = [f"fine-{n}" for n in range(5)]
# These pauses outlast the three ticks; a pause of 2 s ends before the next tick.
LONG_PAUSES = ("429 for a year", "429 for 5,000 digits", "429 until a date")
REPORT = Path(__file__).parents[2] / "docs" / "reliability.md"

type Run = Callable[[FaultyBilling, FakeClock, list[str]], bool]  # whether it was alive at the end


def run_node(billing: FaultyBilling, clock: FakeClock, checkouts: list[str]) -> bool:
    def advance_clock() -> None:
        for _ in range(TICKS):
            time.sleep(INTERVAL)
            clock.advance(5)

    thread = threading.Thread(target=advance_clock)
    thread.start()
    ran = subprocess.run(
        [
            "node",
            str(Path(__file__).with_name("node_loop.mjs")),
            billing.url,
            *(str(round(n)) for n in (INTERVAL * 1000, TIMEOUT * 1000, TICKS)),
            *checkouts,
        ],
        env={**os.environ, "APIKEY": KEY, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    thread.join()
    return ran.returncode == 0 and len(json.loads(ran.stdout)) == TICKS * len(checkouts)


def run_monitor(billing: FaultyBilling, clock: FakeClock, checkouts: list[str]) -> bool:
    """Run each tick on its own worker, as on Lambda."""
    errors: list[object] = []

    def tick(worker: Worker) -> None:
        try:
            worker.check_open_checkout_sessions(clock.now)
        except Exception as error:  # noqa: BLE001 (any error counts as a failure)
            errors.append(error)

    with tempfile.TemporaryDirectory() as directory:
        shop = SQLiteShop(Path(directory) / "shop.db")
        for statement in statements("sqlite"):
            shop.run(statement)
        add_sessions(shop, {checkout: checkout for checkout in checkouts})
        settings = Settings.from_env(
            {
                "DATABASE_URL": shop.url,
                "APIKEY": KEY,
                "BILLING_API_URL": billing.url,
                "REQUEST_TIMEOUT_SECONDS": str(TIMEOUT),
                "STATUS_UPDATES": "true",
            }
        )
        workers = [Worker(settings, clock=clock) for _ in range(TICKS)]
        threads = []
        for worker in workers:
            time.sleep(INTERVAL)
            clock.advance(5)
            threads.append(threading.Thread(target=tick, args=(worker,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()
    return not errors


def defect(fault: str, run: Run) -> str:
    """Describe what goes wrong under a fault; empty if nothing does."""
    clock = FakeClock()
    with FaultyBilling(clock) as billing:
        alive = run(billing, clock, [f"{fault}-1", *HEALTHY])
        time.sleep(0.3)
        if not alive:
            return "crashes, or loses some checks"
        if any(KEY in line for line in billing.redirected):
            return "sends the API key to another host"
        if fault in LONG_PAUSES and len(billing.log[f"{fault}-1"].requested_at) > 1:
            return "ignores Retry-After"
        if billing.log[f"{fault}-1"].max_in_flight > 1:
            return "asks again before the answer"
        healthy = min(len(billing.log[checkout].requested_at) for checkout in HEALTHY)
        if fault not in LIMITS and healthy < TICKS:
            return "misses checks of healthy sessions"
    return ""


def main() -> None:
    logger.setLevel(logging.CRITICAL)
    faults = [*FAULTS, *LIMITS]
    with ThreadPoolExecutor(2) as pool:
        node = list(pool.map(lambda fault: defect(fault, run_node), faults))
        monitor = list(pool.map(lambda fault: defect(fault, run_monitor), faults))
    rows = ["| | this monitor | the algorithm in Node |", "|---|---|---|"]
    survived = [sum(not found for found in defects) for defects in (monitor, node)]
    rows.append(f"| survived, of {len(faults)} faults | {survived[0]} | {survived[1]} |")
    counts = [Counter(found for found in defects if found) for defects in (monitor, node)]
    rows += [
        f"| {found} | {counts[0][found]} | {counts[1][found]} |"
        for found in sorted(counts[0].keys() | counts[1].keys())
    ]
    table = "\n".join(rows) + "\n"
    print(table)
    for name, defects in (("monitor", monitor), ("node", node)):
        details = [f"{fault}: {d}" for fault, d in zip(faults, defects, strict=True) if d]
        print(f"{name}:", *details, sep="\n  ")
    pattern = re.compile(r"(?<=<!-- compare -->\n).*?(?=<!-- /compare -->)", re.DOTALL)
    text = REPORT.read_text(encoding="utf-8")
    REPORT.write_text(pattern.sub(lambda _: table, text), encoding="utf-8")


if __name__ == "__main__":
    main()

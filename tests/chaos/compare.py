"""The same billing faults put to this monitor and to the algorithm it replaces, in Node.

`python -m tests.chaos.compare` runs both and writes the table in docs/reliability.md. Time is
short: the interval is 0.4 s and the time-out 0.8 s, as 5 s and 10 s are to each other.
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
from tests.chaos.billing import FAULTS, LIMITS, Misbehaving

INTERVAL, TIMEOUT, TICKS = 0.4, 0.8, 3
HEALTHY = [f"fine-{n}" for n in range(5)]
KEY = "the-key-that-nobody-may-see"
# Longer than the three ticks; a wait of 2 s is over by the next one.
WAITS = ("429 for a year", "429 for 5,000 digits", "429 until a date")
REPORT = Path(__file__).parents[2] / "docs" / "reliability.md"

type Run = Callable[[Misbehaving, FakeClock, list[str]], bool]  # whether it was alive at the end


def node(billing: Misbehaving, clock: FakeClock, checkouts: list[str]) -> bool:
    def move() -> None:
        for _ in range(TICKS):
            time.sleep(INTERVAL)
            clock.advance(5)

    thread = threading.Thread(target=move)
    thread.start()
    ran = subprocess.run(
        [
            "node",
            str(Path(__file__).with_name("seed.mjs")),
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


def monitor(billing: Misbehaving, clock: FakeClock, checkouts: list[str]) -> bool:
    """Each tick on a worker of its own, as on Lambda."""
    failed: list[object] = []

    def tick(worker: Worker) -> None:
        try:
            worker.check_open_checkout_sessions(clock.now)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is told)
            failed.append(error)

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
    return not failed


def verdict(fault: str, run: Run) -> str:
    """What does not go well; nothing where it survives."""
    clock = FakeClock()
    with Misbehaving(clock) as billing:
        alive = run(billing, clock, [f"{fault}-1", *HEALTHY])
        time.sleep(0.3)
        if not alive:
            return "dies, or says nothing of some checks"
        if any(KEY in line for line in billing.strangers):
            return "sends the API key to another host"
        if fault in WAITS and len(billing.asked[f"{fault}-1"].at) > 1:
            return "goes on asking when told to wait"
        if billing.asked[f"{fault}-1"].most_in_flight > 1:
            return "asks again while it still waits"
        if fault not in LIMITS and min(len(billing.asked[c].at) for c in HEALTHY) < TICKS:
            return "leaves healthy sessions out"
    return ""


def main() -> None:
    logger.setLevel(logging.CRITICAL)
    faults = [*FAULTS, *LIMITS]
    with ThreadPoolExecutor(2) as pool:
        seeds = list(pool.map(lambda fault: verdict(fault, node), faults))
        ours = list(pool.map(lambda fault: verdict(fault, monitor), faults))
    rows = ["| | this monitor | the algorithm in Node |", "|---|---|---|"]
    survived = [sum(not found for found in verdicts) for verdicts in (ours, seeds)]
    rows.append(f"| survived, of {len(faults)} faults | {survived[0]} | {survived[1]} |")
    counts = [Counter(found for found in verdicts if found) for verdicts in (ours, seeds)]
    rows += [
        f"| {what} | {counts[0][what]} | {counts[1][what]} |"
        for what in sorted(counts[0].keys() | counts[1].keys())
    ]
    table = "\n".join(rows) + "\n"
    print(table)
    for name, verdicts in (("monitor", ours), ("node", seeds)):
        told = [f"{f}: {v}" for f, v in zip(faults, verdicts, strict=True) if v]
        print(f"{name}:", *told, sep="\n  ")
    pattern = re.compile(r"(?<=<!-- compare -->\n).*?(?=<!-- /compare -->)", re.DOTALL)
    text = REPORT.read_text(encoding="utf-8")
    REPORT.write_text(pattern.sub(lambda _: table, text), encoding="utf-8")


if __name__ == "__main__":
    main()

"""`make soak`: the monitor runs for minutes under faults drawn at random.

Three worker processes tick in real time over MariaDB (TEST_DATABASE_URL, or a server that the soak
starts). Billing and the event bus fail, database connections are cut and refused, workers are
killed, stopped and frozen, a webhook closes sessions, and the shop retries checkouts. At the end it
prints a report and every violated invariant.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from local.mariadb import mariadb_server
from testkit.shops import MySQLShop, add_sessions, mysql_shop
from tests.chaos.billing import FaultyBilling
from tests.chaos.bus import running_bus
from tests.chaos.proxy import Proxy
from tests.chaos.soak.faults import (
    BACKOFF,
    INTERVAL,
    PASSWORD,
    ROOT,
    TIMEOUT,
    Soak,
    WorkerProcess,
)
from tests.chaos.soak.invariants import violations
from tests.chaos.soak.report import Memory, report
from tests.chaos.world import KEY

REPORT = ROOT / "docs" / "reliability.md"
WORKERS = 3
# Seconds after the last fault: a backoff, a lease and an interval, doubled for a slow machine.
SETTLE = 60
PROGRESS_EVERY = 10


@contextmanager
def running(soak: Soak, server: str, directory: Path) -> Iterator[None]:
    """Start the workers; stop them with SIGTERM at the end of the block."""
    env = {
        "APIKEY": KEY,
        "BILLING_API_URL": soak.billing.url,
        "REQUEST_TIMEOUT_SECONDS": str(TIMEOUT),
        "CHECK_INTERVAL_SECONDS": str(INTERVAL),
        "CHECK_BACKOFF_MAX_SECONDS": str(BACKOFF),
        "STATUS_UPDATES": "true",
        "EVENT_BUS_NAME": "shop",
        "AWS_ENDPOINT_URL_EVENTBRIDGE": soak.bus.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "eu-west-1",
    }
    with ExitStack() as stack:
        for number in range(WORKERS):
            proxy = stack.enter_context(Proxy(server))
            url = proxy.url(soak.shop.database)
            worker = WorkerProcess({**env, "DATABASE_URL": url}, proxy, directory / f"log-{number}")
            stack.callback(worker.kill)
            soak.workers.append(worker)
        yield
        for worker in soak.workers:
            if worker.ended:
                soak.violations.append("a worker exited on its own")
            worker.send_signal(signal.SIGTERM)
        for worker in soak.workers:
            soak.expect_clean_exit(worker)


@contextmanager
def monitor_user(shop: MySQLShop) -> Iterator[str]:
    """Create a user with PASSWORD and all rights in the shop; yields the server's URL."""
    user = f"{shop.database}@'%'"
    shop.run(f"CREATE USER {user} IDENTIFIED BY '{PASSWORD}'")
    try:
        shop.run(f"GRANT ALL ON {shop.database}.* TO {user}")
        url = urlsplit(shop.server)
        yield f"mysql://{shop.database}:{PASSWORD}@{url.hostname}:{url.port or 3306}/"
    finally:
        shop.run(f"DROP USER {user}")


def read_logs(directory: Path) -> str:
    """The output of all workers, including half a line of a killed one."""
    return "".join(path.read_text("utf-8", "replace") for path in sorted(directory.glob("log-*")))


def run(soak: Soak, seconds: float) -> tuple[datetime, Sequence[Memory]]:
    """Run the soak.

    Returns the time when the faults ended, and the memory after a minute, halfway and at the end.
    """
    began = time.monotonic()
    repeating = [
        soak.repeat(soak.close_by_webhook, 0.2),
        soak.repeat(soak.retry_checkout, 0.2),
        soak.repeat(soak.faults_of("database"), 10),
        soak.repeat(soak.faults_of("event bus"), 60),
        soak.repeat(soak.faults_of("process"), 10),
    ]
    samples: list[Memory] = []
    healed_at: datetime | None = None
    ends = began + seconds
    while time.monotonic() < ends:
        time.sleep(PROGRESS_EVERY)
        if healed_at is None and time.monotonic() > ends - SETTLE:
            soak.faults_ended.set()
            for thread in repeating:
                thread.join()
            healed_at = soak.heal()
            ends = time.monotonic() + SETTLE
        elapsed, memory = time.monotonic() - began, Memory.now(soak)
        if len(samples) < 2 and elapsed >= (60, seconds / 2)[len(samples)]:
            samples.append(memory)
        soak.check_due_times()
        for worker in soak.workers:
            worker.proxy.log.clear()  # nothing reads it here, and it would use most of the memory
        groups = Counter[str]()
        for (group, _), count in soak.faults.copy().items():
            groups[group] += count
        print(
            f"{elapsed:5.0f} s  {soak.billing.requests:8,} requests  "
            f"{', '.join(f'{n:,} {group}' for group, n in groups.items())} faults  "
            f"{len(soak.bus.events):5,} changes  {memory.worker:.0f} and {memory.services:.0f} MB",
            flush=True,
        )
    assert healed_at is not None
    return healed_at, (*samples, memory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--report", action="store_true", help="write the report into docs/reliability.md"
    )
    options = parser.parse_args()
    print(f"seed {options.seed}; {options.minutes:g} minutes, {options.sessions:,} sessions")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = os.environ.get("TEST_DATABASE_URL") or stack.enter_context(
            mariadb_server(directory)
        )
        shop = stack.enter_context(mysql_shop(server))
        billing = stack.enter_context(FaultyBilling(lambda: datetime.now(UTC)))
        bus = stack.enter_context(running_bus())
        soak = Soak(shop, billing, bus, random.Random(options.seed), options.sessions)
        billing.draw_fault = soak.draw_fault
        add_sessions(shop, soak.new_sessions(options.sessions))
        server_url = stack.enter_context(monitor_user(shop))
        with running(soak, server_url, directory):
            healed_at, memory = run(soak, options.minutes * 60)
        log = read_logs(directory)
        violated = list(violations(soak, healed_at, log))
        parameters = f"{options.seed}, {options.minutes:g}, {options.sessions:,}"
        lines = report(soak, parameters, log, memory, violated)
        counts = {f"{group}: {kind}": n for (group, kind), n in soak.faults.most_common()}
        print("\n".join([*lines, *violated[:20], json.dumps(counts)]))
        if options.report:
            head, _, rest = REPORT.read_text(encoding="utf-8").partition("<!-- soak -->\n")
            _, _, tail = rest.partition("<!-- /soak -->")
            table = "\n".join(lines)
            REPORT.write_text(
                f"{head}<!-- soak -->\n{table}\n<!-- /soak -->{tail}", encoding="utf-8"
            )
        return bool(violated)


if __name__ == "__main__":
    sys.exit(main())

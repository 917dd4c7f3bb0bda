"""`make soak`: the monitor for minutes among everything that can go wrong, drawn at random.

Three workers tick in real time over MariaDB (TEST_DATABASE_URL, or a server of its own), while
billing misbehaves, the database's connections are cut and refused, workers are stopped, a webhook
closes sessions, and a shop retries checkouts. It reports what happened, and what held.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pymysql

from core.database import StoreError
from core.observability import logger
from core.settings import Settings
from core.status import WORDS
from core.worker import Worker
from tests.chaos.billing import FAULTS, LIMITS, Fault, Misbehaving
from tests.chaos.bus import running_bus
from tests.chaos.proxy import Proxy, cut, refuse
from tests.support import MySQLShop, add_sessions, mariadb_server, mysql_shop

INTERVAL = 5
WORKERS = 3
TIMEOUT = 2.0
FAULTY = 0.01  # of the requests
PAID = 0.002
# Drawn seldom, because each keeps this process busy for as long as its client listens.
POURING = ("headers for ever", "one endless header", "a body of 1 GB", "100 Continue for ever")
# The others pause the whole sweep for the five minutes that are the most.
SHORT_LIMITS = ("429", "429 for 2 s", "429 for 0 s", "429 twice", "503 for 2 s", "429 for soon")
# After the last fault: a backoff, a lease, an interval, and as much again for a slow machine.
SETTLE = 60
CODES = (1213, 1205, 1290, 1317, 1927, 1040, 1114, 3024)
KINDS = ("billing", "database", "process")
REPORT = Path(__file__).parents[2] / "docs" / "reliability.md"


@dataclass
class Soak:
    """What happens in it, and what is counted."""

    shop: MySQLShop
    proxy: Proxy
    billing: Misbehaving
    random: random.Random
    sessions: int
    ended: threading.Event = field(default_factory=threading.Event)
    faults: Counter[str] = field(default_factory=Counter)
    faulty: set[str] = field(default_factory=set)  # checkouts that have met a fault
    closed_by_shop: set[str] = field(default_factory=set)
    failed_passes: int = 0
    passes: int = 0
    made: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, checkout: str) -> Fault | None:
        with self.lock:
            chance = self.random.random()
            if chance < PAID and checkout not in self.billing.words:
                self.billing.words[checkout] = self.random.choice(("paid", "failed", "expired"))
            if chance > 1 - FAULTY / 200:
                name = self.random.choice(SHORT_LIMITS)
            elif chance > 1 - FAULTY:
                name = self.random.choice(list(FAULTS))
                if name in POURING and self.random.random() > 0.1:
                    return None
            else:
                return None
            self.faults[f"billing: {name}"] += 1
            self.faulty.add(checkout)
        return FAULTS.get(name) or LIMITS[name]

    def new(self) -> dict[str, str | None]:
        with self.lock:
            self.made += 1
            return {f"s{self.made}": f"c-{self.made}"}

    def webhook(self) -> None:
        """Close a session, and open another."""
        rows = self.shop.run(
            "SELECT id FROM checkout_session WHERE status = 'open' ORDER BY RAND() LIMIT 1"
        )
        for (session_id,) in rows:
            # Counted first: the monitor may be just about to write another word.
            changed = self.shop.run(
                "UPDATE checkout_session SET status = 'success', billing_order_id = 'webhook'"
                " WHERE id = %s AND status = 'open'",
                (session_id,),
            )
            assert changed == []
        missing = self.sessions - self.open()
        for _ in range(max(0, missing)):
            add_sessions(self.shop, self.new())

    def retry(self) -> None:
        """Give a session another checkout, as a customer does who tries again."""
        with self.lock:
            self.made += 1
            checkout = f"retry-{self.made}"
        rows = self.shop.run(
            "SELECT id FROM checkout_session WHERE status = 'open' ORDER BY RAND() LIMIT 1"
        )
        for (session_id,) in rows:
            self.shop.run(
                "UPDATE checkout_session SET billing_checkout_id = %s"
                " WHERE id = %s AND status = 'open'",
                (checkout, session_id),
            )

    def database_fault(self) -> None:
        kind = self.random.choice(("cut", "cut all", "refuse", "away"))
        self.faults[f"database: {kind}"] += 1
        if kind == "cut all":
            self.proxy.cut_all()
        elif kind == "away":
            self.proxy.refusing = True
            self.proxy.cut_all()
            self.ended.wait(3)
            self.proxy.refusing = False
        else:
            number = self.proxy.count + self.random.randint(1, 30)
            error = refuse(self.random.choice(CODES))
            where = self.proxy.before if self.random.random() < 0.5 else self.proxy.after
            where[number] = error if kind == "refuse" and where is self.proxy.before else cut

    def open(self) -> int:
        [(count,)] = self.shop.run("SELECT COUNT(*) FROM checkout_session WHERE status = 'open'")
        return int(count)

    def repeat(self, work: Callable[[], None], every: float) -> threading.Thread:
        def loop() -> None:
            while not self.ended.wait(every * self.random.uniform(0.5, 1.5)):
                with suppress(pymysql.Error):  # a deadlock with the monitor is the shop's to repeat
                    work()

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        return thread

    def run_worker(self, settings: Settings, number: int, until: float) -> None:
        worker = Worker(settings)
        while (now := time.time()) < until:
            slot = (now // INTERVAL + 1) * INTERVAL
            time.sleep(max(0.0, slot - now))
            stopping = self.random.random() < 0.01 and not self.ended.is_set()
            timer = threading.Timer(self.random.uniform(0, 2), worker.stop) if stopping else None
            if timer is not None:
                timer.start()
            try:
                worker.check_open_checkout_sessions(datetime.fromtimestamp(slot, UTC), seconds=25)
                self.passes += 1
            except StoreError:
                self.failed_passes += 1
            except asyncio.CancelledError:
                self.faults["process: stopped"] += 1
            if timer is not None:
                timer.join()
                worker.close()
                worker = Worker(settings)
        worker.close()


def memory_mb() -> float:
    """Of this process now: workers, service, proxy and shop."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def gaps(soak: Soak) -> list[float]:
    """Seconds between two checks of the same healthy checkout."""
    return [
        (b - a).total_seconds()
        for checkout, asked in soak.billing.asked.items()
        if checkout not in soak.faulty
        for a, b in pairwise(asked.at)
    ]


def broken(soak: Soak, events: list[dict[str, str]], began: datetime) -> Iterator[str]:
    """What does not hold at the end."""
    rows = soak.shop.run(
        "SELECT s.id, s.billing_checkout_id, s.billing_order_id, s.status, c.last_checked_at"
        " FROM checkout_session s LEFT JOIN checkout_session_check c ON c.session_id = s.id"
    )
    told = {(e["session_id"], e["billing_checkout_id"], e["new_status"]) for e in events}
    made = set()
    for session_id, checkout, order, status, checked_at in rows:
        if status == "open":
            if checked_at is None or checked_at.replace(tzinfo=UTC) < began:
                yield f"{session_id} is open and was not checked after the faults were over"
            if soak.billing.words.get(checkout, "open") != "open":
                yield f"{session_id} is open, though billing closed {checkout}"
        elif order != "webhook":
            made.add((session_id, checkout, status))
            words = soak.billing.asked[checkout].said if checkout in soak.billing.asked else ()
            if status not in {WORDS[word] for word in words}:
                yield f"{session_id} is {status}, which billing did not say of {checkout}"
    yield from (f"not published: {change}" for change in made - told)
    by_webhook = {row[0] for row in rows if row[2] == "webhook"}
    untrue = {change for change in told - made if change[0] not in by_webhook}
    yield from (f"published, and not made: {change}" for change in untrue)


@contextmanager
def quiet(path: Path) -> Iterator[None]:
    """The monitor's log goes to a file."""
    [handler] = [h for h in logger.handlers if hasattr(h, "setStream")][:1]
    with path.open("w", encoding="utf-8") as log:
        handler.setStream(log)
        try:
            yield
        finally:
            handler.setStream(sys.stdout)


def report(  # noqa: PLR0917 (made in one place, just below)
    soak: Soak, minutes: float, seed: int, changes: int, memory: float, untrue: list[str]
) -> list[str]:
    """The table of what happened; `memory` is what was held after a minute."""
    [(checked,)] = soak.shop.run("SELECT SUM(checked) FROM checkout_session_run")
    between = sorted(gaps(soak))
    median, most = between[len(between) // 2], between[int(len(between) * 0.99)]
    rows = {
        "seed, minutes, sessions open": f"{seed}, {minutes:g}, {soak.sessions:,}",
        "checks recorded": f"{int(checked):,}",
        "passes, and those that ended in a database error": (
            f"{soak.passes:,}, {soak.failed_passes:,}"
        ),
        **{f"{kind} faults survived": faults_of(soak, kind) for kind in KINDS},
        "status changes published": f"{changes:,}",
        "between two checks of a healthy session: median, 99 %, longest": (
            f"{median:.1f} s, {most:.1f} s, {between[-1]:.1f} s"
        ),
        "memory after a minute, at the end (workers, billing service and shop in one process)": (
            f"{memory:.0f} MB, {memory_mb():.0f} MB"
        ),
        "invariants": "all held" if not untrue else f"{len(untrue)} broken",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def faults_of(soak: Soak, kind: str) -> str:
    found = {name: n for name, n in soak.faults.items() if name.startswith(f"{kind}:")}
    return f"{sum(found.values()):,} of {len(found)} kinds"


def main() -> int:  # noqa: PLR0915 (a program, from its top to its end)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--report", action="store_true", help="write docs/reliability.md's report")
    options = parser.parse_args()
    print(f"seed {options.seed}; {options.minutes:g} minutes, {options.sessions:,} sessions")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = os.environ.get("TEST_DATABASE_URL") or stack.enter_context(
            mariadb_server(directory / "mariadb")
        )
        shop = stack.enter_context(mysql_shop(server))
        proxy = stack.enter_context(Proxy(server))
        billing = stack.enter_context(Misbehaving(lambda: datetime.now(UTC)))
        bus = stack.enter_context(running_bus())
        os.environ |= {
            "AWS_ENDPOINT_URL_EVENTBRIDGE": bus.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "eu-west-1",
        }
        soak = Soak(shop, proxy, billing, random.Random(options.seed), options.sessions)
        billing.draw = soak.draw
        for _ in range(options.sessions):
            soak.made += 1
        add_sessions(shop, {f"s{n}": f"c-{n}" for n in range(1, options.sessions + 1)})
        key = "the-key-that-nobody-may-see"
        settings = Settings.from_env(
            {
                "DATABASE_URL": proxy.url(shop.database),
                "APIKEY": key,
                "BILLING_API_URL": billing.url,
                "REQUEST_TIMEOUT_SECONDS": str(TIMEOUT),
                "CHECK_BACKOFF_MAX_SECONDS": "20",
                "STATUS_UPDATES": "true",
                "EVENT_BUS_NAME": "shop",
            }
        )
        Worker(settings).close()
        log = directory / "log"
        began = time.time()
        faulty_until = began + options.minutes * 60 - SETTLE
        with quiet(log):
            repeating = [
                soak.repeat(soak.webhook, 0.2),
                soak.repeat(soak.retry, 0.2),
                soak.repeat(soak.database_fault, 10),
            ]
            workers = [
                threading.Thread(
                    target=soak.run_worker, args=(settings, n, began + options.minutes * 60)
                )
                for n in range(WORKERS)
            ]
            for worker in workers:
                worker.start()
            memory = [0.0]
            healed_at = None
            while any(worker.is_alive() for worker in workers):
                time.sleep(10)
                if time.time() >= faulty_until and healed_at is None:
                    soak.ended.set()
                    for thread in repeating:
                        thread.join()
                    proxy.before.clear()
                    proxy.after.clear()
                    billing.healed = True
                    healed_at = datetime.now(UTC)
                    shop.run("UPDATE checkout_session_pause SET paused_until = UTC_TIMESTAMP(3)")
                if memory == [0.0] and time.time() > began + 60:
                    memory = [memory_mb()]
                print(
                    f"{time.time() - began:5.0f} s  {billing.requests:8,} requests  "
                    f"{sum(soak.faults.values()):6,} faults  {soak.failed_passes:3} passes failed  "
                    f"{len(bus.events):5,} changes  {memory_mb():6.0f} MB",
                    flush=True,
                )
        gc.collect()
        assert healed_at is not None
        untrue = list(broken(soak, bus.events, healed_at))  # type: ignore[arg-type]
        text = log.read_text(encoding="utf-8")
        if key in text:
            untrue.append("the API key is in the log")
        if "Traceback" in text:
            untrue.append("a traceback is in the log")
        lines = report(soak, options.minutes, options.seed, len(bus.events), memory[0], untrue)
        print("\n".join([*lines, *untrue[:20], json.dumps(soak.faults.most_common(200))]))
        if options.report:
            head, _, rest = REPORT.read_text(encoding="utf-8").partition("<!-- soak -->\n")
            _, _, tail = rest.partition("<!-- /soak -->")
            table = "\n".join(lines)
            REPORT.write_text(
                f"{head}<!-- soak -->\n{table}\n<!-- /soak -->{tail}", encoding="utf-8"
            )
        return bool(untrue)


if __name__ == "__main__":
    sys.exit(main())

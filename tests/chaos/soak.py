"""`make soak`: the monitor for minutes among everything that can go wrong, drawn at random.

Three workers, each in a process of its own, tick in real time over MariaDB (TEST_DATABASE_URL, or a
server of its own), while billing and the event bus misbehave, the database's connections are cut
and refused, workers are killed, stopped and frozen, a webhook closes sessions, and a shop retries
checkouts. It reports what happened, and what held.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pymysql

from core.billing.status_words import WORDS
from local.mariadb import mariadb_server
from testkit.shops import MySQLShop, add_sessions, connect, mysql_shop
from tests.chaos.billing import FAULTS, LIMITS, Fault, Misbehaving
from tests.chaos.bus import Bus, running_bus
from tests.chaos.proxy import Action, Proxy, Statement, cut, refuse
from tests.chaos.world import UNANSWERED

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs" / "reliability.md"
KEY = "the-key-that-nobody-may-see"
PASSWORD = "the-password-that-nobody-may-see"
WORKERS = 3
TIMEOUT = 2.0
INTERVAL = 5
BACKOFF = 20
# What a pass has to begin a check, to wait for the answer and to record it.
LEASE = 5 + TIMEOUT + 5
FAULTY = 0.01  # of the requests
PAID = 0.002
# These keep the service busy for as long as their client listens, or pause the whole sweep: one for
# ten of each other kind.
POURING = ("headers for ever", "one endless header", "a body of 1 GB", "100 Continue for ever")
# These pause the sweep for the five minutes that are the most: half of a run.
LONG_LIMITS = ("429 for a year", "429 for 5,000 digits", "429 until a date")
SELDOM = (*POURING, *(name for name in LIMITS if name not in LONG_LIMITS))
BILLING_FAULTS = [*SELDOM, *[name for name in FAULTS if name not in POURING] * 10]
CODES = (1213, 1205, 1290, 1317, 1927, 1040, 1114, 3024)
AWAY = 3.0  # seconds, of a database or a bus, or of rows that the shop has locked
# Longer than a lease, so that others take over what a frozen worker had claimed.
FROZEN = 20.0
FEW_DESCRIPTORS = 30
# A worker that was asked to stop records what it has heard, and ends.
STOPS_WITHIN = 15.0
# Statements of a worker, between a fault that is drawn and the one that it meets.
MOST_STATEMENTS = 30
# After the last fault: a backoff, a lease, an interval, and as much again for a slow machine.
SETTLE = 60
PROGRESS_EVERY = 10


class WorkerProcess:
    """A worker that can be killed, behind a proxy of its own."""

    def __init__(self, env: Mapping[str, str], proxy: Proxy, log: Path) -> None:
        self.proxy = proxy
        self._env = env
        self._log = log
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.ticking"],
                cwd=ROOT,
                env={**os.environ, **self._env},
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def tell(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int | None:
        """Wait until it has ended, and return its exit status; None: it had to be killed."""
        try:
            return self._process.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Over(Exception):  # noqa: N818 (what happens, not what is wrong)
    """The faults have ended before this one could happen."""


def shuffled(names: Sequence[str], random: random.Random) -> Iterator[str]:
    """All of them in a random order, and again: none is left out for long."""
    while True:
        yield from random.sample(names, len(names))


@dataclass
class Soak:
    """What happens in it, and what is counted."""

    shop: MySQLShop
    billing: Misbehaving
    bus: Bus
    random: random.Random
    sessions: int
    workers: list[WorkerProcess] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)  # by group and kind
    faulty: set[str] = field(default_factory=set)  # checkouts that have met a fault
    broken: list[str] = field(default_factory=list)
    retried: set[str] = field(default_factory=set)  # sessions that the shop gave another checkout
    made: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.kinds: Mapping[str, Mapping[str, Callable[[], None]]] = {
            "database": {
                "a connection is cut before a statement": lambda: self._at_statement("before", cut),
                "a connection is cut after a statement": lambda: self._at_statement("after", cut),
                "all connections are cut": self._cut_all,
                "it is away": self._away,
                "rows are locked by the shop": self._lock_rows,
                **{
                    f"a statement is refused with {code}": partial(
                        self._at_statement, "before", refuse(code)
                    )
                    for code in CODES
                },
            },
            "event bus": {
                "takes nothing": lambda: self._bus("refuses"),
                "fails": lambda: self._bus("breaks"),
            },
            "process": {
                "killed in a pass": self._kill,
                "stopped in a pass": self._stop,
                "frozen in a pass, its connections ended": self._freeze,
                "without descriptors, its connections ended": self._take_descriptors,
            },
        }
        self._billing_faults = shuffled(BILLING_FAULTS, self.random)

    def draw(self, checkout: str) -> Fault | None:
        """What a request meets; and now and then the customer has paid, or given up."""
        with self.lock:
            if self.random.random() < PAID and checkout not in self.billing.words:
                self.billing.words[checkout] = self.random.choice(("paid", "failed", "expired"))
            if self.random.random() > FAULTY:
                return None
            name = next(self._billing_faults)
            self.faults["billing", name] += 1
            self.faulty.add(checkout)
        return FAULTS.get(name) or LIMITS[name]

    def kinds_of(self, group: str) -> int:
        return len(FAULTS) + len(LIMITS) if group == "billing" else len(self.kinds[group])

    def new(self, many: int) -> dict[str, str | None]:
        with self.lock:
            self.made += many
            return {f"s{n}": f"c-{n}" for n in range(self.made - many + 1, self.made + 1)}

    def webhook(self) -> None:
        """Close a session, and open as many as are missing."""
        self.shop.run(
            "UPDATE checkout_session SET status = 'success', billing_order_id = 'webhook'"
            " WHERE status = 'open' AND id = %s",
            (self._any_open(),),
        )
        [(count,)] = self.shop.run("SELECT COUNT(*) FROM checkout_session WHERE status = 'open'")
        add_sessions(self.shop, self.new(max(0, self.sessions - int(count))))

    def retry(self) -> None:
        """Give a session another checkout, as a customer does who tries again."""
        session_id = self._any_open()
        with self.lock:
            self.made += 1
            checkout = f"retry-{self.made}"
            self.retried.add(session_id)
        self.shop.run(
            "UPDATE checkout_session SET billing_checkout_id = %s"
            " WHERE status = 'open' AND id = %s",
            (checkout, session_id),
        )

    def _any_open(self) -> str:
        [(session_id,)] = self.shop.run(
            "SELECT id FROM checkout_session WHERE status = 'open' ORDER BY RAND() LIMIT 1"
        )
        return str(session_id)

    def faults_of(self, group: str) -> Callable[[], None]:
        """Each call is the next fault of that group."""
        kinds = shuffled(list(self.kinds[group]), self.random)

        def next_fault() -> None:
            kind = next(kinds)
            self.kinds[group][kind]()
            self.faults[group, kind] += 1

        return next_fault

    def _at_statement(self, when: str, action: Action) -> None:
        self._meets(self.random.choice(self.workers), when, action)

    def _meets(self, worker: WorkerProcess, when: str, action: Action) -> None:
        """Let it happen at one of the worker's next statements, and wait until it has.

        Raises:
            Over: the worker sends none before the faults end.
        """
        met = threading.Event()

        def noticed(statement: Statement) -> None:
            met.set()
            action(statement)

        actions: dict[int, Action] = getattr(worker.proxy, when)
        actions[worker.proxy.count + self.random.randint(1, MOST_STATEMENTS)] = noticed
        while not met.wait(0.1):
            if self.ended.is_set():
                raise Over

    def _cut_all(self) -> None:
        for worker in self.workers:
            worker.proxy.cut_all()

    def _away(self) -> None:
        for worker in self.workers:
            worker.proxy.refusing = True
        self._cut_all()
        self.ended.wait(AWAY)
        for worker in self.workers:
            worker.proxy.refusing = False

    def _lock_rows(self) -> None:
        with (
            connect(self.shop.server, self.shop.database) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("BEGIN")
            cursor.execute("SELECT id FROM checkout_session WHERE status = 'open' FOR UPDATE")
            self.ended.wait(AWAY)
            cursor.execute("ROLLBACK")

    def _bus(self, how: str) -> None:
        setattr(self.bus, how, True)
        self.ended.wait(AWAY)
        setattr(self.bus, how, False)

    def _in_a_pass(self, worker: WorkerProcess, number: signal.Signals) -> None:
        told = threading.Event()

        def tell(_statement: Statement) -> None:
            worker.tell(number)
            told.set()

        self._meets(worker, "before", tell)
        told.wait()

    def _one_that_may_end(self) -> WorkerProcess:
        """The first one lives for the whole run, so that its memory can be followed."""
        return self.random.choice(self.workers[1:])

    def _kill(self) -> None:
        worker = self._one_that_may_end()
        self._in_a_pass(worker, signal.SIGKILL)
        worker.end()
        worker.start()

    def _stop(self) -> None:
        worker = self._one_that_may_end()
        self._in_a_pass(worker, signal.SIGTERM)
        self.expect_end(worker)
        worker.start()

    def expect_end(self, worker: WorkerProcess) -> None:
        if status := worker.end():
            self.broken.append(f"a worker that was asked to stop ended with {status}")
        elif status is None:
            self.broken.append(f"a worker that was asked to stop did not within {STOPS_WITHIN} s")

    def _freeze(self) -> None:
        worker = self.random.choice(self.workers)
        self._in_a_pass(worker, signal.SIGSTOP)
        worker.proxy.cut_all()
        self.billing.end_connections()
        self.ended.wait(FROZEN)
        worker.tell(signal.SIGCONT)

    def _take_descriptors(self) -> None:
        worker = self.random.choice(self.workers)
        before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, before[1]))
        worker.proxy.cut_all()
        self.billing.end_connections()
        self.ended.wait(AWAY)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)

    def repeat(self, work: Callable[[], None], every: float) -> threading.Thread:
        def loop() -> None:
            while not self.ended.wait(every * self.random.uniform(0.5, 1.5)):
                try:
                    with suppress(pymysql.Error, Over):  # the shop repeats what met a deadlock
                        work()
                except Exception as bug:  # noqa: BLE001 (of the soak's own; it may not pass unseen)
                    self.broken.append(f"the soak itself: {bug!r}")

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        return thread

    def watch(self) -> None:
        """Look for open sessions that nobody would check in time, whatever is going on just now.

        A new one is not in the queue yet.
        """
        for session_id, until, due in self.shop.run(
            "SELECT c.session_id, c.claimed_until, c.next_check_at FROM checkout_session_check c"
            " JOIN checkout_session s ON s.id = c.session_id WHERE s.status = 'open'"
            " AND (c.claimed_until > UTC_TIMESTAMP(3) + INTERVAL %s SECOND"
            " OR c.next_check_at > UTC_TIMESTAMP(3) + INTERVAL %s SECOND)",
            (LEASE, BACKOFF + INTERVAL),
        ):
            self.broken.append(f"{session_id} is claimed until {until}, and due at {due}")

    def heal(self) -> datetime:
        """End what stands of the faults; returns when that was."""
        for worker in self.workers:
            worker.proxy.before.clear()
            worker.proxy.after.clear()
        self.billing.healed = True
        self.shop.run("UPDATE checkout_session_pause SET paused_until = UTC_TIMESTAMP(3)")
        return datetime.now(UTC)


class Memory(NamedTuple):
    """Resident sets, in MB."""

    worker: float  # the first one, which lives for the whole run
    services: float  # this process: simulated services, shop and proxies

    @classmethod
    def now(cls, soak: Soak) -> "Memory":
        return cls(_resident_mb(soak.workers[0].pid), _resident_mb(os.getpid()))


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def gaps(soak: Soak) -> list[float]:
    """Seconds between two checks of the same healthy checkout.

    Where it is still open, and was not checked again, until the last check of any.
    """
    healthy = {
        checkout: asked.at
        for checkout, asked in soak.billing.asked.items()
        if asked.at and checkout not in soak.faulty
    }
    last = max(at[-1] for at in healthy.values())
    waiting = soak.shop.run(
        "SELECT billing_checkout_id FROM checkout_session WHERE status = 'open'"
    )
    moments = [*healthy.values(), *([healthy[c][-1], last] for (c,) in waiting if c in healthy)]
    return [(b - a).total_seconds() for at in moments for a, b in pairwise(at)]


def broken(soak: Soak, healed_at: datetime, log: str) -> Iterator[str]:
    """What does not hold at the end."""
    yield from soak.broken
    yield from _broken_sessions(soak, healed_at)
    yield from _broken_events(soak)
    yield from _broken_runs(soak)
    yield from (f"in the log: {secret}" for secret in (KEY, PASSWORD) if secret in log)
    if any(KEY in head for head in soak.billing.strangers):
        yield "the API key went to another host"
    bugs = ("Traceback", "panicked")
    yield from (line for line in log.splitlines() if any(bug in line for bug in bugs))


def _broken_runs(soak: Soak) -> Iterator[str]:
    """What passes that have ended tell, and is not so."""
    found = Counter[str]()
    changes = 0
    for checked, changed, outcomes in soak.shop.run(
        "SELECT checked, status_changes, outcomes FROM checkout_session_run"
        " WHERE finished_at IS NOT NULL"
    ):
        told = Counter[str](json.loads(outcomes))
        found += told
        changes += changed
        if checked != told.total():
            yield f"a pass checked {checked}, and tells of {outcomes}"
    answers = found.total() - sum(found[word] for word in UNANSWERED)
    given = sum(asked.answered for asked in soak.billing.asked.values())
    if answers > given:
        yield f"the passes tell of {answers} answers, and {given} were given"
    published = len({event["event_id"] for event in soak.bus.events})
    if changes > published:
        yield f"the passes tell of {changes} changes, and {published} were published"


def _broken_sessions(soak: Soak, healed_at: datetime) -> Iterator[str]:
    soon = datetime.now(UTC) + timedelta(seconds=LEASE + INTERVAL)
    for session_id, checkout, order, checked_at, due, until in soak.shop.run(
        "SELECT s.id, s.billing_checkout_id, s.billing_order_id, c.last_checked_at,"
        " c.next_check_at, c.claimed_until"
        " FROM checkout_session s LEFT JOIN checkout_session_check c ON c.session_id = s.id"
        " WHERE s.status = 'open'"
    ):
        if order is not None:
            yield f"{session_id} was closed by the shop, and is open again"
        if checked_at is None or checked_at.replace(tzinfo=UTC) < healed_at:
            yield f"{session_id} is open and was not checked after the faults were over"
        elif max(due, until or due).replace(tzinfo=UTC) > soon:
            yield f"{session_id} is due at {due}, and claimed until {until}"
        if soak.billing.words.get(checkout, "open") != "open":
            yield f"{session_id} is open, though billing closed {checkout}"


type Change = tuple[str, str, str]  # a session, the checkout it had, its new status


def _changes(soak: Soak) -> tuple[set[Change], set[Change]]:
    """Those that the monitor made, and those that it published."""
    made = soak.shop.run(
        "SELECT id, billing_checkout_id, status FROM checkout_session"
        " WHERE status <> 'open' AND billing_order_id IS NULL"
    )
    told = {(e["session_id"], e["billing_checkout_id"], e["new_status"]) for e in soak.bus.events}
    return {(i, checkout, status) for i, checkout, status in made}, told


def overtaken(soak: Soak) -> set[Change]:
    """Changes that were published, and that the shop overruled after their commit was cut.

    An event goes out before the commit, so that it cannot be missing; where the commit then does
    not happen, the session is free, and the shop may close it, or give it another checkout.
    """
    by_shop = soak.retried | {
        session_id
        for (session_id,) in soak.shop.run(
            "SELECT id FROM checkout_session WHERE billing_order_id IS NOT NULL"
        )
    }
    made, told = _changes(soak)
    return {change for change in told - made if change[0] in by_shop}


def _broken_events(soak: Soak) -> Iterator[str]:
    """Changes without billing's word, changes not published, and events of what was not made."""
    made, told = _changes(soak)
    for session_id, checkout, status in made | told:
        if status not in {WORDS[word] for word in soak.billing.asked[checkout].said}:
            yield f"{session_id} is {status}, which billing did not say of {checkout}"
    yield from (f"not published: {change}" for change in made - told)
    cut_short = overtaken(soak)
    yield from (f"published, and not made: {change}" for change in told - made - cut_short)
    may_cut = sum(n for (group, _), n in soak.faults.items() if group in ("database", "process"))
    if len(cut_short) > may_cut:
        yield f"published, and not made: {len(cut_short)}, more than the faults that may be why"


def faults_survived(soak: Soak, group: str) -> str:
    """How many, of how many kinds; and of which, where the kinds are few."""
    by_kind = {kind: n for (of, kind), n in soak.faults.items() if of == group}
    told = f"{sum(by_kind.values()):,}, {len(by_kind)} of {soak.kinds_of(group)} kinds"
    if not by_kind:
        return told
    if group == "billing":
        return f"{told}, {min(by_kind.values())} to {max(by_kind.values())} of each"
    return f"{told}: {', '.join(f'{kind} ({n})' for kind, n in sorted(by_kind.items()))}"


def report(
    soak: Soak, told: str, log: str, memory: Sequence[Memory], untrue: Sequence[str]
) -> list[str]:
    """The table of what happened.

    `memory` is what was held after a minute, half way, and at the end.
    """
    [(checked,)] = soak.shop.run("SELECT SUM(checked) FROM checkout_session_run")
    between = sorted(gaps(soak))
    median, most = between[len(between) // 2], between[int(len(between) * 0.99)]
    published = len({event["event_id"] for event in soak.bus.events})
    completed, failed = log.count('"PassesCompleted":1'), log.count('"PassesFailed":1')
    rows = {
        "seed, minutes, sessions open": told,
        "checks recorded": f"{int(checked):,}",
        "passes, and those that ended in a database error": f"{completed + failed:,}, {failed:,}",
        **{
            f"{group} faults survived": faults_survived(soak, group)
            for group in ("billing", *soak.kinds)
        },
        "status changes published, and those published twice": (
            f"{published:,}, {len(soak.bus.events) - published:,}"
        ),
        "published, and overruled by the shop when their commit was cut": (
            f"{len(overtaken(soak)):,}"
        ),
        "between two checks of a healthy session: median, 99 %, longest": (
            f"{median:.1f} s, {most:.1f} s, {between[-1]:.1f} s"
        ),
        "memory of a worker after a minute, half way, at the end": (
            ", ".join(f"{held.worker:.0f} MB" for held in memory)
        ),
        "the same of the simulated services, the shop and the proxies": (
            ", ".join(f"{held.services:.0f} MB" for held in memory)
        ),
        "invariants": "all held" if not untrue else f"{len(untrue)} broken",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


@contextmanager
def running(soak: Soak, server: str, directory: Path) -> Iterator[None]:
    """Start the workers; end them with SIGTERM at the block's end, however it is left."""
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
                soak.broken.append("a worker ended without being told to")
            worker.tell(signal.SIGTERM)
        for worker in soak.workers:
            soak.expect_end(worker)


@contextmanager
def secret_user(shop: MySQLShop) -> Iterator[str]:
    """The server's URL as a user with PASSWORD, who may do all in the shop's database."""
    user = f"{shop.database}@'%'"
    shop.run(f"CREATE USER {user} IDENTIFIED BY '{PASSWORD}'")
    try:
        shop.run(f"GRANT ALL ON {shop.database}.* TO {user}")
        url = urlsplit(shop.server)
        yield f"mysql://{shop.database}:{PASSWORD}@{url.hostname}:{url.port or 3306}/"
    finally:
        shop.run(f"DROP USER {user}")


def log_of(directory: Path) -> str:
    """What all workers have printed, be it half a line of one that was killed."""
    return "".join(path.read_text("utf-8", "replace") for path in sorted(directory.glob("log-*")))


def run(soak: Soak, seconds: float) -> tuple[datetime, Sequence[Memory]]:
    """Let everything happen for so long.

    Returns when the faults were over, and what was held in memory after a minute, half way and at
    the end.
    """
    began = time.monotonic()
    repeating = [
        soak.repeat(soak.webhook, 0.2),
        soak.repeat(soak.retry, 0.2),
        soak.repeat(soak.faults_of("database"), 10),
        soak.repeat(soak.faults_of("event bus"), 60),
        soak.repeat(soak.faults_of("process"), 10),
    ]
    held: list[Memory] = []
    healed_at: datetime | None = None
    ends = began + seconds
    while time.monotonic() < ends:
        time.sleep(PROGRESS_EVERY)
        if healed_at is None and time.monotonic() > ends - SETTLE:
            soak.ended.set()
            for thread in repeating:
                thread.join()
            healed_at = soak.heal()
            ends = time.monotonic() + SETTLE
        since, memory = time.monotonic() - began, Memory.now(soak)
        if len(held) < 2 and since >= (60, seconds / 2)[len(held)]:
            held.append(memory)
        soak.watch()
        for worker in soak.workers:
            # The statements themselves are of no use here, and would be most of the memory.
            worker.proxy.log.clear()
        groups = Counter[str]()
        for (group, _), many in soak.faults.copy().items():
            groups[group] += many
        print(
            f"{since:5.0f} s  {soak.billing.requests:8,} requests  "
            f"{', '.join(f'{n:,} {group}' for group, n in groups.items())} faults  "
            f"{len(soak.bus.events):5,} changes  {memory.worker:.0f} and {memory.services:.0f} MB",
            flush=True,
        )
    assert healed_at is not None
    return healed_at, (*held, memory)


def main() -> int:
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
            mariadb_server(directory)
        )
        shop = stack.enter_context(mysql_shop(server))
        billing = stack.enter_context(Misbehaving(lambda: datetime.now(UTC)))
        bus = stack.enter_context(running_bus())
        soak = Soak(shop, billing, bus, random.Random(options.seed), options.sessions)
        billing.draw = soak.draw
        add_sessions(shop, soak.new(options.sessions))
        as_monitor = stack.enter_context(secret_user(shop))
        with running(soak, as_monitor, directory):
            healed_at, memory = run(soak, options.minutes * 60)
        log = log_of(directory)
        untrue = list(broken(soak, healed_at, log))
        told = f"{options.seed}, {options.minutes:g}, {options.sessions:,}"
        lines = report(soak, told, log, memory, untrue)
        counts = {f"{group}: {kind}": n for (group, kind), n in soak.faults.most_common()}
        print("\n".join([*lines, *untrue[:20], json.dumps(counts)]))
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

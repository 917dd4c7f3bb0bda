"""What can go wrong in a soak: the worker processes, the shop, and faults drawn at random."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pymysql

from testkit.queue import CLAIMED_UNTIL, DUE_AT, OF_SESSIONS
from testkit.shops import MySQLShop, add_sessions, connect
from tests.chaos.billing import FAULTS, LIMITS, Fault, FaultyBilling
from tests.chaos.bus import Bus
from tests.chaos.proxy import Action, Proxy, Statement, cut, refuse

ROOT = Path(__file__).parents[3]
PASSWORD = "the-password-that-nobody-may-see"
TIMEOUT = 2.0
INTERVAL = 5
BACKOFF = 20
# A lease covers the time to start a check, to wait for the answer and to record it.
LEASE = 5 + TIMEOUT + 5
# Of the requests: how many meet a fault, and how many find that billing has closed the checkout.
FAULT_RATE = 0.01
CLOSE_RATE = 0.002
# These keep the service busy for as long as the client reads, so they are drawn less often.
ENDLESS = ("endless headers", "an endless header", "a body of 1 GB", "endless 100 Continue")
# These pause all checks for the maximum of five minutes, which is half of a soak; never drawn.
LONG_PAUSES = ("429 for a year", "429 for 5,000 digits", "429 until a date")
RARE = (*ENDLESS, *(name for name in LIMITS if name not in LONG_PAUSES))
# Every other kind is drawn ten times as often as a rare one.
BILLING_FAULTS = [*RARE, *[name for name in FAULTS if name not in ENDLESS] * 10]
CODES = (1213, 1205, 1290, 1317, 1927, 1040, 1114, 3024)
# How long the database or the bus is unreachable, or the shop holds its row locks.
OUTAGE_SECONDS = 3.0
# Longer than a lease, so that other workers take over the frozen worker's claims.
FREEZE_SECONDS = 20.0
FEW_DESCRIPTORS = 30
# A worker that is asked to stop records the answers it has received and exits within this time.
STOP_SECONDS = 15.0
# A fault hits one of the worker's next statements, this many at most.
MAX_STATEMENTS = 30


class WorkerProcess:
    """A worker that can be killed, with its own proxy in front of the database."""

    def __init__(self, env: Mapping[str, str], proxy: Proxy, log: Path) -> None:
        self.proxy = proxy
        self._env = env
        self._log = log
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.soak.worker"],
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

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int | None:
        """Wait for the exit status; kill the process and return None if it does not stop."""
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class FaultsEnded(Exception):  # noqa: N818 (not an error)
    """The faults ended before this one could happen."""


def shuffled(names: Sequence[str], random: random.Random) -> Iterator[str]:
    """Yield all names in a random order, again and again, so that each comes up regularly."""
    while True:
        yield from random.sample(names, len(names))


@dataclass
class Soak:
    """The state of a soak: its servers and workers, the faults so far, and the violations."""

    shop: MySQLShop
    billing: FaultyBilling
    bus: Bus
    random: random.Random
    sessions: int
    workers: list[WorkerProcess] = field(default_factory=list)
    faults_ended: threading.Event = field(default_factory=threading.Event)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)  # by group and kind
    faulty_checkouts: set[str] = field(default_factory=set)
    violations: list[str] = field(default_factory=list)
    retried_sessions: set[str] = field(default_factory=set)  # the shop gave them a new checkout
    created: int = 0  # sessions and checkouts
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.kinds: Mapping[str, Mapping[str, Callable[[], None]]] = {
            "database": {
                "connection cut before a statement": lambda: self._at_statement("before", cut),
                "connection cut after a statement": lambda: self._at_statement("after", cut),
                "all connections cut": self._cut_all,
                "server unreachable": self._make_unreachable,
                "rows locked by the shop": self._lock_rows,
                **{
                    f"statement refused with {code}": partial(
                        self._at_statement, "before", refuse(code)
                    )
                    for code in CODES
                },
            },
            "event bus": {
                "rejects every event": lambda: self._bus("rejects"),
                "answers 500": lambda: self._bus("fails"),
            },
            "process": {
                "killed during a pass": self._kill,
                "stopped during a pass": self._stop,
                "frozen during a pass, connections closed": self._freeze,
                "out of descriptors, connections closed": self._take_descriptors,
            },
        }
        self._billing_faults = shuffled(BILLING_FAULTS, self.random)

    def draw_fault(self, checkout: str) -> Fault | None:
        """Draw a fault for a request, or none; at times also change the checkout's status."""
        with self.lock:
            if self.random.random() < CLOSE_RATE and checkout not in self.billing.statuses:
                self.billing.statuses[checkout] = self.random.choice(("paid", "failed", "expired"))
            if self.random.random() > FAULT_RATE:
                return None
            name = next(self._billing_faults)
            self.faults["billing", name] += 1
            self.faulty_checkouts.add(checkout)
        return FAULTS.get(name) or LIMITS[name]

    def kind_count(self, group: str) -> int:
        return len(FAULTS) + len(LIMITS) if group == "billing" else len(self.kinds[group])

    def new_sessions(self, count: int) -> dict[str, str | None]:
        with self.lock:
            self.created += count
            return {f"s{n}": f"c-{n}" for n in range(self.created - count + 1, self.created + 1)}

    def close_by_webhook(self) -> None:
        """Close a session as a webhook does, and open new ones up to the wanted number."""
        self.shop.run(
            "UPDATE checkout_session SET status = 'success', billing_order_id = 'webhook'"
            " WHERE status = 'open' AND id = %s",
            (self._any_open(),),
        )
        [(count,)] = self.shop.run("SELECT COUNT(*) FROM checkout_session WHERE status = 'open'")
        add_sessions(self.shop, self.new_sessions(max(0, self.sessions - int(count))))

    def retry_checkout(self) -> None:
        """Give a session a new checkout, as the shop does when a customer tries again."""
        session_id = self._any_open()
        with self.lock:
            self.created += 1
            checkout = f"retry-{self.created}"
            self.retried_sessions.add(session_id)
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
        """A function that causes the group's next fault with each call."""
        kinds = shuffled(list(self.kinds[group]), self.random)

        def next_fault() -> None:
            kind = next(kinds)
            self.kinds[group][kind]()
            self.faults[group, kind] += 1

        return next_fault

    def _at_statement(self, when: str, action: Action) -> None:
        self._at_statement_of(self.random.choice(self.workers), when, action)

    def _at_statement_of(self, worker: WorkerProcess, when: str, action: Action) -> None:
        """Run an action at one of the worker's next statements, and wait until it has run.

        Raises:
            FaultsEnded: the faults ended before that statement.
        """
        reached = threading.Event()

        def run_action(statement: Statement) -> None:
            reached.set()
            action(statement)

        actions: dict[int, Action] = getattr(worker.proxy, when)
        actions[worker.proxy.count + self.random.randint(1, MAX_STATEMENTS)] = run_action
        while not reached.wait(0.1):
            if self.faults_ended.is_set():
                raise FaultsEnded

    def _cut_all(self) -> None:
        for worker in self.workers:
            worker.proxy.cut_all()

    def _make_unreachable(self) -> None:
        for worker in self.workers:
            worker.proxy.refuses_connections = True
        self._cut_all()
        self.faults_ended.wait(OUTAGE_SECONDS)
        for worker in self.workers:
            worker.proxy.refuses_connections = False

    def _lock_rows(self) -> None:
        with (
            connect(self.shop.server, self.shop.database) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("BEGIN")
            cursor.execute("SELECT id FROM checkout_session WHERE status = 'open' FOR UPDATE")
            self.faults_ended.wait(OUTAGE_SECONDS)
            cursor.execute("ROLLBACK")

    def _bus(self, fault: str) -> None:
        setattr(self.bus, fault, True)
        self.faults_ended.wait(OUTAGE_SECONDS)
        setattr(self.bus, fault, False)

    def _signal_during_pass(self, worker: WorkerProcess, number: signal.Signals) -> None:
        sent = threading.Event()

        def send(_statement: Statement) -> None:
            worker.send_signal(number)
            sent.set()

        self._at_statement_of(worker, "before", send)
        sent.wait()

    def _replaceable_worker(self) -> WorkerProcess:
        """Any worker but the first: it lives for the whole soak, to follow its memory."""
        return self.random.choice(self.workers[1:])

    def _kill(self) -> None:
        worker = self._replaceable_worker()
        self._signal_during_pass(worker, signal.SIGKILL)
        worker.wait()
        worker.start()

    def _stop(self) -> None:
        worker = self._replaceable_worker()
        self._signal_during_pass(worker, signal.SIGTERM)
        self.expect_clean_exit(worker)
        worker.start()

    def expect_clean_exit(self, worker: WorkerProcess) -> None:
        if status := worker.wait():
            self.violations.append(f"a stopped worker exited with {status}")
        elif status is None:
            self.violations.append(f"a worker did not stop within {STOP_SECONDS} s")

    def _freeze(self) -> None:
        worker = self.random.choice(self.workers)
        self._signal_during_pass(worker, signal.SIGSTOP)
        worker.proxy.cut_all()
        self.billing.end_connections()
        self.faults_ended.wait(FREEZE_SECONDS)
        worker.send_signal(signal.SIGCONT)

    def _take_descriptors(self) -> None:
        worker = self.random.choice(self.workers)
        before = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, before[1]))
        worker.proxy.cut_all()
        self.billing.end_connections()
        self.faults_ended.wait(OUTAGE_SECONDS)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, before)

    def repeat(self, work: Callable[[], None], every: float) -> threading.Thread:
        def loop() -> None:
            while not self.faults_ended.wait(every * self.random.uniform(0.5, 1.5)):
                try:
                    with suppress(pymysql.Error, FaultsEnded):  # a deadlock; the loop tries again
                        work()
                except Exception as bug:  # noqa: BLE001 (a bug of the soak must show)
                    self.violations.append(f"bug in the soak: {bug!r}")

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        return thread

    def check_due_times(self) -> None:
        """Record each open session that is claimed or due later than it may be.

        New sessions that are not in the queue yet are left out.
        """
        for session_id, until, due in self.shop.run(
            f"SELECT c.session_id, {CLAIMED_UNTIL}, {DUE_AT} {OF_SESSIONS}"
            " JOIN checkout_session s ON s.id = c.session_id WHERE s.status = 'open'"
            f" AND ({CLAIMED_UNTIL} > UTC_TIMESTAMP(3) + INTERVAL %s SECOND"
            f" OR {DUE_AT} > UTC_TIMESTAMP(3) + INTERVAL %s SECOND)",
            (LEASE, BACKOFF + INTERVAL),
        ):
            self.violations.append(f"{session_id} is claimed until {until} and due at {due}")

    def heal(self) -> datetime:
        """End all faults; returns the time."""
        for worker in self.workers:
            worker.proxy.before.clear()
            worker.proxy.after.clear()
        self.billing.healed = True
        self.shop.run("UPDATE checkout_session_pause SET paused_until = UTC_TIMESTAMP(3)")
        return datetime.now(UTC)

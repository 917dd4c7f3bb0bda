"""Workers that tick on a shop's database, round after round, and what must hold meanwhile.

The clock is injected and moves an interval a round. The servers, their connections and the event
bus are real; billing answers inside the process.
"""

import asyncio
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import cycle, pairwise
from typing import Any, Never

import httpx
import pymysql.err

from core.errors import StoreError
from core.settings import Settings
from core.worker import Worker
from testkit.clock import FakeClock
from testkit.shops import MySQLShop, add_sessions
from tests.chaos.bus import Bus

INTERVAL = 5
SESSIONS = 300
# In each round:
OPENED, PAID, CLOSED_BY_SHOP = 10, 6, 2
# So that every worker claims a part of the sessions, and all claim at once.
CONCURRENCY = 10
BILLING_SECONDS = 0.01
DEADLOCKS = (1020, 1205, 1213, 3101)
# A Galera node then reads what the other one has committed before.
SYNCHRONISED = "SET STATEMENT wsrep_sync_wait = 1 FOR "

# What servers answer to statements of the monitor's database threads, by error code.
server_errors = Counter[int]()
_raise = pymysql.err.raise_mysql_exception


def _counting(data: bytes | bytearray) -> Never:
    if threading.current_thread().name.startswith("database"):
        server_errors[int.from_bytes(data[1:3], "little")] += 1
    _raise(data)


pymysql.err.raise_mysql_exception = _counting


def retried(work: Callable[[], object]) -> None:
    """Do what the shop does; it, too, begins again after a deadlock."""
    for _ in range(20):
        try:
            work()
        except pymysql.OperationalError as error:
            if error.args[0] not in DEADLOCKS:
                raise
            time.sleep(0.05)
        else:
            return
    work()


@dataclass
class Trial:
    """The workers of one case. `shops` are the same database, by each address that a shop uses."""

    name: str
    shops: Sequence[MySQLShop]
    bus: Bus
    addresses: Sequence[str]  # the database's URL, for each worker
    clock: FakeClock = field(default_factory=FakeClock)
    during: Callable[[], None] = lambda: None  # called before each answer of billing
    asked: defaultdict[str, list[datetime]] = field(default_factory=lambda: defaultdict(list))
    paid: set[str] = field(default_factory=set)
    closed_by_shop: set[str] = field(default_factory=set)
    errors: list[tuple[int, str]] = field(default_factory=list)  # of passes: round and sentence
    broken: list[str] = field(default_factory=list)
    rounds: int = 0
    made: int = 0
    id_length: int = 0  # of the sessions that the shop opens from now on, at least

    def __post_init__(self) -> None:
        self._deadlocks_before = self._deadlocks()
        self._lock = threading.Lock()
        self._shops = cycle(self.shops)
        self._workers: list[tuple[ThreadPoolExecutor, Worker]] = []
        self._checked: Counter[Worker] = Counter()
        for url in self.addresses:
            self.add_worker(url)
        self.open_sessions(SESSIONS)

    def add_worker(self, url: str) -> None:
        """Add a worker that has not connected yet, in a thread of its own."""
        thread = ThreadPoolExecutor(1)
        self._workers.append((thread, thread.submit(self._worker, url).result()))

    @property
    def workers(self) -> int:
        return len(self._workers)

    @property
    def deadlocks(self) -> int:
        """How often a server broke a lock's wait or a transaction, be it at its commit."""
        return self._deadlocks() - self._deadlocks_before

    @property
    def checks(self) -> int:
        return sum(map(len, self.asked.values()))

    def open_sessions(self, count: int) -> None:
        numbers = range(self.made, self.made + count)
        sessions = {self._id(n): f"c-{self._id(n)}" for n in numbers}
        retried(partial(add_sessions, next(self._shops), sessions))
        self.made += count

    def round(self, *, exact: bool = True, shop: bool = True) -> None:
        """All workers tick at once. If `exact`, every session must be checked, and once.

        Without `shop` the shop does nothing meanwhile, because it has no database to do it in.
        """
        open_before = self._open()
        if shop:
            waiting = [i for i in open_before if i not in self.paid]
            waiting.sort(key=lambda session_id: len(self.asked[session_id]))  # the newest first
            self.paid.update(waiting[:PAID])
            for session_id in waiting[PAID : PAID + CLOSED_BY_SHOP]:
                self.closed_by_shop.add(session_id)
                sql = "UPDATE checkout_session SET status = 'failure' WHERE id = %s"
                retried(partial(next(self._shops).run, sql, (session_id,)))
            self.open_sessions(OPENED)
        ticks = [thread.submit(self._tick, worker) for thread, worker in self._workers]
        for tick in ticks:
            tick.result()
        if exact:
            for session_id in open_before:
                times = self.asked[session_id].count(self.clock.now)
                if times != 1 and session_id not in self.closed_by_shop:
                    self.broken.append(f"{session_id} was checked {times} times in a slot")
        self.rounds += 1
        self.clock.advance(INTERVAL)

    def finish(self) -> None:
        """Close the workers, and add to `broken` what does not hold at the end."""
        for number, (thread, worker) in enumerate(self._workers):
            thread.submit(worker.close).result()
            thread.shutdown()
            if not self._checked[worker]:
                self.broken.append(f"worker {number} has checked nothing")
        self.broken += self._broken()

    def _broken(self) -> Iterator[str]:
        statuses = dict(self._read("SELECT id, status FROM checkout_session"))
        if len(statuses) != self.made:
            yield f"{self.made} sessions were opened, and the table has {len(statuses)}"
        for session_id, status in statuses.items():
            right = "failure" if session_id in self.closed_by_shop else "open"
            if status != ("success" if session_id in self.paid else right):
                yield f"{session_id} is {status}"
        still_open = {i for i, status in statuses.items() if status == "open"}
        queue = {i for (i,) in self._read("SELECT session_id FROM checkout_session_check")}
        if queue != still_open:
            yield f"the queue and the open sessions differ by {len(queue ^ still_open)}"
        logged = Counter(i for (i,) in self._read("SELECT session_id FROM checkout_session_change"))
        if logged != Counter(self.paid):
            yield f"{logged.total()} changes are logged, and {len(self.paid)} sessions were paid"
        events = {(e["session_id"], e["event_id"]) for e in self._events()}
        if Counter(session_id for session_id, _ in events) != Counter(self.paid):
            yield f"{len(events)} events are published, and {len(self.paid)} sessions were paid"
        yield from self._broken_checks(still_open)
        for at, sentence in self.errors:
            if "\n" in sentence or not sentence.endswith("."):
                yield f"no sentence in round {at}: {sentence}"

    def _broken_checks(self, still_open: set[str]) -> Iterator[str]:
        last = self.clock.now - timedelta(seconds=INTERVAL)
        for session_id in still_open:
            if last not in self.asked[session_id]:
                yield f"{session_id} is open, and was not checked in the last round"
        for session_id, times in self.asked.items():
            gaps = [(b - a).total_seconds() for a, b in pairwise(sorted(times))]
            if min(gaps, default=INTERVAL) < INTERVAL:
                yield f"{session_id} was checked again after {min(gaps):g} s"

    @property
    def published_twice(self) -> int:
        events = self._events()
        return len(events) - len({e["event_id"] for e in events})

    def _events(self) -> list[Any]:
        return [e for e in self.bus.events if e["session_id"].startswith(f"{self.name}-")]

    def _id(self, number: int) -> str:
        return f"{self.name}-{number}-".ljust(self.id_length, "x")

    def _open(self) -> list[str]:
        try:
            rows = self._read("SELECT id FROM checkout_session WHERE status = 'open'")
        except pymysql.MySQLError:  # the shop's node is out of its cluster, as the monitor's is
            return []
        return [i for (i,) in rows]

    def _read(self, sql: str) -> list[tuple[Any, ...]]:
        clustered = len(set(self.addresses)) > 1
        return self.shops[0].run(f"{SYNCHRONISED if clustered else ''}{sql}")

    def _worker(self, url: str) -> Worker:
        env = {
            "DATABASE_URL": url,
            "APIKEY": "key",
            "STATUS_UPDATES": "true",
            "EVENT_BUS_NAME": "shop",
            "MAX_CONCURRENCY": str(CONCURRENCY),
        }
        transport = httpx.MockTransport(self._answer)
        return Worker(Settings.from_env(env), transport=transport, clock=self.clock)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        session_id = request.url.path.rpartition("/c-")[2]
        with self._lock:
            self.asked[session_id].append(self.clock.now)
            self.during()
        await asyncio.sleep(BILLING_SECONDS)
        return httpx.Response(200, json={"status": "paid" if session_id in self.paid else "open"})

    def _tick(self, worker: Worker) -> None:
        try:
            summary = worker.check_open_checkout_sessions(self.clock.now)
            self._checked[worker] += summary.checked
        except StoreError as error:
            self.errors.append((self.rounds, str(error)))
        except Exception as error:  # noqa: BLE001 (the report says it)
            self.broken.append(f"a pass raised {type(error).__name__}: {error}")

    def _deadlocks(self) -> int:
        return sum(server_errors[code] for code in DEADLOCKS)

"""Two workers share one budget, and one of them dies at any statement."""

import asyncio
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime, timedelta
from typing import NamedTuple

import pytest

from core.database.port import Database
from core.domain.model import Answer, Outcome
from core.domain.rate import KNOWN_LIMIT_SHARE, MIN_SHARE
from core.errors import StoreError
from core.passes.pause import SharedPause
from core.settings import Settings
from core.store.monitor_state import MonitorState
from core.store.store import Store
from core.worker import open_database
from testkit.clock import NOON
from testkit.shops import MySQLShop
from testkit.virtual_time import VirtualLoop
from tests.chaos.conftest import Cases
from tests.chaos.proxy import Cut, Proxy, Statement
from tests.support import database_of

LIMIT = 50
ANSWERED = Answer(Outcome.ACTIVE, 200, 0.05)
LIMITED = Answer(Outcome.RATE_LIMITED, 429, 0.05, retry_after=0.3)
# The first worker looks at the budget this often, and is limited before its last look but one.
LOOKS, LOOK_EVERY_SECONDS = 5, 0.25
# From then on the survivor has the whole rate.
ALONE_FROM, END = 2.0, 4.0


class Sent(NamedTuple):
    """When both workers sent requests, and the rate in force at ALONE_FROM."""

    times: list[float]
    rate: float


class Sender:
    """A worker that always has requests to send.

    When it loses its database, it still sends what it has reserved: a worker that is cut off does
    that, and a killed one sends less.
    """

    def __init__(self, database: Database) -> None:
        self.pause = SharedPause(MonitorState(database), known_limit=LIMIT)
        self.pause.held = True  # until its first look
        self.pause.claimed(1000)
        self.times: list[float] = []

    async def look(self, *, begin: float, looks: int, limited_at: int | None = None) -> None:
        await asyncio.sleep(begin)
        with suppress(StoreError):
            for number in range(looks):
                if number == limited_at:
                    self.pause.rate_limited(LIMITED)
                self.pause.read()
                await asyncio.sleep(LOOK_EVERY_SECONDS)

    async def send(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if await self.pause.wait_for_turn():
                self.times.append(loop.time())
                self.pause.answered(ANSWERED)
            else:
                await asyncio.sleep(0.01)


@pytest.fixture
def proxy(server_shop: MySQLShop) -> Iterator[Proxy]:
    with Proxy(server_shop.server) as proxy:
        yield proxy


def sent(shop: MySQLShop, proxy: Proxy) -> Sent:
    """Let two workers send from an empty row on; only the first one uses the proxy."""
    shop.run("DELETE FROM checkout_session_pause")
    loop = VirtualLoop()

    def now() -> datetime:
        return NOON + timedelta(seconds=loop.now)

    def database(url: str) -> Database:
        return open_database(Settings.from_env({"DATABASE_URL": url}), clock=now)

    async def both(first: Database, second: Database) -> Sent:
        dying, survivor = Sender(first), Sender(second)
        rate: float | None = None
        with suppress(TimeoutError):
            async with asyncio.timeout(END), asyncio.TaskGroup() as tasks:
                tasks.create_task(dying.look(begin=0, looks=LOOKS, limited_at=LOOKS - 2))
                tasks.create_task(survivor.look(begin=LOOK_EVERY_SECONDS / 2, looks=100))
                tasks.create_task(dying.send())
                tasks.create_task(survivor.send())
                await asyncio.sleep(ALONE_FROM)
                rate = survivor.pause.rate
        assert rate is not None
        return Sent(sorted(dying.times + survivor.times), rate)

    with (
        closing(database(proxy.url(shop.database))) as first,
        closing(database(shop.url)) as second,
        asyncio.Runner(loop_factory=lambda: loop) as runner,
    ):
        return runner.run(both(first, second))


def die(statement: Statement) -> None:
    statement.proxy.refuses_connections = True
    raise Cut


def test_budget_outlives_a_worker_killed_at_any_statement(
    server_shop: MySQLShop, proxy: Proxy, cases: Cases
) -> None:
    """Its statement before, and so its answer, has arrived: what it knows makes it send most."""
    with closing(Store(database_of(server_shop))) as store:
        store.prepare()
    sent(server_shop, proxy)
    statements = proxy.log.copy()
    assert statements[-1].startswith("UPDATE checkout_session_pause SET budget")
    for number in range(1, len(statements) + 2):  # the last one is not killed
        proxy.reset()
        proxy.before[number] = die
        with cases.case(f"killed at statement {number}"):
            times, rate = sent(server_shop, proxy)
            assert max(bisect_left(times, at + 1) - n for n, at in enumerate(times)) <= LIMIT
            assert rate >= MIN_SHARE * LIMIT * KNOWN_LIMIT_SHARE
            alone = len([at for at in times if at >= ALONE_FROM])
            assert alone >= 0.95 * rate * (END - ALONE_FROM)

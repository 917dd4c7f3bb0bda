"""Results are recorded in batches while the pass goes on."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from core.database.thread import DatabaseThread
from core.domain.model import Answer, Claim, Outcome, Reason, Recheck
from core.domain.summary import Summary
from core.log import PassLog
from core.passes import writer
from core.passes.pause import SharedPause
from core.passes.writer import WRITE_AT_ONCE, Writer
from core.store.store import Store
from testkit.clock import FakeClock
from testkit.queue import claimed
from testkit.shops import Shop, add_sessions, numbered
from tests.support import FakeBilling, Passes, database_of, reconcile, until


@pytest.mark.slow
@pytest.mark.usefixtures("recorded_at_once")
async def test_results_are_recorded_while_requests_are_in_flight(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(3))
    hanging = billing.held["checkout_active_0"] = asyncio.Event()

    running = asyncio.create_task(passes.run())
    await until(lambda: passes.recorded(2))
    hanging.set()
    await running


@pytest.mark.usefixtures("recorded_at_once")
async def test_many_results_are_recorded_at_once(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "WRITE_EVERY_SECONDS", 3600)
    add_sessions(passes.shop, numbered(WRITE_AT_ONCE + 1))
    hanging = billing.held["checkout_active_0"] = asyncio.Event()

    running = asyncio.create_task(passes.run())
    recorded = "SELECT COUNT(last_outcome) FROM checkout_session_check"
    await until(lambda: passes.shop.run(recorded) == [(WRITE_AT_ONCE,)])
    hanging.set()
    assert (await running).checked == WRITE_AT_ONCE + 1


@pytest.mark.usefixtures("recorded_at_once")
async def test_a_running_pass_records_its_progress(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PROGRESS_EVERY_SECONDS", 0)
    add_sessions(passes.shop, numbered(3))
    answered = billing.held["checkout_active_0"] = asyncio.Event()
    under_way = "SELECT checked FROM checkout_session_run WHERE finished_at IS NULL"

    running = asyncio.create_task(passes.run())
    await until(lambda: passes.shop.run(under_way) == [(2,)])
    answered.set()
    await running


@asynccontextmanager
async def recording(
    shop: Shop, clock: FakeClock, *, sessions: int = 1
) -> AsyncIterator[tuple[Writer, Callable[[], Awaitable[Claim]]]]:
    """A pass's writer, and a function that claims one of the due sessions for it."""
    add_sessions(shop, numbered(sessions))
    store = Store(database_of(shop, clock), batch_size=1)
    with ThreadPoolExecutor(1) as thread:
        database = DatabaseThread(thread)
        await database.run(store.prepare)
        await database.run(reconcile, store, clock.now)
        pass_id = await database.run(store.history.begin, Summary(Reason.TICK, clock.now))
        shared = SharedPause(store.state)
        writer = Writer(store, database, shared, PassLog())
        began = asyncio.get_running_loop().time()

        async def claim_one() -> Claim:
            found = await database.run(
                store.queue.claim_due, clock.now, tick=clock.now, lease=LEASE, limit=1
            )
            await database.run(writer.hold, found)
            [claim] = found.claims
            return claim

        async with writer.running(pass_id, began, began + 60):
            yield writer, claim_one
        await database.run(store.close)


LEASE = timedelta(seconds=20)


async def test_a_closed_writer_has_given_back_its_claims(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    async with recording(sqlite_shop, clock) as (writer, claim_one):
        await claim_one()
        assert claimed(sqlite_shop) == 1
    assert writer.closing
    assert claimed(sqlite_shop) == 0


async def test_the_result_of_a_lapsed_claim_does_not_end_the_next_claim(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    """In a pass that was frozen and then claimed the same session again."""
    async with recording(sqlite_shop, clock) as (writer, claim_one):
        lapsed = await claim_one()
        clock.advance(20)
        await claim_one()
        writer.write(Recheck(lapsed, Answer(Outcome.ACTIVE, 200), clock.now))
    assert claimed(sqlite_shop) == 0

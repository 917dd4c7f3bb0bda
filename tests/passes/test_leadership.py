"""One worker leads a tick; a tick that is delivered twice costs next to nothing."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.domain.model import Reason
from core.domain.summary import Summary
from core.passes import running_pass
from core.passes.check_pass import check_open_checkout_sessions
from core.passes.running_pass import PassOptions
from core.store.reconcile import Reconciliation
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, numbered, settings_for
from tests.due_sessions import add_due_sessions
from tests.support import FakeBilling, Passes, database_of, note_statements


async def test_a_manual_pass_leads_no_tick(passes: Passes) -> None:
    assert not (await passes.run(PassOptions(Reason.MANUAL))).led
    assert (await passes.run()).led


async def test_a_duplicate_tick_costs_one_statement(
    shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(shop, numbered(3))
    await Passes(shop, clock, billing).run()
    store = Store(database_of(shop, clock))
    with ThreadPoolExecutor(1) as thread:
        thread.submit(store.prepare).result()
        statements = note_statements(shop, monkeypatch)
        summary = await check_open_checkout_sessions(
            store,
            billing,
            settings_for(shop),
            PassOptions(Reason.TICK, NOON),
            database_thread=thread,
        )
        thread.submit(store.close).result()
    assert len(statements) == 1, statements
    assert (summary.led, summary.checked, billing.asked.total()) == (False, 0, 3)


async def test_a_duplicate_tick_helps_with_sessions_that_are_still_due(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    add_due_sessions(sqlite_shop, clock, 3)
    store = Store(database_of(sqlite_shop, clock))
    assert store.take_lead(store.look(NOON, interval_seconds=5))
    store.close()
    summary = await Passes(sqlite_shop, clock, billing).run()
    assert (summary.led, summary.counted, summary.checked) == (False, False, 3)


async def test_requests_are_sent_before_reconcile_begins(
    passes: Passes, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_due_sessions(passes.shop, clock, 3)
    requests_before: list[int] = []
    next_piece = Reconciliation.reconcile_next_piece

    def after_the_requests(reconciliation: Reconciliation) -> bool:
        for _ in range(2000):  # ten seconds at most
            if billing.asked:
                break
            threading.Event().wait(0.005)
        requests_before.append(billing.asked.total())
        return next_piece(reconciliation)

    monkeypatch.setattr(Reconciliation, "reconcile_next_piece", after_the_requests)
    assert (await passes.run()).open == 3
    assert requests_before == [3]


async def test_a_tick_in_the_future_does_not_stop_the_next_ones(
    passes: Passes, clock: FakeClock
) -> None:
    await passes.run()
    passes.shop.run(
        "UPDATE checkout_session_pause SET last_tick = %s", ("2026-01-15T13:00:00.000Z",)
    )
    clock.advance(5)
    assert (await passes.run()).led


@pytest.mark.usefixtures("recorded_at_once")
@pytest.mark.slow
async def test_a_pass_waiting_for_its_last_answer_helps_in_the_next_slot(
    passes: Passes, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_pass, "HELP_AFTER_SECONDS", 0.05)
    add_due_sessions(passes.shop, clock, 2)
    last = billing.held["checkout_active_0"] = asyncio.Event()

    async def scenario() -> Summary:
        running = asyncio.create_task(passes.run(CHECK_INTERVAL_SECONDS="1"))
        while not passes.recorded(1):  # noqa: ASYNC110 (in a database)
            await asyncio.sleep(0.01)
        clock.advance(1)
        async with asyncio.timeout(10):
            while billing.asked["checkout_active_1"] < 2:  # noqa: ASYNC110 (a count)
                await asyncio.sleep(0.01)
        last.set()
        return await running

    assert (await scenario()).checked == 3

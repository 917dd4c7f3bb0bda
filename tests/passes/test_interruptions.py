"""Passes that are killed, cancelled or out of time: no session is lost."""

import asyncio
import multiprocessing
import os
import signal
import threading
from datetime import datetime, timedelta

import pytest

from core.domain.model import Answer, Outcome, Reason, Skip
from core.passes.running_pass import PassOptions
from core.store.queue import Claimed, Queue
from testkit.clock import FakeClock
from testkit.queue import claimed
from testkit.shops import MySQLShop, add_sessions, numbered
from tests.support import FakeBilling, Passes, until


def pass_until_killed(url: str, requested: "multiprocessing.Queue[str | None]") -> None:
    """Run by a separate process until it is killed; every second request is never answered."""

    class HalfAnswering(FakeBilling):
        async def check(self, billing_checkout_id: str | None) -> Answer:
            requested.put(billing_checkout_id)
            if int(str(billing_checkout_id).rpartition("_")[2]) % 2:
                await asyncio.sleep(3600)
            return Answer(Outcome.ACTIVE, 200, 0.01)

    shop = MySQLShop(*url.rsplit("/", 1))
    asyncio.run(Passes(shop, FakeClock(), HalfAnswering()).run())


async def test_a_killed_pass_loses_no_session(
    mariadb_shop: MySQLShop, clock: FakeClock, billing: FakeBilling
) -> None:
    """Every session is checked again when the killed pass's lease ends, and none before."""
    add_sessions(mariadb_shop, numbered(60))
    spawn = multiprocessing.get_context("spawn")
    requested: multiprocessing.Queue[str | None] = spawn.Queue()
    victim = spawn.Process(target=pass_until_killed, args=(mariadb_shop.url, requested))
    victim.start()
    for _ in range(60):
        requested.get(timeout=60)
    passes = Passes(mariadb_shop, clock, billing)
    await until(lambda: passes.recorded(30))
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    clock.advance(5)
    assert (await passes.run()).checked == 30
    clock.advance(15)  # the lease: 5 s to begin, 10 s to answer, 5 s to record
    assert (await passes.run()).checked == 60
    assert set(billing.asked) == {f"checkout_active_{n}" for n in range(60)}


async def test_a_cancelled_pass_records_its_results_and_releases_its_claims(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(30))
    billing.held = {f"checkout_active_{n}": asyncio.Event() for n in range(10, 30)}

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="15"))
    await until(lambda: billing.asked.total() == 10 + 15)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert claimed(passes.shop) == 0
    assert passes.recorded(billing.asked.total() - 15)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_pass_cancelled_during_a_slow_claim_leaves_no_claim(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Once or twice; the results that it has are recorded."""
    add_sessions(passes.shop, numbered(60))
    claim_due, may_return, claiming = Queue.claim_due, threading.Event(), threading.Event()
    claims: list[int] = []

    def slow(
        queue: Queue, now: datetime, *, tick: datetime, lease: timedelta, limit: int
    ) -> Claimed:
        found = claim_due(queue, now, tick=tick, lease=lease, limit=limit)
        if claims:
            claiming.set()
            may_return.wait(10)
        claims.extend([len(found.claims)] if found.claims else [])
        return found

    monkeypatch.setattr(Queue, "claim_due", slow)

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="4"))
    await until(lambda: claiming.is_set() and billing.asked.total() == 20)
    for _ in range(times):
        running.cancel()
        for _ in range(20):  # until it waits for the claim
            await asyncio.sleep(0)
    may_return.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert passes.recorded(20)
    assert claimed(passes.shop) == 0


async def test_a_pass_at_its_deadline_abandons_hanging_checks(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    """They are reported as skipped, and their claims are released."""
    add_sessions(passes.shop, numbered(3))
    billing.held["checkout_active_1"] = asyncio.Event()
    options = PassOptions(Reason.TICK, clock.now, start_seconds=0.05, total_seconds=0.1)
    summary = await asyncio.wait_for(passes.run(options), 10)
    assert summary.checked == 2
    assert summary.skipped == {Skip.DEADLINE: 1}
    assert claimed(passes.shop) == 0

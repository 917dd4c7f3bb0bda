"""A helper checks what is due in whatever slot it arrives; it never leads and never starts others.

`starts` are the ticks for which a pass started workers.
"""

from datetime import datetime, timedelta

import pytest

from core.domain.model import Reason
from core.passes.running_pass import PassOptions
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop
from tests.due_sessions import add_due_sessions, healthy_answers
from tests.support import FakeBilling, Passes

SESSIONS = 60  # many for one worker with one request in flight


@pytest.fixture
def starts() -> list[datetime]:
    return []


@pytest.fixture
def busy(sqlite_shop: Shop, clock: FakeClock, starts: list[datetime]) -> Passes:
    """Passes over a shop whose every tick needs helpers."""
    add_due_sessions(sqlite_shop, clock, SESSIONS)
    passes = Passes(sqlite_shop, clock, FakeBilling(healthy_answers(SESSIONS)))
    passes.start_worker = starts.append
    return passes


def led(passes: Passes) -> list[datetime | None]:
    """The tick with the newest leader, by the monitor's state."""
    rows = passes.shop.run("SELECT last_tick FROM checkout_session_pause")
    return [datetime.fromisoformat(tick) if tick else None for (tick,) in rows]


@pytest.mark.parametrize(
    "seconds", [-86_400, -3600, -6, -5, -1, 0, 4, 5, 6, 86_400], ids=lambda s: f"{s} s"
)
async def test_a_helper_of_any_tick_neither_leads_nor_starts_others(
    busy: Passes, clock: FakeClock, starts: list[datetime], seconds: int
) -> None:
    """Its tick is that many seconds from the database's clock; what is due is checked."""
    tick = NOON + timedelta(seconds=seconds)
    helper = await busy.run(PassOptions(Reason.TICK, tick, helps=True), MAX_CONCURRENCY="1")
    assert (helper.led, helper.counted, helper.checked, starts) == (False, False, SESSIONS, [])
    assert led(busy) == [None]
    leader = await busy.run()
    assert (leader.led, leader.counted) == (True, True)


async def test_a_late_helper_with_nothing_to_do_adds_no_row(
    busy: Passes, clock: FakeClock, starts: list[datetime]
) -> None:
    await busy.run(MAX_CONCURRENCY="1")
    starts.clear()
    clock.advance(4)
    helper = await busy.run(PassOptions(Reason.TICK, NOON, helps=True))
    assert (helper.led, helper.checked, starts) == (False, 0, [])
    ticks = "SELECT COUNT(*) FROM checkout_session_run WHERE tick IS NOT NULL"
    assert busy.shop.run(ticks) == [(1,)]


@pytest.mark.slow
async def test_helpers_that_come_late_again_and_again_start_no_chain(
    busy: Passes, clock: FakeClock, starts: list[datetime]
) -> None:
    """Every helper is delivered 6 s late, before the loop's own tick."""
    await busy.run(MAX_CONCURRENCY="1")
    chain = starts.copy()
    delivered = 0
    assert chain
    starts.clear()
    while chain and delivered < 50:
        clock.advance(6)
        tick = chain.pop()
        helper = await busy.run(PassOptions(Reason.TICK, tick, helps=True), MAX_CONCURRENCY="1")
        assert not helper.led
        chain += starts
        starts.clear()
        delivered += 1
    assert delivered < 10


async def test_a_worker_of_an_older_leader_may_still_lead(
    busy: Passes, starts: list[datetime]
) -> None:
    """Workers of 0.2.0 send no mark; a tick that nobody leads has a leader then."""
    summary = await busy.run(PassOptions(Reason.TICK, NOON), MAX_CONCURRENCY="1")
    assert summary.led
    assert set(starts) == {NOON}

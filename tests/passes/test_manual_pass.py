"""A manual pass: which sessions it checks, and that it ends in time."""

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from core.domain.model import Reason, Skip
from core.passes import check_pass
from core.passes.running_pass import PassOptions
from testkit.clock import FakeClock
from testkit.shops import add_sessions, numbered
from tests.support import FakeBilling, Passes, until


async def check_beside_a_hanging_one(
    passes: Passes, clock: FakeClock, billing: FakeBilling, is_ready: Callable[[], bool]
) -> None:
    """A manual pass beside a tick's pass that waits for one of five answers."""
    add_sessions(passes.shop, numbered(5))
    hanging = billing.held["checkout_active_4"] = asyncio.Event()

    tick = asyncio.create_task(passes.run())
    await until(is_ready)
    clock.advance(1)
    manual = await passes.run(PassOptions(Reason.MANUAL))
    assert manual.checked == 4
    assert manual.skipped == {Skip.IN_FLIGHT: 1}
    hanging.set()
    await tick


@pytest.mark.slow
@pytest.mark.usefixtures("recorded_at_once")
async def test_a_manual_pass_checks_all_open_sessions_not_in_flight(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    """Whether they are due or not."""
    await check_beside_a_hanging_one(passes, clock, billing, lambda: passes.recorded(4))


@pytest.mark.slow
async def test_a_manual_pass_waits_for_what_others_have_decided(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    """Another pass holds their batch, because billing has not answered about one of them."""
    await check_beside_a_hanging_one(passes, clock, billing, lambda: billing.asked.total() == 5)


async def test_a_manual_pass_does_not_disturb_the_next_tick(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(2))
    await passes.run()
    clock.advance(2.5)
    await passes.run(PassOptions(Reason.MANUAL))
    clock.advance(2.5)
    assert (await passes.run()).checked == 2


async def test_a_manual_pass_with_ids_reports_which_are_not_open(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(3))
    summary = await passes.trigger(["s1", "s1", "gone"])
    assert summary.checked == 1
    assert summary.skipped == {Skip.NOT_OPEN: 1}
    assert billing.asked == Counter({"checkout_active_1": 1})


async def test_a_manual_pass_ends_in_time_if_billing_hangs(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_pass.MANUAL_SECONDS < 25
    monkeypatch.setattr(check_pass, "MANUAL_SECONDS", 0.2)
    add_sessions(passes.shop, numbered(3))
    billing.held = dict.fromkeys(numbered(3).values(), asyncio.Event())
    summary = await passes.trigger()
    assert summary.checked == 0
    assert summary.skipped == {Skip.DEADLINE: 3}

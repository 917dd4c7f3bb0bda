"""Duplicate, late, early and missing ticks; a changed interval; a long pause."""

from datetime import timedelta

import pytest

from core.domain.model import Outcome
from testkit.queue import due_times
from testkit.shops import add_sessions
from tests.chaos.world import INTERVAL, World, later, outcomes

SESSIONS = {f"ok-{n}": f"fine-{n}" for n in range(6)}


def requests_per_checkout(world: World) -> set[int]:
    return {len(world.billing.log[checkout].requested_at) for checkout in SESSIONS.values()}


@pytest.mark.parametrize("world", ["sqlite", "mariadb"], indirect=True)
def test_tick_delivered_three_times_is_checked_once(world: World) -> None:
    add_sessions(world.shop, SESSIONS)
    workers = [world.worker() for _ in range(3)]
    for _ in range(3):
        for worker in workers:
            assert world.tick(worker) is not None
        world.advance()
    assert requests_per_checkout(world) == {3}
    world.invariants()


TICK_OFFSETS = {
    "an hour ago": -3600,
    "yesterday": -86_400,
    "a second ago": -1,
    "the last slot": -INTERVAL,
    "the next slot": INTERVAL,
    "tomorrow": 86_400,
    "next year": 31_536_000,
}


@pytest.mark.parametrize("name", TICK_OFFSETS)
def test_tick_with_a_wrong_time_checks_what_is_due_now(world: World, name: str) -> None:
    add_sessions(world.shop, SESSIONS)
    for n in range(1, 5):
        assert world.tick(at=later(world.clock.now, TICK_OFFSETS[name])) is not None
        assert requests_per_checkout(world) <= {n, n - 1}
        world.advance()
    for _ in range(3):  # correct ticks that follow are not taken for old ones
        assert world.tick() is not None
        world.advance()
    assert min(requests_per_checkout(world)) >= 6
    world.invariants()


def test_tick_without_a_timestamp_means_now(world: World) -> None:
    add_sessions(world.shop, SESSIONS)
    worker = world.worker()
    for _ in range(3):
        assert worker.check_open_checkout_sessions(None).checked == len(SESSIONS)
        world.advance()
    world.invariants()


def test_missing_ticks_are_caught_up_by_one_pass(world: World) -> None:
    add_sessions(world.shop, SESSIONS)
    world.tick()
    world.advance(10 * 60)
    summary = world.tick()
    assert outcomes([summary]) == {"active": 6}
    assert summary is not None
    assert summary.overdue_seconds == 10 * 60 - INTERVAL
    world.invariants()


def test_jittered_ticks_check_every_session_in_every_slot(world: World) -> None:
    add_sessions(world.shop, SESSIONS)
    begin = world.clock.now
    for n, jitter in enumerate((0, 0.9, -0.9, 0.4, -0.4, 2.0)):
        slot = begin + timedelta(seconds=n * INTERVAL)
        world.clock.now = later(slot, jitter)
        assert outcomes([world.tick(at=slot)]) == {"active": 6}
    assert len(world.billing.log["fine-0"].requested_at) == 6


@pytest.mark.parametrize(("first", "second"), [(5, 10), (10, 5), (5, 60), (60, 5), (5, 1)])
def test_interval_can_change_between_passes(world: World, first: int, second: int) -> None:
    add_sessions(world.shop, SESSIONS)
    for seconds in (first, second):
        worker = world.worker(CHECK_INTERVAL_SECONDS=str(seconds))
        world.advance(first)  # so that everything is due
        before = max(requests_per_checkout(world))
        for _ in range(4):
            assert world.tick(worker) is not None
            world.advance(seconds)
        assert requests_per_checkout(world) <= {before + 3, before + 4}
    assert None not in due_times(world.shop).values()


def test_pause_ends_after_its_maximum(world: World) -> None:
    add_sessions(world.shop, {"limited": "429 for a year-1"} | SESSIONS)
    assert outcomes([world.tick()])[Outcome.RATE_LIMITED.value] == 1
    world.billing.healed = True
    world.advance(299)
    requests = world.billing.requests
    assert outcomes([world.tick()]) == {}
    assert world.billing.requests == requests
    world.advance(2)
    assert outcomes([world.tick()])["active"] >= 6
    world.invariants()


def test_clock_can_be_set_back(world: World) -> None:
    """A minute back: sessions are checked again when due, and claims still expire."""
    add_sessions(world.shop, SESSIONS)
    world.tick()
    world.advance(-60)
    for _ in range(16):
        assert world.tick() is not None
        world.advance()
    assert min(requests_per_checkout(world)) >= 3

"""Ticks that come twice, late, early or not at all; an interval that changes; a long pause."""

from datetime import timedelta

import pytest

from core.domain.model import Outcome
from testkit.shops import add_sessions
from tests.chaos.world import INTERVAL, World, later, outcomes

SESSIONS = {f"ok-{n}": f"fine-{n}" for n in range(6)}


def asked(world: World) -> set[int]:
    """How often the checkouts were asked about."""
    return {len(world.billing.asked[checkout].at) for checkout in SESSIONS.values()}


@pytest.mark.parametrize("world", ["sqlite", "mariadb"], indirect=True)
def test_a_tick_that_comes_three_times_is_one(world: World) -> None:
    add_sessions(world.shop, SESSIONS)
    workers = [world.worker() for _ in range(3)]
    for _ in range(3):
        for worker in workers:
            assert world.tick(worker) is not None
        world.advance()
    assert asked(world) == {3}
    world.invariants()


TICKS = {
    "of an hour ago": -3600,
    "of yesterday": -86_400,
    "of a second ago": -1,
    "of the last slot": -INTERVAL,
    "of the next slot": INTERVAL,
    "of tomorrow": 86_400,
    "of next year": 31_536_000,
}


@pytest.mark.parametrize("name", TICKS)
def test_a_tick_of_another_time_checks_what_is_due_now(world: World, name: str) -> None:
    add_sessions(world.shop, SESSIONS)
    for n in range(1, 5):
        assert world.tick(at=later(world.clock.now, TICKS[name])) is not None
        assert asked(world) <= {n, n - 1}
        world.advance()
    for _ in range(3):  # and the right ticks after it are not taken for old ones
        assert world.tick() is not None
        world.advance()
    assert min(asked(world)) >= 6
    world.invariants()


def test_a_tick_without_a_moment_is_now(world: World) -> None:
    add_sessions(world.shop, SESSIONS)
    worker = world.worker()
    for _ in range(3):
        assert worker.check_open_checkout_sessions(None).checked == len(SESSIONS)
        world.advance()
    world.invariants()


def test_missing_ticks_are_made_up_for_once(world: World) -> None:
    add_sessions(world.shop, SESSIONS)
    world.tick()
    world.advance(10 * 60)
    summary = world.tick()
    assert outcomes([summary]) == {"active": 6}
    assert summary is not None
    assert summary.overdue_seconds == 10 * 60 - INTERVAL
    world.invariants()


def test_a_tick_just_before_or_after_its_slot_keeps_the_rhythm(world: World) -> None:
    add_sessions(world.shop, SESSIONS)
    begin = world.clock.now
    for n, jitter in enumerate((0, 0.9, -0.9, 0.4, -0.4, 2.0)):
        slot = begin + timedelta(seconds=n * INTERVAL)
        world.clock.now = later(slot, jitter)
        assert outcomes([world.tick(at=slot)]) == {"active": 6}
    gaps = world.billing.asked["fine-0"].at
    assert len(gaps) == 6


@pytest.mark.parametrize(("first", "then"), [(5, 10), (10, 5), (5, 60), (60, 5), (5, 1)])
def test_an_interval_may_change_while_it_runs(world: World, first: int, then: int) -> None:
    add_sessions(world.shop, SESSIONS)
    for seconds in (first, then):
        worker = world.worker(CHECK_INTERVAL_SECONDS=str(seconds))
        world.advance(first)  # what is left of the old rhythm
        before = max(asked(world))
        for _ in range(4):
            assert world.tick(worker) is not None
            world.advance(seconds)
        assert asked(world) <= {before + 3, before + 4}
    rows = world.shop.run("SELECT COUNT(*) FROM checkout_session_check WHERE next_check_at IS NULL")
    assert rows == [(0,)]


def test_a_pause_that_outlives_its_service_ends(world: World) -> None:
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


def test_the_clock_may_be_set_back(world: World) -> None:
    """By a minute: each is checked again when its time has come, and claims still lapse."""
    add_sessions(world.shop, SESSIONS)
    world.tick()
    world.advance(-60)
    for _ in range(16):
        assert world.tick() is not None
        world.advance()
    assert min(asked(world)) >= 3

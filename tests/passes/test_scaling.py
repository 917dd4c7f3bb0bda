"""How many workers a tick needs, and how many the leader starts."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime

import pytest

from core.domain.model import Answer, Outcome, Reason, Skip
from core.domain.summary import Summary
from core.errors import StartWorkerError
from core.passes.scaling import Scaling
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.queue import claimed
from testkit.shops import Shop, settings_for
from tests.due_sessions import add_due_sessions, healthy_answers
from tests.support import FakeBilling, Passes, database_of

HANG = Answer(Outcome.TIMEOUT, None, 10.0)


def running_passes(shop: Shop, clock: FakeClock, count: int) -> None:
    """That many passes that run in other processes."""
    store = Store(database_of(shop, clock))
    for _ in range(count):
        store.history.begin(Summary(Reason.TICK, clock.now, clock.now))
    store.close()


async def run_leader(
    shop: Shop, clock: FakeClock, billing: FakeBilling, **env: str
) -> tuple[list[datetime], Summary]:
    """Run a pass; returns the ticks for which it started workers, and its summary."""
    ticks: list[datetime] = []
    passes = Passes(shop, clock, billing)
    passes.start_worker = ticks.append
    return ticks, await passes.run(None, **env)


async def test_a_leader_starts_as_many_workers_as_due_sessions_need(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    """One worker with ten in flight at 0.1 s begins 110 checks in a fifth of 5 s; 500 need five."""
    add_due_sessions(sqlite_shop, clock, 510)
    ticks, summary = await run_leader(
        sqlite_shop, clock, FakeBilling(healthy_answers(510)), MAX_CONCURRENCY="10"
    )
    assert ticks == [NOON] * 4
    assert summary.workers_started == 4


async def test_a_tick_that_one_worker_can_serve_starts_no_helper(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    add_due_sessions(sqlite_shop, clock, 100)
    ticks, _ = await run_leader(
        sqlite_shop, clock, FakeBilling(healthy_answers(100)), MAX_CONCURRENCY="10"
    )
    assert ticks == []


async def test_a_helper_starts_no_helper(sqlite_shop: Shop, clock: FakeClock) -> None:
    add_due_sessions(sqlite_shop, clock, 510)
    leader = Store(database_of(sqlite_shop, clock))
    assert leader.take_lead(leader.look(NOON, interval_seconds=5))
    leader.close()
    ticks, helper = await run_leader(
        sqlite_shop, clock, FakeBilling(healthy_answers(510)), MAX_CONCURRENCY="10"
    )
    assert (ticks, helper.led, helper.checked) == ([], False, 510)


async def test_a_leader_starts_no_more_than_max_workers(
    sqlite_shop: Shop,
) -> None:
    ticks: list[datetime] = []
    settings = settings_for(sqlite_shop, MAX_CONCURRENCY="1", MAX_WORKERS="3")
    leader = Scaling(ticks.append, settings, under_way=1)
    assert leader.record_latency(Answer(Outcome.ACTIVE, 200, 0.1))
    assert await leader.start_missing(10_000, NOON) == 2
    assert ticks == [NOON] * 2


@pytest.mark.parametrize(
    ("due", "per_second", "latency", "started"),
    [
        (1000, 100, 0.05, 0),
        (1000, 100, 2.0, 2),  # 200 in flight, in workers that have 80 of 100 permits in use
        (1000, 100, 20.0, 6),  # those of the next tick take over before its answers come
        (90, 100, 2.0, 0),
        (1000, 10_000, 2.0, 6),
    ],
)
async def test_a_budget_gets_the_workers_that_its_latency_needs(
    sqlite_shop: Shop, due: int, per_second: float, latency: float, started: int
) -> None:
    """Two workers of the last tick still wait for answers; they count towards MAX_WORKERS."""
    ticks: list[datetime] = []
    settings = settings_for(sqlite_shop, MAX_WORKERS="9")
    leader = Scaling(ticks.append, settings, under_way=3, latency=latency)
    assert await leader.start_missing(due, NOON, per_second) == started
    assert len(ticks) == started


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        HANG,
        Answer(Outcome.NETWORK_ERROR, None, 0.001),
        Answer(Outcome.UNEXPECTED_STATUS, 500, 0.1),
        Answer(Outcome.UNAUTHORIZED, 401, 0.1),
        Answer(Outcome.RATE_LIMITED, 429, 0.1),
    ],
)
async def test_errors_and_timeouts_start_no_workers(
    sqlite_shop: Shop, clock: FakeClock, answer: Answer
) -> None:
    add_due_sessions(sqlite_shop, clock, 500)
    billing = FakeBilling(dict.fromkeys(healthy_answers(500), answer))
    ticks, _ = await run_leader(sqlite_shop, clock, billing, MAX_CONCURRENCY="5")
    assert ticks == []


async def test_workers_that_are_still_running_count_towards_max_workers(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    add_due_sessions(sqlite_shop, clock, 2000)
    running_passes(sqlite_shop, clock, 2)
    ticks, _ = await run_leader(
        sqlite_shop,
        clock,
        FakeBilling(healthy_answers(2000)),
        MAX_CONCURRENCY="10",
        MAX_WORKERS="6",
    )
    assert len(ticks) == 6 - 2 - 1


async def test_at_max_workers_a_tick_is_led_but_checks_nothing(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    add_due_sessions(sqlite_shop, clock, 3)
    running_passes(sqlite_shop, clock, 2)
    passes = Passes(sqlite_shop, clock, billing)
    leader = await passes.run(MAX_WORKERS="2")
    assert (leader.led, leader.open, leader.checked) == (True, 3, 0)
    assert leader.skipped == {Skip.IN_FLIGHT: 3}
    follower = await passes.run(MAX_WORKERS="2")
    assert (follower.led, follower.checked) == (False, 0)
    assert billing.asked.total() == 0


async def test_killed_workers_do_not_count_towards_max_workers(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    """A running pass writes a heartbeat every second; these have written none for five."""
    add_due_sessions(sqlite_shop, clock, 3)
    running_passes(sqlite_shop, clock, 10)
    clock.advance(5.1)
    assert (await Passes(sqlite_shop, clock, billing).run()).checked == 3


async def test_workers_that_cannot_start_are_logged_once(
    sqlite_shop: Shop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The leader checks all sessions itself."""
    add_due_sessions(sqlite_shop, clock, 510)
    passes = Passes(sqlite_shop, clock, FakeBilling(healthy_answers(510)))

    def refuse(_tick: datetime) -> None:
        raise StartWorkerError("AccessDeniedException")

    passes.start_worker = refuse
    summary = await passes.run(MAX_CONCURRENCY="10")
    assert (summary.checked, summary.workers_started) == (510, 0)
    logged = [r.message for r in caplog.records if "could not be started" in r.message]
    assert logged == ["❌ 4 of 4 workers could not be started: AccessDeniedException"]


def test_a_leader_and_its_helpers_check_each_session_once(shop: Shop, clock: FakeClock) -> None:
    """With MAX_WORKERS helpers, more than find work."""
    add_due_sessions(shop, clock, 700)
    billing = FakeBilling(healthy_answers(700))
    with ThreadPoolExecutor(8) as other_workers:
        helpers: list[Future[Summary]] = []

        def one_pass() -> Summary:
            passes = Passes(shop, clock, billing)
            passes.start_worker = lambda _tick: helpers.append(other_workers.submit(one_pass))
            return asyncio.run(passes.run(MAX_CONCURRENCY="4", MAX_WORKERS="6"))

        leader = one_pass()
        summaries = [leader, *(helper.result() for helper in helpers)]
    assert leader.workers_started == len(helpers) == 5
    assert sum(summary.checked for summary in summaries) == 700
    assert [summary.led for summary in summaries] == [True] + [False] * 5
    assert set(billing.asked.values()) == {1}
    assert claimed(shop) == 0


def test_the_latency_is_known_after_a_round_of_healthy_answers(
    sqlite_shop: Shop,
) -> None:
    leader = Scaling(
        lambda _tick: None, settings_for(sqlite_shop, MAX_CONCURRENCY="3"), under_way=1
    )
    answers = [Answer(Outcome.ACTIVE, 200, 0.1), HANG] * 4
    known = [leader.record_latency(answer) for answer in answers]
    assert known == [False, False, False, False, True, False, False, False]

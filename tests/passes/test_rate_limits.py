"""Billing allows so many requests a second: as many checks as it allows, and nobody starves."""

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise

import pytest

from core.domain import rate
from core.domain.batch import Settlement
from core.domain.model import Answer, Outcome
from core.domain.rate import Budget
from core.passes import check_pass, claims
from core.passes.pause import SharedPause
from core.store.monitor_state import MonitorState
from core.store.results import Results
from core.store.store import Store
from handlers.routes import message
from local.billing import Bucket
from testkit.clock import NOON
from testkit.shops import add_sessions, numbered, settings_for
from tests.passes.virtual import VirtualMonitor
from tests.support import FakeBilling, Passes, database_of

SECONDS = 120
LIMITED = Answer(Outcome.RATE_LIMITED, 429, 0.05)


@pytest.fixture(autouse=True)
def _requests_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in production; time is virtual."""
    monkeypatch.setattr(claims, "MIN_PACE", rate.MIN_PACE)


class LimitedMonitor(VirtualMonitor):
    """A monitor whose billing answers from a token bucket; 429 after 50 ms."""

    def __init__(
        self,
        allows: Callable[[str, float], Answer | None],
        *,
        latency: Callable[[str, int], float] = lambda _checkout_id, _earlier: 0.05,
        **env: str,
    ) -> None:
        super().__init__(latency, **env)
        self.allows = allows
        self.requests: list[tuple[float, bool]] = []  # when, and whether it was answered

    async def check(self, billing_checkout_id: str | None) -> Answer:
        checkout_id, at = str(billing_checkout_id), self.loop.now
        limited = self.allows(checkout_id, at)
        self.requests.append((at, limited is None))
        if limited is None:
            return await super().check(checkout_id)
        await asyncio.sleep(0.05)
        return limited


def with_bucket(
    per_second: float, burst: float, retry_after: float | None = None
) -> Callable[[str, float], Answer | None]:
    bucket = Bucket(per_second, burst)
    limited = LIMITED._replace(retry_after=retry_after)
    return lambda _checkout_id, at: None if bucket.take(at) else limited


@pytest.mark.slow
@pytest.mark.parametrize(
    ("per_second", "burst", "sessions", "retry_after", "workers"),
    [
        (25, 25, 1000, 1.0, 4),
        (50, 10, 400, None, 1),
        (50, 10, 380, None, 1),  # a single session falls out of step with its batch
        (4, 8, 15, 1.0, 1),
        (4, 8, 200, None, 1),  # a batch takes longer than it may be held
    ],
)
def test_as_much_is_checked_as_billing_allows_and_nobody_starves(
    per_second: float, burst: float, sessions: int, retry_after: float | None, workers: int
) -> None:
    monitor = LimitedMonitor(with_bucket(per_second, burst, retry_after))
    monitor.workers_a_tick = workers
    monitor.open(sessions)
    monitor.run(ticks=SECONDS // 5 + 1)
    second_minute = [ok for at, ok in monitor.requests if SECONDS / 2 <= at < SECONDS]
    assert sum(second_minute) >= 0.95 * min(per_second, sessions / 5) * SECONDS / 2
    assert second_minute.count(False) <= 0.03 * len(second_minute)
    assert len(monitor.asked) == sessions
    longest = max(
        b - a
        for times in monitor.asked.values()
        for a, b in pairwise([*(at for at in times if at < SECONDS), SECONDS])
        if b > SECONDS / 2
    )
    assert longest <= max(1.5 * sessions / per_second, 10)


@pytest.mark.slow
@pytest.mark.parametrize("latency", [0.3, 1.0, 3.0])
def test_slow_answers_cause_no_more_limits(latency: float) -> None:
    """They come after a fall of the rate, but belong to the rate before it."""
    bucket = with_bucket(10, 10)
    monitor = LimitedMonitor(bucket, latency=lambda _checkout_id, _earlier: latency)
    monitor.open(300)
    monitor.run(ticks=37)
    later = [ok for at, ok in monitor.requests if 40 <= at < 180]
    assert later.count(False) <= 0.02 * len(later)
    assert sum(later) >= 0.9 * 10 * 140


@pytest.mark.slow
def test_a_limit_is_found_out_although_the_first_answers_are_slow() -> None:
    """The first 429 comes 6 s before the first answer."""
    monitor = LimitedMonitor(with_bucket(25, 25), latency=lambda _checkout_id, _earlier: 6.0)
    monitor.open(400)
    monitor.run(ticks=9)
    assert len([at for at, ok in monitor.requests if ok and 20 <= at < 40]) >= 0.8 * 25 * 20


@pytest.mark.slow
def test_a_service_that_allows_no_burst_is_used_within_half_a_minute() -> None:
    """It limits the second request, so only one answer is counted before the first limit."""
    monitor = LimitedMonitor(with_bucket(10, 1, retry_after=2.0))
    monitor.open(200)
    monitor.run(ticks=13)
    half_minute = [ok for at, ok in monitor.requests if 30 <= at < 60]
    assert sum(half_minute) >= 0.5 * 10 * 30
    assert half_minute.count(False) <= 0.03 * len(half_minute)


def test_answers_that_come_after_a_limit_count_for_the_rate() -> None:
    """The only 429 comes when one of some 40 requests is answered."""
    monitor = LimitedMonitor(
        lambda _checkout_id, _at: LIMITED if len(asked) == 19 else None,
        latency=lambda _checkout_id, _earlier: 0.01 if len(asked) == 1 else 0.3,
    )
    asked = monitor.requests
    monitor.open(120)
    monitor.run(ticks=4)
    assert len([ok for at, ok in asked if ok and 5 <= at < 20]) >= 0.9 * 120 * 3


def test_under_a_budget_a_tick_is_left_to_its_leader() -> None:
    monitor = LimitedMonitor(with_bucket(100, 100), BILLING_MAX_PER_SECOND="20")
    monitor.workers_a_tick = 3
    monitor.open(100)
    monitor.run(ticks=3)
    later = [summary for summary in monitor.summaries if summary.tick != NOON]
    assert [summary.checked > 0 for summary in later] == [summary.led for summary in later]


def test_under_a_budget_a_leader_waits_for_what_earlier_passes_hold() -> None:
    """They have handed over, so nobody else asks about it when they give it back."""
    monitor = LimitedMonitor(lambda _checkout_id, _at: None, BILLING_MAX_PER_SECOND="100")
    store, tick = Store(monitor.database), NOON + timedelta(seconds=5)

    def hold() -> None:
        lease = timedelta(seconds=20)
        held = store.queue.claim_due(monitor.now(), tick=tick, lease=lease, limit=1)
        given_back = Results([Settlement(batch, left=batch.claims) for batch in held.batches])
        monitor.loop.call_later(0.4, lambda: store.queue.write(given_back, monitor.now()))

    monitor.loop.call_later(4.9, hold)
    monitor.open(1)
    monitor.run(ticks=2)
    assert monitor.asked_in_slot("checkout_0")[1] == 1


def test_a_pause_that_another_worker_extends_does_not_end_the_pass() -> None:
    limits = iter([LIMITED._replace(retry_after=1.0)])

    def first_is_limited(_checkout_id: str, _at: float) -> Answer | None:
        if limited := next(limits, None):
            state = MonitorState(monitor.database)
            monitor.loop.call_later(0.5, state.pause, 1.0)
        return limited

    monitor = LimitedMonitor(first_is_limited)
    monitor.open(10)
    monitor.run(ticks=1)
    assert len(monitor.asked) == 10


@pytest.mark.parametrize(("known_limit", "leave"), [(None, 2), (20, 1)])
def test_late_requests_leave_unless_the_limit_is_known(known_limit: int | None, leave: int) -> None:
    """Two may leave after 20 and 70 ms, and the machine stands still for 80."""
    monitor = LimitedMonitor(lambda _checkout_id, _at: None)

    async def left() -> int:
        store = Store(monitor.database)
        store.prepare()
        state, at = store.state, NOON.timestamp()
        state.exchange(lambda _row: Budget(20, 5, at, at, 0, 20, 20, at))
        pause = SharedPause(state, known_limit=known_limit)
        pause.read()
        pause.claimed(2)
        monitor.loop.now += 0.08
        count = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(0.005):
                while await pause.wait_for_turn():
                    count += 1
        return count

    with asyncio.Runner(loop_factory=lambda: monitor.loop) as runner:
        found = runner.run(left())
    monitor.database.close()
    assert found == leave


@pytest.mark.slow
def test_limits_of_single_sessions_are_theirs() -> None:
    """Ten of 200 are always limited; soon the others are checked at every tick."""
    locked = {f"checkout_{n}" for n in range(0, 200, 20)}
    monitor = LimitedMonitor(lambda checkout_id, _at: LIMITED if checkout_id in locked else None)
    monitor.open(200)
    monitor.run(ticks=12)
    of_each_tick = Counter(int(at // 5) for at, ok in monitor.requests if ok and at >= 20)
    assert of_each_tick == dict.fromkeys(range(4, 12), 190)
    assert len([at for at, ok in monitor.requests if not ok and at >= 20]) <= 20  # they back off


@pytest.mark.slow
def test_a_known_limit_is_used_and_never_exceeded_in_any_second() -> None:
    monitor = LimitedMonitor(with_bucket(1000, 1000), BILLING_MAX_PER_SECOND="50")
    monitor.workers_a_tick = 8
    monitor.open(1000)
    monitor.run(ticks=6)
    times = sorted(at for at, _ in monitor.requests)
    assert max(bisect_left(times, at + 1) - n for n, at in enumerate(times)) <= 50
    assert len([at for at in times if 5 <= at < 30]) >= 0.95 * 50 * 25


def test_without_a_limit_the_checks_of_a_tick_are_no_burst() -> None:
    """They are spread over a tenth of the interval, once it is known how many there are."""
    monitor = LimitedMonitor(lambda _checkout_id, _at: None)
    monitor.open(1000)
    monitor.run(ticks=2)
    times = sorted(at - 5 for at, _ in monitor.requests if at >= 5)
    assert len(times) == 1000
    assert 0.4 < times[-1] < 0.8
    assert len([at for at in times if at <= times[0] + 0.1]) < 300


def test_more_checks_than_a_worker_can_make_are_not_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(claims, "MAX_PACE", 2000.0)
    monitor = LimitedMonitor(lambda _checkout_id, _at: None, MAX_CONCURRENCY="500")
    monitor.open(1000)
    monitor.run(ticks=2)
    times = sorted(at - 5 for at, _ in monitor.requests if at >= 5)
    assert len(times) == 1000
    assert times[-1] < 0.2


@pytest.mark.slow
def test_a_pass_hands_over_to_the_worker_of_the_next_tick() -> None:
    monitor = LimitedMonitor(with_bucket(25, 25))
    monitor.open(1000)
    monitor.run(ticks=6)
    *earlier, last = monitor.summaries
    assert all(summary.duration_seconds < 12 for summary in earlier)
    assert last.duration_seconds > 40  # nobody takes over


@pytest.mark.slow
def test_helpers_are_started_for_what_the_budget_allows_only() -> None:
    monitor = LimitedMonitor(
        with_bucket(200, 200), MAX_CONCURRENCY="10", BILLING_MAX_PER_SECOND="150"
    )
    monitor.open(5000)
    monitor.run(ticks=5)
    assert monitor.started == 5


@pytest.mark.slow
async def test_a_manual_trigger_says_what_the_limit_left(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_pass, "MANUAL_SECONDS", 1.0)
    add_sessions(passes.shop, numbered(100))
    with ThreadPoolExecutor(1) as thread:
        store = Store(database_of(passes.shop, passes.clock))
        known = settings_for(passes.shop, BILLING_MAX_PER_SECOND="20")
        try:
            summary = await check_pass.trigger_checkout_session_check(
                store, billing, known, database_thread=thread
            )
        finally:
            thread.submit(store.close).result()
    assert 10 <= summary.checked <= 20
    assert message(summary) == (
        f"Checked {summary.checked} of 100 open checkout sessions; skipped: "
        f"{100 - summary.checked} rate_limited; billing allows about 19 checks a second."
    )

"""The budget in virtual time: workers that share it, against a token bucket."""

import heapq
import itertools
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import pytest

from core.domain import rate
from core.domain.cadence import Cadence
from core.domain.rate import Budget, Seen
from local.billing import Bucket

INTERVAL, LATENCY, LOOK_EVERY, SECONDS = 5.0, 0.05, 0.25, 120


class Request(NamedTuple):
    at: float
    session: int
    answered: bool


class Simulation:
    """Sessions that are due at every interval, and workers that check them; seconds from 0."""

    def __init__(
        self, bucket: Bucket, sessions: int, *, workers: int = 1, known: float | None = None
    ) -> None:
        self.bucket, self.sessions, self.known = bucket, sessions, known
        self.budget: Budget | None = None
        self.paused_until = 0.0
        self.retry_after = 0.0
        self.due = [(0.0, session) for session in range(sessions)]
        self.requests: list[Request] = []
        self.at_second: Callable[[int], None] = lambda _second: None
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._workers = [SimulatedWorker(self) for _ in range(workers)]

    def at(self, time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), action))

    def run(self, seconds: int = SECONDS) -> None:
        for second in range(seconds):
            self.at(second, lambda at: self.at_second(int(at)))
        for number, worker in enumerate(self._workers):
            self.at(0.05 + 0.01 * number, worker.look_and_repeat)
            self.at(0.06, worker.step)
        while self._events and self._events[0][0] < seconds:
            now, _, action = heapq.heappop(self._events)
            action(now)

    def answered(self, begin: float, end: float) -> int:
        return sum(r.answered for r in self.requests if begin <= r.at < end)

    def limited_share(self, begin: float, end: float) -> float:
        found = [r.answered for r in self.requests if begin <= r.at < end]
        return found.count(False) / len(found)


class SimulatedWorker:
    """What a pass does with the budget; see `core.passes.pause`."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._reserved = deque[float]()
        self._reserved_from = self._reserved_to = 0.0
        self._seen = Seen()
        self._limited_at: float | None = None
        self._answered_sent_at: float | None = None  # of the newest answer's request
        self._recent = deque[float]()
        self._best = 0.0

    def look_and_repeat(self, now: float) -> None:
        self._look(now)
        self._simulation.at(now + LOOK_EVERY, self.look_and_repeat)

    def _look(self, now: float) -> None:
        world = self._simulation
        limited_at, self._limited_at = self._limited_at, None
        answered_at, self._answered_sent_at = self._answered_sent_at, None
        sent_at = answered_at if limited_at is None else limited_at
        pace = world.sessions / (rate.SPREAD_SHARE * INTERVAL)
        if world.due and world.due[0][0] < now - INTERVAL:
            pace = math.inf
        before = rate.rate_in_force(world.budget, world.known)
        seen = self._seen._replace(
            best=self._best,
            limited=limited_at is not None,
            sent_ago=now - (now if sent_at is None else sent_at),
            waited=self._is_due(now) and (before or math.inf) <= pace,
        )
        self._seen = Seen()
        budget = rate.updated(world.budget, seen, now=now, known_limit=world.known)
        allowed = rate.rate_in_force(budget, world.known)
        if limited_at is not None:
            if self._reserved and budget:
                begin = max(now, self._reserved[0], self._reserved_from)
                budget = rate.given_up(budget, begin, self._reserved_to)
            self._reserved.clear()
            if world.retry_after:
                world.paused_until = max(world.paused_until, now + world.retry_after)
        if budget and allowed and self._is_due(now) and now >= world.paused_until:
            pace = min(allowed, pace)
            left = sum(time >= now - rate.late_seconds(world.known) for time in self._reserved)
            budget, times = rate.reserved(budget, rate.portion(pace) - left, pace, now=now)
            self._reserved.extend(times)
            if times:
                if times[0] > self._reserved_to:
                    self._reserved_from = times[0]
                self._reserved_to = budget.next_at
        world.budget = budget

    def _is_due(self, now: float) -> bool:
        return bool(self._simulation.due) and self._simulation.due[0][0] <= now

    def step(self, now: float) -> None:
        """Send one request, if one may leave."""
        world = self._simulation
        while self._reserved and self._reserved[0] < now - rate.late_seconds(world.known):
            self._reserved.popleft()
        wait = 0.01
        if self._is_due(now) and now >= world.paused_until and self._limited_at is None:
            if world.budget is None:
                self._send(now)
                wait = rate.UNLIMITED_SPREAD_SHARE * INTERVAL / world.sessions
            elif self._reserved and self._reserved[0] <= now:
                self._reserved.popleft()
                self._send(now)
                wait = 0.0
            elif self._reserved:
                wait = self._reserved[0] - now
        world.at(now + wait, self.step)

    def _send(self, now: float) -> None:
        world = self._simulation
        due, session = heapq.heappop(world.due)
        answered = world.bucket.take(now)
        world.requests.append(Request(now, session, answered))

        def answer(at: float) -> None:
            if answered:
                self._seen = self._seen._replace(answered=self._seen.answered + 1)
                self._answered_sent_at = now
                self._recent.append(at)
                while self._recent[0] < at - 1:
                    self._recent.popleft()
                self._best = max(self._best, len(self._recent))
                heapq.heappush(world.due, (now // INTERVAL * INTERVAL + INTERVAL, session))
            else:  # still due, first in line
                heapq.heappush(world.due, (due, session))
                self._limited_at = now
                world.at(at + 0.01, self._look)

        world.at(now + LATENCY, answer)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(
    ("per_second", "burst", "sessions", "retry_after"),
    [
        (25, 25, 1000, 0),
        (25, 25, 1000, 1),
        (100, 100, 1000, 0),
        (100, 100, 300, 0),
        (100, 100, 300, 1),
        (400, 400, 1000, 0),
        (25, 25, 50, 0),
        (4, 8, 15, 1),
        (50, 10, 400, 0),
    ],
)
def test_workers_use_what_a_service_allows(
    workers: int, per_second: int, burst: int, sessions: int, retry_after: float
) -> None:
    simulation = Simulation(Bucket(per_second, burst), sessions, workers=workers)
    simulation.retry_after = retry_after
    simulation.run()
    half = SECONDS / 2
    # Up to a second of each pause is not used.
    share = 0.94 if retry_after else 0.95
    possible = min(per_second, sessions / INTERVAL) * half
    assert simulation.answered(half, SECONDS) >= share * possible
    assert simulation.limited_share(half, SECONDS) <= 0.03
    assert {r.session for r in simulation.requests if r.answered} == set(range(sessions))


def test_a_limit_that_rises_is_used_and_one_that_falls_is_followed() -> None:
    """From 25 to 100 requests a second after a minute, and back after another."""
    simulation = Simulation(bucket := Bucket(25, 25), 1000)

    def change(second: int) -> None:
        bucket.per_second = bucket.burst = 100 if 60 <= second < 120 else 25

    simulation.at_second = change
    simulation.run(150)
    assert simulation.answered(90, 120) >= 90 * 30
    assert simulation.limited_share(130, 150) <= 0.03


def test_a_known_limit_is_used_and_never_exceeded_in_any_second() -> None:
    simulation = Simulation(Bucket(1000, 1000), 1000, workers=8, known=50)
    simulation.run(60)
    times = [request.at for request in simulation.requests]
    assert max(bisect_left(times, at + 1) - n for n, at in enumerate(times)) <= 50
    assert simulation.answered(10, 60) >= 0.95 * 50 * 50


LIMITED = Budget(100, 0, 1000, 1000, 0, 100, 100, 1000)


def test_a_limit_without_any_answer_says_nothing_about_the_rate() -> None:
    limited = Seen(limited=True)
    assert rate.updated(None, limited, now=1000) is None
    assert rate.answers_nothing(None, limited, 1000)
    after = rate.updated(LIMITED, limited, now=1001)
    assert after is not None
    assert after.rate == LIMITED.rate
    assert rate.answers_nothing(LIMITED, limited, 1001)


def test_a_first_limit_after_few_answers_says_little_about_the_rate() -> None:
    begun = rate.updated(None, Seen(answered=1, best=1, limited=True), now=1000)
    assert begun is not None
    assert begun.rate == pytest.approx(0.7 * 8)


def test_answers_of_the_same_pass_do_not_hide_that_there_are_none_any_more() -> None:
    seen = Seen(best=50, limited=True)
    assert not rate.answers_nothing(None, seen, 1000)
    after = rate.updated(None, seen, now=1000)
    assert after is not None
    assert after.rate == pytest.approx(35)
    assert rate.answers_nothing(after, seen, 1001)


@pytest.mark.parametrize("limited", [True, False])
def test_requests_sent_before_a_fall_do_not_count_as_sent_after_it(limited: bool) -> None:
    """But their answers show that billing allowed more than had been counted."""
    seen = Seen(answered=10, limited=limited, sent_ago=0.3)
    after = rate.updated(LIMITED, seen, now=1000.5)
    assert after is not None
    assert after.rate == pytest.approx(70)
    more = seen._replace(answered=150)
    raised = rate.updated(LIMITED, more, now=1000.5)
    assert raised is not None
    assert raised.rate == pytest.approx(0.7 * (100 * math.exp(-0.5) + 150))
    later = rate.updated(LIMITED._replace(falls=1), more, now=1000.5)
    assert later is not None
    assert (later.rate > 70) == limited  # a later fall is from all answers of a second


def test_the_latency_of_a_budget_is_that_of_about_the_last_hundred_answers() -> None:
    first = rate.updated(LIMITED, Seen(healthy=10, healthy_seconds=5.0), now=1001)
    assert first is not None
    assert first.latency == pytest.approx(0.5)
    later = rate.updated(first, Seen(answered=100, healthy=100, healthy_seconds=100.0), now=1002)
    assert later is not None
    assert later.latency == pytest.approx(0.75)
    failed = rate.updated(later, Seen(answered=9), now=1003)
    assert failed is not None
    assert failed.latency == later.latency


@pytest.mark.parametrize("field", ["limited_at", "next_at", "seen_at"])
def test_times_of_a_clock_that_was_ahead_are_ignored(field: str) -> None:
    ahead = LIMITED._replace(**{field: 5000})
    after = rate.updated(ahead, Seen(answered=50, limited=True), now=1010)
    assert after is not None
    assert 35 <= after.rate <= 70
    assert (after.limited_at, after.seen_at) == (1010, 1010)
    _, times = rate.reserved(after, 3, after.rate, now=1010)
    assert times[0] == 1010


def test_a_budget_is_forgotten_an_hour_after_the_last_limit() -> None:
    assert rate.updated(LIMITED, Seen(), now=1000 + 3600) is not None
    assert rate.updated(LIMITED, Seen(), now=1000 + 3601) is None


def test_a_budget_is_kept_as_text_and_one_of_another_version_is_dropped() -> None:
    assert Budget.from_json(LIMITED.as_json()) == LIMITED
    assert Budget.from_json('{"rate": 25}') is None
    assert Budget.from_json("25") is None


def test_only_the_last_reservation_can_be_given_up() -> None:
    after, times = rate.reserved(LIMITED, 10, 100, now=1000)
    assert times == pytest.approx([1000 + n / 100 for n in range(10)])
    assert rate.given_up(after, 1000.05, after.next_at).next_at == 1000.05
    others, _ = rate.reserved(after, 1, 100, now=1000)
    assert rate.given_up(others, 1000.05, after.next_at) == others


def test_demand_is_counted_by_age_and_cadence() -> None:
    cadence = Cadence.parse("5s until 10m, 30s until 1h, 5m")
    ages = {"10m": 100, "1h": 300, "24h": 3000, "older": 600}
    assert rate.demand(ages, cadence, 5) == 20 + 10 + 10 + 2
    assert rate.demand(ages, Cadence.parse("5s"), 10) == 400

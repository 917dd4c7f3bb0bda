"""A database clock that was wrong, and settings that became shorter: nothing waits for the past.

The loop's clock is always right. The database's clock differs from it by `offset` seconds.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.database.port import as_datetime
from core.domain.model import iso
from core.domain.summary import Summary
from core.passes import running_pass
from core.store import monitor_state
from core.worker import Worker
from testkit.clock import NOON
from testkit.queue import DUE_AT, OF_SESSIONS
from testkit.shops import Shop, add_sessions, numbered, settings_for
from tests.conftest import SERVERS

MINUTES, HOURS, DAYS = 60, 3600, 86_400
TABLES = ["checkout_session", "checkout_session_check", "checkout_session_run"]
TABLES += ["checkout_session_pause", "checkout_session_change"]


@dataclass
class Monitor:
    """A shop's monitor: its settings, which may change, and the two clocks."""

    shop: Shop
    at: datetime = NOON  # by the loop's clock
    offset: float = 0.0
    env: dict[str, str] = field(default_factory=lambda: {"CHECK_BACKOFF_MAX_SECONDS": "10"})
    answer: httpx.Response = field(default_factory=lambda: httpx.Response(200))
    asked: defaultdict[str, list[datetime]] = field(default_factory=lambda: defaultdict(list))
    workers: dict[str, Worker] = field(default_factory=dict)

    @property
    def now(self) -> datetime:
        """The database's clock."""
        return self.at + timedelta(seconds=self.offset)

    @property
    def interval(self) -> int:
        return int(self.env.get("CHECK_INTERVAL_SECONDS", "5"))

    @property
    def worker(self) -> Worker:
        """The worker with the settings in force."""
        key = str(self.env)
        if key not in self.workers:
            self.workers[key] = Worker(
                settings_for(self.shop, **self.env),
                transport=httpx.MockTransport(self._answer),
                clock=lambda: self.now,
            )
        return self.workers[key]

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked[request.url.path.rpartition("/")[2]].append(self.at)
        return httpx.Response(self.answer.status_code, headers=self.answer.headers)

    def tick(self, count: int = 1) -> list[int]:
        """Run the next ticks of the loop; returns how many requests each of them sent."""
        requests = []
        for _ in range(count):
            seconds = self.at.timestamp()
            slot = self.at + timedelta(seconds=self.interval - seconds % self.interval)
            self.at = slot + timedelta(seconds=0.1)  # that Lambda takes
            before = self.requests
            self.worker.check_open_checkout_sessions(slot)
            requests.append(self.requests - before)
        return requests

    def trigger(self) -> Summary:
        return self.worker.trigger_checkout_session_check()

    def status(self) -> Any:  # noqa: ANN401 (JSON)
        return self.worker.status()

    @property
    def requests(self) -> int:
        return sum(map(len, self.asked.values()))

    def too_far_ahead(self) -> list[Any]:
        """Open sessions whose next check lies further ahead than the settings allow."""
        rules = settings_for(self.shop, **self.env).check_rules()
        rows = self.shop.run(
            f"SELECT session_id, {DUE_AT}, first_seen_at, consecutive_failures {OF_SESSIONS}"
        )
        found = []
        for session_id, next_check_at, first_seen_at, failures in rows:
            due, first_seen = utc(next_check_at), utc(first_seen_at)
            age = self.now - first_seen
            wait = next(w for w in rules.longest_waits() if w.max_age is None or age < w.max_age)
            if due - self.now > (wait.failing if failures else wait.healthy):
                found.append((session_id, due - self.now))
        return found

    @property
    def slowest(self) -> int:
        """The seconds between two checks of the session that is checked least often."""
        cadence = settings_for(self.shop, **self.env).cadence
        rows = self.shop.run("SELECT MIN(first_seen_at) FROM checkout_session_check")
        return int(cadence.every_seconds((self.now - utc(rows[0][0])).total_seconds()))

    def set_future(self, update: str, ahead: float) -> None:
        """Run updates that set some columns to a time that far ahead."""
        time = iso(self.now + timedelta(seconds=ahead))
        if not self.shop.url.startswith("sqlite"):
            time = time.replace("T", " ").rstrip("Z")
        for statement in update.format(ahead=f"'{time}'").split(";"):
            self.shop.run(statement)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def utc(value: Any) -> datetime:  # noqa: ANN401 (as each engine's own driver returns it)
    time = as_datetime(value)
    return time if time.tzinfo else time.replace(tzinfo=NOON.tzinfo)


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reconciliation takes no time: how fast this machine is has no effect.

    A manual pass waits for what others hold, but not for long.
    """
    monkeypatch.setattr(monitor_state, "REST_FACTOR", 0)
    monkeypatch.setattr(running_pass, "WRITE_EVERY_SECONDS", 0.01)


@pytest.fixture
def monitor(shop: Shop) -> Iterator[Monitor]:
    """Three open sessions, checked on time for two ticks."""
    monitor = Monitor(shop)
    add_sessions(shop, numbered(3))
    assert monitor.tick(2) == [3, 3]
    yield monitor
    monitor.close()


def on_each_engine(on_sqlite: Sequence[int], on_servers: Sequence[int]) -> list[tuple[str, int]]:
    """Parameters of `shop` with seconds: a few on servers, whose statements are the same."""
    return [
        *(("sqlite", seconds) for seconds in on_sqlite),
        *((server, seconds) for server in SERVERS for seconds in on_servers),
    ]


JUMPS = [-30 * DAYS, -DAYS, -10 * MINUTES, -60, -20, -5, -1]
JUMPS += [1, 5, 20, 60, 5 * MINUTES, 9 * MINUTES, 10 * MINUTES, 11 * MINUTES, DAYS, 30 * DAYS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shop", "offset"),
    on_each_engine(JUMPS, [-DAYS, -20, 5, 10 * MINUTES, 30 * DAYS]),
    indirect=["shop"],
)
def test_two_ticks_after_the_clock_is_right_every_session_is_asked_again(
    monitor: Monitor, offset: int
) -> None:
    """It was wrong for two ticks, during which a session was opened."""
    monitor.offset = offset
    add_sessions(monitor.shop, {"new": "checkout_new"})
    monitor.tick(2)
    monitor.offset = 0
    monitor.asked.clear()
    monitor.tick(2)
    assert monitor.too_far_ahead() == []
    if abs(offset) > 20:
        assert set(monitor.asked) == {*numbered(3).values(), "checkout_new"}
    monitor.tick(4)
    assert monitor.tick(3) == [4, 4, 4]


@pytest.mark.parametrize("offset", [-DAYS, -10 * MINUTES, 10 * MINUTES, DAYS])
def test_sessions_are_asked_while_the_clock_is_wrong(monitor: Monitor, offset: int) -> None:
    monitor.offset = offset
    monitor.tick()
    assert monitor.tick(3) == [3, 3, 3]


SHORTER = {
    "1h, then 5s": ({"CHECK_CADENCE": "1h"}, {"CHECK_CADENCE": "5s"}),
    "1h, then the default": ({"CHECK_CADENCE": "1h"}, {}),
    "shorter steps": (
        {"CHECK_CADENCE": "5m until 1h, 1h"},
        {"CHECK_CADENCE": "5s until 10m, 30s until 1h, 5m"},
    ),
    "a first step": ({"CHECK_CADENCE": "5m"}, {"CHECK_CADENCE": "5s until 10m, 5m"}),
    "interval 60, then 5": ({"CHECK_INTERVAL_SECONDS": "60"}, {}),
    "interval 60, then 1": ({"CHECK_INTERVAL_SECONDS": "60"}, {"CHECK_INTERVAL_SECONDS": "1"}),
    "ten years, then 5s": ({"CHECK_CADENCE": "3650d"}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", SHORTER)
def test_a_shorter_cadence_or_interval_counts_from_the_next_tick(
    monitor: Monitor, change: str
) -> None:
    monitor.env, shorter = SHORTER[change]
    monitor.tick(2)
    monitor.env = shorter
    assert monitor.tick(3) == [3, 3, 3]
    assert monitor.too_far_ahead() == []


def test_a_step_of_older_sessions_leaves_younger_ones_alone(monitor: Monitor) -> None:
    """An old session is due every five minutes, and is not asked earlier for a younger one."""
    monitor.env = {"CHECK_CADENCE": "5s until 10m, 5m"}
    monitor.at += timedelta(minutes=11)
    monitor.tick()
    add_sessions(monitor.shop, {"new": "checkout_new"})
    assert monitor.tick(5) == [1, 1, 1, 1, 1]


def test_a_shorter_backoff_counts_from_the_next_tick(monitor: Monitor) -> None:
    monitor.env = {"CHECK_BACKOFF_MAX_SECONDS": "86400"}
    monitor.answer = httpx.Response(500)
    monitor.tick()
    monitor.set_future(LEFT_BEHIND["due times"], 20 * HOURS)
    assert monitor.tick(2) == [0, 0]  # as the settings allow
    monitor.env = {"CHECK_BACKOFF_MAX_SECONDS": "10"}
    assert monitor.tick() == [3]


# What a clock that was ahead may have left, as an UPDATE; {ahead} is that time.
LEFT_BEHIND = {
    "due times": (
        "UPDATE checkout_session_batch SET next_check_at = {ahead}, due_at = {ahead};"
        "UPDATE checkout_session_check SET next_check_at = {ahead}"
    ),
    "due times of batches": (
        "UPDATE checkout_session_batch SET next_check_at = {ahead}, due_at = {ahead}"
    ),
    "claims": (
        "UPDATE checkout_session_batch SET claimed_until = {ahead}, next_check_at = {ahead},"
        " due_at = {ahead}"
    ),
    "claims of sessions": (
        "UPDATE checkout_session_batch SET due_at = {ahead};"
        "UPDATE checkout_session_check SET claimed_until = {ahead}, next_check_at = {ahead}"
    ),
    "claims on due sessions": "UPDATE checkout_session_check SET claimed_until = {ahead}",
    "claims on due batches": "UPDATE checkout_session_batch SET claimed_until = {ahead}",
    "a pause": "UPDATE checkout_session_pause SET paused_until = {ahead}, pauses = 3",
    "a leader": "UPDATE checkout_session_pause SET last_tick = {ahead}",
    "a rest": "UPDATE checkout_session_pause SET count_again_at = {ahead}, counted_at = {ahead}",
    "checks": (
        "UPDATE checkout_session_batch SET checked_at = {ahead};"
        "UPDATE checkout_session_check SET last_checked_at = {ahead}"
    ),
    "failures": (
        "UPDATE checkout_session_batch SET due_at = {ahead};"
        "UPDATE checkout_session_check SET failing_since = {ahead}, consecutive_failures = 9,"
        " next_check_at = {ahead}"
    ),
    "the first sight": "UPDATE checkout_session_check SET first_seen_at = {ahead}",
    "a pass": "UPDATE checkout_session_run SET started_at = {ahead}, finished_at = {ahead}",
    "a pass under way": "UPDATE checkout_session_run SET started_at = {ahead}, finished_at = NULL",
    "all of it": (
        "UPDATE checkout_session_batch SET next_check_at = {ahead}, due_at = {ahead},"
        " claimed_until = {ahead}, checked_at = {ahead};"
        "UPDATE checkout_session_check SET next_check_at = {ahead}, claimed_until = {ahead},"
        " last_checked_at = {ahead}, first_seen_at = {ahead}"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shop", "ahead"),
    on_each_engine([9 * MINUTES, DAYS, 400 * DAYS], [DAYS]),
    indirect=["shop"],
)
@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_what_lies_in_the_future_delays_no_tick_and_no_manual_pass(
    monitor: Monitor, what: str, ahead: int
) -> None:
    monitor.set_future(LEFT_BEHIND[what], ahead)
    monitor.at += timedelta(seconds=1)
    summary = monitor.trigger()
    assert (summary.checked, summary.skipped) == (3, {})
    monitor.asked.clear()
    monitor.set_future(LEFT_BEHIND[what], ahead)
    monitor.env = {**monitor.env, "MAX_WORKERS": "1"}
    monitor.tick(2)
    assert set(monitor.asked) == set(numbered(3).values())
    assert monitor.tick(3) == [3, 3, 3]
    assert monitor.too_far_ahead() == []
    assert monitor.worker.health().ok


@pytest.mark.parametrize("ahead", [6, 30, 60, DAYS])
def test_a_manual_pass_checks_what_was_checked_in_the_future(monitor: Monitor, ahead: int) -> None:
    monitor.set_future(LEFT_BEHIND["checks"], ahead)
    monitor.at += timedelta(seconds=0.5)
    assert monitor.trigger().checked == 3


@pytest.mark.parametrize("ahead", [-DAYS, -10 * MINUTES, 10, 10 * MINUTES, DAYS])
def test_health_and_the_page_are_not_ok_for_passes_of_the_future(
    monitor: Monitor, ahead: int
) -> None:
    """The loop stopped when the clock became right. A day ahead, older passes were forgotten."""
    assert monitor.worker.health().ok
    monitor.offset = ahead
    monitor.tick(2)
    monitor.offset = 0
    monitor.at += timedelta(seconds=5 * MINUTES)
    health, status = monitor.worker.health(), monitor.status()
    assert not health.checks["last_pass"]
    assert health.last_pass_at is None or health.last_pass_at <= monitor.now
    if ahead == DAYS:
        assert status["verdict"]["text"].startswith("Checks are late: all 3 open sessions")
    else:
        assert re.match(r"No pass for [45] min; all 3 open sessions", status["verdict"]["text"])
    monitor.tick(2)
    assert monitor.worker.health().ok
    assert monitor.status()["verdict"]["level"] == "ok"


@pytest.mark.parametrize("ahead", [10, 10 * MINUTES, DAYS])
def test_passes_killed_in_the_future_are_never_under_way(monitor: Monitor, ahead: int) -> None:
    monitor.set_future(LEFT_BEHIND["a pass under way"], ahead)
    count = monitor.worker._store.history.count_under_way
    assert monitor.worker._database_thread.submit(count).result() == 0
    assert {one["state"] for one in monitor.status()["passes"]} == {"killed"}


def test_a_manual_pass_asks_once_though_the_clock_is_set_back_meanwhile(monitor: Monitor) -> None:
    monitor.at += timedelta(seconds=1)
    monitor.offset = DAYS
    monitor.asked.clear()

    answer = monitor._answer

    def set_back(request: httpx.Request) -> httpx.Response:
        monitor.offset = 0
        return answer(request)

    worker = Worker(
        settings_for(monitor.shop, MAX_CONCURRENCY="1"),
        transport=httpx.MockTransport(set_back),
        clock=lambda: monitor.now,
    )
    worker.trigger_checkout_session_check()
    worker.close()
    assert max(map(len, monitor.asked.values())) == 1


OFFSETS = st.one_of(st.integers(-40, 40), st.integers(-2 * DAYS, 2 * DAYS), st.sampled_from(JUMPS))
CADENCES = ["5s", "1m", "1h", "5s until 1m, 20s", "10s until 5m, 1h", "1d", "3650d"]
SHORT_CADENCES = ["5s", "20s", "5s until 1m, 20s", "5s until 1h, 5m"]
STEPS = st.one_of(
    st.tuples(st.just("offset"), OFFSETS),
    st.tuples(st.just("tick"), st.integers(1, 3)),
    st.tuples(st.just("wait"), st.integers(1, 1000)),
    st.tuples(st.just("CHECK_CADENCE"), st.sampled_from(CADENCES)),
    st.tuples(st.just("CHECK_INTERVAL_SECONDS"), st.sampled_from(["1", "5", "10", "60"])),
    st.tuples(st.just("status_code"), st.sampled_from([200, 500])),
    st.tuples(st.just("open"), st.none()),
    st.tuples(st.just("trigger"), st.none()),
)


def take(monitor: Monitor, steps: list[tuple[str, Any]]) -> None:
    opened = Counter[str]()
    for what, value in steps:
        match what:
            case "offset":
                monitor.offset = value
            case "tick":
                monitor.tick(value)
            case "wait":
                monitor.at += timedelta(seconds=value)
            case "open":
                opened["new"] += 1
                add_sessions(monitor.shop, {f"n{opened['new']}": f"checkout_new_{opened['new']}"})
            case "trigger":
                monitor.trigger()
            case "status_code":
                monitor.answer = httpx.Response(value)
            case _:
                monitor.env = {**monitor.env, what: value}


def assert_recovery(shop: Shop, steps: list[tuple[str, Any]], cadence: str) -> None:
    """Take the steps; soon after the clock is right, every session is asked at its cadence."""
    monitor = Monitor(shop)
    try:
        monitor.worker.health()  # makes the tables
        for table in TABLES:
            shop.run(f"DELETE FROM {table}")
        add_sessions(shop, numbered(3))
        monitor.tick()
        take(monitor, steps)
        monitor.offset, monitor.answer = 0, httpx.Response(200)
        monitor.env = {"CHECK_CADENCE": cadence, "CHECK_BACKOFF_MAX_SECONDS": "10"}
        monitor.tick(4)  # a tick that was led up to two intervals ahead is believed
        assert monitor.too_far_ahead() == []
        monitor.asked.clear()
        monitor.tick(monitor.slowest // 5 + 3)  # the longest wait that the settings allow
        [(count,)] = shop.run("SELECT COUNT(*) FROM checkout_session")
        assert len(monitor.asked) == count
        assert monitor.too_far_ahead() == []
        monitor.tick(3)
        checks = monitor.worker.health().checks
        # A monitor whose settings were just changed to and fro looks like two.
        assert all(ok for name, ok in checks.items() if name != "other_monitors")
    finally:
        monitor.close()


@pytest.mark.slow
@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(STEPS, max_size=12), cadence=st.sampled_from(SHORT_CADENCES))
@example(steps=[("offset", 9 * MINUTES), ("tick", 2)], cadence="5s")
@example(steps=[("CHECK_CADENCE", "3650d"), ("tick", 1)], cadence="5s")
def test_after_any_jumps_and_changes_every_session_is_asked_at_its_cadence(
    sqlite_shop: Shop, steps: list[tuple[str, Any]], cadence: str
) -> None:
    assert_recovery(sqlite_shop, steps, cadence)


@pytest.mark.slow
@settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=st.lists(STEPS, max_size=8), cadence=st.sampled_from(SHORT_CADENCES[:3]))
def test_after_any_jumps_and_changes_sessions_are_asked_on_each_server(
    server_shop: Shop, steps: list[tuple[str, Any]], cadence: str
) -> None:
    assert_recovery(server_shop, steps, cadence)

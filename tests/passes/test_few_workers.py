"""MAX_WORKERS=1: neither a pass that failed nor a request that hangs costs others a slot."""

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from core.errors import StoreError
from core.store.pass_history import PassHistory
from core.store.store import Store
from core.worker import Worker
from testkit.clock import FakeClock
from testkit.shops import Shop, add_sessions, numbered, settings_for
from tests.passes.virtual import VirtualMonitor
from tests.support import FakeBilling, Passes, until

ONE_WORKER = {"MAX_WORKERS": "1", "CHECK_INTERVAL_SECONDS": "1"}
UNENDED = "SELECT COUNT(*) FROM checkout_session_run WHERE finished_at IS NULL"


@pytest.fixture
def only_worker(shop: Shop, clock: FakeClock) -> Iterator[Worker]:
    add_sessions(shop, numbered(3))
    healthy = httpx.MockTransport(lambda _request: httpx.Response(200))
    worker = Worker(settings_for(shop, **ONE_WORKER), transport=healthy, clock=clock)
    assert worker.health().ok  # it makes the tables
    yield worker
    worker.close()


def fail(*_: object, **__: object) -> None:
    raise StoreError("The database is away.")


@pytest.mark.parametrize("where", ["record", "finish", "reconciliation"])
def test_the_tick_after_a_failed_pass_checks_again(
    only_worker: Worker,
    shop: Shop,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    """The row of the failed pass has an end; only claims of checks not recorded have to expire."""
    with monkeypatch.context() as patch:
        patch.setattr(Store, where, fail)
        with pytest.raises(StoreError, match="is away"):
            only_worker.check_open_checkout_sessions(clock.now)
    assert shop.run(UNENDED) == [(0,)]
    add_sessions(shop, {"new": "checkout_new"})
    clock.advance(1)
    assert only_worker.check_open_checkout_sessions(clock.now).checked >= 1


def test_a_failed_pass_without_an_end_keeps_no_place_of_its_own_worker(
    only_worker: Worker, shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database was still away when its end had to be recorded."""
    with monkeypatch.context() as patch:
        patch.setattr(Store, "record", fail)
        patch.setattr(PassHistory, "end", fail)
        with pytest.raises(StoreError, match="is away"):
            only_worker.check_open_checkout_sessions(clock.now)
    assert shop.run(UNENDED) == [(1,)]
    add_sessions(shop, {"new": "checkout_new"})
    clock.advance(1)
    assert only_worker.check_open_checkout_sessions(clock.now).checked == 1


def test_the_passes_of_other_workers_still_count(
    only_worker: Worker, shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another worker, a pass without an end is under way for five seconds."""
    with monkeypatch.context() as patch:
        patch.setattr(PassHistory, "end", fail)
        with pytest.raises(StoreError, match="is away"):
            only_worker.check_open_checkout_sessions(clock.now)
    other = Worker(settings_for(shop, **ONE_WORKER), clock=clock)
    checked = []
    for _ in range(7):
        clock.advance(1)
        summary = other.check_open_checkout_sessions(clock.now)
        checked.append(summary.checked + sum(summary.skipped.values()))
    other.close()
    ends = shop.run("SELECT COUNT(*) FROM checkout_session_run WHERE reason = 'tick'")
    assert ends == [(8,)]
    assert shop.run(UNENDED) == [(1,)]


@pytest.mark.parametrize("times", [1, 2, 100])
async def test_a_cancelled_pass_keeps_no_place(
    passes: Passes, clock: FakeClock, billing: FakeBilling, times: int
) -> None:
    """However often it is cancelled, as `make run` does until its passes have ended."""
    add_sessions(passes.shop, numbered(3))
    held = billing.held["checkout_active_1"] = asyncio.Event()
    running = asyncio.create_task(passes.run(MAX_WORKERS="1"))
    await until(lambda: billing.asked.total() == 3)
    for _ in range(times):
        running.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await running
    assert passes.shop.run(UNENDED) == [(0,)]
    held.set()
    clock.advance(5)
    assert (await passes.run(MAX_WORKERS="1")).checked == 3


# Requests that end within a slot, just before and just after its end, and several slots later.
TIMEOUTS = [
    *(("1", timeout) for timeout in ("0.4", "0.98", "1", "1.7", "4.95", "4.98", "5", "14.9")),
    *(("5", timeout) for timeout in ("1.7", "4.95", "4.98", "5", "14.9")),
]


@pytest.mark.slow
@pytest.mark.parametrize("start_seconds", [0.001, 0.05], ids=["at once", "soon"])
@pytest.mark.parametrize(("interval", "timeout"), TIMEOUTS)
def test_a_session_that_hangs_each_time_costs_the_others_no_slot(
    interval: str, timeout: str, start_seconds: float
) -> None:
    """One of ten, 18 ticks; the request ends at any time of a slot."""
    monitor = VirtualMonitor(
        lambda checkout, _: 100.0 if checkout == "checkout_3" else 0.1,
        MAX_WORKERS="1",
        CHECK_INTERVAL_SECONDS=interval,
        REQUEST_TIMEOUT_SECONDS=timeout,
    )
    monitor.start_seconds = start_seconds
    monitor.open(10)
    monitor.run(ticks=18)
    for number in range(10):
        slots = monitor.asked_in_slot(f"checkout_{number}")
        if number != 3:
            assert [slot for slot in range(18) if slots[slot] != 1] == []
    assert monitor.asked["checkout_3"]


@pytest.mark.slow
@pytest.mark.parametrize("hanging", [1, 5, 9])
def test_sessions_that_hang_at_random_cost_the_others_no_slot(hanging: int) -> None:
    """Without backoff: each hangs for its time, again and again."""
    monitor = VirtualMonitor(
        lambda checkout, n: 1.3 + n % 7 if int(checkout.split("_")[1]) < hanging else 0.1,
        MAX_WORKERS="1",
        CHECK_INTERVAL_SECONDS="1",
        REQUEST_TIMEOUT_SECONDS="10",
        CHECK_BACKOFF_MAX_SECONDS="0",
    )
    monitor.open(10)
    monitor.run(ticks=30)
    for number in range(hanging, 10):
        slots = monitor.asked_in_slot(f"checkout_{number}")
        assert [slot for slot in range(30) if slots[slot] != 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("quick", [100, 500, 1500])
@pytest.mark.parametrize("slow_seconds", [0.5, 1.0, 2.0, 4.0])
def test_billing_that_becomes_slow_is_not_taken_for_one_that_hangs(
    quick: int, slow_seconds: float
) -> None:
    """2,000 sessions, an interval of a minute; the first answers take a millisecond."""
    asked = iter(range(10_000))
    monitor = VirtualMonitor(
        lambda _checkout, _n: 0.001 if next(asked) < quick else slow_seconds,
        MAX_WORKERS="1",
        CHECK_INTERVAL_SECONDS="60",
    )
    monitor.open(2000)
    monitor.run(ticks=1)
    within = 55.0 - 10 - 1  # the pass begins no check later, with its default time-out
    could = quick + int(within / slow_seconds) * 100
    [summary] = monitor.summaries
    assert summary.checked >= min(2000, could)


def test_billing_that_hangs_ends_the_pass_early() -> None:
    """After a round of answers, nothing comes any more."""
    asked = iter(range(10_000))
    monitor = VirtualMonitor(
        lambda _checkout, _n: 0.001 if next(asked) < 500 else 100.0,
        MAX_WORKERS="1",
        CHECK_INTERVAL_SECONDS="60",
    )
    monitor.open(2000)
    monitor.run(ticks=1)
    [summary] = monitor.summaries
    assert summary.checked == 600
    assert summary.duration_seconds < 11

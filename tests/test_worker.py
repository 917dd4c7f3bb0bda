"""The worker: the time that it gives a pass, and what its health says."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from core.domain.model import Reason
from core.domain.summary import Summary
from core.passes import check_pass
from core.passes.check_pass import trigger_checkout_session_check
from core.passes.running_pass import PassOptions
from core.store.store import Store
from core.worker import Worker
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, numbered, settings_for
from tests.support import FakeBilling, Passes, database_of, until


@pytest.fixture
def pass_options(monkeypatch: pytest.MonkeyPatch) -> list[PassOptions]:
    """The options of each pass; no pass is run."""
    pass_options: list[PassOptions] = []

    async def note(*args: object, **_: object) -> Summary:
        pass_options.extend(options for options in args if isinstance(options, PassOptions))
        return Summary(pass_options[-1].reason, NOON)

    monkeypatch.setattr(check_pass, "check_open_checkout_sessions", note)
    return pass_options


def test_on_lambda_five_seconds_are_left_to_record_the_last_check(
    sqlite_shop: Shop, pass_options: list[PassOptions]
) -> None:
    worker = Worker(settings_for(sqlite_shop, REQUEST_TIMEOUT_SECONDS="10"))
    worker.check_open_checkout_sessions(NOON, seconds=60)
    worker.close()
    assert [(options.start_seconds, options.total_seconds) for options in pass_options] == [
        (45, 55)
    ]


async def test_the_last_check_of_a_manual_pass_has_its_full_timeout(
    sqlite_shop: Shop, pass_options: list[PassOptions]
) -> None:
    settings = settings_for(sqlite_shop, REQUEST_TIMEOUT_SECONDS="10")
    with ThreadPoolExecutor(1) as thread:
        store = Store(database_of(sqlite_shop))
        await trigger_checkout_session_check(store, None, settings, database_thread=thread)
    assert [(options.start_seconds, options.total_seconds) for options in pass_options] == [
        (12, 22)
    ]


def test_health_does_not_blame_other_monitors_for_a_broken_database(sqlite_shop: Shop) -> None:
    sqlite_shop.run("DROP TABLE checkout_session")
    api = Worker(settings_for(sqlite_shop))
    checks = api.health().checks
    assert (checks["database"], checks["other_monitors"]) == (False, True)
    api.close()


def test_health_and_page_name_lambda_when_passes_start_late(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    api = Worker(settings_for(sqlite_shop), clock=clock, on_lambda=True)
    assert api.health().checks["starts_on_time"]
    store = Store(database_of(sqlite_shop))
    for seconds in (5, 10, 15):
        tick = NOON + timedelta(seconds=seconds)
        store.history.begin(Summary(Reason.TICK, tick + timedelta(seconds=14), tick))
    store.close()
    clock.advance(30)
    failed = [name for name, ok in api.health().checks.items() if not ok]
    verdict = api.status()["verdict"]
    api.close()
    assert failed == ["starts_on_time"]
    assert "Lambda probably throttles the worker" in str(verdict)


async def test_a_long_pass_counts_as_a_heartbeat_from_its_start(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    answered = billing.held["checkout_active_0"] = asyncio.Event()
    api = Worker(settings_for(passes.shop), clock=clock)
    clock.advance(60)  # no heartbeat since the monitor was installed
    running = asyncio.create_task(passes.run())
    await until(lambda: billing.in_flight == 1)
    clock.advance(25)
    health = api.health()
    assert health.checks["last_pass"]
    assert not health.checks["answers"]  # about the only open session
    answered.set()
    await running
    await asyncio.to_thread(api.close)  # it has an event loop of its own

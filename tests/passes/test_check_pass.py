"""One pass, and passes one after the other, on an injected clock."""

import asyncio
import json
from datetime import timedelta
from functools import partial

import pytest

from core.database.port import NO_STATUS_INDEX
from core.domain.model import Answer, Outcome, Reason, SessionStatus, Skip
from core.errors import StoreError
from core.passes.checks import OWN_LIMITS
from core.passes.running_pass import PassOptions
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.queue import claimed, due_times
from testkit.shops import Shop, add_sessions, numbered
from tests.support import FakeBilling, Passes, database_of, reconcile, until


async def test_every_open_session_is_checked_once_per_tick(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(7))
    for tick in range(1, 13):
        tick_time = clock.now
        clock.advance(0.3)  # the worker starts shortly after the tick
        summary = await passes.run(PassOptions(Reason.TICK, tick_time))
        assert (summary.open, summary.checked, summary.successes) == (7, 7, 7)
        assert set(billing.asked.values()) == {tick}
        clock.advance(4.7)


async def test_a_second_pass_for_the_same_slot_checks_nothing(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(3))
    await passes.run()
    clock.advance(1)
    summary = await passes.run(PassOptions(Reason.TICK, NOON))
    assert summary.checked == 0
    assert billing.asked.total() == 3
    assert passes.shop.run("SELECT COUNT(*) FROM checkout_session_run WHERE tick IS NOT NULL") == [
        (1,)
    ]


async def test_a_new_session_is_checked_at_the_next_tick(passes: Passes) -> None:
    await passes.run()
    passes.clock.advance(3)
    add_sessions(passes.shop, numbered(2))
    passes.clock.advance(2)
    summary = await passes.run()
    assert (summary.open, summary.checked) == (2, 2)


async def test_ten_sessions_are_in_flight_at_once(passes: Passes, billing: FakeBilling) -> None:
    """Ten sessions that take a second each take one second, not ten."""
    add_sessions(passes.shop, numbered(10))
    billing.held = {f"checkout_active_{n}": asyncio.Event() for n in range(10)}

    running = asyncio.create_task(passes.run())
    await until(lambda: billing.in_flight == 10)
    for event in billing.held.values():
        event.set()
    assert (await running).checked == 10


async def test_no_more_than_max_concurrency_requests_are_in_flight(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(50))
    summary = await passes.run(MAX_CONCURRENCY="4")
    assert summary.checked == 50
    assert billing.most_in_flight == 4


@pytest.mark.slow
@pytest.mark.usefixtures("recorded_at_once")
async def test_a_hanging_session_delays_only_itself(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(5))
    hanging = billing.held["checkout_active_2"] = asyncio.Event()

    first = asyncio.create_task(passes.run())
    for healthy_checks in (1, 2, 3):
        await until(partial(passes.recorded, 4 * healthy_checks))
        if healthy_checks < 3:
            clock.advance(5)
            later = await passes.run()
            assert later.checked == 4
            assert later.skipped == {Skip.IN_FLIGHT: 1}
    hanging.set()
    assert (await first).checked == 5
    assert billing.asked["checkout_active_2"] == 1


TIMEOUT = Answer(Outcome.TIMEOUT, None, 10.0)


async def test_each_outcome_is_counted_and_affects_no_other_session(
    passes: Passes, billing: FakeBilling
) -> None:
    """Eleven sessions; the limited one is asked three times before it backs off."""
    answers = {
        "checkout_404_1": Answer(Outcome.NOT_FOUND, 404, 0.1),
        "checkout_500_1": Answer(Outcome.UNEXPECTED_STATUS, 500, 0.1),
        "checkout_429_1": Answer(Outcome.RATE_LIMITED, 429, 0.1),
        "checkout_401_1": Answer(Outcome.UNAUTHORIZED, 401, 0.1),
        "checkout_hang_1": TIMEOUT,
        "checkout_reset_1": Answer(Outcome.NETWORK_ERROR, None, 0.1, "reset"),
        "checkout_bad_1": Answer(Outcome.INVALID_SESSION),
        "checkout_refunded_1": Answer(Outcome.UNKNOWN_STATUS, 200, 0.1, "'refunded'"),
        "checkout_other_1": Answer(Outcome.MISMATCH, 200, 0.1, "the id 'other'"),
        "checkout_paid_1": Answer(Outcome.ACTIVE, 200, 0.1, status=SessionStatus.SUCCESS),
    }
    billing.answers = answers
    add_sessions(passes.shop, {f"s-{c}": c for c in [*answers, "checkout_active_1"]})
    summary = await passes.run()
    # DEFERRED and REFUSED come from the shop's database: tests/store/test_status_changes.py.
    others = {Outcome.DEFERRED, Outcome.REFUSED, Outcome.INTERNAL_ERROR}
    once = dict.fromkeys(set(Outcome) - others, 1)
    assert summary.outcomes == once | {Outcome.RATE_LIMITED: OWN_LIMITS}
    assert (summary.successes, summary.errors) == (3, 10)
    assert len(summary.latencies) == 12


async def test_an_unexpected_error_in_one_check_is_that_sessions_outcome(
    passes: Passes,
    billing: FakeBilling,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    add_sessions(passes.shop, numbered(4))
    check = billing.check

    async def faulty(checkout_id: str | None) -> Answer:
        if checkout_id == "checkout_active_1":
            raise ZeroDivisionError("by zero")
        return await check(checkout_id)

    monkeypatch.setattr(billing, "check", faulty)
    summary = await passes.run()
    assert summary.outcomes == {Outcome.ACTIVE: 3, Outcome.INTERNAL_ERROR: 1}
    line = "❌ Error checking session s1 (checkout_active_1): ZeroDivisionError: by zero"
    assert line in caplog.messages
    assert passes.shop.run(
        "SELECT session_id, consecutive_failures FROM checkout_session_check"
        " WHERE last_outcome = 'internal_error'"
    ) == [("s1", 1)]


@pytest.mark.parametrize("where", ["decide", "PassLog.check"])
async def test_an_unexpected_error_after_an_answer_is_that_sessions_outcome(
    passes: Passes, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    add_sessions(passes.shop, numbered(4))
    monkeypatch.setattr(f"core.passes.checks.{where}", lambda *_args, **_kwargs: 1 / 0)
    assert (await passes.run()).outcomes == {Outcome.INTERNAL_ERROR: 4}
    assert claimed(passes.shop) == 0


async def test_failures_back_off_until_a_success(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    """After a success the session is checked at every tick again."""
    add_sessions(passes.shop, numbered(1))
    billing.answers["checkout_active_0"] = Answer(Outcome.UNEXPECTED_STATUS, 500, 0.1)
    checked_at = []
    for second in range(0, 270, 5):
        if second == 200:
            billing.answers.clear()
        before = billing.asked.total()
        await passes.run()
        if billing.asked.total() > before:
            checked_at.append(second)
        clock.advance(5)
    assert checked_at == [0, 10, 30, 70, 130, 190, 250, 255, 260, 265]


async def test_sessions_that_failed_are_checked_after_the_healthy_ones(
    passes: Passes, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(passes.shop, numbered(6))
    billing.answers = {f"checkout_active_{n}": TIMEOUT for n in (0, 3)}
    await passes.run(CHECK_BACKOFF_MAX_SECONDS="0")
    order: list[str | None] = []
    check = billing.check

    async def note(checkout_id: str | None) -> Answer:
        order.append(checkout_id)
        return await check(checkout_id)

    monkeypatch.setattr(billing, "check", note)
    clock.advance(5)
    await passes.run(MAX_CONCURRENCY="2")
    assert set(order[-2:]) == {"checkout_active_0", "checkout_active_3"}


async def test_old_sessions_are_checked_as_the_cadence_says(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    for _ in range(24):
        await passes.run(CHECK_CADENCE="5s until 30s, 20s")
        clock.advance(5)
    # At 0, 5, … 30, then every 20 s: 50, 70, 90, 110.
    assert billing.asked.total() == 7 + 4


async def test_two_simultaneous_passes_check_each_session_once(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(mariadb_shop, numbered(1000))
    passes = Passes(mariadb_shop, clock, billing)

    billing.held = dict.fromkeys(numbered(1000).values(), asyncio.Event())

    store = Store(database_of(mariadb_shop, passes.clock))
    reconcile(store, passes.clock.now)
    store.close()

    both = [asyncio.create_task(passes.run(MAX_CONCURRENCY="20")) for _ in range(2)]
    await until(lambda: billing.in_flight == 40)
    billing.held["checkout_active_0"].set()  # one event for all
    first, second = [summary.checked for summary in await asyncio.gather(*both)]
    assert first + second == 1000
    assert min(first, second) > 0
    assert set(billing.asked.values()) == {1}
    assert passes.recorded(1000)


async def test_without_an_api_key_a_pass_sends_nothing_and_reports_it(
    sqlite_shop: Shop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    add_sessions(sqlite_shop, numbered(3))
    summary = await Passes(sqlite_shop, clock, billing=None).run()
    assert summary.checked == 0
    assert summary.skipped == {Skip.NO_API_KEY: 3}
    assert "⚠️ APIKEY not found in environment variables" in caplog.messages
    [(skipped,)] = sqlite_shop.run("SELECT skipped FROM checkout_session_run WHERE reason = 'tick'")
    assert json.loads(skipped) == {"no_api_key": 3}


async def test_a_lost_database_ends_the_pass_and_the_next_one_recovers(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(sqlite_shop, numbered(3))
    passes = Passes(sqlite_shop, clock, billing)

    def fail(*_: object) -> None:
        raise StoreError("The database is away.")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "record", fail)
        with pytest.raises(StoreError, match=r"^The database is away\.$"):
            await passes.run()
    clock.advance(20)
    assert (await passes.run()).checked == 3


async def test_a_tick_far_from_the_databases_clock_is_ignored(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    """The slot of the database's clock is used instead."""
    add_sessions(passes.shop, numbered(1))
    clock.advance(2)
    await passes.run(PassOptions(Reason.TICK, NOON + timedelta(days=300)))
    assert due_times(passes.shop) == {"s0": "2026-01-15T12:00:05.000Z"}


async def test_each_pass_is_one_row_of_the_run_table(passes: Passes, clock: FakeClock) -> None:
    add_sessions(passes.shop, numbered(2))
    for _ in range(3):
        await passes.run()
        clock.advance(5)
    assert passes.shop.run(
        "SELECT reason, tick, open_sessions, checked FROM checkout_session_run"
        " WHERE reason <> 'start' ORDER BY id"
    ) == [("tick", f"2026-01-15T12:00:{second:02}.000Z", 2, 2) for second in (0, 5, 10)]


async def test_a_pass_warns_of_a_missing_index_on_status(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling, caplog: pytest.LogCaptureFixture
) -> None:
    [(index,)] = sqlite_shop.run(
        "SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = 'checkout_session'"
        " AND sql IS NOT NULL"
    )
    sqlite_shop.run(f"DROP INDEX {index}")
    await Passes(sqlite_shop, clock, billing).run()
    assert f"⚠️ {NO_STATUS_INDEX}" in caplog.messages

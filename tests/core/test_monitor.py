"""One pass, and passes one after the other and at once, on an injected clock."""

import asyncio
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial

import pytest

from core.database.port import STATEMENT_ROWS
from core.domain.decision import decide
from core.domain.model import Answer, Claim, Outcome, Reason, Result, SessionStatus, Skip, Summary
from core.errors import StoreError
from core.log import PassLog
from core.passes import check_pass, writer
from core.passes.check_pass import PassOptions, trigger_checkout_session_check
from core.passes.writer import DatabaseThread, Recorder
from core.settings import Settings
from core.store.queue import Queue
from core.store.store import Store
from core.worker import Worker
from testkit.clock import NOON, FakeClock
from testkit.shops import MySQLShop, Shop, add_sessions, numbered, settings_for
from tests.support import FakeBilling, Passes, census, database_of, until

TIMEOUT = Answer(Outcome.TIMEOUT, None, 10.0)


async def test_every_open_session_is_checked_once_a_tick_every_five_seconds(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(7))
    for tick in range(1, 13):
        tick_time = clock.now
        clock.advance(0.3)  # the worker starts a moment after the tick
        summary = await passes.run(PassOptions(Reason.TICK, tick_time))
        assert (summary.open, summary.checked, summary.successes) == (7, 7, 7)
        assert set(billing.asked.values()) == {tick}
        clock.advance(4.7)


async def test_a_second_start_in_the_same_slot_checks_nothing(
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


async def test_ten_sessions_are_in_flight_at_once(passes: Passes, billing: FakeBilling) -> None:
    """So ten sessions that take a second each take one second, not ten."""
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


async def test_a_session_that_hangs_delays_only_itself(
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


async def test_results_are_recorded_while_other_requests_are_in_flight(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(3))
    hanging = billing.held["checkout_active_0"] = asyncio.Event()

    running = asyncio.create_task(passes.run())
    await until(lambda: passes.recorded(2))
    hanging.set()
    await running


async def test_results_that_fill_a_statement_are_recorded_at_once(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RECORD_EVERY_SECONDS", 3600)
    add_sessions(passes.shop, numbered(STATEMENT_ROWS + 1))
    hanging = billing.held["checkout_active_0"] = asyncio.Event()

    running = asyncio.create_task(passes.run())
    await until(partial(passes.recorded, STATEMENT_ROWS))
    hanging.set()
    assert (await running).checked == STATEMENT_ROWS + 1


async def test_each_outcome_is_settled_and_a_failure_of_one_touches_no_other(
    passes: Passes, billing: FakeBilling
) -> None:
    answers = {
        "checkout_404_1": Answer(Outcome.NOT_FOUND, 404, 0.1),
        "checkout_500_1": Answer(Outcome.UNEXPECTED_STATUS, 500, 0.1),
        "checkout_429_1": Answer(Outcome.RATE_LIMITED, 429, 0.1),
        "checkout_401_1": Answer(Outcome.UNAUTHORIZED, 401, 0.1),
        "checkout_hang_1": TIMEOUT,
        "checkout_reset_1": Answer(Outcome.NETWORK_ERROR, None, 0.1, "reset"),
        "checkout_bad_1": Answer(Outcome.INVALID_SESSION),
        "checkout_refunded_1": Answer(Outcome.UNKNOWN_STATUS, 200, 0.1, "'refunded'"),
        "checkout_paid_1": Answer(Outcome.ACTIVE, 200, 0.1, status=SessionStatus.SUCCESS),
    }
    billing.answers = answers
    add_sessions(passes.shop, {f"s-{c}": c for c in [*answers, "checkout_active_1"]})
    summary = await passes.run()
    # What only the shop's database can bring about has tests of its own.
    assert summary.outcomes == dict.fromkeys(set(Outcome) - {Outcome.DEFERRED, Outcome.REFUSED}, 1)
    assert (summary.successes, summary.errors) == (3, 7)
    assert len(summary.latencies) == 9


async def test_a_bug_in_one_check_is_raised_after_every_other_session_was_checked(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(passes.shop, numbered(4))
    check = billing.check

    async def faulty(checkout_id: str | None) -> Answer:
        if checkout_id == "checkout_active_1":
            raise ZeroDivisionError
        return await check(checkout_id)

    monkeypatch.setattr(billing, "check", faulty)
    with pytest.raises(ExceptionGroup) as raised:
        await passes.run()
    assert isinstance(raised.value.exceptions[0], ZeroDivisionError)
    assert passes.shop.run("SELECT SUM(attempts) FROM checkout_session_check") == [(3,)]


async def test_failures_back_off_and_a_success_brings_the_session_back_to_every_tick(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    billing.answers["checkout_active_0"] = Answer(Outcome.UNEXPECTED_STATUS, 500, 0.1)
    asked_at = []
    for second in range(0, 270, 5):
        if second == 200:
            billing.answers.clear()
        before = billing.asked.total()
        await passes.run()
        if billing.asked.total() > before:
            asked_at.append(second)
        clock.advance(5)
    assert asked_at == [0, 10, 30, 70, 130, 190, 250, 255, 260, 265]


def test_an_answer_that_took_longer_than_the_wait_is_next_due_in_the_slot_after_it() -> None:
    claim = Claim(1, "s", "c", NOON, 0, NOON, NOON + timedelta(seconds=20))
    settings = Settings.from_env({"DATABASE_URL": "sqlite:///nowhere.db"})
    for took, due in ((0.4, 5), (4.999, 5), (5.0, 10), (7.2, 10), (10.1, 15)):
        result = decide(
            claim,
            Answer(Outcome.ACTIVE, 200, took),
            answered_at=NOON + timedelta(seconds=took),
            tick=NOON,
            settings=settings,
            choose=lambda _low, high: high,
        )
        assert result.next_check_at == NOON + timedelta(seconds=due)


async def test_old_sessions_are_checked_as_seldom_as_the_cadence_says(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    for _ in range(24):
        await passes.run(CHECK_CADENCE="5s until 30s, 20s")
        clock.advance(5)
    # At 0, 5, … 30, then every 20 s: 50, 70, 90, 110.
    assert billing.asked.total() == 7 + 4


async def test_two_passes_started_together_check_each_of_a_thousand_sessions_exactly_once(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(mariadb_shop, numbered(1000))
    passes = Passes(mariadb_shop, clock, billing)

    billing.held = dict.fromkeys(numbered(1000).values(), asyncio.Event())

    store = Store(database_of(mariadb_shop, passes.clock))
    census(store, passes.clock.now)
    store.close()

    both = [asyncio.create_task(passes.run(MAX_CONCURRENCY="20")) for _ in range(2)]
    await until(lambda: billing.in_flight == 40)
    billing.held["checkout_active_0"].set()  # it is one event for all
    first, second = [summary.checked for summary in await asyncio.gather(*both)]
    assert first + second == 1000
    assert min(first, second) > 0
    assert set(billing.asked.values()) == {1}
    assert mariadb_shop.run(
        "SELECT attempts, COUNT(*) FROM checkout_session_check GROUP BY attempts"
    ) == [(1, 1000)]


def half_a_pass(url: str, asked: "multiprocessing.Queue[str | None]") -> None:
    """In a process of its own: check until killed; every second session is never answered."""

    class Halting(FakeBilling):
        async def check(self, billing_checkout_id: str | None) -> Answer:
            asked.put(billing_checkout_id)
            if int(str(billing_checkout_id).rpartition("_")[2]) % 2:
                await asyncio.sleep(3600)
            return Answer(Outcome.ACTIVE, 200, 0.01)

    shop = MySQLShop(*url.rsplit("/", 1))
    asyncio.run(Passes(shop, FakeClock(), Halting()).run())


async def test_a_pass_killed_half_way_loses_no_session(
    mariadb_shop: MySQLShop, clock: FakeClock, billing: FakeBilling
) -> None:
    """Every session is checked again when the dead pass's lease is over, and none before."""
    add_sessions(mariadb_shop, numbered(60))
    spawn = multiprocessing.get_context("spawn")
    asked: multiprocessing.Queue[str | None] = spawn.Queue()
    victim = spawn.Process(target=half_a_pass, args=(mariadb_shop.url, asked))
    victim.start()
    for _ in range(60):
        asked.get(timeout=60)
    passes = Passes(mariadb_shop, clock, billing)
    await until(lambda: passes.recorded(30))
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    clock.advance(5)
    assert (await passes.run()).checked == 30
    clock.advance(15)  # the lease: 5 s to start, 10 s for the request, 5 s to record
    assert (await passes.run()).checked == 60
    assert set(billing.asked) == {f"checkout_active_{n}" for n in range(60)}


async def test_a_pass_told_to_stop_gives_its_claims_back_and_keeps_what_it_learned(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(30))
    billing.held = {f"checkout_active_{n}": asyncio.Event() for n in range(10, 30)}

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="15"))
    await until(lambda: billing.asked.total() == 10 + 15)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    recorded, claimed = passes.shop.run(
        "SELECT SUM(attempts), COUNT(claimed_until) FROM checkout_session_check"
    )[0]
    assert claimed == 0
    assert recorded == billing.asked.total() - 15


@pytest.mark.parametrize("times", [1, 2])
async def test_a_pass_told_to_stop_behind_a_slow_claim_loses_no_result_and_leaves_no_claim(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    add_sessions(passes.shop, numbered(60))
    claim_due, may_return, claiming = Queue.claim_due, threading.Event(), threading.Event()
    claims: list[int] = []

    def slow(
        queue: Queue, now: datetime, *, tick: datetime, lease: timedelta, limit: int
    ) -> list[Claim]:
        claimed = claim_due(queue, now, tick=tick, lease=lease, limit=limit)
        if claims:
            claiming.set()
            may_return.wait(10)
        claims.extend([len(claimed)] if claimed else [])
        return claimed

    monkeypatch.setattr(Queue, "claim_due", slow)

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="4"))
    await until(lambda: claiming.is_set() and billing.asked.total() == 20)
    for _ in range(times):
        running.cancel()
        for _ in range(20):  # until it waits for the claim
            await asyncio.sleep(0)
    may_return.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert passes.shop.run(
        "SELECT SUM(attempts), COUNT(claimed_until) FROM checkout_session_check"
    ) == [(20, 0)]


@pytest.mark.parametrize("where", ["decide", "PassLog.checked"])
async def test_a_bug_in_what_follows_an_answer_costs_no_other_session_its_check(
    passes: Passes, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    add_sessions(passes.shop, numbered(4))
    monkeypatch.setattr(f"core.passes.check_pass.{where}", lambda *_args, **_kwargs: 1 / 0)
    with pytest.raises(ExceptionGroup) as raised:
        await passes.run()
    assert [type(bug) for bug in raised.value.exceptions] == [ZeroDivisionError] * 4
    recorded = 0 if where == "decide" else 4
    assert passes.shop.run(
        "SELECT SUM(attempts), COUNT(claimed_until) FROM checkout_session_check"
    ) == [(recorded, 0)]


@pytest.fixture
def claim_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sessions each claim has taken, but for those that found none."""
    sizes: list[int] = []
    claim_due = Queue.claim_due

    def noting(
        queue: Queue, now: datetime, *, tick: datetime, lease: timedelta, limit: int
    ) -> list[Claim]:
        claimed = claim_due(queue, now, tick=tick, lease=lease, limit=limit)
        sizes.extend([len(claimed)] if claimed else [])
        return claimed

    monkeypatch.setattr(Queue, "claim_due", noting)
    return sizes


@pytest.mark.parametrize(
    ("quickly_seconds", "sizes"),
    [(60, [10, 10, 20, 40, 40, 40, 40]), (0, [10] * 20)],
    ids=["quickly", "not quickly"],
)
async def test_a_claim_grows_up_to_four_times_where_batches_are_begun_quickly_and_only_there(
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
    claim_sizes: list[int],
    quickly_seconds: int,
    sizes: list[int],
) -> None:
    """The next batch is claimed before it is known how quickly this one is begun."""
    monkeypatch.setattr(check_pass, "QUICKLY_SECONDS", quickly_seconds)
    add_sessions(passes.shop, numbered(200))
    assert (await passes.run(MAX_CONCURRENCY="2")).checked == 200
    assert claim_sizes == sizes


async def test_what_is_claimed_and_not_begun_in_time_is_given_back_at_once(
    passes: Passes,
    billing: FakeBilling,
    monkeypatch: pytest.MonkeyPatch,
    claim_sizes: list[int],
) -> None:
    """Of two claims of five, the second of which comes when nothing more can be begun."""
    monkeypatch.setattr(check_pass, "BEGIN_WITHIN_SECONDS", 0.05)
    add_sessions(passes.shop, numbered(10))
    billing.held = {f"checkout_active_{n}": asyncio.Event() for n in range(10)}
    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="1"))
    claimed = "SELECT COUNT(*), COUNT(claimed_until) FROM checkout_session_check"
    await until(lambda: len(claim_sizes) == 2 and passes.shop.run(claimed) == [(10, 1)])
    for event in billing.held.values():
        event.set()
    summary = await running
    assert summary.checked == 1
    assert summary.skipped == {Skip.DEADLINE: 9}
    assert claim_sizes == [5, 5]


async def test_a_claim_that_took_the_database_too_long_is_given_back_and_the_pass_goes_on(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one slow moment of the database would put off every session that was not yet checked."""
    add_sessions(passes.shop, numbered(20))
    claim_due = Queue.claim_due
    claims: list[list[Claim]] = []

    def second_is_late(
        queue: Queue, now: datetime, *, tick: datetime, lease: timedelta, limit: int
    ) -> list[Claim]:
        claims.append(claim_due(queue, now, tick=tick, lease=lease, limit=limit))
        # What a claim may take, seen from the pass: the second one takes longer.
        late = len(claims) == 2
        monkeypatch.setattr(check_pass, "BEGIN_WITHIN_SECONDS", -1.0 if late else 5.0)
        return claims[-1]

    monkeypatch.setattr(Queue, "claim_due", second_is_late)
    summary = await passes.run(MAX_CONCURRENCY="1")

    assert summary.checked == 20
    assert summary.skipped == {}
    later = {claim.session_id for claimed in claims[2:] for claim in claimed}
    assert {claim.session_id for claim in claims[1]} <= later
    assert set(billing.asked.values()) == {1}


async def test_a_pass_at_its_deadline_gives_up_what_hangs_and_says_so(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(3))
    billing.held["checkout_active_1"] = asyncio.Event()
    options = PassOptions(Reason.TICK, clock.now, start_seconds=0.05, total_seconds=0.1)
    summary = await asyncio.wait_for(passes.run(options), 10)
    assert summary.checked == 2
    assert summary.skipped == {Skip.DEADLINE: 1}
    assert passes.shop.run("SELECT COUNT(claimed_until) FROM checkout_session_check") == [(0,)]


async def test_sessions_that_failed_last_time_start_after_the_healthy_ones(
    passes: Passes, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(passes.shop, numbered(6))
    billing.answers = {f"checkout_active_{n}": TIMEOUT for n in (0, 3)}
    await passes.run(CHECK_BACKOFF_MAX_SECONDS="0")
    order: list[str | None] = []
    check = billing.check

    async def noted(checkout_id: str | None) -> Answer:
        order.append(checkout_id)
        return await check(checkout_id)

    monkeypatch.setattr(billing, "check", noted)
    clock.advance(5)
    await passes.run(MAX_CONCURRENCY="2")
    assert set(order[-2:]) == {"checkout_active_0", "checkout_active_3"}


async def test_a_manual_pass_checks_all_open_sessions_due_or_not_except_those_in_flight(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(5))
    hanging = billing.held["checkout_active_4"] = asyncio.Event()

    tick = asyncio.create_task(passes.run())
    await until(lambda: passes.recorded(4))
    clock.advance(1)
    manual = await passes.run(PassOptions(Reason.MANUAL))
    assert manual.checked == 4
    assert manual.skipped == {Skip.IN_FLIGHT: 1}
    hanging.set()
    await tick


async def test_a_manual_pass_does_not_disturb_the_next_tick(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(2))
    await passes.run()
    clock.advance(2.5)
    await passes.run(PassOptions(Reason.MANUAL))
    clock.advance(2.5)
    assert (await passes.run()).checked == 2


async def test_a_manual_pass_over_ids_tells_which_are_not_open(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(3))
    summary = await passes.trigger(["s1", "s1", "gone"])
    assert summary.checked == 1
    assert summary.skipped == {Skip.NOT_OPEN: 1}
    assert billing.asked == Counter({"checkout_active_1": 1})


async def test_without_an_api_key_nothing_is_asked_and_the_pass_says_so(
    sqlite_shop: Shop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    add_sessions(sqlite_shop, numbered(3))
    summary = await Passes(sqlite_shop, clock, billing=None).run()
    assert summary.checked == 0
    assert summary.skipped == {Skip.NO_API_KEY: 3}
    assert "⚠️ APIKEY not found in environment variables" in caplog.messages
    [(skipped,)] = sqlite_shop.run("SELECT skipped FROM checkout_session_run WHERE reason = 'tick'")
    assert json.loads(skipped) == {"no_api_key": 3}


async def test_a_database_that_goes_away_ends_the_pass_and_the_next_one_works_again(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(sqlite_shop, numbered(3))
    passes = Passes(sqlite_shop, clock, billing)

    def away(_store: Store, _results: list[Result], _now: datetime) -> None:
        raise StoreError("The database is away.")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "record", away)
        with pytest.raises(StoreError, match=r"^The database is away\.$"):
            await passes.run()
    clock.advance(20)
    assert (await passes.run()).checked == 3


async def test_a_tick_far_from_the_databases_clock_is_not_believed(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    clock.advance(2)
    await passes.run(PassOptions(Reason.TICK, NOON + timedelta(days=300)))
    assert passes.shop.run("SELECT next_check_at FROM checkout_session_check") == [
        ("2026-01-15T12:00:05.000Z",)
    ]


async def test_each_pass_is_one_row_of_the_run_table(passes: Passes, clock: FakeClock) -> None:
    add_sessions(passes.shop, numbered(2))
    for _ in range(3):
        await passes.run()
        clock.advance(5)
    assert passes.shop.run(
        "SELECT reason, tick, open_sessions, checked FROM checkout_session_run"
        " WHERE reason <> 'start' ORDER BY id"
    ) == [("tick", f"2026-01-15T12:00:{second:02}.000Z", 2, 2) for second in (0, 5, 10)]


async def test_a_manual_pass_ends_in_time_whatever_billing_does(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_pass.MANUAL_SECONDS < 25
    monkeypatch.setattr(check_pass, "MANUAL_SECONDS", 0.2)
    add_sessions(passes.shop, numbered(3))
    billing.held = dict.fromkeys(numbered(3).values(), asyncio.Event())
    summary = await passes.trigger()
    assert summary.checked == 0
    assert summary.skipped == {Skip.DEADLINE: 3}


async def test_a_claim_lasts_until_the_slowest_request_that_it_may_lead_to_is_recorded(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    answered = billing.held["checkout_active_0"] = asyncio.Event()

    running = asyncio.create_task(passes.run(REQUEST_TIMEOUT_SECONDS="20"))
    await until(lambda: billing.in_flight == 1)
    claimed = passes.shop.run("SELECT claimed_until FROM checkout_session_check")
    assert claimed == [("2026-01-15T12:00:30.000Z",)]  # 5 s to begin, 20 s, 5 s to record
    answered.set()
    await running


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[PassOptions]:
    """With what each pass is asked for; none is run."""
    given: list[PassOptions] = []

    async def noting(*args: object, **_: object) -> Summary:
        given.extend(options for options in args if isinstance(options, PassOptions))
        return Summary(given[-1].reason, NOON)

    monkeypatch.setattr(check_pass, "check_open_checkout_sessions", noting)
    return given


def test_on_lambda_the_last_check_has_its_whole_time_and_five_seconds_are_left_to_record(
    sqlite_shop: Shop, given: list[PassOptions]
) -> None:
    worker = Worker(settings_for(sqlite_shop, REQUEST_TIMEOUT_SECONDS="10"))
    worker.check_open_checkout_sessions(NOON, seconds=60)
    worker.close()
    assert [(options.start_seconds, options.total_seconds) for options in given] == [(45, 55)]


async def test_the_last_check_of_a_manual_pass_has_its_whole_time(
    sqlite_shop: Shop, given: list[PassOptions]
) -> None:
    settings = settings_for(sqlite_shop, REQUEST_TIMEOUT_SECONDS="10")
    with ThreadPoolExecutor(1) as thread:
        store = Store(database_of(sqlite_shop))
        await trigger_checkout_session_check(store, None, settings, database_thread=thread)
    assert [(options.start_seconds, options.total_seconds) for options in given] == [(12, 22)]


async def test_a_pass_says_while_it_is_under_way_how_far_it_has_come(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PROGRESS_EVERY_SECONDS", 0)
    add_sessions(passes.shop, numbered(3))
    answered = billing.held["checkout_active_0"] = asyncio.Event()
    under_way = "SELECT checked FROM checkout_session_run WHERE finished_at IS NULL"

    running = asyncio.create_task(passes.run())
    await until(lambda: passes.shop.run(under_way) == [(2,)])
    answered.set()
    await running


async def test_a_pass_that_takes_long_is_a_sign_of_life_from_its_beginning_on(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    answered = billing.held["checkout_active_0"] = asyncio.Event()
    api = Worker(settings_for(passes.shop), clock=clock)
    clock.advance(60)  # nothing has been heard since the monitor was installed
    running = asyncio.create_task(passes.run())
    await until(lambda: billing.in_flight == 1)
    clock.advance(25)
    assert api.health().ok
    answered.set()
    await running
    await asyncio.to_thread(api.close)  # it has an event loop of its own


@asynccontextmanager
async def recording(
    shop: Shop, clock: FakeClock, *, sessions: int = 1
) -> AsyncIterator[tuple[Recorder, Store]]:
    """A pass's recorder over sessions that are due, and the store that it writes to."""
    add_sessions(shop, numbered(sessions))
    store = Store(database_of(shop, clock))
    with ThreadPoolExecutor(1) as thread:
        database = DatabaseThread(thread)
        await database.run(store.prepare)
        await database.run(census, store, clock.now)
        pause, _now = await database.run(store.shared.read_pause)
        summary = Summary(Reason.TICK, clock.now)
        run_id = await database.run(store.runs.begin, summary)
        ours = Recorder(store, database, summary, PassLog(), pause)
        async with ours.running(run_id, asyncio.get_running_loop().time()):
            yield ours, store
        assert await ours.claim(partial(claim_one, store, clock)) == []
        await database.run(store.close)


def claim_one(store: Store, clock: FakeClock, now: datetime) -> list[Claim]:
    return store.queue.claim_due(now, tick=clock.now, lease=timedelta(seconds=20), limit=1)


CLAIMED = "SELECT COUNT(claimed_until) FROM checkout_session_check"


async def test_a_recorder_that_has_closed_claims_nothing(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    """Nobody would give it back."""
    async with recording(sqlite_shop, clock):
        pass
    assert sqlite_shop.run(CLAIMED) == [(0,)]


async def test_the_result_of_a_lapsed_claim_does_not_keep_the_next_one_from_being_given_back(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    """In a pass that was frozen, and then claimed the same session once more."""
    async with recording(sqlite_shop, clock) as (ours, store):
        [lapsed] = await ours.claim(partial(claim_one, store, clock))
        clock.advance(20)
        assert len(await ours.claim(partial(claim_one, store, clock))) == 1
        ours.settle(Result(lapsed, Answer(Outcome.ACTIVE, 200), clock.now))
    assert sqlite_shop.run(CLAIMED) == [(0,)]


async def test_of_the_429s_of_one_batch_the_longest_pause_counts(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    limited: list[Result] = []
    async with recording(sqlite_shop, clock, sessions=3) as (ours, store):
        for seconds in (5, 30, 10):
            [claim] = await ours.claim(partial(claim_one, store, clock))
            limited.append(
                Result(claim, Answer(Outcome.RATE_LIMITED, 429, retry_after=seconds), NOON)
            )
        for result in limited:
            ours.settle(result)
    paused = sqlite_shop.run("SELECT paused_until FROM checkout_session_pause")
    assert paused == [("2026-01-15T12:00:30.000Z",)]

"""A tick's leader and its helpers: one leads, claims come first, and a crew is what it needs."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import datetime, timedelta

import httpx
import pytest

from core.database.port import Value
from core.domain.model import Answer, Outcome, Reason, Skip, Summary
from core.errors import StartWorkerError
from core.passes import check_pass
from core.passes.check_pass import PassOptions, check_open_checkout_sessions
from core.passes.scaling import Crew
from core.store import reconcile as census_module
from core.store.reconcile import Census
from core.store.store import Store
from core.worker import Worker
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, numbered, settings_for
from tests.support import FakeBilling, Passes, census, database_of

HANG = Answer(Outcome.TIMEOUT, None, 10.0)


def healthy(count: int, seconds: float = 0.1) -> dict[str, Answer]:
    return dict.fromkeys(
        [str(c) for c in numbered(count).values()], Answer(Outcome.ACTIVE, 200, seconds)
    )


def adopted(shop: Shop, clock: FakeClock, count: int) -> None:
    """That many open sessions, due at once."""
    add_sessions(shop, numbered(count))
    store = Store(database_of(shop, clock))
    store.prepare()
    census(store, clock.now)
    store.close()


def under_way(shop: Shop, clock: FakeClock, passes: int) -> None:
    """That many passes that have begun in other processes."""
    store = Store(database_of(shop, clock))
    for _ in range(passes):
        store.runs.begin(Summary(Reason.TICK, clock.now, clock.now))
    store.close()


def test_one_of_many_workers_leads_a_tick(shop: Shop, clock: FakeClock) -> None:
    adopted(shop, clock, 1)
    together = threading.Barrier(4)

    def look() -> list[bool]:
        store = Store(database_of(shop, clock))
        led = []
        for second in range(0, 100, 5):
            together.wait()
            tick = NOON + timedelta(seconds=second)
            led.append(store.view(tick, interval_seconds=100, may_lead=True).leads)
        store.close()
        return led

    with ThreadPoolExecutor(4) as threads:
        looks = [thread.result() for thread in [threads.submit(look) for _ in range(4)]]
    assert [sum(led) for led in zip(*looks, strict=True)] == [1] * 20


def test_a_tick_is_led_once_and_none_after_a_later_one(shop: Shop, clock: FakeClock) -> None:
    databases = [database_of(shop, clock) for _ in range(2)]
    first, second = (Store(database) for database in databases)
    first.prepare()
    first.shared.read_pause()  # puts the row there

    def leads(store: Store, seconds: int) -> bool:
        tick, soon = (NOON + timedelta(seconds=s) for s in (seconds, 60))
        return store._database.run(lambda: store.shared.lead(tick, not_after=soon))

    assert [leads(first, 5), leads(second, 5), leads(second, 0)] == [True, False, False]
    assert [leads(second, 10), leads(first, 10), leads(first, 5)] == [True, False, False]
    first.close()
    second.close()


async def test_a_manual_pass_leads_no_tick(passes: Passes) -> None:
    assert not (await passes.run(PassOptions(Reason.MANUAL))).led
    assert (await passes.run()).led


async def test_a_tick_delivered_twice_costs_one_statement_the_second_time(
    shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(shop, numbered(3))
    await Passes(shop, clock, billing).run()
    database = database_of(shop, clock)
    store = Store(database)
    statements: list[str] = []
    query = database.query

    def noting(sql: str, parameters: Sequence[Value] = ()) -> Sequence[tuple[Value, ...]]:
        statements.append(sql)
        return query(sql, parameters)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(store.prepare).result()
        monkeypatch.setattr(database, "query", noting)
        monkeypatch.setattr(database, "execute", noting)
        summary = await check_open_checkout_sessions(
            store,
            billing,
            settings_for(shop),
            PassOptions(Reason.TICK, NOON),
            database_thread=thread,
        )
        thread.submit(store.close).result()
    assert len(statements) == 1, statements
    assert (summary.led, summary.checked, billing.asked.total()) == (False, 0, 3)


async def test_a_tick_delivered_twice_helps_with_what_is_still_due(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    adopted(sqlite_shop, clock, 3)
    store = Store(database_of(sqlite_shop, clock))
    assert store.view(NOON, interval_seconds=5, may_lead=True).leads
    store.close()
    summary = await Passes(sqlite_shop, clock, billing).run()
    assert (summary.led, summary.counted, summary.checked) == (False, False, 3)


async def test_requests_leave_before_anything_is_counted(
    passes: Passes, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopted(passes.shop, clock, 3)
    asked_first: list[int] = []
    next_piece = Census.next_piece

    def after_the_requests(counting: Census) -> bool:
        for _ in range(2000):  # ten seconds at the most
            if billing.asked:
                break
            threading.Event().wait(0.005)
        asked_first.append(billing.asked.total())
        return next_piece(counting)

    monkeypatch.setattr(Census, "next_piece", after_the_requests)
    assert (await passes.run()).open == 3
    assert asked_first == [3]


async def test_a_session_that_has_just_opened_is_checked_at_the_first_tick(passes: Passes) -> None:
    await passes.run()
    passes.clock.advance(3)
    add_sessions(passes.shop, numbered(2))
    passes.clock.advance(2)
    summary = await passes.run()
    assert (summary.open, summary.checked) == (2, 2)


@pytest.mark.parametrize("piece", [1, 3, 7, 100])
def test_a_count_in_pieces_adopts_forgets_and_counts_as_one_would(
    shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(census_module, "PIECE_SESSIONS", piece)
    adopted(shop, clock, 12)
    store = Store(database_of(shop, clock))
    claims = store.queue.claim_due(store.now(), tick=NOON, lease=timedelta(seconds=20), limit=4)
    shop.run("UPDATE checkout_session SET status = 'success' WHERE id IN ('s0', 's11', 's9')")
    add_sessions(shop, {"": "empty", "A": "new", "é": "new", "zz": "new"})
    clock.advance(1)
    counted = census(store, NOON)
    still_claimed = sum(claim.session_id not in ("s0", "s11", "s9") for claim in claims)
    assert (counted.open, counted.in_flight, counted.not_due) == (13, still_claimed, 0)
    known = shop.run("SELECT session_id FROM checkout_session_check ORDER BY session_id")
    assert known == shop.run("SELECT id FROM checkout_session WHERE status = 'open' ORDER BY id")
    store.close()


async def test_where_a_count_takes_long_it_is_taken_less_often(
    passes: Passes, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the time at the most: after two seconds of counting, eighteen of rest."""
    add_sessions(passes.shop, numbered(2))
    next_piece = Census.next_piece

    def slow(counting: Census) -> bool:
        counting.took += timedelta(seconds=2)
        return next_piece(counting)

    monkeypatch.setattr(Census, "next_piece", slow)
    counted = []
    for _ in range(9):
        summary = await passes.run()
        counted.append(summary.counted)
        assert (summary.led, summary.open, summary.checked) == (True, 2, 2)
        clock.advance(5)
    assert counted == [True, False, False, False, True, False, False, False, True]


async def started(
    shop: Shop, clock: FakeClock, billing: FakeBilling, **env: str
) -> tuple[list[datetime], Summary]:
    """The ticks for which a pass starts more workers, and its summary."""
    ticks: list[datetime] = []
    passes = Passes(shop, clock, billing)
    passes.start_worker = ticks.append
    return ticks, await passes.run(None, **env)


async def test_a_leader_starts_as_many_workers_as_the_due_sessions_need(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    """Ten in flight, answered after 0.1 s, begin 110 checks in a fifth of 5 s; 500 need five."""
    adopted(sqlite_shop, clock, 510)
    ticks, summary = await started(
        sqlite_shop, clock, FakeBilling(healthy(510)), MAX_CONCURRENCY="10"
    )
    assert ticks == [NOON] * 4
    assert summary.workers_started == 4


async def test_a_tick_that_one_worker_can_serve_starts_no_other(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    adopted(sqlite_shop, clock, 100)
    ticks, _ = await started(sqlite_shop, clock, FakeBilling(healthy(100)), MAX_CONCURRENCY="10")
    assert ticks == []


async def test_a_helper_starts_no_other_worker(sqlite_shop: Shop, clock: FakeClock) -> None:
    adopted(sqlite_shop, clock, 510)
    leader = Store(database_of(sqlite_shop, clock))
    assert leader.view(NOON, interval_seconds=5, may_lead=True).leads
    leader.close()
    ticks, helper = await started(
        sqlite_shop, clock, FakeBilling(healthy(510)), MAX_CONCURRENCY="10"
    )
    assert (ticks, helper.led, helper.checked) == ([], False, 510)


async def test_a_crew_is_never_larger_than_it_may_be_however_many_sessions_are_due(
    sqlite_shop: Shop,
) -> None:
    ticks: list[datetime] = []
    settings = settings_for(sqlite_shop, MAX_CONCURRENCY="1", MAX_WORKERS="3")
    leader = Crew(ticks.append, settings, under_way=1)
    assert leader.hears(Answer(Outcome.ACTIVE, 200, 0.1))
    assert await leader.start(10_000, NOON) == 2
    assert ticks == [NOON] * 2


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
async def test_errors_and_time_outs_are_no_reason_for_more_workers(
    sqlite_shop: Shop, clock: FakeClock, answer: Answer
) -> None:
    adopted(sqlite_shop, clock, 500)
    billing = FakeBilling(dict.fromkeys(healthy(500), answer))
    ticks, _ = await started(sqlite_shop, clock, billing, MAX_CONCURRENCY="5")
    assert ticks == []


async def test_there_are_never_more_workers_than_may_be_those_still_under_way_included(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    adopted(sqlite_shop, clock, 2000)
    under_way(sqlite_shop, clock, 2)
    ticks, _ = await started(
        sqlite_shop, clock, FakeBilling(healthy(2000)), MAX_CONCURRENCY="10", MAX_WORKERS="6"
    )
    assert len(ticks) == 6 - 2 - 1


async def test_where_all_workers_are_under_way_a_tick_is_led_and_nothing_more(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    adopted(sqlite_shop, clock, 3)
    under_way(sqlite_shop, clock, 2)
    passes = Passes(sqlite_shop, clock, billing)
    leader = await passes.run(MAX_WORKERS="2")
    assert (leader.led, leader.open, leader.checked) == (True, 3, 0)
    assert leader.skipped == {Skip.IN_FLIGHT: 3}
    follower = await passes.run(MAX_WORKERS="2")
    assert (follower.led, follower.checked) == (False, 0)
    assert billing.asked.total() == 0


async def test_workers_that_were_killed_do_not_stand_in_the_way(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    """A pass that is under way says so every second; these have said nothing for five."""
    adopted(sqlite_shop, clock, 3)
    under_way(sqlite_shop, clock, 10)
    clock.advance(5.1)
    assert (await Passes(sqlite_shop, clock, billing).run()).checked == 3


async def test_workers_that_cannot_be_started_are_said_once_and_lose_nothing(
    sqlite_shop: Shop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    adopted(sqlite_shop, clock, 510)
    passes = Passes(sqlite_shop, clock, FakeBilling(healthy(510)))

    def refuse(_tick: datetime) -> None:
        raise StartWorkerError("AccessDeniedException")

    passes.start_worker = refuse
    summary = await passes.run(MAX_CONCURRENCY="10")
    assert (summary.checked, summary.workers_started) == (510, 0)
    said = [record.message for record in caplog.records if "could not be started" in record.message]
    assert said == ["❌ 4 of 4 workers could not be started: AccessDeniedException"]


def test_a_leader_and_its_helpers_check_each_session_once(shop: Shop, clock: FakeClock) -> None:
    """The helpers are as many as there may be, and more than find work."""
    adopted(shop, clock, 700)
    billing = FakeBilling(healthy(700))
    with ThreadPoolExecutor(8) as elsewhere:
        helpers: list[Future[Summary]] = []

        def one_pass() -> Summary:
            passes = Passes(shop, clock, billing)
            passes.start_worker = lambda _tick: helpers.append(elsewhere.submit(one_pass))
            return asyncio.run(passes.run(MAX_CONCURRENCY="4", MAX_WORKERS="6"))

        leader = one_pass()
        summaries = [leader, *(helper.result() for helper in helpers)]
    assert leader.workers_started == len(helpers) == 5
    assert sum(summary.checked for summary in summaries) == 700
    assert [summary.led for summary in summaries] == [True] + [False] * 5
    assert set(billing.asked.values()) == {1}
    assert shop.run(
        "SELECT attempts, COUNT(claimed_until) FROM checkout_session_check GROUP BY attempts"
    ) == [(1, 0)]


async def test_a_tick_from_a_clock_that_went_wrong_does_not_stop_the_next_ones(
    passes: Passes, clock: FakeClock
) -> None:
    await passes.run()
    passes.shop.run(
        "UPDATE checkout_session_pause SET last_tick = %s", ("2026-01-15T13:00:00.000Z",)
    )
    clock.advance(5)
    assert (await passes.run()).led


def test_the_row_that_all_workers_share_is_put_back_where_somebody_removed_it(
    shop: Shop, clock: FakeClock
) -> None:
    """In an environment that has found it there before."""
    add_sessions(shop, numbered(1))
    healthy = httpx.MockTransport(lambda _request: httpx.Response(200))
    worker = Worker(settings_for(shop), transport=healthy, clock=clock)
    for _ in range(2):
        summary = worker.check_open_checkout_sessions(clock.now)
        assert (summary.led, summary.checked) == (True, 1)
        shop.run("DELETE FROM checkout_session_pause")
        clock.advance(5)
    worker.close()
    store = Store(database_of(shop, clock))
    assert store.shared.pause(30).until == clock.now + timedelta(seconds=30)
    store.close()


async def test_a_pass_that_waits_for_its_last_answer_helps_in_the_next_slot(
    passes: Passes, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_pass, "HELP_AFTER_SECONDS", 0.05)
    adopted(passes.shop, clock, 2)
    last = billing.held["checkout_active_0"] = asyncio.Event()

    async def scenario() -> Summary:
        running = asyncio.create_task(passes.run(CHECK_INTERVAL_SECONDS="1"))
        while not passes.recorded(1):  # noqa: ASYNC110 (in a database)
            await asyncio.sleep(0.01)
        clock.advance(1)
        async with asyncio.timeout(10):
            while billing.asked["checkout_active_1"] < 2:  # noqa: ASYNC110 (another thread's)
                await asyncio.sleep(0.01)
        last.set()
        return await running

    assert (await scenario()).checked == 3


def test_a_leader_knows_what_billing_takes_after_a_round_of_healthy_answers(
    sqlite_shop: Shop,
) -> None:
    leader = Crew(lambda _tick: None, settings_for(sqlite_shop, MAX_CONCURRENCY="3"), under_way=1)
    answers = [Answer(Outcome.ACTIVE, 200, 0.1), HANG] * 4
    heard = [leader.hears(answer) for answer in answers]
    assert heard == [False, False, False, False, True, False, False, False]


@pytest.mark.parametrize("hands", [1, 2, 5])
def test_no_pass_of_a_thousand_leaves_a_claimed_session_that_nobody_works_on(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling, hands: int
) -> None:
    adopted(sqlite_shop, clock, 7)
    settings = settings_for(sqlite_shop, MAX_CONCURRENCY=str(hands))
    with ThreadPoolExecutor(1) as thread, asyncio.Runner() as runner:
        store = Store(database_of(sqlite_shop, clock))
        for number in range(1, 1001):
            options = PassOptions(Reason.TICK, clock.now)
            summary = runner.run(
                check_open_checkout_sessions(
                    store, billing, settings, options, database_thread=thread
                )
            )
            assert summary.checked == 7, number
            clock.advance(5)
        thread.submit(store.close).result()
    assert sqlite_shop.run(
        "SELECT SUM(attempts), COUNT(claimed_until) FROM checkout_session_check"
    ) == [(7000, 0)]


class Turns(Executor):
    """A database that answers after so many turns of the event loop, behind all that waits."""

    def __init__(self, turns: int) -> None:
        self._turns = turns

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        result, loop = fn(*args, **kwargs), asyncio.get_running_loop()

        def turn(left: int) -> None:
            if left:
                loop.call_later(0, turn, left - 1)
            else:
                done.set_result(result)

        turn(self._turns)
        return done


async def test_an_answer_that_comes_with_a_claim_leaves_no_session_that_nobody_works_on(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    """Whichever of them comes first, and by how many turns of the event loop."""

    class Billing:
        turns = 0

        async def check(self, _billing_checkout_id: str | None) -> Answer:
            for _ in range(self.turns):
                await asyncio.sleep(0)
            return Answer(Outcome.ACTIVE, 200, 0.01)

    adopted(sqlite_shop, clock, 7)
    store, billing = Store(database_of(sqlite_shop, clock)), Billing()
    settings = settings_for(sqlite_shop, MAX_CONCURRENCY="1")
    left = {}
    for database_turns, billing.turns in itertools.product(range(8), range(8)):
        thread, options = Turns(database_turns), PassOptions(Reason.TICK, clock.now)
        summary = await check_open_checkout_sessions(
            store, billing, settings, options, database_thread=thread
        )
        left[database_turns, billing.turns] = 7 - summary.checked
        clock.advance(25)  # what was left is claimed anew
    store.close()
    assert {turns: sessions for turns, sessions in left.items() if sessions} == {}

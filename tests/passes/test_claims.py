"""Claims: how large they are, how long they last, and that none is left behind."""

import asyncio
import itertools
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest

from core.domain.model import Answer, Outcome, Reason, Skip
from core.passes import claims, running_pass
from core.passes.check_pass import check_open_checkout_sessions
from core.passes.running_pass import PassOptions
from core.store.queue import Claimed, Queue
from core.store.store import Store
from testkit.clock import FakeClock
from testkit.queue import claimed
from testkit.shops import Shop, add_sessions, numbered, settings_for
from tests.due_sessions import add_due_sessions
from tests.support import FakeBilling, Passes, database_of, until


@pytest.fixture
def claim_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sessions each claim had, without the empty ones."""
    sizes: list[int] = []
    claim_due = Queue.claim_due

    def note(
        queue: Queue, now: datetime, *, tick: datetime, lease: timedelta, limit: int
    ) -> Claimed:
        found = claim_due(queue, now, tick=tick, lease=lease, limit=limit)
        sizes.extend([len(found.claims)] if found.claims else [])
        return found

    monkeypatch.setattr(Queue, "claim_due", note)
    return sizes


@pytest.mark.parametrize(
    ("quickly_seconds", "sizes"),
    [(60, [10, 10, 20, 40, 40, 40, 40]), (0, [10] * 20)],
    ids=["quickly", "not quickly"],
)
async def test_claims_grow_up_to_four_times_if_checks_begin_quickly(
    passes: Passes,
    monkeypatch: pytest.MonkeyPatch,
    claim_sizes: list[int],
    quickly_seconds: int,
    sizes: list[int],
) -> None:
    """The next claim is made before the pass knows how quickly this one's checks begin."""
    monkeypatch.setattr(running_pass, "QUICKLY_SECONDS", quickly_seconds)
    add_sessions(passes.shop, numbered(200))
    assert (await passes.run(MAX_CONCURRENCY="2")).checked == 200
    assert claim_sizes == sizes


async def test_claims_not_begun_in_time_are_released(
    passes: Passes,
    billing: FakeBilling,
    monkeypatch: pytest.MonkeyPatch,
    claim_sizes: list[int],
) -> None:
    """Of two claims of five; the second one comes when no more checks may begin."""
    for module in ("claims", "checks"):
        monkeypatch.setattr(f"core.passes.{module}.BEGIN_WITHIN_SECONDS", 0.05)
    add_sessions(passes.shop, numbered(10))
    billing.held = {f"checkout_active_{n}": asyncio.Event() for n in range(10)}
    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="1"))
    await until(lambda: len(claim_sizes) == 2 and claimed(passes.shop) == 1)
    for event in billing.held.values():
        event.set()
    summary = await running
    assert summary.checked == 1
    assert summary.skipped == {Skip.DEADLINE: 9}
    assert claim_sizes == [5, 5]


async def test_a_claim_that_comes_too_late_is_released_and_made_again(
    passes: Passes, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slow statement must not postpone every session that is still to be checked."""
    add_sessions(passes.shop, numbered(20))
    claim_due = Queue.claim_due
    made: list[Claimed] = []

    def second_is_late(
        queue: Queue, now: datetime, *, tick: datetime, lease: timedelta, limit: int
    ) -> Claimed:
        made.append(claim_due(queue, now, tick=tick, lease=lease, limit=limit))
        # As if the second claim took longer than the pass allows.
        late = len(made) == 2
        monkeypatch.setattr(claims, "BEGIN_WITHIN_SECONDS", -1.0 if late else 5.0)
        return made[-1]

    monkeypatch.setattr(Queue, "claim_due", second_is_late)
    summary = await passes.run(MAX_CONCURRENCY="1")

    assert summary.checked == 20
    assert summary.skipped == {}
    later = {claim.session_id for some in made[2:] for claim in some.claims}
    assert {claim.session_id for claim in made[1].claims} <= later
    assert set(billing.asked.values()) == {1}


async def test_a_lease_lasts_until_the_slowest_request_is_recorded(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    answered = billing.held["checkout_active_0"] = asyncio.Event()

    running = asyncio.create_task(passes.run(REQUEST_TIMEOUT_SECONDS="20"))
    await until(lambda: billing.in_flight == 1)
    until_then = passes.shop.run("SELECT claimed_until FROM checkout_session_batch")
    assert until_then == [
        ("2026-01-15T12:00:30.000Z",)
    ]  # 5 s to begin, 20 s to answer, 5 s to record
    answered.set()
    await running


@pytest.mark.slow
@pytest.mark.parametrize("max_concurrency", [1, 2, 5])
def test_hundreds_of_passes_leave_no_claim_behind(
    sqlite_shop: Shop, clock: FakeClock, billing: FakeBilling, max_concurrency: int
) -> None:
    add_due_sessions(sqlite_shop, clock, 7)
    settings = settings_for(sqlite_shop, MAX_CONCURRENCY=str(max_concurrency))
    with ThreadPoolExecutor(1) as thread, asyncio.Runner() as runner:
        store = Store(database_of(sqlite_shop, clock))
        for number in range(1, 301):
            options = PassOptions(Reason.TICK, clock.now)
            summary = runner.run(
                check_open_checkout_sessions(
                    store, billing, settings, options, database_thread=thread
                )
            )
            assert summary.checked == 7, number
            clock.advance(5)
        thread.submit(store.close).result()
    assert sqlite_shop.run("SELECT SUM(checked) FROM checkout_session_run") == [(2100,)]
    assert claimed(sqlite_shop) == 0


class Turns(Executor):
    """A database thread that answers after a number of turns of the event loop."""

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


@pytest.mark.slow
async def test_no_order_of_answers_and_claims_leaves_a_claim_behind(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    """Whichever comes first, and by however many turns of the event loop."""

    class Billing:
        turns = 0

        async def check(self, _billing_checkout_id: str | None) -> Answer:
            for _ in range(self.turns):
                await asyncio.sleep(0)
            return Answer(Outcome.ACTIVE, 200, 0.01)

    add_due_sessions(sqlite_shop, clock, 7)
    store, billing = Store(database_of(sqlite_shop, clock)), Billing()
    settings = settings_for(sqlite_shop, MAX_CONCURRENCY="1")
    left = {}
    for database_turns, billing.turns in itertools.product(range(8), range(8)):
        thread, options = Turns(database_turns), PassOptions(Reason.TICK, clock.now)
        summary = await check_open_checkout_sessions(
            store, billing, settings, options, database_thread=thread
        )
        left[database_turns, billing.turns] = 7 - summary.checked
        clock.advance(25)  # what was left can be claimed again
    store.close()
    assert {turns: sessions for turns, sessions in left.items() if sessions} == {}

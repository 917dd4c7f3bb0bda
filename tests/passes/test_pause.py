"""One 429 pauses the checks of every worker, for as long as billing asks."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from core.domain.model import Answer, Claim, Outcome, Reason, Skip
from core.domain.rate import Budget
from core.passes import claims, writer
from core.passes.running_pass import PassOptions
from core.store.monitor_state import MonitorState, StateRow
from core.store.store import Store
from handlers.routes import message
from testkit.clock import NOON, FakeClock
from testkit.queue import claimed
from testkit.shops import Shop, add_sessions, numbered
from tests.support import FakeBilling, Passes, database_of, reconcile, until

WITHOUT_RETRY_AFTER = Answer(Outcome.RATE_LIMITED, 429, 0.01)


def limited_for(seconds: float) -> Answer:
    return Answer(Outcome.RATE_LIMITED, 429, 0.01, retry_after=seconds)


def no_waiting(clock: FakeClock) -> PassOptions:
    """A tick's pass that ends at a pause, and does not wait for the pause to end."""
    return PassOptions(Reason.TICK, clock.now, start_seconds=0.9)


async def test_one_429_stops_every_worker_until_the_pause_ends(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers; the pass that gets the 429 ends with what is in flight."""
    check = billing.check
    before: list[int] = []  # requests sent when the 429 came

    async def note(checkout_id: str | None) -> Answer:
        answer = await check(checkout_id)
        if answer.outcome is Outcome.RATE_LIMITED:
            before.append(billing.asked.total())
        return answer

    monkeypatch.setattr(billing, "check", note)
    workers = [Passes(mariadb_shop, clock, billing) for _ in range(3)]
    add_sessions(mariadb_shop, numbered(60))
    billing.answers = {"checkout_active_0": limited_for(30)}
    first = await workers[0].run(MAX_CONCURRENCY="20")
    requests = billing.asked.total()
    assert first.outcomes[Outcome.RATE_LIMITED] == 1
    assert first.paused_until == NOON + timedelta(seconds=30)
    assert requests - before[0] <= 20
    assert first.skipped == {Skip.PAUSED: 60 - requests + 1}  # the one with the 429 is still due
    assert claimed(mariadb_shop) == 0
    for second in range(5, 30, 5):
        clock.now = NOON + timedelta(seconds=second)
        for worker in workers:
            assert (await worker.run()).paused_until == first.paused_until
    assert billing.asked.total() == requests
    billing.answers = {}
    clock.now = NOON + timedelta(seconds=30)
    assert (await workers[1].run()).checked == 60
    assert set(billing.asked) == set(numbered(60).values())


async def test_after_a_429_only_requests_in_flight_are_sent(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(500))
    billing.answers = {f"checkout_active_{n}": limited_for(30) for n in range(500)}
    await passes.run(MAX_CONCURRENCY="20")
    assert billing.asked.total() <= 1 + 20


async def test_a_pause_stops_a_pass_running_in_another_worker(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(40))
    held = billing.held = {c: asyncio.Event() for c in numbered(40).values()}

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="4"))
    while billing.in_flight < 4:  # noqa: ASYNC110 (there is nothing to wait for)
        await asyncio.sleep(0.002)
    other = Store(database_of(mariadb_shop, clock))
    other.state.pause(30)
    other.close()
    for checkout_id in list(billing.asked):
        held[checkout_id].set()
    while billing.in_flight:
        for checkout_id in list(billing.asked):
            held[checkout_id].set()
        await asyncio.sleep(0.2)
    summary = await running
    assert summary.paused_until == NOON + timedelta(seconds=30)
    assert summary.skipped[Skip.PAUSED] == 40 - summary.checked > 0
    assert claimed(mariadb_shop) == 0


async def test_a_429_is_shared_at_once_not_with_the_next_results(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "WRITE_EVERY_SECONDS", 3600)
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(2))
    billing.answers = {"checkout_active_0": limited_for(30)}
    answered = billing.held["checkout_active_1"] = asyncio.Event()
    other = Store(database_of(mariadb_shop, clock))

    running = asyncio.create_task(passes.run())
    await until(lambda: other.state.read_pause()[0].until == NOON + timedelta(seconds=30))
    answered.set()
    await running
    other.close()


async def test_another_workers_pause_is_noticed_when_recording_results(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty are claimed and four in flight when the pause comes; no other request follows."""
    monkeypatch.setattr(writer, "WRITE_EVERY_SECONDS", 0.01)
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(40))
    billing.held = {checkout: asyncio.Event() for checkout in numbered(40).values()}
    exchange, reads = MonitorState.exchange, 0

    def note(shared: MonitorState, change: Callable[[StateRow], Budget | None]) -> StateRow:
        nonlocal reads
        row = exchange(shared, change)
        reads += 1
        return row

    monkeypatch.setattr(MonitorState, "exchange", note)

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="4"))
    await until(lambda: billing.in_flight == 4)
    other = Store(database_of(mariadb_shop, clock))
    other.state.pause(30)
    other.close()
    # One read may have begun before the pause; the second one must see it.
    before = reads
    await until(lambda: reads >= before + 3)  # the third begins after the second has ended
    for answered in billing.held.values():
        answered.set()
    summary = await running
    assert summary.paused_until == NOON + timedelta(seconds=30)
    assert billing.asked.total() == summary.checked == 4


async def test_another_workers_pause_is_noticed_by_the_next_claim(
    mariadb_shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next claim is made after three of five have begun; the pause comes with the second."""
    monkeypatch.setattr(writer, "WRITE_EVERY_SECONDS", 3600)
    other = Store(database_of(mariadb_shop, clock), batch_size=1)
    answered = asyncio.Event()

    class Stalling(FakeBilling):
        async def check(self, billing_checkout_id: str | None) -> Answer:
            if self.asked.total() == 1:
                other.state.pause(30)
            if self.asked.total() == 2:
                self.held[billing_checkout_id] = answered
            return await super().check(billing_checkout_id)

    claim, claimed = claims.Claims._claim, list[int]()

    def note(some: Any, limit: int) -> list[Claim]:  # noqa: ANN401 (private)
        found = claim(some, limit)
        claimed.append(len(found))
        return found

    billing = Stalling()
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(20))
    reconcile(other, NOON)
    monkeypatch.setattr(claims.Claims, "_claim", note)

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="1"))
    await until(lambda: len(claimed) == 2)
    answered.set()
    await running
    other.close()
    assert claimed == [5, 0]
    assert billing.asked.total() == 3


@pytest.mark.slow
async def test_pauses_without_retry_after_double_up_to_a_minute(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    """They begin again at one second once billing answers normally."""
    add_sessions(passes.shop, numbered(3))
    all_limited = dict.fromkeys(numbered(3).values(), WITHOUT_RETRY_AFTER)
    billing.answers = all_limited  # type: ignore[assignment]
    seconds = []
    for _ in range(8):
        summary = await passes.run(no_waiting(clock), CHECK_BACKOFF_MAX_SECONDS="0")
        assert summary.paused_until is not None
        seconds.append((summary.paused_until - clock.now).total_seconds())
        clock.now = max(summary.paused_until, clock.now + timedelta(seconds=10))
    assert seconds == [1, 2, 4, 8, 16, 32, 60, 60]
    billing.answers = {}
    assert (await passes.run()).successes == 3
    billing.answers = all_limited  # type: ignore[assignment]
    clock.advance(5)
    again = await passes.run(no_waiting(clock))
    assert again.paused_until == clock.now + timedelta(seconds=1)


async def test_an_error_does_not_reset_pauses_without_retry_after(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    """Only a normal answer does."""
    add_sessions(passes.shop, numbered(1))
    failing = Answer(Outcome.UNEXPECTED_STATUS, 500, 0.01)
    pauses = []
    for answer in (WITHOUT_RETRY_AFTER, failing, WITHOUT_RETRY_AFTER):
        billing.answers = {"checkout_active_0": answer}
        summary = await passes.run(no_waiting(clock), CHECK_BACKOFF_MAX_SECONDS="0")
        pauses.append(summary.paused_until and (summary.paused_until - clock.now).total_seconds())
        clock.advance(5)
    assert pauses == [1, None, 2]


async def test_the_manual_trigger_respects_and_reports_the_pause(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(3))
    billing.answers = {"checkout_active_0": limited_for(30)}
    await passes.run()
    requests = billing.asked.total()
    passes.clock.advance(5)
    summary = await passes.run(PassOptions(Reason.MANUAL))
    assert billing.asked.total() == requests
    assert message(summary) == (
        "Checked 0 of 3 open checkout sessions; skipped: 3 paused; "
        "billing asked for a pause until 2026-01-15T12:00:30.000Z."
    )


async def test_the_longest_of_several_pauses_counts(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(3))
    billing.answers = {f"checkout_active_{n}": limited_for(s) for n, s in enumerate((5, 30, 10))}
    assert (await passes.run()).paused_until == NOON + timedelta(seconds=30)

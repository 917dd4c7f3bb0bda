"""One 429 slows the whole sweep, for every worker, for as long as billing asks."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.billing.client import MAX_RETRY_AFTER_SECONDS, BillingClient, parse_retry_after
from core.database.port import Value
from core.domain.model import Answer, Claim, Outcome, Pause, Reason, Skip
from core.passes import writer
from core.passes.check_pass import PassOptions
from core.passes.writer import Recorder
from core.store.monitor_state import Shared
from core.store.store import Store
from handlers.api import message
from testkit.clock import NOON, FakeClock
from testkit.shops import MySQLShop, Shop, add_sessions, connect, numbered
from tests.support import FakeBilling, Passes, census, database_of, until

BLIND = Answer(Outcome.RATE_LIMITED, 429, 0.01)


def limited_for(seconds: float) -> Answer:
    return Answer(Outcome.RATE_LIMITED, 429, 0.01, retry_after=seconds)


async def test_one_429_ends_the_pass_and_none_of_three_workers_asks_until_the_time_is_over(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = billing.check
    before: list[int] = []  # how many had been asked when the 429 came

    async def noting(checkout_id: str | None) -> Answer:
        answer = await check(checkout_id)
        if answer.outcome is Outcome.RATE_LIMITED:
            before.append(billing.asked.total())
        return answer

    monkeypatch.setattr(billing, "check", noting)
    workers = [Passes(mariadb_shop, clock, billing) for _ in range(3)]
    add_sessions(mariadb_shop, numbered(500))
    billing.answers = {"checkout_active_0": limited_for(30)}
    first = await workers[0].run(MAX_CONCURRENCY="20")
    asked = billing.asked.total()
    assert first.outcomes[Outcome.RATE_LIMITED] == 1
    assert first.paused_until == NOON + timedelta(seconds=30)
    assert asked - before[0] <= 20
    assert first.skipped == {Skip.PAUSED: 500 - asked}
    assert mariadb_shop.run("SELECT COUNT(claimed_until) FROM checkout_session_check") == [(0,)]
    for second in range(5, 30, 5):
        clock.now = NOON + timedelta(seconds=second)
        for worker in workers:
            assert (await worker.run()).paused_until == first.paused_until
    assert billing.asked.total() == asked
    billing.answers = {}
    clock.now = NOON + timedelta(seconds=30)
    assert (await workers[1].run()).checked == 500
    assert set(billing.asked) == set(numbered(500).values())


@pytest.mark.parametrize(
    ("status", "headers", "outcome", "seconds"),
    [
        (429, {"Retry-After": "30"}, Outcome.RATE_LIMITED, 30),
        (503, {"Retry-After": "Thu, 15 Jan 2026 12:00:20 GMT"}, Outcome.RATE_LIMITED, 20),
        (429, {"Retry-After": "soon"}, Outcome.RATE_LIMITED, None),
        (429, {}, Outcome.RATE_LIMITED, None),
        (503, {"Retry-After": "soon"}, Outcome.UNEXPECTED_STATUS, None),
        (200, {"Retry-After": "30"}, Outcome.ACTIVE, None),
    ],
)
async def test_an_answer_tells_how_long_billing_asks_for(
    status: int, headers: dict[str, str], outcome: Outcome, seconds: float | None
) -> None:
    client = BillingClient(
        api_url="http://billing/api",
        api_key="key",
        timeout_seconds=10,
        transport=httpx.MockTransport(lambda _: httpx.Response(status, headers=headers)),
        now=lambda: NOON,
    )
    answer = await client.check("checkout_1")
    assert (answer.outcome, answer.retry_after) == (outcome, seconds)


async def test_no_more_than_what_is_in_flight_is_sent_after_a_429(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(500))
    billing.answers = {f"checkout_active_{n}": limited_for(30) for n in range(500)}
    await passes.run(MAX_CONCURRENCY="20")
    assert billing.asked.total() <= 1 + 20


async def test_a_pause_stops_a_pass_that_is_running_in_another_worker(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling
) -> None:
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(40))
    held = billing.held = {c: asyncio.Event() for c in numbered(40).values()}

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="4"))
    while billing.in_flight < 4:  # noqa: ASYNC110 (there is nothing to wait for)
        await asyncio.sleep(0.002)
    other = Store(database_of(mariadb_shop, clock))
    other.shared.pause(30)
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
    assert mariadb_shop.run("SELECT COUNT(claimed_until) FROM checkout_session_check") == [(0,)]


async def test_a_429_is_told_to_the_other_workers_at_once_and_not_with_the_next_results(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RECORD_EVERY_SECONDS", 3600)
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(2))
    billing.answers = {"checkout_active_0": limited_for(30)}
    answered = billing.held["checkout_active_1"] = asyncio.Event()
    other = Store(database_of(mariadb_shop, clock))

    running = asyncio.create_task(passes.run())
    await until(lambda: other.shared.read_pause()[0].until == NOON + timedelta(seconds=30))
    answered.set()
    await running
    other.close()


async def test_the_pause_of_another_worker_is_heard_while_results_are_recorded(
    mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twenty that are claimed, four are in flight when the pause comes; no other follows."""
    monkeypatch.setattr(writer, "RECORD_EVERY_SECONDS", 0.01)
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(40))
    billing.held = {checkout: asyncio.Event() for checkout in numbered(40).values()}
    read_pause, reads = Shared.read_pause, 0

    def noting(shared: Shared) -> tuple[Pause, datetime]:
        nonlocal reads
        pause = read_pause(shared)
        reads += 1
        return pause

    monkeypatch.setattr(Shared, "read_pause", noting)

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="4"))
    await until(lambda: billing.in_flight == 4)
    other = Store(database_of(mariadb_shop, clock))
    other.shared.pause(30)
    other.close()
    before = reads  # one more may have begun before the pause; after the third, the second
    await until(lambda: reads >= before + 3)  # has been heard
    for answered in billing.held.values():
        answered.set()
    summary = await running
    assert summary.paused_until == NOON + timedelta(seconds=30)
    assert billing.asked.total() == summary.checked == 4


async def test_the_pause_of_another_worker_is_heard_with_the_next_claim_which_claims_nothing(
    mariadb_shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next five are claimed when three of five have begun; the pause comes with the second."""
    monkeypatch.setattr(writer, "RECORD_EVERY_SECONDS", 3600)
    other = Store(database_of(mariadb_shop, clock))
    answered = asyncio.Event()

    class Stalling(FakeBilling):
        async def check(self, billing_checkout_id: str | None) -> Answer:
            if self.asked.total() == 1:
                other.shared.pause(30)
            if self.asked.total() == 2:
                self.held[billing_checkout_id] = answered
            return await super().check(billing_checkout_id)

    claim, claimed = Recorder.claim, list[int]()

    async def noting(recorder: Recorder, how: Callable[[datetime], list[Claim]]) -> list[Claim]:
        claims = await claim(recorder, how)
        claimed.append(len(claims))
        return claims

    billing = Stalling()
    passes = Passes(mariadb_shop, clock, billing)
    add_sessions(mariadb_shop, numbered(20))
    census(other, NOON)
    monkeypatch.setattr(Recorder, "claim", noting)

    running = asyncio.create_task(passes.run(MAX_CONCURRENCY="1"))
    await until(lambda: len(claimed) == 2)
    answered.set()
    await running
    other.close()
    assert claimed == [5, 0]
    assert billing.asked.total() == 3


def test_of_two_pauses_at_once_the_longer_one_stands(
    server_shop: MySQLShop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(database_of(server_shop, clock))
    store.prepare()
    store.shared.read_pause()  # puts the row there
    longer = NOON + timedelta(seconds=30)
    execute, writing = store._database.execute, threading.Event()

    def noting(sql: str, parameters: Sequence[Value] = ()) -> int:
        if sql.startswith("UPDATE"):
            writing.set()
        return execute(sql, parameters)

    monkeypatch.setattr(store._database, "execute", noting)
    with (
        connect(server_shop.server, server_shop.database) as other,
        other.cursor() as cursor,
        ThreadPoolExecutor(1) as thread,
    ):
        other.begin()
        cursor.execute("UPDATE checkout_session_pause SET paused_until = %s", (longer,))
        shorter = thread.submit(store.shared.pause, 5)
        assert writing.wait(10)
        other.commit()
        assert shorter.result().until == longer
    store.close()


async def test_blind_pauses_double_up_to_a_minute_until_billing_answers_normally(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(3))
    every = dict.fromkeys(numbered(3).values(), BLIND)
    billing.answers = every  # type: ignore[assignment]
    seconds = []
    for _ in range(8):
        summary = await passes.run(CHECK_BACKOFF_MAX_SECONDS="0")
        assert summary.paused_until is not None
        seconds.append((summary.paused_until - clock.now).total_seconds())
        clock.now = max(summary.paused_until, clock.now + timedelta(seconds=10))
    assert seconds == [1, 2, 4, 8, 16, 32, 60, 60]
    billing.answers = {}
    assert (await passes.run()).successes == 3
    billing.answers = every  # type: ignore[assignment]
    clock.advance(5)
    again = await passes.run()
    assert again.paused_until == clock.now + timedelta(seconds=1)


async def test_errors_are_no_normal_answers_after_which_blind_pauses_would_begin_anew(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    failing = Answer(Outcome.UNEXPECTED_STATUS, 500, 0.01)
    pauses = []
    for answer in (BLIND, failing, BLIND):
        billing.answers = {"checkout_active_0": answer}
        summary = await passes.run(CHECK_BACKOFF_MAX_SECONDS="0")
        pauses.append(summary.paused_until and (summary.paused_until - clock.now).total_seconds())
        clock.advance(5)
    assert pauses == [1, None, 2]


async def test_the_manual_trigger_respects_the_pause_and_says_so(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(3))
    billing.answers = {"checkout_active_0": limited_for(30)}
    await passes.run()
    asked = billing.asked.total()
    passes.clock.advance(5)
    summary = await passes.run(PassOptions(Reason.MANUAL))
    assert billing.asked.total() == asked
    assert message(summary) == (
        "Checked 0 of 3 open checkout sessions; skipped: 3 paused; "
        "billing asked for a pause until 2026-01-15T12:00:30.000Z."
    )


def test_a_pause_is_never_shortened_and_only_the_newest_is_ended(
    shop: Shop, clock: FakeClock
) -> None:
    store, other = (Store(database_of(shop, clock)) for _ in range(2))
    assert store.prepare() == []
    before, _now = store.shared.read_pause()
    long = store.shared.pause(30)
    assert other.shared.pause(5) == other.shared.pause(None) == long
    other.shared.end_pauses(before)
    assert store.shared.read_pause()[0] == long
    other.shared.end_pauses(long)
    assert store.shared.read_pause()[0].in_a_row == 0
    store.close()
    other.close()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30),
        (" 0 ", 0),
        ("9" * 400, MAX_RETRY_AFTER_SECONDS),
        ("Thu, 15 Jan 2026 12:00:20 GMT", 20),
        ("Thu, 15 Jan 2026 11:00:00 GMT", 0),
        ("Fri, 16 Jan 2026 12:00:00 GMT", MAX_RETRY_AFTER_SECONDS),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_five_minutes_at_most_and_nonsense_is_ignored(
    text: str, seconds: float | None
) -> None:
    assert parse_retry_after(text, NOON) == seconds


@given(st.text())
def test_no_header_breaks_the_reading_of_retry_after(text: str) -> None:
    seconds = parse_retry_after(text, datetime.now(UTC))
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER_SECONDS

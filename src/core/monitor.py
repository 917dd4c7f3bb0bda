"""The check pass: claim what is due, ask billing about it in parallel, record what was learned.

Any number of passes may run at once, in any number of processes. The store hands each due session
to one of them (a claim, for the length of a lease), so no session is checked twice, and whatever a
dead pass had claimed comes back when its lease is over.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Protocol

from core.cadence import next_check, slot_at
from core.database import StoreError
from core.model import (
    Answer,
    Claim,
    OpenSessions,
    Outcome,
    Pause,
    Reason,
    Recorded,
    Result,
    SessionStatus,
    Skip,
    Summary,
)
from core.observability import PassLog, logger
from core.settings import Settings

# A claimed session whose request has not begun after this time is given back: this pass is stuck
# behind requests that hang, and the next pass, one interval later, has free hands.
START_WITHIN_SECONDS = 5.0
# What a lease holds beyond that and the request itself: for the database on a slow day, to return
# the claim and to record the result.
RECORD_WITHIN_SECONDS = 5.0
# Results are gathered this long, so that one statement records many of them. A killed pass loses
# that much, and those sessions are then checked once more.
RECORD_EVERY_SECONDS = 0.25
# Sessions claimed at once, for each request in flight: the next ones are claimed while these run.
CLAIMS_PER_REQUEST = 5


class Store(Protocol):
    """What a pass needs of the database; see `core.store.SqlStore`. Methods raise StoreError."""

    def prepare(self) -> list[str]: ...
    def now(self) -> datetime: ...
    def sync_open_sessions(
        self, tick: datetime, session_ids: Sequence[str] | None = None
    ) -> OpenSessions: ...
    def claim_due(self, *, tick: datetime, lease: timedelta, limit: int) -> list[Claim]: ...
    def claim_unchecked(
        self,
        *,
        since: datetime,
        lease: timedelta,
        limit: int,
        session_ids: Sequence[str] | None = None,
    ) -> list[Claim]: ...
    def record(self, results: Sequence[Result]) -> Recorded: ...
    def read_pause(self) -> Pause: ...
    def pause(self, seconds: float | None) -> Pause: ...
    def end_pauses(self, pause: Pause) -> None: ...
    def release(self, claims: Sequence[Claim]) -> None: ...
    def record_run(self, summary: Summary) -> None: ...


class Billing(Protocol):
    """What a pass needs of the billing service; see `core.billing.BillingClient`."""

    async def check(self, billing_checkout_id: str | None) -> Answer: ...


@dataclass(frozen=True, slots=True)
class PassOptions:
    """Why a pass runs and how long it may."""

    reason: Reason
    tick: datetime | None = None
    session_ids: Sequence[str] | None = None  # manual passes only; None: all open sessions
    start_seconds: float = 30.0  # no check begins later than this after the pass did
    total_seconds: float = 50.0  # requests still in flight then are given up


# API Gateway gives up after 29 s; a manual pass answers well before.
MANUAL_SECONDS = 22.0


async def trigger_checkout_session_check(
    store: Store,
    billing: Billing | None,
    settings: Settings,
    *,
    database_thread: Executor,
    session_ids: Sequence[str] | None = None,
) -> Summary:
    """Check all open sessions now, due or not, or just those named; not those in flight elsewhere.

    Ends within MANUAL_SECONDS, whatever billing does, plus the time of a few statements. Raises
    what `check_open_checkout_sessions` raises.
    """
    start_seconds = max(1.0, MANUAL_SECONDS - settings.request_timeout_seconds)
    options = PassOptions(
        Reason.MANUAL,
        session_ids=session_ids,
        start_seconds=start_seconds,
        total_seconds=MANUAL_SECONDS,
    )
    return await check_open_checkout_sessions(
        store, billing, settings, options, database_thread=database_thread
    )


async def check_open_checkout_sessions(
    store: Store,
    billing: Billing | None,
    settings: Settings,
    options: PassOptions,
    *,
    database_thread: Executor,
    choose: Callable[[int, int], int] = random.randint,
) -> Summary:
    """Run one pass and tell what it did.

    `billing` is None when there is no API key: then nothing is claimed and no request is sent.
    Every call of `store` runs on `database_thread`, so that it never holds up the requests.
    `choose(low, high)` is the backoff's jitter.

    Raises:
        StoreError: the database cannot be used. Requests in flight were given up; their sessions
            are checked again when their lease is over.
        ExceptionGroup: a bug met while checking single sessions; every other one was checked.
    """
    return await _Pass(store, billing, settings, options, database_thread, choose).run()


def decide(
    claim: Claim,
    answer: Answer,
    *,
    tick: datetime,
    answered_at: datetime,
    settings: Settings,
    choose: Callable[[int, int], int],
) -> Result:
    """What to record of an answer, and when the session is due again.

    The next due time counts from the tick, or the slot of the claim when a long pass made it later;
    not from the end of the check, which would cost every session its next slot. Only where it has
    passed by then, because billing took so long, it is the first slot after the answer.

    The session's status follows billing's, and an old session that billing has just said to be open
    becomes `timeout`, as far as the settings allow.
    """
    age_seconds = (claim.claimed_at - claim.first_seen_at).total_seconds()
    next_check_at = next_check(
        slot_at(max(claim.claimed_at, tick), settings.interval_seconds),
        interval_seconds=settings.interval_seconds,
        every_seconds=settings.cadence.every_seconds(age_seconds),
        failures=claim.consecutive_failures + 1 if answer.outcome.is_error else 0,
        backoff_max_seconds=settings.backoff_max_seconds,
        choose=choose,
    )
    if next_check_at <= answered_at:
        slot = slot_at(answered_at, settings.interval_seconds)
        next_check_at = slot + timedelta(seconds=settings.interval_seconds)
    new_status = answer.status
    expires_after = settings.expires_after_seconds
    if new_status is SessionStatus.OPEN:
        # Only here: billing has just said that the session is not paid.
        expired = expires_after is not None and age_seconds >= expires_after
        new_status = SessionStatus.TIMEOUT if expired else None
    return Result(
        claim,
        answer.outcome if new_status is None else Outcome.CLOSED,
        answer.status_code,
        next_check_at,
        new_status,
        answer.billing_status,
    )


@dataclass(frozen=True, slots=True)
class _Queued:
    claim: Claim
    claimed: float  # when, by the event loop's clock, as the next one
    begin_by: float


class _Pass:
    def __init__(  # noqa: PLR0917 (made in one place, just above)
        self,
        store: Store,
        billing: Billing | None,
        settings: Settings,
        options: PassOptions,
        database_thread: Executor,
        choose: Callable[[int, int], int],
    ) -> None:
        self._store = store
        self._billing = billing
        self._settings = settings
        self._options = options
        self._database_thread = database_thread
        self._choose = choose
        self._loop = asyncio.get_running_loop()
        self._log = PassLog(settings.log_lines_active)
        self._lease = timedelta(
            seconds=START_WITHIN_SECONDS + settings.request_timeout_seconds + RECORD_WITHIN_SECONDS
        )
        self._batch = CLAIMS_PER_REQUEST * settings.max_concurrency
        self._queue: deque[_Queued] = deque()
        self._queue_is_low = asyncio.Event()
        self._checking: set[asyncio.Task[None]] = set()
        self._out_of_time = asyncio.Event()  # nothing more is claimed or begun
        self._results: list[Result] = []
        self._given_back: list[Claim] = []
        self._settled = asyncio.Event()  # there is something to record or to give back
        self._all_settled = asyncio.Event()
        self._record_now = asyncio.Event()  # more results are not worth waiting for
        self._pause_asked_for: list[float | None] = []  # seconds; None: for as long as we think
        self._normal_again = False
        self._bugs: list[Exception] = []

    async def run(self) -> Summary:
        began = self._loop.time()
        for warning in await self._database(self._store.prepare):
            logger.warning(f"⚠️ {warning}")
        now = await self._database(self._store.now)
        self._tick = self._trusted_tick(now)
        sessions = await self._database(
            self._store.sync_open_sessions, self._tick, self._options.session_ids
        )
        summary = self._summary = Summary(
            self._options.reason,
            now,
            self._options.tick,
            open=sessions.open,
            overdue_seconds=sessions.overdue_seconds,
        )
        self._log.begins(now, sessions.open)
        self._pause = await self._database(self._store.read_pause)
        if self._billing is None:
            logger.warning("⚠️ APIKEY not found in environment variables")
            summary.skipped[Skip.NO_API_KEY] = sessions.open
        elif self._pause.until > now:
            summary.paused_until = self._pause.until
            self._count_skipped(sessions)
        elif sessions.open:
            await self._check_all(self._billing, began)
            self._count_skipped(sessions)
        if self._options.session_ids is not None:
            asked = len(set(self._options.session_ids))
            summary.skipped[Skip.NOT_OPEN] = max(0, asked - sessions.open)
        summary.skipped = +summary.skipped  # without zeros
        summary.duration_seconds = self._loop.time() - began
        await self._database(self._store.record_run, summary)
        self._log.ends(summary)
        if self._bugs:
            raise ExceptionGroup("bugs met while checking sessions", self._bugs)
        return summary

    def _trusted_tick(self, now: datetime) -> datetime:
        """The tick's slot by the loop's clock, unless it is too far from the database's to be it.

        The two clocks differ a little. Where the loop's is ahead, what is due at the tick would
        not be due yet by the database's clock, and would wait for the next one.
        """
        tick = self._options.tick
        if tick is None or abs((now - tick).total_seconds()) > self._settings.interval_seconds:
            return slot_at(now, self._settings.interval_seconds)
        return tick

    async def _check_all(self, billing: Billing, began: float) -> None:
        timers = [
            self._loop.call_at(began + self._options.start_seconds, self._begin_no_more),
            self._loop.call_at(began + self._options.total_seconds, self._give_up),
        ]
        try:
            async with asyncio.TaskGroup() as pass_tasks:
                pass_tasks.create_task(self._record_as_they_settle())
                async with asyncio.TaskGroup() as checks:
                    checks.create_task(self._claim_while_due(billing, checks))
                self._all_settled.set()
                self._record_now.set()
                self._settled.set()
        except ExceptionGroup as failed:
            store_errors, others = failed.split(StoreError)
            if store_errors is None or others is not None:
                raise
            raise _first(store_errors) from None
        except asyncio.CancelledError:
            # The process is asked to stop: hand everything back before it does.
            self._give_back_queue()
            with suppress(StoreError):
                await self._record_settled()
            raise
        finally:
            for timer in timers:
                timer.cancel()

    async def _claim_while_due(self, billing: Billing, checks: asyncio.TaskGroup) -> None:
        while not self._out_of_time.is_set():
            claimed = self._loop.time()
            claims = await self._database(self._claim)
            if self._summary.paused_until is not None:
                self._begin_no_more()
            if not claims:
                return
            received = self._loop.time()
            if received - claimed > RECORD_WITHIN_SECONDS:
                # Too little of the lease is left. The hands are free, so the pass goes on.
                await self._database(self._store.release, claims)
                continue
            # Sessions that failed last time may well hang; the healthy ones go first.
            claims.sort(key=lambda claim: claim.consecutive_failures > 0)
            begin_by = received + START_WITHIN_SECONDS
            self._queue.extend(_Queued(claim, claimed, begin_by) for claim in claims)
            if self._out_of_time.is_set():
                self._give_back_queue()
                return
            self._loop.call_at(begin_by, self._give_back_stuck)
            for _ in range(min(len(claims), self._settings.max_concurrency - len(self._checking))):
                task = checks.create_task(self._check_queued(billing))
                self._checking.add(task)
                task.add_done_callback(self._checking.discard)
            while len(self._queue) > self._batch // 2:
                self._queue_is_low.clear()
                await self._queue_is_low.wait()

    def _claim(self) -> list[Claim]:
        if self._paused():
            return []
        if self._options.reason is Reason.MANUAL:
            return self._store.claim_unchecked(
                since=self._summary.started_at,
                lease=self._lease,
                limit=self._batch,
                session_ids=self._options.session_ids,
            )
        return self._store.claim_due(tick=self._tick, lease=self._lease, limit=self._batch)

    async def _check_queued(self, billing: Billing) -> None:
        while self._queue:
            queued = self._queue.popleft()
            claim = queued.claim
            if len(self._queue) <= self._batch // 2:
                self._queue_is_low.set()
            try:
                answer = await billing.check(claim.billing_checkout_id)
            except asyncio.CancelledError:
                self._given_back.append(claim)
                self._settled.set()
                raise
            except Exception as bug:  # noqa: BLE001 (raised when every other session is settled)
                self._bugs.append(bug)
                continue
            self._settle(queued, answer)

    def _settle(self, queued: _Queued, answer: Answer) -> None:
        took = timedelta(seconds=self._loop.time() - queued.claimed)
        result = decide(
            queued.claim,
            answer,
            tick=self._tick,
            answered_at=queued.claim.claimed_at + took,
            settings=self._settings,
            choose=self._choose,
        )
        if result.new_status is None:  # a change is told when it has been made
            self._log.checked(queued.claim, answer)
        self._summary.outcomes[result.outcome] += 1
        if answer.seconds is not None:
            self._summary.latencies.append(answer.seconds)
        self._results.append(result)
        if answer.outcome is Outcome.RATE_LIMITED:
            self._begin_no_more()
            self._pause_asked_for.append(answer.retry_after)
            self._record_now.set()
        elif not answer.outcome.is_error:
            self._normal_again = True
        self._settled.set()

    async def _record_as_they_settle(self) -> None:
        while not self._all_settled.is_set() or self._settled.is_set():
            await self._settled.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(RECORD_EVERY_SECONDS):
                    await self._record_now.wait()
            self._settled.clear()
            if not self._all_settled.is_set():
                self._record_now.clear()
            await self._record_settled()

    async def _record_settled(self) -> None:
        asked_for, self._pause_asked_for = self._pause_asked_for, []
        results, self._results = self._results, []
        given_back, self._given_back = self._given_back, []
        if asked_for:
            # The longest that was asked for; a number of seconds counts more than none.
            seconds = max((s for s in asked_for if s is not None), default=None)
            pause = await self._database(self._store.pause, seconds)
            self._summary.paused_until = pause.until
        elif not self._out_of_time.is_set() and await self._database(self._paused):
            self._begin_no_more()  # another worker was told to
        if results:
            recorded = await self._database(self._store.record, results)
            self._log.changed(recorded.changed)
            self._summary.status_changes += len(recorded.changed)
            self._summary.unpublished += recorded.unpublished
        if given_back:
            await self._database(self._store.release, given_back)
        if self._normal_again and self._pause.count and self._summary.paused_until is None:
            await self._database(self._store.end_pauses, self._pause)
            self._pause = Pause(self._pause.until, 0)

    def _paused(self) -> bool:
        """Whether any worker's requests have led to a pause since this pass began."""
        pause = self._store.read_pause()
        if pause.until > self._pause.until:
            self._summary.paused_until = pause.until
            return True
        return False

    def _begin_no_more(self) -> None:
        self._out_of_time.set()
        self._give_back_queue()

    def _give_up(self) -> None:
        self._begin_no_more()
        for task in self._checking:
            task.cancel()

    def _give_back_stuck(self) -> None:
        if self._queue and self._queue[0].begin_by <= self._loop.time():
            # This pass has no free hands, so it claims nothing more either.
            self._begin_no_more()

    def _give_back_queue(self) -> None:
        self._given_back.extend(queued.claim for queued in self._queue)
        self._queue.clear()
        self._queue_is_low.set()
        self._settled.set()

    def _count_skipped(self, sessions: OpenSessions) -> None:
        skipped = self._summary.skipped
        skipped[Skip.IN_FLIGHT] = sessions.in_flight
        if self._options.reason is Reason.TICK:
            skipped[Skip.NOT_DUE] = sessions.not_due
        # What is left was for other passes to check, or for the next one.
        left = max(0, sessions.open - self._summary.checked - skipped.total())
        if self._summary.paused_until is not None:
            skipped[Skip.PAUSED] = left
        elif self._out_of_time.is_set():
            skipped[Skip.DEADLINE] = left
        else:
            skipped[Skip.IN_FLIGHT] += left

    async def _database[**P, T](self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        began = self._loop.time()
        result = await self._loop.run_in_executor(
            self._database_thread, partial(step, *args, **kwargs)
        )
        logger.debug(f"Database: {step.__name__} took {(self._loop.time() - began) * 1000:.1f} ms")
        return result


def _first(group: BaseExceptionGroup[StoreError]) -> StoreError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")

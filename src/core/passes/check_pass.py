"""The check pass: claim what is due, ask billing about it in parallel, record what was learned.

Any number of passes may run at once, in any number of processes. The store hands each due session
to one of them (a claim, for the length of a lease), so no session is checked twice, and whatever a
dead pass had claimed comes back when its lease is over. Of the passes of a tick one leads: beside
its checks it counts the open sessions, and starts the workers that the tick needs besides.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple, Protocol

from core.domain.cadence import slot_at
from core.domain.decision import decide
from core.domain.model import Answer, Claim, Reason, Skip, Summary
from core.log import PassLog, logger
from core.passes.scaling import Crew, StartWorker
from core.passes.writer import DatabaseThread, Own, Recorder
from core.settings import Settings
from core.store.reconcile import Census
from core.store.store import Store, View

# A claimed session whose request has not begun after this time is given back: this pass has no
# free hands, and another one may have.
BEGIN_WITHIN_SECONDS = 5.0
# What a lease holds beyond that and the request itself: for the database on a slow day, to return
# the claim and to record the result.
RECORD_WITHIN_SECONDS = 5.0
# Sessions claimed at once, for each request in flight: few at first, for what is claimed is kept
# from workers that have free hands. Where billing is quick, one transaction claims many: a batch
# that was begun quickly is followed by one of twice the size, one that was not in time by half.
FIRST_CLAIMS_PER_REQUEST, MOST_CLAIMS_PER_REQUEST = 5, 20
QUICKLY_SECONDS = 0.2
# The next batch is claimed when this one will last so many times as long as a claim takes: later it
# would be waited for, earlier it would be kept from workers that have free hands.
CLAIM_AHEAD = 4
# A pass that waits for its last answers looks so long after the next slot whether that slot's own
# workers have left it anything to do.
HELP_AFTER_SECONDS = 0.25


class Billing(Protocol):
    """What a pass needs of the billing service; see `core.billing.client.BillingClient`."""

    async def check(self, billing_checkout_id: str | None) -> Answer: ...


class PassOptions(NamedTuple):
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
    start_worker: StartWorker | None = None,
    choose: Callable[[int, int], int] = random.randint,
) -> Summary:
    """Run one pass and tell what it did.

    `billing` is None when there is no API key: then nothing is claimed and no request is sent.
    Every call of `store` runs on `database_thread`, so that it never holds up the requests.
    `start_worker` starts one more pass of the same tick elsewhere; None: this is the only worker.
    `choose(low, high)` is the backoff's jitter.

    Raises:
        StoreError: the database cannot be used. Requests in flight were given up; their sessions
            are checked again when their lease is over.
        ExceptionGroup: a bug met while checking single sessions; every other one was checked.
    """
    database = DatabaseThread(database_thread)
    for warning in await database.run(store.prepare):
        logger.warning(f"⚠️ {warning}")
    began = asyncio.get_running_loop().time()
    by_tick = options.reason is Reason.TICK
    view = await database.run(
        store.view, options.tick, interval_seconds=settings.interval_seconds, may_lead=by_tick
    )
    summary = Summary(
        options.reason,
        view.now,
        options.tick,
        led=view.leads,
        open=view.last_count.open,
        overdue_seconds=view.overdue_seconds,
        paused_until=view.paused_until,
    )
    may_check = billing is not None and summary.paused_until is None
    if by_tick and not view.leads and not (may_check and view.due):
        return summary  # the tick's leader has left this worker nothing to do
    under_way = await database.run(store.runs.under_way) if by_tick else 0
    if under_way >= settings.max_workers:
        may_check = False
        if not view.leads:
            return summary
    crew = Crew(start_worker, settings, under_way + 1) if start_worker and view.leads else None
    one_pass = _Pass(store, billing, settings, options, database, view, summary, crew, choose)
    return await one_pass.run(began, may_check=may_check)


class _Batch(NamedTuple):
    """Claims that wait for a free hand. Times are by the event loop's clock."""

    claims: deque[Claim]
    asked: float
    came: float
    begin_by: float


class _Pass:
    def __init__(  # noqa: PLR0917 (made in one place, just above)
        self,
        store: Store,
        billing: Billing | None,
        settings: Settings,
        options: PassOptions,
        database: DatabaseThread,
        view: View,
        summary: Summary,
        crew: Crew | None,
        choose: Callable[[int, int], int],
    ) -> None:
        self._store = store
        self._billing = billing
        self._settings = settings
        self._options = options
        self._database = database
        self._view = view
        self._summary = summary
        self._crew = crew
        self._choose = choose
        self._loop = asyncio.get_running_loop()
        # A manual pass counts whatever it costs: it tells a person what it did not check, and why.
        manual = options.reason is Reason.MANUAL
        self._counts = manual or (view.leads and view.may_count)
        self._log = PassLog(most_active=settings.log_lines_active, waits=self._counts)
        self._recorder = Recorder(store, database, summary, self._log, view.pause)
        self._tasks = asyncio.TaskGroup()
        self._hands = asyncio.Semaphore(settings.max_concurrency)
        self._lease = timedelta(
            seconds=BEGIN_WITHIN_SECONDS + settings.request_timeout_seconds + RECORD_WITHIN_SECONDS
        )
        self._answers = 0
        self._elsewhere = Counter[Skip]()  # sessions that were not for this pass to check
        self._out_of_time = False
        self._bugs: list[Exception] = []

    async def run(self, began: float, *, may_check: bool) -> Summary:
        """Run the pass, which began at that time of the event loop's clock."""
        self._began = began
        self._begin_until = began + self._options.start_seconds
        summary = self._summary
        run_id = await self._database.run(self._store.runs.begin, summary)
        if self._view.leads and not self._counts:
            self._log.begins(self._view.now, summary.open)
        if self._billing is None:
            logger.warning("⚠️ APIKEY not found in environment variables")
        try:
            async with self._recorder.running(run_id, began):
                await self._work(may_check=may_check)
        finally:
            if self._counts and not summary.counted:
                self._log.begins(self._view.now, summary.open)
        self._count_skipped()
        summary.duration_seconds = self._loop.time() - began
        await self._database.run(self._store.runs.end, run_id, summary)
        self._log.ends(summary)
        if self._bugs:
            raise ExceptionGroup("bugs met while checking sessions", self._bugs)
        return summary

    async def _work(self, *, may_check: bool) -> None:
        ends = self._began + self._options.total_seconds
        try:
            async with asyncio.timeout_at(ends), self._tasks as tasks:
                # In this order, on the database's thread: nothing is counted on the way to a check.
                size = FIRST_CLAIMS_PER_REQUEST * self._settings.max_concurrency
                ahead = tasks.create_task(self._claim(size)) if may_check else None
                census = tasks.create_task(self._take_census()) if self._counts else None
                if ahead is not None:
                    await self._claim_and_begin(ahead, size, census)
        except TimeoutError:
            self._out_of_time = True

    async def _claim_and_begin(
        self, ahead: asyncio.Task[_Batch], size: int, census: asyncio.Task[bool] | None
    ) -> None:
        """Begin a check whenever a hand is free, and claim the next batch meanwhile."""
        in_flight, share_ahead = self._settings.max_concurrency, 0.5
        while True:
            batch = await ahead
            if not batch.claims:
                adopted, census = census is not None and await census, None
                if not adopted and not await self._is_needed_in_the_next_slot():
                    return
                ahead = self._tasks.create_task(self._claim(size))
                continue
            answers, began = self._answers, self._loop.time()
            await self._begin(batch, leaving=int(share_ahead * len(batch.claims)))
            ahead = self._tasks.create_task(self._claim(size))
            await self._begin(batch, leaving=0)
            lasted, waited = self._loop.time() - began, batch.came - batch.asked
            share_ahead = min(1.0, CLAIM_AHEAD * waited / lasted) if lasted else 1.0
            if batch.claims:
                self._recorder.give_back(batch.claims)
                # Without a single answer all requests hang: the next pass has free hands.
                hang = self._hands.locked() and self._answers == answers
                if hang or not self._may_begin(self._begin_until):
                    self._recorder.give_back((await ahead).claims)
                    self._out_of_time = True
                    return
                size = max(in_flight, size // 2)
            elif lasted < QUICKLY_SECONDS:
                size = min(size * 2, MOST_CLAIMS_PER_REQUEST * in_flight)

    async def _claim(self, limit: int) -> _Batch:
        asked = self._loop.time()
        queue = self._store.queue
        if self._options.reason is Reason.MANUAL:
            claim = partial(
                queue.claim_unchecked,
                since=self._view.now,
                lease=self._lease,
                limit=limit,
                session_ids=self._options.session_ids,
            )
        else:
            claim = partial(queue.claim_due, tick=self._view.tick, lease=self._lease, limit=limit)
        claims = await self._recorder.claim(claim)
        # Sessions that failed last time may well hang; the healthy ones go first.
        claims.sort(key=lambda claim: claim.consecutive_failures > 0)
        begin_by = min(asked + BEGIN_WITHIN_SECONDS, self._begin_until)
        return _Batch(deque(claims), asked, self._loop.time(), begin_by)

    async def _begin(self, batch: _Batch, *, leaving: int) -> None:
        """Begin as many checks of the batch as find a free hand in time, but for so many."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(batch.begin_by):
                while len(batch.claims) > leaving:
                    await self._hands.acquire()
                    if not self._may_begin(batch.begin_by):
                        self._hands.release()
                        return
                    self._tasks.create_task(self._check(batch.claims.popleft(), batch.asked))

    def _may_begin(self, until: float) -> bool:
        return self._loop.time() < until and not self._recorder.paused

    async def _is_needed_in_the_next_slot(self) -> bool:
        """Whether this pass has requests in flight until then anyway, and hands that are free.

        A pass whose last requests hang would otherwise be a worker that does nothing, and that
        counts among those that there may be.
        """
        if self._options.reason is Reason.MANUAL:
            return False
        interval = self._settings.interval_seconds
        now = self._view.now + timedelta(seconds=self._loop.time() - self._began)
        next_slot = slot_at(now, interval) + timedelta(seconds=interval)
        free = 0
        try:
            async with asyncio.timeout((next_slot - now).total_seconds() + HELP_AFTER_SECONDS):
                while free < self._settings.max_concurrency:
                    await self._hands.acquire()
                    free += 1
        except TimeoutError:
            return self._may_begin(self._begin_until)
        finally:
            for _ in range(free):
                self._hands.release()
        return False

    async def _check(self, claim: Claim, asked: float) -> None:
        assert self._billing is not None  # noqa: S101 (without it nothing is claimed)
        try:
            answer = await self._billing.check(claim.billing_checkout_id)
            self._answers += 1
            took = timedelta(seconds=self._loop.time() - asked)
            result = decide(
                claim,
                answer,
                tick=self._view.tick,
                answered_at=claim.claimed_at + took,
                settings=self._settings,
                choose=self._choose,
            )
            self._recorder.settle(result)
            if answer.seconds is not None:
                self._summary.latencies.append(answer.seconds)
            if self._crew is not None and self._crew.hears(answer):
                self._tasks.create_task(self._start_workers(self._crew))
            if result.new_status is None:  # a change is told when it has been made
                self._log.checked(claim, answer)
        except Exception as bug:  # noqa: BLE001 (raised when every other session is settled)
            self._bugs.append(bug)
        finally:
            self._hands.release()

    async def _take_census(self) -> bool:
        """Count the open sessions, a piece at a time; returns whether new ones were adopted."""
        census = self._store.census(self._view.tick, self._options.session_ids)
        more, own = True, Own()
        while more:
            more, own = await self._database.run(self._count_piece, census)
        await self._database.run(self._store.keep, census)
        self._summary.counted = True
        self._summary.open = census.count.open + own.closed
        self._elsewhere[Skip.IN_FLIGHT] = max(0, census.count.in_flight - own.held)
        if self._options.reason is Reason.TICK:
            self._elsewhere[Skip.NOT_DUE] = max(0, census.count.not_due - own.checked)
        self._log.begins(self._view.now, self._summary.open)
        return census.adopted > 0

    def _count_piece(self, census: Census) -> tuple[bool, Own]:
        # In one step on the database's thread: what of the count is of this pass's own making.
        return census.next_piece(), self._recorder.own()

    async def _start_workers(self, crew: Crew) -> None:
        due = await self._database.run(
            self._store.queue.count_due, tick=self._view.tick, most=crew.most_due
        )
        self._summary.workers_started = await crew.start(due, self._view.tick)

    def _count_skipped(self) -> None:
        """Tell why the other open sessions were not checked, where this pass has counted them."""
        summary, skipped = self._summary, self._summary.skipped
        if self._options.session_ids is not None:
            asked = len(set(self._options.session_ids))
            skipped[Skip.NOT_OPEN] = max(0, asked - summary.open)
        if self._billing is None:
            skipped[Skip.NO_API_KEY] = summary.open
        elif summary.counted:
            skipped.update(self._elsewhere)
            left = max(0, summary.open - summary.checked - self._elsewhere.total())
            if summary.paused_until is not None:
                skipped[Skip.PAUSED] += left
            elif self._out_of_time:
                skipped[Skip.DEADLINE] += left
            else:  # the others, or the next pass, have them
                skipped[Skip.IN_FLIGHT] += left
        summary.skipped = +skipped  # without zeros

"""The check pass: claim what is due, ask billing about it in parallel, record the answers.

Any number of passes may work at once, in any number of processes. The store hands each due session
to one of them (a claim, for the length of a lease), so no session is checked twice, and the claims
of a dead pass expire. One pass of each tick leads: beside its checks it reconciles the queue with
the shop's open sessions, and starts the workers that the tick needs besides itself.
"""

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import NamedTuple, Protocol

from core.database.thread import DatabaseThread
from core.domain.cadence import slot_at
from core.domain.decision import decide
from core.domain.model import Answer, Claim, Decision, Outcome, Reason, Recheck, Skip
from core.domain.other_monitors import OTHER_MONITOR
from core.domain.rate import (
    MIN_BUDGET_PACE,
    MIN_PACE,
    SPREAD_SHARE,
    UNLIMITED_SPREAD_SHARE,
    demand,
)
from core.domain.summary import Summary
from core.domain.waiting import Waiting
from core.errors import StoreError
from core.log import PassLog, logger, shown
from core.passes.held_claims import HOLD_SECONDS
from core.passes.late_payments import in_turn, look_for_late_payments
from core.passes.pause import SharedPause
from core.passes.scaling import Scaling, StartWorker
from core.passes.writer import WRITE_EVERY_SECONDS, Progress, Writer
from core.settings import Settings
from core.store.reconcile import Reconciliation
from core.store.store import Store, View

# A claimed session whose request has not begun after this time is given back: this pass has no free
# permits, and another one may have some.
BEGIN_WITHIN_SECONDS = 5.0
# A lease lasts for this long besides that time and the request itself: for a slow database to
# return the claim and to record the result.
RECORD_WITHIN_SECONDS = 5.0
# Sessions claimed at once, for each request in flight. The first claim is small, because what is
# claimed is kept from workers that have free permits. If billing is quick, one transaction claims
# many: after a claim whose checks began quickly comes one of twice the size, after one whose checks
# did not begin in time one of half the size.
FIRST_CLAIMS_PER_REQUEST, MAX_CLAIMS_PER_REQUEST = 5, 20
QUICKLY_SECONDS = 0.2
# The next claim is made when this one will last as many times as long as a claim takes. Later,
# the pass would wait for it; earlier, it would be kept from workers that have free permits.
CLAIM_AHEAD = 4
# A pass that waits for its last answers looks this long after the next slot whether that slot's own
# workers have left it anything to do.
HELP_AFTER_SECONDS = 0.25
# A pass counts as under way until its end is recorded. One that could end this shortly before a
# slot stays for it, because that slot's worker might still count it.
END_SECONDS = 0.05
# Under a budget, a claim covers what may leave within this time: a claim is held until its check
# begins, and is kept from workers that could begin it.
CLAIM_AHEAD_SECONDS = 1.0
# The next claim is made this long before the last one is worked off, so that the budget is used
# while the database is busy.
BEFORE_SECONDS = 0.5
# When a request is limited, the answers of this long are counted before the rate is lowered.
COLLECT_SECONDS = 0.05
# A 429 may be about one session only, for example about a lock at Stripe. It is taken for that if
# the session is limited this often in a row, or was so last time, while of the last others only one
# or no larger share is limited.
OWN_LIMITS, OTHERS, MAX_LIMITED_SHARE = 3, 50, 0.3
# A manual pass, and a leader under a budget, wait this long for batches that others hold. By then
# all but those that billing has not answered about have been given back: HOLD_SECONDS, and two
# writes.
WAIT_FOR_BATCHES_SECONDS = HOLD_SECONDS + 2 * WRITE_EVERY_SECONDS
# API Gateway gives up after 29 s; a manual pass ends well before.
MANUAL_SECONDS = 22.0


class Billing(Protocol):
    """What a pass needs of the billing service; see `core.billing.client.BillingClient`."""

    async def check(self, billing_checkout_id: str | None) -> Answer: ...


class PassOptions(NamedTuple):
    """Why a pass starts, and how long it may take."""

    reason: Reason
    tick: datetime | None = None
    helps: bool = False  # started by the tick's leader; it never leads, nor starts others
    session_ids: Sequence[str] | None = None  # manual passes only; None: all open sessions
    start_seconds: float = 30.0  # no check begins later than this after the pass did
    total_seconds: float = 50.0  # requests still in flight then are given up


async def trigger_checkout_session_check(
    store: Store,
    billing: Billing | None,
    settings: Settings,
    *,
    database_thread: Executor,
    session_ids: Sequence[str] | None = None,
) -> Summary:
    """Check all open sessions now, due or not, or just those named; none that is in flight.

    Ends within MANUAL_SECONDS, plus the time of a few statements. Raises what
    `check_open_checkout_sessions` raises.
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
    """Make one pass and return what it did.

    `billing` is None if there is no API key: then nothing is claimed and no request is sent.
    Every call of `store` runs on `database_thread`, so that it never delays the requests.
    `start_worker` starts another worker for the same tick; None: this is the only worker.
    `choose(low, high)` draws the backoff's jitter.

    Raises:
        StoreError: the database cannot be used. Requests in flight were given up; their sessions
            are checked again when their lease is over.
    """
    database = DatabaseThread(database_thread)
    for warning in await database.run(store.prepare):
        logger.warning(f"⚠️ {warning}")
    began = asyncio.get_running_loop().time()
    by_tick = options.reason is Reason.TICK
    view = await database.run(store.look, options.tick, interval_seconds=settings.interval_seconds)
    may_lead = by_tick and not options.helps
    leads = may_lead and await database.run(store.take_lead, view)
    summary = Summary(
        options.reason,
        view.now,
        options.tick,
        led=leads,
        open=view.last_counts.open,
        failing=view.last_counts.failing,
        overdue_seconds=view.overdue_seconds,
        paused_until=view.paused_until,
    )
    next_slot = view.tick + view.interval
    may_check = billing is not None and (view.paused_until is None or view.paused_until < next_slot)
    if may_lead and not leads and view.state.budget:
        may_check = False  # one worker sends what billing allows, or the leader starts more
    if by_tick and not leads and not (may_check and view.has_due):
        # The tick's leader has left this worker nothing to do.
        await _show_monitor(store, database, view, options, summary)
        return summary
    under_way = await database.run(store.history.count_under_way) if by_tick else 0
    # Under a budget, the older passes hand over to this one.
    if under_way >= settings.max_workers and not (leads and view.state.budget):
        may_check = False
        if not leads:
            await _show_monitor(store, database, view, options, summary)
            return summary
    latency = view.state.budget.latency if view.state.budget else 0.0
    scaling = (
        Scaling(start_worker, settings, under_way + 1, latency) if start_worker and leads else None
    )
    check_pass = _Pass(
        store, settings, options, database, view, summary, scaling, under_way, choose
    )
    summary = await check_pass.complete(began, billing, may_check=may_check)
    if leads and view.tick.second < settings.interval_seconds:  # one slot of each minute
        await _log_other_monitors(store, database)
        if billing is not None and may_check and summary.paused_until is None:
            known_limit = settings.billing_max_per_second
            await look_for_late_payments(
                store.late_payments,
                in_turn(billing.check, store.state, database, known_limit=known_limit),
                database,
                at_once=settings.max_concurrency,
                until=began + options.start_seconds,
            )
    return summary


async def _show_monitor(
    store: Store, database: DatabaseThread, view: View, options: PassOptions, summary: Summary
) -> None:
    """Record, once a minute, that this monitor exists if one with other settings does its work."""
    by_others = not options.helps and store.others.differ(view.newest_settings)
    if by_others and await database.run(store.others.show_this, summary):
        await _log_other_monitors(store, database)


async def _log_other_monitors(store: Store, database: DatabaseThread) -> None:
    with suppress(StoreError):  # the pass is complete; the next one raises it
        for other in await database.run(store.others.find):
            logger.warning(f"⚠️ {OTHER_MONITOR}: {shown(str(other))}")


class _Waiting(NamedTuple):
    """Claims that wait for a permit. Times are by the event loop's clock."""

    claims: deque[Claim]
    requested: float
    received: float
    begin_by: float
    paused: bool  # when it was requested, or when it came


class _Beginning(NamedTuple):
    """The claims whose checks are being begun, until so many remain."""

    waiting: _Waiting
    remaining: int


@dataclass(slots=True)
class _Tally:
    """What a pass has done so far; only the pass changes it."""

    open: int
    counted: bool = False
    last_answer_at: float = 0.0  # by the event loop's clock
    latencies: list[float] = field(default_factory=list)  # seconds, one for each request
    elsewhere: Counter[Skip] = field(default_factory=Counter)  # not for this pass to check
    workers_started: int = 0
    waiting: Waiting | None = None  # None: not read
    not_open: int = 0  # of those asked for by id
    out_of_time: bool = False
    rate_limited: int = 0  # requests that billing limited, and not because of their sessions
    others: deque[bool] = field(default_factory=lambda: deque(maxlen=OTHERS))  # limited, or not


class _Pass:
    def __init__(  # noqa: PLR0917 (made in one place, just above)
        self,
        store: Store,
        settings: Settings,
        options: PassOptions,
        database: DatabaseThread,
        view: View,
        summary: Summary,
        scaling: Scaling | None,
        under_way: int,
        choose: Callable[[int, int], int],
    ) -> None:
        self._store = store
        self._settings = settings
        self._rules = settings.check_rules()
        self._options = options
        self._database = database
        self._view = view
        self._at_start = summary
        self._scaling = scaling
        self._choose = choose
        self._loop = asyncio.get_running_loop()
        # A manual pass always counts: it tells a person what it did not check, and why.
        manual = options.reason is Reason.MANUAL
        self._reconciles = manual or (summary.led and view.may_reconcile)
        self._log = PassLog(
            max_active=settings.log_lines_active,
            waits=self._reconciles,
            sent_headers=settings.headers_to_name,
        )
        self._demand = demand(view.last_counts.ages, settings.cadence, settings.interval_seconds)
        self._pause = SharedPause(
            store.state,
            paused_until=view.paused_until,
            now=view.now,
            known_limit=settings.billing_max_per_second,
            budget_pace=self._budget_pace(),
        )
        self._writer = Writer(store, database, self._pause, self._log)
        self._tally = _Tally(view.last_counts.open)
        self._tasks = asyncio.TaskGroup()
        self._permits = asyncio.Semaphore(settings.max_concurrency)
        self._beginning: _Beginning | None = None
        self._claimed = 0
        self._share: float | None = None  # requests a second that this pass began lately
        self._workers = under_way + 1
        self._gave_back = False
        self._looked_again = False
        self._sharing_limit = asyncio.Lock()
        self._lease = timedelta(
            seconds=BEGIN_WITHIN_SECONDS + settings.request_timeout_seconds + RECORD_WITHIN_SECONDS
        )

    async def complete(self, began: float, billing: Billing | None, *, may_check: bool) -> Summary:
        """Make the pass, which began at that time of the event loop's clock."""
        self._began = began
        self._begin_until = began + self._options.start_seconds
        self._first_request_at = began
        tally = self._tally
        pass_id = await self._database.run(self._store.history.begin, self._at_start)
        if self._at_start.led and not self._reconciles:
            self._log.start(self._view.now, tally.open)
        if billing is None:
            logger.warning("⚠️ APIKEY not found in environment variables")
        ends = began + self._options.total_seconds
        try:
            async with self._writer.running(pass_id, began, ends):
                await self._work(billing if may_check else None, ends)
        except BaseException:
            await self._end_early(pass_id, has_api_key=billing is not None)
            raise
        finally:
            if self._reconciles and not tally.counted:
                self._log.start(self._view.now, tally.open)
        summary = self._summary(has_api_key=billing is not None)
        await self._database.run_to_end(self._store.history.end, pass_id, summary)
        self._log.end(summary)
        return summary

    async def _end_early(self, pass_id: int, *, has_api_key: bool) -> None:
        """Record the end of a pass that failed, so that it does not count as under way."""
        summary = self._summary(has_api_key=has_api_key)
        with suppress(StoreError):  # most likely the reason why it failed
            await self._database.run_to_end(self._store.history.end, pass_id, summary)

    async def _work(self, billing: Billing | None, ends: float) -> None:
        """Check what is due, unless `billing` is None, and reconcile meanwhile."""
        try:
            async with asyncio.timeout_at(ends), self._tasks as tasks:
                # In this order on the database's thread: claims do not wait for counting.
                size = FIRST_CLAIMS_PER_REQUEST * self._settings.max_concurrency
                first = tasks.create_task(self._claim_more(size)) if billing else None
                if self._at_start.led:
                    tasks.create_task(self._read_waiting())
                reconciling = tasks.create_task(self._reconcile()) if self._reconciles else None
                if billing and self._scaling and self._scaling.knows_latency:
                    tasks.create_task(self._start_workers(self._scaling))
                if billing and first:
                    await self._claim_and_begin(billing, first, size, reconciling)
        except TimeoutError:
            self._tally.out_of_time = True

    async def _claim_and_begin(
        self,
        billing: Billing,
        next_claims: asyncio.Task[_Waiting],
        size: int,
        reconciling: asyncio.Task[bool] | None,
    ) -> None:
        """Begin a check whenever a permit is free, and claim more meanwhile."""
        max_in_flight, share_ahead = self._settings.max_concurrency, 0.5
        while True:
            waiting = await next_claims
            if not waiting.claims:
                made_due, reconciling = reconciling is not None and await reconciling, None
                if not await self._pause_is_over() or self._has_handed_over:
                    return
                if not (self._gave_back or made_due or waiting.paused):
                    needed = await self._is_needed_in_next_slot(waiting.requested)
                    if not (needed or self._gave_back):
                        return
                if self._gave_back:  # maybe after this claim was made
                    self._gave_back = False
                    await self._writer.wait_until_given_back()
                next_claims = self._tasks.create_task(self._claim_more(size))
                continue
            began, count = self._loop.time(), len(waiting.claims)
            ahead = max(int(share_ahead * count), self._begun_within(BEFORE_SECONDS))
            await self._begin(billing, waiting, remaining=ahead)
            next_claims = self._tasks.create_task(self._claim_more(size))
            await self._begin(billing, waiting, remaining=0)
            lasted, waited = self._loop.time() - began, waiting.received - waiting.requested
            share_ahead = min(1.0, CLAIM_AHEAD * waited / lasted) if lasted else 1.0
            self._share = max(1.0, (count - len(waiting.claims)) / max(lasted, QUICKLY_SECONDS))
            if waiting.claims:
                self._give_back(waiting.claims)
                # If no answer comes, all requests hang: the next pass has free permits.
                silent = self._loop.time() - max(self._tally.last_answer_at, self._first_request_at)
                hang = self._permits.locked() and silent >= BEGIN_WITHIN_SECONDS
                late = self._loop.time() >= self._begin_until
                if hang or late or not await self._pause_is_over():
                    self._give_back((await next_claims).claims)
                    self._tally.out_of_time = True
                    return
                size = max(max_in_flight, size // 2)
            elif lasted < QUICKLY_SECONDS:
                size = min(size * 2, MAX_CLAIMS_PER_REQUEST * max_in_flight)

    def _give_back(self, claims: Collection[Claim]) -> None:
        """Give back claims whose checks cannot begin here."""
        self._writer.give_back(claims)
        self._pause.gone(len(claims))
        self._gave_back = True

    def _now(self) -> datetime:
        """The database's clock, by the event loop's."""
        return self._view.now + timedelta(seconds=self._loop.time() - self._began)

    @property
    def _has_handed_over(self) -> bool:
        """Whether a later tick's leader checks what is left, under the same budget."""
        newest = self._pause.newest_tick
        if newest is None or self._pause.rate is None or self._options.reason is Reason.MANUAL:
            return False
        # A later one came from a clock that was wrong.
        return self._view.tick < newest <= self._now() + 2 * self._view.interval

    async def _pause_is_over(self) -> bool:
        """Wait for the end of a pause before the next slot; returns false for a longer one."""
        interval = self._settings.interval_seconds
        now = self._now()
        next_slot = slot_at(max(now, self._view.tick), interval) + timedelta(seconds=interval)
        until = min(self._begin_until, self._loop.time() + (next_slot - now).total_seconds())
        while self._pause.in_force:  # another worker may have extended it meanwhile
            if self._pause.resumes_at >= until:
                return False
            await asyncio.sleep(self._pause.resumes_at - self._loop.time())
            await self._database.run(self._pause.read)
        return True

    async def _claim_more(self, limit: int) -> _Waiting:
        requested = self._loop.time()
        paused = self._pause.in_force
        claims = await self._database.run(self._claim, limit)
        self._claimed += len(claims)
        self._pause.pace = self._pace()
        paused |= self._pause.in_force
        if self._pause.rate is not None:  # a batch may be given back half-way
            claims.sort(key=lambda claim: claim.due_at or claim.claimed_at)
        # Sessions that failed last time may well hang; the healthy ones go first.
        claims.sort(key=lambda claim: claim.consecutive_failures > 0)
        begin_by = min(requested + BEGIN_WITHIN_SECONDS, self._begin_until)
        return _Waiting(deque(claims), requested, self._loop.time(), begin_by, paused)

    def _pace(self) -> float:
        """At how many requests a second all workers together work off what is due."""
        if not self._view.state.reconciled_at:  # how many there are is not known yet
            return math.inf
        sessions = max(self._tally.open, self._claimed)
        spread_seconds = UNLIMITED_SPREAD_SHARE * self._settings.interval_seconds
        return max(MIN_PACE, sessions / spread_seconds)

    def _budget_pace(self) -> float:
        """The same under a budget, as long as nothing is late."""
        is_late = self._view.overdue_seconds > self._settings.interval_seconds
        if self._options.reason is Reason.MANUAL or is_late:
            return math.inf
        return max(MIN_BUDGET_PACE, self._demand / SPREAD_SHARE) if self._demand else math.inf

    def _begun_within(self, seconds: float) -> int:
        """How many checks this pass may begin in that time under a budget; 0 without one."""
        if self._pause.rate is None:
            return 0
        share = self._share or self._pause.rate / self._workers
        by_permits = self._settings.max_concurrency / max(self._pause.latency, 0.001)
        return math.ceil(min(self._pause.rate, 2 * share, by_permits) * seconds)

    def _claim(self, limit: int) -> list[Claim]:
        """Claim sessions on the database's thread, unless billing may not be asked."""
        now = self._pause.read()
        if self._writer.closing or self._pause.in_force or self._has_handed_over:
            return []
        if self._pause.rate is not None:
            limit = min(limit, max(1, self._begun_within(CLAIM_AHEAD_SECONDS)))
        queue, options = self._store.queue, self._options
        if options.reason is Reason.MANUAL:
            claimed = queue.claim_unchecked(
                now,
                since=self._view.now,
                lease=self._lease,
                limit=limit,
                session_ids=options.session_ids,
            )
        else:
            claimed = queue.claim_due(now, tick=self._view.tick, lease=self._lease, limit=limit)
        self._writer.hold(claimed)
        self._pause.claimed(len(claimed.claims))
        return claimed.claims

    async def _begin(self, billing: Billing, waiting: _Waiting, *, remaining: int) -> None:
        """Begin checks until `remaining` claims are left or time is up."""
        self._pause.begin_by = waiting.begin_by
        self._beginning = _Beginning(waiting, remaining)
        try:
            async with asyncio.timeout_at(waiting.begin_by):
                while len(waiting.claims) > remaining:
                    await self._writer.wait_for_room()
                    await self._permits.acquire()
                    turn = self._pause.takes_turn() or await self._may_leave(waiting.begin_by)
                    if not turn:
                        return
                    self._pause.gone(1)
                    checks = self._check_and_go_on(billing, waiting.claims.popleft(), waiting)
                    self._tasks.create_task(checks)
        except TimeoutError:
            pass
        finally:
            self._beginning = None

    async def _check_and_go_on(self, billing: Billing, claim: Claim, waiting: _Waiting) -> None:
        """Check a session, then others: a task for each of them would cost as much as to decide."""
        try:
            while True:
                await self._check(billing, claim, waiting.requested)
                following = self._following()
                if following is None:
                    return
                claim, waiting = following
        finally:
            self._permits.release()

    def _following(self) -> tuple[Claim, _Waiting] | None:
        """A claim whose check may begin now. The last one is left to `_begin`, which then ends."""
        if self._beginning is None:
            return None
        waiting, remaining = self._beginning
        if len(waiting.claims) <= remaining + 1 or not self._writer.has_room:
            return None
        if not self._pause.takes_turn():
            return None
        self._pause.gone(1)
        return waiting.claims.popleft(), waiting

    async def _may_leave(self, until: float) -> bool:
        """Wait for the turn of one request; it keeps its permit only if it may leave then."""
        leaves = False
        try:
            leaves = await self._pause.wait_for_turn() and self._may_begin(until)
            return leaves
        finally:
            if not leaves:
                self._permits.release()

    def _may_begin(self, until: float) -> bool:
        return self._loop.time() < until and not self._pause.in_force

    async def _is_needed_in_next_slot(self, last_claim: float) -> bool:
        """Whether a slot has begun since the last claim, and this pass has free permits in it.

        A pass whose last requests hang counts towards MAX_WORKERS, and may have kept that slot's
        own worker from working. Its `last_claim` is a time by the event loop's clock.
        """
        manual = self._options.reason is Reason.MANUAL
        # Under a budget, what earlier passes still hold is left to this one.
        takes_over = self._at_start.led and self._pause.rate is not None
        if (manual or takes_over) and await self._batches_are_held():
            return True
        if manual:
            return False
        interval = self._settings.interval_seconds
        now = self._now()
        claimed = self._view.now + timedelta(seconds=last_claim - self._began)
        next_slot = slot_at(claimed, interval) + timedelta(seconds=interval)
        free = 0
        try:
            async with asyncio.timeout((next_slot - now).total_seconds() + HELP_AFTER_SECONDS):
                while free < self._settings.max_concurrency:
                    await self._permits.acquire()
                    free += 1
        except TimeoutError:
            return self._may_begin(self._begin_until)
        finally:
            for _ in range(free):
                self._permits.release()
        left = (next_slot - self._now()).total_seconds()
        if left > END_SECONDS:
            return False
        await asyncio.sleep(max(0.0, left + END_SECONDS))
        return self._may_begin(self._begin_until)

    async def _batches_are_held(self) -> bool:
        """Wait a little for batches of which others hold sessions that are decided already.

        If none is held any more, the last one may have been given back since this pass looked for
        work: then it looks once more.
        """
        if self._loop.time() - self._began > WAIT_FOR_BATCHES_SECONDS:
            return False
        if not await self._database.run(self._others_hold_batches):
            self._looked_again = not self._looked_again
            return self._looked_again
        self._looked_again = False
        await asyncio.sleep(WRITE_EVERY_SECONDS)
        return True

    def _others_hold_batches(self) -> bool:
        held = self._store.queue.count_claimed(self._store.now())
        return held > self._writer.batches_held

    async def _check(self, billing: Billing, claim: Claim, requested: float) -> None:
        answer, decision = await self._ask_and_decide(billing, claim, requested)
        limits = 0
        while limited := self._is_limit_of_all(claim, answer, limits):
            limits += 1
            self._tally.rate_limited += 1
            self._pause.rate_limited(answer)
            if not await self._may_ask_again(requested):
                break
            answer, decision = await self._ask_and_decide(billing, claim, requested)
        if limited:
            self._writer.give_back([claim])
            self._gave_back = True
        else:
            self._writer.write(decision)
        if self._scaling is not None and self._scaling.record_latency(answer):
            self._tasks.create_task(self._start_workers(self._scaling))

    async def _may_ask_again(self, requested: float) -> bool:
        """Wait until a session that was limited may be asked again; returns false if that is late.

        It is the first one to be asked. So it is soon known whether the limit is its own.
        """
        async with self._sharing_limit:
            if self._pause.held:  # otherwise another check has told the other workers
                await asyncio.sleep(COLLECT_SECONDS)
                await self._database.run(self._pause.read)
        self._pause.gone(-1)
        try:
            async with asyncio.timeout_at(min(requested + BEGIN_WITHIN_SECONDS, self._begin_until)):
                return await self._pause_is_over() and await self._pause.wait_for_turn()
        except TimeoutError:
            return False
        finally:
            self._pause.gone(1)

    def _is_limit_of_all(self, claim: Claim, answer: Answer, limits: int) -> bool:
        """Whether billing limits the rate, after so many limits of this session in a row.

        Counts the answer.
        """
        limited, others = answer.outcome is Outcome.RATE_LIMITED, self._tally.others
        was_limited = claim.last_outcome == Outcome.RATE_LIMITED
        if not limits and not was_limited:
            others.append(limited)
        if not limited:
            self._pause.answered(answer)
            return False
        if sum(others) > max(1, MAX_LIMITED_SHARE * len(others)):
            return True
        return not was_limited and limits + 1 < OWN_LIMITS

    async def _ask_and_decide(
        self, billing: Billing, claim: Claim, requested: float
    ) -> tuple[Answer, Decision]:
        """Ask billing and decide; an unexpected error is this session's outcome, and logged."""
        try:
            answer = await billing.check(claim.billing_checkout_id)
            self._tally.last_answer_at = now = self._loop.time()
            decision = decide(
                claim,
                answer,
                tick=self._view.tick,
                answered_after=now - requested,
                rules=self._rules,
                choose=self._choose,
            )
            if isinstance(decision, Recheck):  # a status change is logged when it has been made
                self._log.check(claim, answer)
        except Exception as error:  # noqa: BLE001 (whatever it is, the other sessions go on)
            logger.debug("Unexpected error in a check", exc_info=error)
            answer = Answer(Outcome.INTERNAL_ERROR, detail=f"{type(error).__name__}: {error}")
            with suppress(Exception):
                self._log.check(claim, answer)
            backoff = max(self._settings.interval_seconds, self._settings.backoff_max_seconds)
            decision = Recheck(claim, answer, claim.claimed_at + timedelta(seconds=backoff))
        if answer.seconds is not None:
            self._tally.latencies.append(answer.seconds)
        return answer, decision

    async def _read_waiting(self) -> None:
        counts = self._view.last_counts
        self._tally.waiting = await self._database.run(
            self._store.read_waiting, self._rules, counts
        )

    async def _reconcile(self) -> bool:
        """Reconcile the queue, a piece at a time; returns whether sessions became due by it."""
        ids = self._options.session_ids
        reconciliation = self._store.reconciliation(self._view.tick, self._rules, ids)
        more, progress = True, Progress()
        while more:
            more, progress = await self._database.run(self._reconcile_piece, reconciliation)
        await self._database.run(self._store.finish, reconciliation)
        tally, counts = self._tally, reconciliation.counts
        tally.counted = True
        tally.open = counts.open + progress.closed
        tally.not_open = reconciliation.not_open
        tally.elsewhere[Skip.IN_FLIGHT] = max(0, counts.in_flight - progress.held)
        if self._options.reason is Reason.TICK:
            tally.elsewhere[Skip.NOT_DUE] = max(0, counts.not_due - progress.rechecks)
        self._log.start(self._view.now, tally.open)
        return reconciliation.made_due > 0

    def _reconcile_piece(self, reconciliation: Reconciliation) -> tuple[bool, Progress]:
        # One step on the database's thread, so that the counts and the progress fit together.
        return reconciliation.reconcile_next_piece(), self._writer.progress()

    async def _start_workers(self, scaling: Scaling) -> None:
        due = await self._database.run(
            self._store.queue.count_due, tick=self._view.tick, limit=scaling.max_useful_due
        )
        per_second = self._pause.rate and min(self._pause.rate, self._budget_pace())
        self._tally.workers_started += await scaling.start_missing(due, self._view.tick, per_second)

    def _summary(self, *, has_api_key: bool) -> Summary:
        tally, writer = self._tally, self._writer
        return replace(
            self._at_start,
            counted=tally.counted,
            open=tally.open,
            waiting=tally.waiting,
            unknown_words=self._log.unknown_words,
            outcomes=writer.outcomes + Counter({Outcome.RATE_LIMITED: tally.rate_limited}),
            skipped=self._skipped(has_api_key=has_api_key),
            status_changes=writer.status_changes,
            unpublished=writer.unpublished,
            workers_started=tally.workers_started,
            paused_until=self._pause.until,
            allowed=self._pause.allowed,
            demand=self._demand if self._pause.allowed else 0.0,
            latencies=tally.latencies,
            duration_seconds=self._loop.time() - self._began,
        )

    def _skipped(self, *, has_api_key: bool) -> Counter[Skip]:
        """Why the other open sessions were not checked, if this pass has counted them."""
        tally = self._tally
        skipped = Counter[Skip]()
        skipped[Skip.NOT_OPEN] = tally.not_open
        if not has_api_key:
            skipped[Skip.NO_API_KEY] = tally.open
        elif tally.counted:
            unchecked = max(0, tally.open - self._writer.outcomes.total())
            skipped.update(tally.elsewhere)
            # Others may have given back some of what they held when it was counted.
            others = max(0, unchecked - tally.elsewhere[Skip.NOT_DUE])
            skipped[Skip.IN_FLIGHT] = min(tally.elsewhere[Skip.IN_FLIGHT], others)
            left = max(0, unchecked - tally.elsewhere[Skip.NOT_DUE] - skipped[Skip.IN_FLIGHT])
            if self._pause.rate is not None and self._options.reason is Reason.MANUAL:
                # What others hold waits for its turn.
                left += skipped.pop(Skip.IN_FLIGHT)
            if self._pause.until is not None:
                skipped[Skip.PAUSED] += left
            elif self._pause.rate is not None:
                skipped[Skip.RATE_LIMITED] += left
            elif tally.out_of_time:
                skipped[Skip.DEADLINE] += left
            else:  # claimed by others, or left to the next pass
                skipped[Skip.IN_FLIGHT] += left
        return +skipped  # without zeros

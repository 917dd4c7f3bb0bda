"""One pass at work: it claims and begins checks, reconciles if it leads, and ends in a summary."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from core.database.thread import DatabaseThread
from core.domain.model import Answer, Claim, Outcome, Reason, Skip
from core.domain.rate import demand, is_too_low
from core.domain.summary import Summary
from core.errors import StoreError
from core.log import PassLog, logger
from core.passes.checks import Billing, Checks
from core.passes.claims import Claims, PendingClaims, budget_pace
from core.passes.held_claims import HOLD_SECONDS
from core.passes.pass_times import PassTimes
from core.passes.pause import SharedPause
from core.passes.scaling import Scaling, StartWorker
from core.passes.tally import Tally
from core.passes.writer import WRITE_EVERY_SECONDS, Progress, Writer
from core.settings import Settings
from core.store.reconcile import Reconciliation
from core.store.store import Store, View

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
# A leader deletes old rows in so many steps, between which claims and records come.
FORGET_STEPS = 10
# A manual pass, and a leader under a budget, wait this long for batches that others hold. By then
# all but those that billing has not answered about have been given back: HOLD_SECONDS, and two
# writes.
WAIT_FOR_BATCHES_SECONDS = HOLD_SECONDS + 2 * WRITE_EVERY_SECONDS


class PassOptions(NamedTuple):
    """Why a pass starts, and how long it may take."""

    reason: Reason
    tick: datetime | None = None
    helps: bool = False  # started by the tick's leader; it never leads, nor starts others
    session_ids: Sequence[str] | None = None  # manual passes only; None: all open sessions
    start_seconds: float = 30.0  # no check begins later than this after the pass did
    total_seconds: float = 50.0  # requests still in flight then are given up


class RunningPass:
    """Made once for each pass; `complete` makes it."""

    def __init__(  # noqa: PLR0917 (made in one place)
        self,
        store: Store,
        billing: Billing | None,  # None: it is not asked
        settings: Settings,
        options: PassOptions,
        database: DatabaseThread,
        view: View,
        summary: Summary,
        began: float,
        start_worker: StartWorker | None,
        under_way: int,
        choose: Callable[[int, int], int],
        *,
        has_api_key: bool,
    ) -> None:
        self._store = store
        self._has_api_key = has_api_key
        self._settings = settings
        self._rules = settings.check_rules()
        self._options = options
        self._database = database
        self._view = view
        self._at_start = summary
        self._loop = asyncio.get_running_loop()
        self._ends = began + options.total_seconds
        self._times = PassTimes(
            began,
            view.now,
            interval_seconds=settings.interval_seconds,
            start_seconds=options.start_seconds,
        )
        latency = view.state.budget.latency if view.state.budget else 0.0
        self._scaling = None
        if start_worker is not None and summary.led:
            self._scaling = Scaling(start_worker, settings, under_way + 1, latency)
        # A manual pass always counts: it tells a person what it did not check, and why.
        manual = options.reason is Reason.MANUAL
        self._reconciles = manual or (summary.led and view.may_reconcile)
        self._log = PassLog(
            max_active=settings.log_lines_active,
            waits=self._reconciles,
            sent_headers=settings.headers_to_name,
        )
        interval = settings.interval_seconds
        self._demand = demand(view.last_counts.ages, settings.cadence, interval)
        self._budget_pace = budget_pace(view, options.reason, self._demand, interval)
        self._pause = SharedPause(
            store.state,
            paused_until=view.paused_until,
            now=view.now,
            known_limit=settings.billing_max_per_second,
            budget_pace=self._budget_pace,
        )
        self._writer = Writer(store, database, self._pause, self._log)
        self._tally = Tally(view.last_counts.open)
        self._tasks = asyncio.TaskGroup()
        self._looked_again = False
        self._claims = Claims(
            store,
            settings,
            view=view,
            reason=options.reason,
            session_ids=options.session_ids,
            workers=under_way + 1,
            times=self._times,
            database=database,
            pause=self._pause,
            writer=self._writer,
            tally=self._tally,
        )
        self._checks = None
        if billing is not None:
            self._checks = Checks(
                billing,
                self._rules,
                tick=view.tick,
                max_in_flight=settings.max_concurrency,
                times=self._times,
                tasks=self._tasks,
                database=database,
                pause=self._pause,
                writer=self._writer,
                log=self._log,
                tally=self._tally,
                take_answer=self._take_answer,
                choose=choose,
            )

    async def complete(self) -> Summary:
        """Make the pass."""
        tally = self._tally
        pass_id = await self._database.run(self._store.history.begin, self._at_start)
        if self._at_start.led and not self._reconciles:
            self._log.start(self._view.now, tally.open)
        if not self._has_api_key:
            logger.warning("⚠️ APIKEY not found in environment variables")
        try:
            async with self._writer.running(pass_id, self._times.began, self._ends):
                await self._work()
        except BaseException:
            await self._end_early(pass_id)
            raise
        finally:
            if self._reconciles and not tally.counted:
                self._log.start(self._view.now, tally.open)
        summary = self._summary()
        await self._database.run_to_end(self._store.history.end, pass_id, summary)
        self._log.end(summary)
        return summary

    async def _end_early(self, pass_id: int) -> None:
        """Record the end of a pass that failed, so that it does not count as under way."""
        with suppress(StoreError):  # most likely the reason why it failed
            await self._database.run_to_end(self._store.history.end, pass_id, self._summary())

    async def _work(self) -> None:
        """Check what is due, if billing may be asked, and reconcile meanwhile."""
        try:
            async with asyncio.timeout_at(self._ends), self._tasks as tasks:
                # In this order on the database's thread: claims do not wait for counting.
                size = FIRST_CLAIMS_PER_REQUEST * self._settings.max_concurrency
                first = tasks.create_task(self._claims.claim(size)) if self._checks else None
                if self._at_start.led:
                    tasks.create_task(self._read_waiting())
                reconciling = tasks.create_task(self._reconcile()) if self._reconciles else None
                if self._checks and self._scaling and self._scaling.knows_latency:
                    tasks.create_task(self._start_workers(self._scaling))
                if self._checks and first:
                    await self._claim_and_begin(self._checks, first, size, reconciling)
        except TimeoutError:
            self._tally.out_of_time = True

    async def _claim_and_begin(
        self,
        checks: Checks,
        next_claims: asyncio.Task[PendingClaims],
        size: int,
        reconciling: asyncio.Task[bool] | None,
    ) -> None:
        """Begin a check whenever a permit is free, and claim more meanwhile."""
        max_in_flight, share_ahead = self._settings.max_concurrency, 0.5
        while True:
            pending = await next_claims
            if not pending.claims:
                made_due, reconciling = reconciling is not None and await reconciling, None
                if not await checks.pause_is_over() or self._claims.has_handed_over:
                    return
                if not (self._writer.gave_back or made_due or pending.paused):
                    needed = await self._is_needed_in_next_slot(checks, pending.requested)
                    if not (needed or self._writer.gave_back):
                        return
                if self._writer.gave_back:  # maybe after this claim was made
                    await self._writer.wait_until_given_back()
                next_claims = self._tasks.create_task(self._claims.claim(size))
                continue
            began, count = self._loop.time(), len(pending.claims)
            ahead = max(int(share_ahead * count), self._claims.claim_before)
            await checks.begin(pending, remaining=ahead)
            next_claims = self._tasks.create_task(self._claims.claim(size))
            await checks.begin(pending, remaining=0)
            lasted, waited = self._loop.time() - began, pending.received - pending.requested
            share_ahead = min(1.0, CLAIM_AHEAD * waited / lasted) if lasted else 1.0
            begun = count - len(pending.claims)
            self._claims.share = max(1.0, begun / max(lasted, QUICKLY_SECONDS))
            if pending.claims:
                self._give_back(pending.claims)
                late = self._loop.time() >= self._times.begin_until
                # If no answer comes, all requests hang: the next pass has free permits.
                if checks.hang or late or not await checks.pause_is_over():
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

    async def _is_needed_in_next_slot(self, checks: Checks, last_claim: float) -> bool:
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
        claimed_at = self._times.at(last_claim)
        left = self._times.seconds_to_slot_after(claimed_at)
        if await checks.end_within(left + HELP_AFTER_SECONDS):
            left = self._times.seconds_to_slot_after(claimed_at)
            if left > END_SECONDS:
                return False
            await asyncio.sleep(max(0.0, left + END_SECONDS))
        return checks.may_begin(self._times.begin_until)

    async def _batches_are_held(self) -> bool:
        """Wait a little for batches of which others hold sessions that are decided already.

        If none is held any more, the last one may have been given back since this pass looked for
        work: then it looks once more.
        """
        if self._loop.time() - self._times.began > WAIT_FOR_BATCHES_SECONDS:
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

    async def _read_waiting(self) -> None:
        self._tally.waiting = await self._database.run(
            self._store.read_waiting,
            self._rules,
            self._view.last_counts,
            is_limited=is_too_low(self._pause.allowed, self._demand),
        )

    async def _reconcile(self) -> bool:
        """Reconcile the queue, a piece at a time; returns whether sessions became due by it."""
        ids = self._options.session_ids
        reconciliation = self._store.reconciliation(self._view.tick, self._rules, ids)
        more, closed, progress = True, 0, Progress()
        while more:
            more, closed_ahead, progress = await self._database.run(
                self._reconcile_piece, reconciliation
            )
            closed += closed_ahead
        await self._database.run(self._store.finish, reconciliation)
        tally, counts = self._tally, reconciliation.counts
        tally.counted = True
        tally.open = counts.open + closed
        tally.not_open = reconciliation.not_open
        tally.elsewhere[Skip.IN_FLIGHT] = max(0, counts.in_flight - progress.held)
        if self._options.reason is Reason.TICK:
            tally.elsewhere[Skip.NOT_DUE] = max(0, counts.not_due - progress.rechecks)
        self._log.start(self._view.now, tally.open)
        if reconciliation.is_complete:  # sessions that became due do not wait for it
            self._tasks.create_task(self._forget_old())
        return reconciliation.made_due > 0

    async def _forget_old(self) -> None:
        for _ in range(FORGET_STEPS):
            if not await self._database.run(self._store.forget_old):
                break

    def _reconcile_piece(self, reconciliation: Reconciliation) -> tuple[bool, int, Progress]:
        # One step on the database's thread, so that the counts and the progress fit together. What
        # was closed behind the walk has been counted as open there.
        closed_ahead = reconciliation.count_ahead(self._writer.take_closed())
        return reconciliation.reconcile_next_piece(), closed_ahead, self._writer.progress()

    def _take_answer(self, answer: Answer) -> None:
        if self._scaling is not None and self._scaling.record_latency(answer):
            self._tasks.create_task(self._start_workers(self._scaling))

    async def _start_workers(self, scaling: Scaling) -> None:
        due = await self._database.run(
            self._store.queue.count_due, tick=self._view.tick, limit=scaling.max_useful_due
        )
        per_second = self._pause.rate and min(self._pause.rate, self._budget_pace)
        self._tally.workers_started += await scaling.start_missing(due, self._view.tick, per_second)

    def _summary(self) -> Summary:
        tally, writer = self._tally, self._writer
        return self._at_start._replace(
            counted=tally.counted,
            open=tally.open,
            waiting=tally.waiting,
            unknown_words=self._log.unknown_words,
            outcomes=writer.outcomes + Counter({Outcome.RATE_LIMITED: tally.rate_limited}),
            skipped=tally.skipped(
                self._options.reason,
                self._pause,
                checked=writer.outcomes.total(),
                has_api_key=self._has_api_key,
            ),
            status_changes=writer.status_changes,
            unpublished=writer.unpublished,
            workers_started=tally.workers_started,
            paused_until=self._pause.until,
            allowed=self._pause.allowed,
            demand=self._demand if self._pause.allowed else 0.0,
            latencies=tally.latencies,
            duration_seconds=self._loop.time() - self._times.began,
        )

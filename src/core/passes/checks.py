"""The checks of one pass: each begins in its turn, with a permit, and ends in a decision."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Protocol

from core.database.thread import DatabaseThread
from core.domain.decision import CheckRules, decide
from core.domain.model import Answer, Claim, Decision, Outcome, Recheck
from core.log import PassLog, logger
from core.passes.claims import BEGIN_WITHIN_SECONDS, PendingClaims
from core.passes.pass_times import PassTimes
from core.passes.pause import SharedPause
from core.passes.tally import Tally
from core.passes.writer import Writer

# When a request is limited, the answers of this long are counted before the rate is lowered.
COLLECT_SECONDS = 0.05
# A 429 may be about one session only, for example about a lock at Stripe. It is taken for that if
# the session is limited this often in a row, or was so last time, while of the last others only one
# or no larger share is limited.
OWN_LIMITS, OTHERS, MAX_LIMITED_SHARE = 3, 50, 0.3


class Billing(Protocol):
    """What a pass needs of the billing service; see `core.billing.client.BillingClient`."""

    async def check(self, billing_checkout_id: str | None) -> Answer: ...


class Checks:
    """Makes up to `max_in_flight` checks at once, as tasks of a group.

    `take_answer` is called with each answer, `choose(low, high)` draws the backoff's jitter.
    """

    def __init__(
        self,
        billing: Billing,
        rules: CheckRules,
        *,
        tick: datetime,
        max_in_flight: int,
        times: PassTimes,
        tasks: asyncio.TaskGroup,
        database: DatabaseThread,
        pause: SharedPause,
        writer: Writer,
        log: PassLog,
        tally: Tally,
        take_answer: Callable[[Answer], None],
        choose: Callable[[int, int], int],
    ) -> None:
        self._billing = billing
        self._rules = rules
        self._tick = tick
        self._max_in_flight = max_in_flight
        self._times = times
        self._tasks = tasks
        self._database = database
        self._pause = pause
        self._writer = writer
        self._log = log
        self._tally = tally
        self._take_answer = take_answer
        self._choose = choose
        self._loop = asyncio.get_running_loop()
        self._permits = asyncio.Semaphore(max_in_flight)
        self._pending: PendingClaims | None = None  # whose checks are being begun
        self._remaining = 0  # until so many of them remain
        self._last_answer_at = times.began
        self._others = deque[bool](maxlen=OTHERS)  # whether other sessions' checks were limited
        self._sharing_limit = asyncio.Lock()

    @property
    def hang(self) -> bool:
        """Whether all permits are taken, and no answer comes."""
        silent = self._loop.time() - self._last_answer_at
        return self._permits.locked() and silent >= BEGIN_WITHIN_SECONDS

    def may_begin(self, until: float) -> bool:
        return self._loop.time() < until and not self._pause.in_force

    async def begin(self, pending: PendingClaims, *, remaining: int) -> None:
        """Begin checks until `remaining` claims are left or time is up."""
        self._pause.begin_by = pending.begin_by
        self._pending, self._remaining = pending, remaining
        try:
            async with asyncio.timeout_at(pending.begin_by):
                while len(pending.claims) > remaining:
                    await self._writer.wait_for_room()
                    await self._permits.acquire()
                    turn = self._pause.takes_turn() or await self._may_leave(pending.begin_by)
                    if not turn:
                        return
                    self._pause.gone(1)
                    checks = self._check_and_go_on(pending.claims.popleft(), pending)
                    self._tasks.create_task(checks)
        except TimeoutError:
            pass
        finally:
            self._pending = None

    async def end_within(self, seconds: float) -> bool:
        """Wait until no check is in flight; returns false if that takes longer."""
        free = 0
        try:
            async with asyncio.timeout(seconds):
                while free < self._max_in_flight:
                    await self._permits.acquire()
                    free += 1
        except TimeoutError:
            return False
        finally:
            for _ in range(free):
                self._permits.release()
        return True

    async def pause_is_over(self) -> bool:
        """Wait for the end of a pause before the next slot; returns false for a longer one."""
        to_slot = self._times.seconds_to_slot_after(max(self._times.now(), self._tick))
        until = min(self._times.begin_until, self._loop.time() + to_slot)
        while self._pause.in_force:  # another worker may have extended it meanwhile
            if self._pause.resumes_at >= until:
                return False
            await asyncio.sleep(self._pause.resumes_at - self._loop.time())
            await self._database.run(self._pause.read)
        return True

    async def _may_leave(self, until: float) -> bool:
        """Wait for the turn of one request; it keeps its permit only if it may leave then."""
        leaves = False
        try:
            leaves = await self._pause.wait_for_turn() and self.may_begin(until)
            return leaves
        finally:
            if not leaves:
                self._permits.release()

    async def _check_and_go_on(self, claim: Claim, pending: PendingClaims) -> None:
        """Check a session, then others: a task for each of them would cost as much as to decide."""
        try:
            while True:
                await self._check(claim, pending.requested)
                following = self._following()
                if following is None:
                    return
                claim, pending = following
        finally:
            self._permits.release()

    def _following(self) -> tuple[Claim, PendingClaims] | None:
        """A claim whose check may begin now. The last one is left to `begin`, which then ends."""
        pending = self._pending
        if pending is None or len(pending.claims) <= self._remaining + 1:
            return None
        if not self._writer.has_room:
            return None
        if not self._pause.takes_turn():
            return None
        self._pause.gone(1)
        return pending.claims.popleft(), pending

    async def _check(self, claim: Claim, requested: float) -> None:
        """Ask billing and decide; an unexpected error is this session's outcome, and logged."""
        limits = 0
        while True:
            try:
                answer = await self._billing.check(claim.billing_checkout_id)
                decision = self._decide(claim, answer, requested)
            except Exception as error:  # noqa: BLE001 (whatever it is, the other sessions go on)
                answer, decision = self._failed(claim, error)
            if answer.seconds is not None:
                self._tally.latencies.append(answer.seconds)
            if not self._is_limit_of_all(claim, answer, limits):
                self._writer.write(decision)
                break
            limits += 1
            self._tally.rate_limited += 1
            self._pause.rate_limited(answer)
            if not await self._may_ask_again(requested):
                self._writer.give_back([claim])
                break
        self._take_answer(answer)

    async def _may_ask_again(self, requested: float) -> bool:
        """Wait until a session that was limited may be asked again; returns false if that is late.

        It is the first one to be asked. So it is soon known whether the limit is its own.
        """
        async with self._sharing_limit:
            if self._pause.held:  # otherwise another check has told the other workers
                await asyncio.sleep(COLLECT_SECONDS)
                await self._database.run(self._pause.read)
        self._pause.gone(-1)
        until = min(requested + BEGIN_WITHIN_SECONDS, self._times.begin_until)
        try:
            async with asyncio.timeout_at(until):
                return await self.pause_is_over() and await self._pause.wait_for_turn()
        except TimeoutError:
            return False
        finally:
            self._pause.gone(1)

    def _is_limit_of_all(self, claim: Claim, answer: Answer, limits: int) -> bool:
        """Whether billing limits the rate, after so many limits of this session in a row.

        Counts the answer.
        """
        limited, others = answer.outcome is Outcome.RATE_LIMITED, self._others
        was_limited = claim.last_outcome == Outcome.RATE_LIMITED
        if not limits and not was_limited:
            others.append(limited)
        if not limited:
            self._pause.answered(answer)
            return False
        if sum(others) > max(1, MAX_LIMITED_SHARE * len(others)):
            return True
        return not was_limited and limits + 1 < OWN_LIMITS

    def _decide(self, claim: Claim, answer: Answer, requested: float) -> Decision:
        self._last_answer_at = now = self._loop.time()
        decision = decide(
            claim,
            answer,
            tick=self._tick,
            answered_after=now - requested,
            rules=self._rules,
            choose=self._choose,
        )
        if isinstance(decision, Recheck):  # a status change is logged when it has been made
            self._log.check(claim, answer)
        return decision

    def _failed(self, claim: Claim, error: Exception) -> tuple[Answer, Decision]:
        """What becomes of a session whose check ended in an unexpected error."""
        logger.debug("Unexpected error in a check", exc_info=error)
        answer = Answer(Outcome.INTERNAL_ERROR, detail=f"{type(error).__name__}: {error}")
        with suppress(Exception):
            self._log.check(claim, answer)
        backoff = max(self._rules.interval_seconds, self._rules.backoff_max_seconds)
        return answer, Recheck(claim, answer, claim.claimed_at + timedelta(seconds=backoff))

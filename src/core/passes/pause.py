"""Whether a pass may ask billing, and how fast: the pause and the budget that all workers share."""

import asyncio
import math
import threading
from collections import deque
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from core.domain import rate
from core.domain.model import Answer
from core.domain.rate import ANSWERED_SECONDS, Budget, Seen
from core.store.monitor_state import MonitorState, StateRow

# A request may leave this long before its time, so that not every one needs a timer: under a
# budget, and without one, where a hundred answers may come at once.
TIMER_SECONDS, UNLIMITED_TIMER_SECONDS = 0.003, 0.01
# Reserved requests leave no sooner than this, because the budget has yet to be written.
LEAD_SECONDS = 0.02
# Reserved times that are this close follow each other: the clocks differ by that much.
SAME_SECONDS = 0.0015


class _Change(NamedTuple):
    """What this worker makes of the shared budget. Times are by the database's clock."""

    budget: Budget | None
    rate: float | None
    answers_nothing: bool  # billing limits requests, and answers none
    dropped: int  # of the reserved requests, the last ones
    reserved: tuple[float, ...]
    ahead: float  # the database's clock, less the event loop's


class SharedPause:
    """Follows the pause and the budget in the monitor's state during one pass.

    `read` and `agree` use the database, on its thread, and raise StoreError. The other methods
    belong to the event loop. A request leaves when `wait_for_turn` returns true: without a budget
    at `pace`, and with one when this worker has reserved it (see `core.domain.rate`).

    `paused_until` is the pause in force at `now`, by the database's clock; `known_limit` is
    BILLING_MAX_PER_SECOND; no more than `budget_pace` is taken of a budget.
    """

    def __init__(
        self,
        state: MonitorState,
        *,
        paused_until: datetime | None = None,
        now: datetime | None = None,
        known_limit: int | None = None,
        budget_pace: float = math.inf,
    ) -> None:
        self._state = state
        self._known_limit = known_limit
        self._late_seconds = rate.late_seconds(known_limit)
        self._budget_pace = budget_pace
        self._loop = asyncio.get_running_loop()
        # Changed on the event loop only:
        self.pace = math.inf  # requests a second that all workers together want to send
        self._answered = 0
        self.begin_by = math.inf  # what has not begun then is given back, by the event loop's clock
        self._gone = 0  # claims that do not wait for their turn any more
        self._delayed = False  # a request had to wait for its turn
        self._turn_at = 0.0
        # Changed on both threads, in single steps:
        self._limits = deque[tuple[Answer, float]]()  # with the time at which each was sent
        self._answers = deque[tuple[Answer, float]]()  # the others under a budget, likewise
        self.held = False  # until the next look at the row
        self._lock = threading.Lock()  # of the next one
        self._reserved = deque[float]()  # times by the event loop's clock
        # Changed on the database's thread only:
        self._changed = asyncio.Event()
        self.rate: float | None = None  # requests a second that billing allows; None: no limit
        self.allowed: float | None = None  # the same, for people
        self.latency = 0.0  # mean seconds of healthy answers under a budget; 0: not known
        self.newest_tick: datetime | None = None  # that has a leader
        self._until: datetime | None = None
        self._resume_at = 0.0  # by the event loop's clock
        self._answers_nothing = False
        self._answered_before = self._claimed = 0
        self._limited_before: float | None = None  # when billing had answered nothing yet
        self._recently, self._recently_at = 0.0, 0.0  # answers a second, and when that was
        self._best = 0.0  # of these
        self._reserved_from = self._reserved_to = 0.0  # by the database's clock
        self._ahead = -math.inf  # the database's clock, less the event loop's
        if paused_until is not None and now is not None:
            self._follow(paused_until, now)

    @property
    def in_force(self) -> bool:
        """Whether this pass must not send another request."""
        return self._until is not None and self._loop.time() < self._resume_at

    @property
    def until(self) -> datetime | None:
        """Until when billing may not be asked; None: no pause is in force."""
        return self._until if self.in_force else None

    @property
    def resumes_at(self) -> float:
        """When the pause ends, by the event loop's clock; infinite if nobody can know it.

        Where billing answers nothing, its pauses are the monitor's own.
        """
        return math.inf if self._answers_nothing else self._resume_at

    def rate_limited(self, answer: Answer | None = None) -> None:
        """Send nothing until the next look at the row, because billing has limited a request.

        `answer` is what billing said; without it, the limit was one of the session alone.
        """
        if answer is not None:
            self._limits.append(self._with_time(answer))
        self.held = True

    def answered(self, answer: Answer) -> None:
        """Count an answer of billing that is not a limit."""
        if answer.status_code is None:
            return
        self._answered += 1
        if self.rate is not None:
            self._answers.append(self._with_time(answer))
        if answer.used_up:
            self._limits.append(self._with_time(answer))

    def takes_turn(self) -> bool:
        """Whether the next request may leave now, without a limit; otherwise wait for its turn."""
        if self.rate is not None or self.held or self._until is not None:
            return False
        now = self._loop.time()
        at = max(self._turn_at, now) + 1 / self.pace
        if at > now + UNLIMITED_TIMER_SECONDS or now >= self.begin_by:
            return False
        self._turn_at = at
        return True

    async def wait_for_turn(self) -> bool:
        """Wait until the next request may leave; returns false if there is a pause instead."""
        while not self.in_force:
            now = self._loop.time()
            if self.held:
                at = math.inf
            elif self.rate is None:
                at = self._turn_at = max(self._turn_at, now) + 1 / self.pace
            else:
                at = self._take_reserved(now)
            timer = UNLIMITED_TIMER_SECONDS if self.rate is None else TIMER_SECONDS
            if at <= now + timer:
                return True
            self._delayed = True
            if math.isinf(at):
                await self._changed.wait()
                self._changed.clear()
                continue
            await asyncio.sleep(at - now)
            if self.rate is None and not self.held:
                return True
        return False

    def gone(self, claims: int) -> None:
        """So many claims do not wait for their turn any more."""
        self._gone += claims

    def read(self) -> datetime:
        """Learn the pause and the budget, and reserve requests; returns the database's clock."""
        return self._exchange(healthy=False)

    def claimed(self, claims: int) -> None:
        """So many more claims wait for their turn; call it on the database's thread."""
        self._claimed += claims
        if claims and self.rate is not None and not self._left():
            self.read()

    def agree(self, answers: Iterable[Answer]) -> datetime:
        """Share what billing said with the other workers, and learn from them.

        `answers` are those that were decided. Returns the database's clock.
        """
        healthy = any(not answer.outcome.is_error for answer in answers)
        return self._exchange(healthy=healthy)

    def _with_time(self, answer: Answer) -> tuple[Answer, float]:
        """An answer and when its request was sent, by the event loop's clock."""
        return answer, self._loop.time() - (answer.seconds or 0.0)

    def _take_reserved(self, now: float) -> float:
        """Take the next reserved request if its time has come; returns its time.

        Infinite, if no request is reserved.
        """
        reserved = self._reserved
        with self._lock:
            while reserved and reserved[0] < now - self._late_seconds:
                reserved.popleft()
            if not reserved:
                return math.inf
            return reserved[0] if reserved[0] > now + TIMER_SECONDS else reserved.popleft()

    def _left(self) -> list[float]:
        """The times that are reserved and not over."""
        begin = self._loop.time() - self._late_seconds
        with self._lock:
            return [time for time in self._reserved if time >= begin]

    def _exchange(self, *, healthy: bool) -> datetime:
        limits = [self._limits.popleft() for _ in range(len(self._limits))]
        answers = [self._answers.popleft() for _ in range(len(self._answers))]
        answered = self._answered
        now = self._loop.time()
        more = answered - self._answered_before
        kept = math.exp((self._recently_at - now) / ANSWERED_SECONDS)
        self._recently = self._recently * kept + more / ANSWERED_SECONDS
        self._recently_at, self._best = now, max(self._best, self._recently)
        limited_at = max((sent_at for _, sent_at in limits), default=None)
        if more and limited_at is None:  # the answers of a slow service come after its limits
            limited_at = self._limited_before
        latencies = [a.seconds for a, _ in answers if a.seconds and not a.outcome.is_error]
        sent_at = max((sent_at for _, sent_at in answers), default=now)
        seen = Seen(
            answered=more,
            best=self._best,
            limited=limited_at is not None,
            sent_ago=now - (sent_at if limited_at is None else limited_at),
            waited=self._delayed,
            healthy=len(latencies),
            healthy_seconds=sum(latencies),
        )
        self._answered_before, self._delayed = answered, False
        change = _Change(None, None, answers_nothing=False, dropped=0, reserved=(), ahead=0.0)

        def changed(row: StateRow) -> Budget | None:
            nonlocal change
            change = self._change(row, seen, waiting=self._claimed - self._gone)
            return change.budget

        row = self._state.exchange(changed)
        pause = row.pause
        if healthy and pause.in_a_row and pause.until <= row.now:
            self._state.end_pauses(pause)
        seconds = [a.retry_after for a, _ in limits if a.retry_after is not None]
        longest = max(seconds, default=0.0)
        if seconds or change.answers_nothing:
            # The longest that billing asked for; if it gave no number, the state's own backoff.
            pause = self._state.pause(longest or (None if change.answers_nothing else 0.0))
        self._answers_nothing = change.answers_nothing and not longest
        if limits:
            self._limited_before = limited_at if change.answers_nothing else None
        elif change.budget and change.budget.limited_at < row.now.timestamp() - ANSWERED_SECONDS:
            self._limited_before = None  # by then, all answers have been counted
        self._follow(pause.until, row.now)
        self._apply(change)
        self.newest_tick = row.last_tick
        self.held = bool(self._limits)
        self._loop.call_soon_threadsafe(self._changed.set)
        return row.now

    def _change(self, row: StateRow, seen: Seen, *, waiting: int) -> _Change:
        at = self._loop.time()
        # The database's clock, kept going between two looks at it: it may stand still, or go back.
        ahead = max(self._ahead, row.now.timestamp() - at)
        now = at + ahead
        rate_before = rate.rate_in_force(row.budget, self._known_limit)
        seen = seen._replace(waited=seen.waited and (rate_before or math.inf) <= self._budget_pace)
        answers_nothing = rate.answers_nothing(row.budget, seen, now)
        budget = rate.updated(row.budget, seen, now=now, known_limit=self._known_limit)
        rate_now = rate.rate_in_force(budget, self._known_limit)
        dropped, times = 0, tuple[float, ...]()
        if budget is not None and rate_now is not None:
            left = self._left()
            kept = 0 if seen.limited else min(len(left), max(0, waiting))
            if kept < len(left):
                begin = max(now, left[kept] + ahead, self._reserved_from)
                budget = rate.given_up(budget, begin, self._reserved_to)
                dropped = len(left) - kept
            pace = min(rate_now, self._budget_pace)
            usable = self.begin_by + ahead - rate.next_time(budget, pace, now)
            count = math.floor(min(rate.portion(pace), waiting, kept + usable * pace)) - kept
            if count > 0 and row.pause.until <= row.now and not answers_nothing:
                budget, times = rate.reserved(budget, count, pace, now=now + LEAD_SECONDS)
        return _Change(budget, rate_now, answers_nothing, dropped, times, ahead)

    def _apply(self, change: _Change) -> None:
        with self._lock:
            for _ in range(min(change.dropped, len(self._reserved))):
                self._reserved.pop()
            self._reserved.extend(time - change.ahead for time in change.reserved)
        self.rate, self._ahead = change.rate, change.ahead
        self.latency = change.budget.latency if change.budget else 0.0
        self.allowed = rate.allowed(change.budget, self._known_limit)
        if change.reserved and change.budget is not None:
            if abs(change.reserved[0] - self._reserved_to) > SAME_SECONDS:
                self._reserved_from = change.reserved[0]
            self._reserved_to = change.budget.next_at

    def _follow(self, until: datetime, now: datetime) -> None:
        """Follow the row's pause, which is over if it ended before `now`."""
        self._until = until if until > now else None
        self._resume_at = self._loop.time() + (until - now).total_seconds()

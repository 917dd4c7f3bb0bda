"""What a pass claims: how many sessions at once, and how fast their requests may leave."""

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from core.database.thread import DatabaseThread
from core.domain.model import Claim, Reason
from core.domain.rate import (
    MAX_PACE,
    MIN_BUDGET_PACE,
    MIN_PACE,
    SPREAD_SHARE,
    UNLIMITED_SPREAD_SHARE,
)
from core.passes.pass_times import PassTimes
from core.passes.pause import SharedPause
from core.passes.tally import Tally
from core.passes.writer import Writer
from core.settings import Settings
from core.store.store import Store, View

# A claimed session whose request has not begun after this time is given back: this pass has no free
# permits, and another one may have some.
BEGIN_WITHIN_SECONDS = 5.0
# A lease lasts for this long besides that time and the request itself: for a slow database to
# return the claim and to record the result.
RECORD_WITHIN_SECONDS = 5.0
# Under a budget, a claim covers what may leave within this time: a claim is held until its check
# begins, and is kept from workers that could begin it.
CLAIM_AHEAD_SECONDS = 1.0
# The next claim is made this long before the last one is worked off, so that the budget is used
# while the database is busy.
CLAIM_BEFORE_SECONDS = 0.5


class PendingClaims(NamedTuple):
    """Claims whose checks have not begun. Times are by the event loop's clock."""

    claims: deque[Claim]
    requested: float
    received: float
    begin_by: float
    paused: bool  # when it was requested, or when it came


class Claims:
    """Claims sessions for one pass. Its methods raise StoreError.

    `session_ids` are those of a manual pass, `workers` is how many workers are at work now.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        view: View,
        reason: Reason,
        session_ids: Sequence[str] | None,
        workers: int,
        times: PassTimes,
        database: DatabaseThread,
        pause: SharedPause,
        writer: Writer,
        tally: Tally,
    ) -> None:
        self._store = store
        self._settings = settings
        self._view = view
        self._reason = reason
        self._session_ids = session_ids
        self._workers = workers
        self._times = times
        self._database = database
        self._pause = pause
        self._writer = writer
        self._tally = tally
        self._loop = asyncio.get_running_loop()
        self._claimed = 0
        self.share: float | None = None  # requests a second that this pass began lately
        self._lease = timedelta(
            seconds=BEGIN_WITHIN_SECONDS + settings.request_timeout_seconds + RECORD_WITHIN_SECONDS
        )

    async def claim(self, limit: int) -> PendingClaims:
        """Claim about `limit` sessions."""
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
        begin_by = min(requested + BEGIN_WITHIN_SECONDS, self._times.begin_until)
        return PendingClaims(deque(claims), requested, self._loop.time(), begin_by, paused)

    @property
    def has_handed_over(self) -> bool:
        """Whether a later tick's leader checks what is left, under the same budget."""
        newest = self._pause.newest_tick
        if newest is None or self._pause.rate is None or self._reason is Reason.MANUAL:
            return False
        # A later one came from a clock that was wrong.
        return self._view.tick < newest <= self._times.now() + 2 * self._view.interval

    @property
    def claim_before(self) -> int:
        """The next claim is made when so many claims are left, or more; 0 without a budget."""
        return self._begun_within(CLAIM_BEFORE_SECONDS)

    def _begun_within(self, seconds: float) -> int:
        """How many checks this pass may begin in that time under a budget; 0 without one."""
        if self._pause.rate is None:
            return 0
        share = self.share or self._pause.rate / self._workers
        by_permits = self._settings.max_concurrency / max(self._pause.latency, 0.001)
        return math.ceil(min(self._pause.rate, 2 * share, by_permits) * seconds)

    def _pace(self) -> float:
        """At how many requests a second all workers together work off what is due."""
        if not self._view.state.reconciled_at:  # how many there are is not known yet
            return math.inf
        sessions = max(self._tally.open, self._claimed)
        spread_seconds = UNLIMITED_SPREAD_SHARE * self._settings.interval_seconds
        pace = max(MIN_PACE, sessions / spread_seconds)
        return pace if pace < MAX_PACE else math.inf

    def _claim(self, limit: int) -> list[Claim]:
        """Claim sessions on the database's thread, unless billing may not be asked."""
        now = self._pause.read()
        if self._writer.closing or self._pause.in_force or self.has_handed_over:
            return []
        if self._pause.rate is not None:
            limit = min(limit, max(1, self._begun_within(CLAIM_AHEAD_SECONDS)))
        queue = self._store.queue
        if self._reason is Reason.MANUAL:
            claimed = queue.claim_unchecked(
                now,
                since=self._view.now,
                lease=self._lease,
                limit=limit,
                session_ids=self._session_ids,
            )
        else:
            claimed = queue.claim_due(now, tick=self._view.tick, lease=self._lease, limit=limit)
        self._writer.hold(claimed)
        self._pause.claimed(len(claimed.claims))
        return claimed.claims


def budget_pace(view: View, reason: Reason, demand: float, interval_seconds: int) -> float:
    """At how many requests a second a budget is taken, as long as nothing is late."""
    if reason is Reason.MANUAL or view.overdue_seconds > interval_seconds:
        return math.inf
    return max(MIN_BUDGET_PACE, demand / SPREAD_SHARE) if demand else math.inf

"""The database as the monitor sees it: a queue, a count, a row that is shared, and two logs.

Each class writes one table, in statements that every engine understands. Of the shop's
`checkout_session` only `status` is ever written, by `core.store.status_changes`.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from core.database.port import Database, moment_or_none
from core.domain.cadence import slot_at
from core.domain.model import Count, Pause, Recorded, Result
from core.store.monitor_state import Shared, Standing
from core.store.pass_history import Runs
from core.store.queue import Queue, longest_due
from core.store.reconcile import Census
from core.store.status_changes import Changes, Publisher

NO_STATUS_INDEX = (
    "checkout_session has no index on status, so every pass reads the whole table. Run: "
    "CREATE INDEX checkout_session_status ON checkout_session (status);"
)


class View(NamedTuple):
    """What a pass finds when it begins."""

    now: datetime  # by the database's clock
    tick: datetime
    leads: bool
    shared: Standing
    next_due_at: datetime | None  # of the sessions that nobody is checking; None: there is none

    @property
    def pause(self) -> Pause:
        return self.shared.pause

    @property
    def paused_until(self) -> datetime | None:
        """None where billing may be asked."""
        return self.pause.until if self.pause.until > self.now else None

    @property
    def last_count(self) -> Count:
        return self.shared.last_count

    @property
    def may_count(self) -> bool:
        """Whether the last count is long enough ago for its length."""
        again_at = self.shared.count_again_at
        return again_at is None or again_at <= self.now

    @property
    def due(self) -> bool:
        return self.next_due_at is not None and self.next_due_at <= max(self.now, self.tick)

    @property
    def overdue_seconds(self) -> float:
        if self.next_due_at is None:
            return 0.0
        return max(0.0, (self.now - self.next_due_at).total_seconds())


class Store:
    """All tables on one connection. Every method raises StoreError."""

    def __init__(self, database: Database, publisher: Publisher | None = None) -> None:
        self._database = database
        self.queue = Queue(database)
        self.changes = Changes(database, self.queue, publisher)
        self.shared = Shared(database)
        self.runs = Runs(database)

    def prepare(self) -> list[str]:
        """Make the monitor's tables if need be; return warnings for the operator."""
        if self._database.prepared:
            return []
        indexed = self._database.prepare()
        self.runs.prepare()
        return [] if indexed else [NO_STATUS_INDEX]

    def now(self) -> datetime:
        return self._database.run(self._database.now)

    def view(self, tick: datetime | None, *, interval_seconds: int, may_lead: bool) -> View:
        """Look at everything that a beginning pass needs, and lead its tick if nobody does yet.

        One statement; two for the pass that leads. A tick's slot by the loop's clock is believed,
        unless it is too far from the database's to be it. The two clocks differ a little: where the
        loop's is ahead, what is due at the tick would not be due yet by the database's clock, and
        would wait for the next one.
        """

        def work() -> View:
            standing, (now_value, due_value) = self.shared.read(
                self._database.now_sql, longest_due(self._database)
            )
            now, due = moment_or_none(now_value), moment_or_none(due_value)
            assert now is not None  # noqa: S101 (a database knows the time)
            interval = timedelta(seconds=interval_seconds)
            believed = tick is not None and abs(now - tick) <= interval
            slot = tick if tick is not None and believed else slot_at(now, interval_seconds)
            soon = slot + 2 * interval
            led = standing.last_tick
            leads = may_lead and (led is None or led < slot or led > soon)
            if leads:
                leads = self.shared.lead(slot, not_after=soon)
            return View(now, slot, leads, standing, due)

        return self._database.run(work)

    def census(self, tick: datetime, session_ids: Sequence[str] | None = None) -> Census:
        return Census(self._database, self.queue, tick, session_ids)

    def keep(self, census: Census) -> None:
        """Keep a census of all open sessions; and drop the logs' rows that are over a day old."""
        if census.is_whole:
            self.shared.keep_count(census.count, took=census.took)
            self.runs.forget_old()
            self.changes.forget_old()

    def record(self, results: Sequence[Result], now: datetime) -> Recorded:
        """Keep what some checks found: those whose session stays open, and status changes."""
        staying = [result for result in results if result.new_status is None]
        self.queue.record(staying, now)
        outcomes = Counter(result.answer.outcome for result in staying)
        leaving = [result for result in results if result.new_status is not None]
        return Recorded(outcomes=outcomes) + self.changes.make(leaving)

    def close(self) -> None:
        self._database.close()

"""The database as a pass sees it: one class for each table of the monitor.

The SQL is written once, in statements that every engine understands. Of the shop's
`checkout_session` only `status` is ever written, by `status_changes`.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from core.database.port import Connection, Database, as_datetime_or_none, as_text_or_none
from core.domain.batch import MAX_BATCH
from core.domain.cadence import slot_at
from core.domain.decision import CheckRules
from core.domain.model import OpenCounts, Pause, Recorded, StatusChange
from core.domain.other_monitors import Monitor
from core.domain.waiting import Waiting
from core.store.monitor_state import MonitorState, StateRow
from core.store.other_monitors import OtherMonitors, newest_settings
from core.store.pass_history import PassHistory
from core.store.queue import Queue, oldest_due
from core.store.reconcile import Reconciliation
from core.store.results import Results
from core.store.status_changes import Publisher, StatusChanges
from core.store.waiting import WaitingReader

if TYPE_CHECKING:
    from core.store import late_payments


class View(NamedTuple):
    """What a pass finds when it begins."""

    tick: datetime
    interval: timedelta
    state: StateRow
    oldest_due: datetime | None  # of the sessions that nobody is checking; None: there is none
    newest_settings: str | None  # of the newest tick's pass

    @property
    def now(self) -> datetime:
        """By the database's clock."""
        return self.state.now

    @property
    def pause(self) -> Pause:
        return self.state.pause

    @property
    def paused_until(self) -> datetime | None:
        """None if billing may be asked."""
        return self.pause.until if self.pause.until > self.now else None

    @property
    def last_counts(self) -> OpenCounts:
        return self.state.last_counts

    @property
    def may_reconcile(self) -> bool:
        """Whether it is time to, or sessions are open and no batch is free.

        So it is where somebody has upgraded the tables by hand, and no batch was formed yet.
        """
        return self.state.may_reconcile or (self.oldest_due is None and self.last_counts.open > 0)

    @property
    def has_due(self) -> bool:
        return self.oldest_due is not None and self.oldest_due <= max(self.now, self.tick)

    @property
    def overdue_seconds(self) -> float:
        if self.oldest_due is None:
            return 0.0
        return max(0.0, (self.now - self.oldest_due).total_seconds())

    @property
    def last_plausible_tick(self) -> datetime:
        """A later tick on record came from a clock that was wrong."""
        return self.tick + 2 * self.interval

    @property
    def has_leader(self) -> bool:
        """Whether the tick already has a leader."""
        led = self.state.last_tick
        return led is not None and self.tick <= led <= self.last_plausible_tick


class Store:
    """All tables on one connection. Every method raises StoreError."""

    def __init__(
        self,
        database: Database,
        publisher: Publisher | None = None,
        *,
        monitor: Monitor | None = None,  # None: passes do not record who makes them
        late_payments_for: timedelta | None = None,  # None: expired sessions are not looked at
        late_status_updates: bool = False,
        batch_size: int = MAX_BATCH,
    ) -> None:
        self._database = database
        self.queue = Queue(database, batch_size)
        self.status_changes = StatusChanges(database, self.queue.rows, publisher, late_payments_for)
        self.late_payments: late_payments.LatePayments | None = None
        if late_payments_for is not None:
            from core.store.late_payments import LatePayments  # noqa: PLC0415 (only if set)

            self.late_payments = LatePayments(
                database, publisher, late_payments_for, updates_status=late_status_updates
            )
        self.state = MonitorState(database)
        self.history = PassHistory(database, monitor.as_text() if monitor else None)
        self.others = OtherMonitors(database, self.history, monitor)
        self._warned: set[str] = set()

    def prepare(self) -> list[str]:
        """Make the monitor's tables if need be; returns warnings for the operator."""
        if self._database.prepared:
            return []
        warnings = self._database.prepare()
        self.history.prepare()
        new = [warning for warning in warnings if warning not in self._warned]
        self._warned.update(new)
        return new

    def now(self) -> datetime:
        return self._database.run(lambda connection: connection.now())

    def look(self, tick: datetime | None, *, interval_seconds: int) -> View:
        """Read everything that a beginning pass needs, in one statement.

        The tick comes from the loop's clock, which differs a little from the database's. It is used
        as it is: otherwise, with the loop's clock ahead, sessions due at the tick would not be due
        yet and would wait for the next one. A tick more than an interval away from the database's
        clock is replaced with the slot of that clock.
        """
        interval = timedelta(seconds=interval_seconds)

        def read(connection: Connection) -> View:
            expressions = oldest_due(self._database), newest_settings(self._database)
            state, (due, settings) = self.state.read_or_create(connection, *expressions)
            plausible = tick is not None and abs(state.now - tick) <= interval
            slot = tick if tick is not None and plausible else slot_at(state.now, interval_seconds)
            return View(slot, interval, state, as_datetime_or_none(due), as_text_or_none(settings))

        return self._database.run(read)

    def take_lead(self, view: View) -> bool:
        """Become the leader of the view's tick, if it has none; returns whether this pass is it."""
        if view.has_leader:
            return False
        return self.state.take_lead(view.tick, not_after=view.last_plausible_tick)

    def reconciliation(
        self, tick: datetime, rules: CheckRules, session_ids: Sequence[str] | None = None
    ) -> Reconciliation:
        return Reconciliation(self._database, self.queue, tick, rules, session_ids)

    def read_waiting(
        self, rules: CheckRules, counts: OpenCounts, *, is_limited: bool = False
    ) -> Waiting:
        """Which open sessions wait now; `counts` are the last ones."""
        reader = WaitingReader(self._database, rules, is_limited=is_limited)
        return self._database.run(lambda c: reader.read(c, c.now(), counts.outcomes))

    def finish(self, reconciliation: Reconciliation) -> None:
        """Keep the counts of a complete reconciliation."""
        if reconciliation.is_complete:
            self.state.keep_counts(reconciliation.counts, took=reconciliation.took)

    def forget_old(self) -> bool:
        """Delete rows that are over a day old; returns whether more are left."""
        more_passes, more_changes = self.history.forget_old(), self.status_changes.forget_old()
        return more_passes or more_changes

    def record(self, results: Results, changes: Sequence[StatusChange], now: datetime) -> Recorded:
        """Write what was decided: results of checks, and up to CHANGES_AT_ONCE status changes."""
        self.queue.write(results, now)
        outcomes = Counter(recheck.answer.outcome for recheck in results.all_rechecks)
        made = self.status_changes.make(changes)
        return made._replace(outcomes=outcomes + Counter(made.outcomes))

    def close(self) -> None:
        self._database.close()

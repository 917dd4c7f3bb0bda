"""What `GET /api/status` returns: how the open sessions, the passes and billing are doing.

Every query uses an index and reads a bounded number of rows, whatever the size of the shop. The
number of open sessions comes from the leader's last complete reconciliation.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from core.database.port import (
    Connection,
    Database,
    Row,
    as_datetime,
    as_datetime_or_none,
    as_int,
    as_shown_text,
)
from core.domain import rate
from core.domain.cadence import slot_at
from core.domain.model import AGES, JsonObject, Outcome, Reason, Skip, iso
from core.domain.other_monitors import OtherMonitor, others_at_work
from core.domain.rate import Budget
from core.domain.verdict import Facts, Quiet, judge, starts_late_by
from core.settings import Settings
from core.store.monitor_state import MAX_PAUSE
from core.store.other_monitors import monitor_of, monitors_seen
from core.store.pass_history import ALIVE_SECONDS, is_alive, start_delays, unknown_words
from core.store.queue import oldest_due
from core.store.queue_rows import DUE, LAST_CHECK
from core.store.settings_in_force import settings_in_force
from core.store.status_changes import KEEP_CHANGES
from core.store.usual import unusually_quiet, usual_not_found
from core.store.waiting import WaitingReader

PASSES = 60  # of ticks
MANUAL_PASSES = 20  # since then
FAILING = CHANGES = 10
NEWEST = 200  # sessions among which checkouts are compared
MISSED = 60  # missed ticks that are listed; all are counted
HISTORY = timedelta(hours=1)  # searched for missed ticks and failures
# A cold start takes seconds: a slot without a pass is missed after an interval and this long.
START_SECONDS = 5
FAILED = ", ".join(f"'{outcome.value}'" for outcome in Outcome if outcome.is_error)


def read_status(database: Database, settings: Settings, *, on_lambda: bool = False) -> JsonObject:
    """The whole answer; its form is `Status` in `handlers/openapi.json`.

    `on_lambda`: whether Lambda starts the passes, so that the verdict can say why they are late.

    Raises:
        StoreError: the database cannot be used.
    """
    return database.run(
        lambda connection: _StatusReport(connection, database, settings, on_lambda=on_lambda).read()
    )


class _UnderWay(NamedTuple):
    """A pass that has begun and not ended."""

    tick: datetime | None
    started_at: datetime
    alive: bool


class _StatusReport:
    """Reads the monitor's tables. It writes nothing, and locks no row."""

    def __init__(
        self, connection: Connection, database: Database, settings: Settings, *, on_lambda: bool
    ) -> None:
        self._connection = connection
        self._database = database
        self._settings = settings
        self._on_lambda = on_lambda

    def read(self) -> JsonObject:
        now = self._connection.now()
        paused_until, counts, counted_at, budget = self._monitor_state()
        known_limit = self._settings.billing_max_per_second
        allowed = rate.allowed(budget, known_limit)
        ages = counts["ages"] if counts else {}
        interval = self._settings.interval_seconds
        demand = rate.demand(ages, self._settings.cadence, interval)
        last_pass_at, has_api_key = self._newest_tick(now)
        ticks = self._ticks(since=now - HISTORY)
        under_way = self._under_way(now)
        since = max(self._first_tick() or now, now - HISTORY)
        slots, missed = self._missed(ticks, since, now)
        if missed and (changed := self._other_interval_until(since, now)) is not None:
            since = changed
            slots, missed = self._missed(ticks, since, now)
        outcomes = counts["outcomes"] if counts else {}
        reader = WaitingReader(
            self._database,
            self._settings.check_rules(),
            is_limited=rate.is_too_low(allowed, demand),
        )
        waiting = reader.read(self._connection, now, outcomes)
        killed = [p.started_at for p in under_way if not p.alive and p.started_at > now - HISTORY]
        facts = Facts(
            waiting=waiting,
            interval_seconds=self._settings.interval_seconds,
            last_pass_at=last_pass_at,
            installed_at=None if last_pass_at else self._installed_at(),
            open=counts["open"] if counts else None,
            outcomes=outcomes,
            unknown_words=unknown_words(self._connection, now),
            usual_not_found=usual_not_found(self._connection, now, outcomes),
            quiet=self._quiet(ages, now),
            paused_until=_in_force(paused_until, now),
            allowed=allowed,
            demand=demand,
            slower_cadence=rate.slower_cadence(ages, allowed, interval) if allowed else None,
            has_api_key=has_api_key and self._settings.has_api_key,
            other_monitors=self._other_monitors(now),
            shared_checkouts=self._shared_checkouts(),
            paid_late=self._paid_late(now),
            expected_ticks=slots,
            missed_ticks=len(missed),
            last_missed=missed[0] if missed else None,
            killed_pass_at=max(killed, default=None),
            starts_late_by=starts_late_by(start_delays(self._connection, now)),
            on_lambda=self._on_lambda,
        )
        verdict = judge(facts)
        step = verdict.next_step
        return {
            "timestamp": iso(now),
            "verdict": verdict.as_dict(),
            "next_step": step.as_dict() if step else None,
            "waiting": waiting.as_dict(),
            "open": {
                "count": facts.open,
                "counted_at": _iso(counted_at),
                "outcomes": {name or "unchecked": n for name, n in facts.outcomes.items()},
                "failed": sum(facts.failed.values()),
                "ages": counts["ages"] if counts else {},
            },
            "overdue_seconds": round(self._overdue_seconds(now), 3),
            "paused_until": _iso(facts.paused_until),
            "billing_rate": allowed
            and {
                "allowed_per_second": round(allowed, 1),
                "source": "billing"
                if budget and rate.is_below(budget, known_limit)
                else "BILLING_MAX_PER_SECOND",
                "demand_per_second": round(demand, 1),
            },
            "last_pass_at": _iso(last_pass_at),
            "passes": self._passes(ticks, under_way, now),
            "missed_ticks": {
                "since": iso(since),
                "expected": slots,
                "missed": len(missed),
                "newest": [iso(slot) for slot in missed[:MISSED]],
            },
            "failing": self._failing(),
            "changes": self._changes(),
            "settings": settings_in_force(self._settings),
        }

    def _monitor_state(
        self,
    ) -> tuple[datetime | None, dict[str, Any], datetime | None, Budget | None]:
        """The pause, the last complete reconciliation's counts with their time, and the budget."""
        rows = self._connection.query(
            "SELECT paused_until, counts, counted_at, budget"
            " FROM checkout_session_pause WHERE id = 1"
        )
        for paused_until, counts, counted_at, text in rows:
            found = json.loads(counts) if isinstance(counts, str) else {}
            budget = Budget.from_json(text) if isinstance(text, str) else None
            return as_datetime(paused_until), found, as_datetime_or_none(counted_at), budget
        return None, {}, None, None

    def _newest_tick(self, now: datetime) -> tuple[datetime | None, bool]:
        """When the newest pass of a tick began, and whether it had an API key."""
        # A pass that began in the future is of a clock that was ahead.
        rows = self._connection.query(
            "SELECT started_at, skipped FROM checkout_session_run"
            " WHERE reason = %s AND started_at <= %s ORDER BY id DESC LIMIT 1",
            (Reason.TICK.value, now + timedelta(seconds=ALIVE_SECONDS)),
        )
        for started_at, skipped in rows:
            return as_datetime(started_at), Skip.NO_API_KEY.value not in json.loads(str(skipped))
        return None, True

    def _other_monitors(self, now: datetime) -> list[OtherMonitor]:
        here = monitor_of(self._settings, "").settings
        return others_at_work(here, monitors_seen(self._connection, now), now)

    def _installed_at(self) -> datetime | None:
        rows = self._connection.query(
            "SELECT started_at FROM checkout_session_run ORDER BY id LIMIT 1"
        )
        return as_datetime(rows[0][0]) if rows else None

    def _first_tick(self) -> datetime | None:
        """The first tick on record; before it there was no loop, so no tick was missed."""
        rows = self._connection.query(
            "SELECT tick FROM checkout_session_run WHERE tick IS NOT NULL ORDER BY tick LIMIT 1"
        )
        return as_datetime(rows[0][0]) if rows else None

    def _ticks(self, since: datetime) -> list[datetime]:
        """The ticks that had a pass, the newest first."""
        rows = self._connection.query(
            "SELECT DISTINCT tick FROM checkout_session_run WHERE tick > %s ORDER BY tick DESC",
            (since,),
        )
        return [as_datetime(tick) for (tick,) in rows]

    def _missed(
        self, ticks: Sequence[datetime], since: datetime, now: datetime
    ) -> tuple[int, list[datetime]]:
        """How many slots there were, and the ones without a pass, the newest first."""
        interval = timedelta(seconds=self._settings.interval_seconds)
        slot = slot_at(now - max(interval, timedelta(seconds=START_SECONDS)), interval.seconds)
        with_pass = set(ticks)
        slots = []
        while slot >= since:
            slots.append(slot)
            slot -= interval
        return len(slots), [slot for slot in slots if slot not in with_pass]

    def _other_interval_until(self, since: datetime, now: datetime) -> datetime | None:
        """The last tick of a time in which CHECK_INTERVAL_SECONDS was another one, if there is."""
        interval = self._settings.interval_seconds
        [(tick,)] = self._connection.query(
            "SELECT MAX(tick) FROM checkout_session_run WHERE tick > %s AND tick <= %s"
            " AND settings NOT LIKE %s",
            (since, now, f'%"CHECK_INTERVAL_SECONDS": {interval},%'),
        )
        return as_datetime_or_none(tick)

    def _quiet(self, ages: Mapping[str, int], now: datetime) -> Quiet | None:
        """If status changes are made, and there are sessions that could have been closed."""
        _, *older = AGES
        if self._settings.status_reader is None or not any(ages.get(name) for name in older):
            return None
        return unusually_quiet(self._connection, now)

    def _under_way(self, now: datetime) -> list[_UnderWay]:
        rows = self._connection.query(
            "SELECT tick, started_at, duration_ms FROM checkout_session_run"
            " WHERE finished_at IS NULL"
        )
        return [
            _UnderWay(
                as_datetime_or_none(tick),
                as_datetime(started_at),
                is_alive(as_datetime(started_at), as_int(so_far), now),
            )
            for tick, started_at, so_far in rows
        ]

    def _passes(
        self, ticks: Sequence[datetime], under_way: Sequence[_UnderWay], now: datetime
    ) -> list[JsonObject]:
        """The newest first. All workers of a tick make one entry; the other passes are manual."""
        rows: list[Row] = []
        if ticks:
            rows += self._connection.query(
                "SELECT tick, MIN(reason), MIN(started_at), MAX(finished_at), COUNT(*),"
                " SUM(checked), SUM(errors), SUM(status_changes), MAX(latency_p95_ms)"
                " FROM checkout_session_run WHERE tick >= %s GROUP BY tick",
                (ticks[:PASSES][-1],),
            )
        rows += self._connection.query(
            "SELECT tick, reason, started_at, finished_at, 1, checked, errors, status_changes,"
            " latency_p95_ms FROM checkout_session_run"
            " WHERE tick IS NULL AND reason <> %s AND started_at > %s"
            f" ORDER BY id DESC LIMIT {MANUAL_PASSES:d}",
            (Reason.START.value, ticks[:PASSES][-1] if ticks else now - HISTORY),
        )
        # If one worker of a tick is alive and another was killed, the tick counts as alive.
        under_way = sorted(under_way, key=lambda worker: worker.alive)
        alive = {worker.tick or worker.started_at: worker.alive for worker in under_way}
        passes = [_pass(row, alive, now) for row in rows]
        passes.sort(key=lambda one: str(one["started_at"]), reverse=True)
        return passes

    def _overdue_seconds(self, now: datetime) -> float:
        """How late the most overdue session is; sessions under way do not count."""
        [(due,)] = self._connection.query(f"SELECT {oldest_due(self._database)}")
        due_at = as_datetime_or_none(due)
        return max(0.0, (now - due_at).total_seconds()) if due_at else 0.0

    def _failing(self) -> list[JsonObject]:
        """Those of the sessions whose last check failed that have waited longest."""
        rows = self._connection.query(
            # The few are found first, by their index, whatever is joined to them.
            "SELECT c.session_id, s.billing_checkout_id, c.last_outcome, c.last_status_code,"
            f" c.consecutive_failures, c.failing_since, {LAST_CHECK}, {DUE}"
            " FROM (SELECT * FROM checkout_session_check"
            f" WHERE failing_since IS NOT NULL AND last_outcome IN ({FAILED})"
            f" ORDER BY failing_since LIMIT {FAILING:d}) AS c"
            " LEFT JOIN checkout_session_batch b ON b.id = c.batch_id"
            " LEFT JOIN checkout_session s ON s.id = c.session_id"
            " ORDER BY c.failing_since"
        )
        return [
            {
                "session_id": as_shown_text(session_id),
                "billing_checkout_id": None if checkout_id is None else as_shown_text(checkout_id),
                "outcome": outcome,
                "status_code": status_code,
                "consecutive_failures": failures,
                "failing_since": _iso(as_datetime_or_none(since)),
                "last_checked_at": _iso(as_datetime_or_none(checked_at)),
                "next_check_at": _iso(as_datetime_or_none(next_at)),
            }
            for (
                session_id,
                checkout_id,
                outcome,
                status_code,
                failures,
                since,
                checked_at,
                next_at,
            ) in rows
        ]

    def _shared_checkouts(self) -> dict[str, list[str]]:
        """The checkouts that several of the newest open sessions have, with those sessions."""
        rows = self._connection.query(
            # Not `WHERE s.status`: no statistics may make it read every open session.
            "SELECT c.session_id, s.billing_checkout_id, COALESCE(s.status, '') = 'open'"
            " FROM (SELECT session_id, rowid AS number FROM checkout_session_check"
            f" ORDER BY rowid DESC LIMIT {NEWEST:d}) c"
            " LEFT JOIN checkout_session s ON s.id = c.session_id ORDER BY c.number"
        )
        sessions: defaultdict[str, list[str]] = defaultdict(list)
        for session_id, checkout_id, is_open in rows:
            if is_open and checkout_id:
                sessions[as_shown_text(checkout_id)].append(as_shown_text(session_id))
        return {checkout: ids for checkout, ids in sessions.items() if len(ids) > 1}

    def _paid_late(self, now: datetime) -> list[str]:
        """The sessions whose late payment was found within a day, and that are still `timeout`."""
        rows = self._connection.query(
            "SELECT c.session_id FROM checkout_session_change c LEFT JOIN checkout_session s"
            " ON s.id = c.session_id WHERE c.paid_late_at > %s AND COALESCE(s.status, '') ="
            f" 'timeout' GROUP BY 1 ORDER BY MAX(c.paid_late_at) DESC LIMIT {CHANGES:d}",
            (now - KEEP_CHANGES,),
        )
        return [as_shown_text(session_id) for (session_id,) in rows]

    def _changes(self) -> list[JsonObject]:
        rows = self._connection.query(
            "SELECT session_id, billing_checkout_id, new_status, billing_status, changed_at"
            f" FROM checkout_session_change ORDER BY id DESC LIMIT {CHANGES:d}"
        )
        return [
            {
                "session_id": as_shown_text(session_id),
                "billing_checkout_id": None if checkout_id is None else as_shown_text(checkout_id),
                "new_status": new_status,
                "billing_status": billing_status,
                "changed_at": iso(as_datetime(changed_at)),
            }
            for session_id, checkout_id, new_status, billing_status, changed_at in rows
        ]


def _pass(row: Row, alive: Mapping[datetime, bool], now: datetime) -> JsonObject:
    tick, reason, started_at, finished_at, workers, checked, errors, changes, p95 = row
    began = as_datetime(started_at)
    state = {None: "complete", True: "running", False: "killed"}[
        alive.get(as_datetime_or_none(tick) or began)
    ]
    ended = now if state == "running" else as_datetime_or_none(finished_at)
    return {
        "tick": _iso(as_datetime_or_none(tick)),
        "reason": reason,
        "started_at": iso(began),
        "state": state,
        "duration_ms": None if ended is None else round((ended - began).total_seconds() * 1000),
        "workers": as_int(workers),
        "checked": as_int(checked),
        "errors": as_int(errors),
        "status_changes": as_int(changes),
        "latency_p95_ms": p95,
    }


def _in_force(paused_until: datetime | None, now: datetime) -> datetime | None:
    """The end of the pause; None if it is over, or so far ahead that a clock was wrong."""
    return paused_until if paused_until and now < paused_until <= now + MAX_PAUSE else None


def _iso(at: datetime | None) -> str | None:
    return iso(at) if at else None

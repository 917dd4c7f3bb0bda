"""What `GET /api/status` tells: how the open sessions, the passes and billing stand.

Every query is by an index and reads a bounded number of rows, whatever the size of the shop: how
many sessions are open is read where the last whole count left it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from core.database.address import MySQLAddress, SQLitePath
from core.database.port import Database, Row, integer, moment, moment_or_none
from core.domain.cadence import slot_at
from core.domain.model import JsonObject, Reason, Skip, iso
from core.domain.verdict import Facts, judge
from core.settings import Settings
from core.store.pass_history import ALIVE_SECONDS
from core.store.queue import longest_due

PASSES = 60  # of ticks
BY_HAND = 20  # passes since then that somebody triggered
FAILING = CHANGES = 10
MISSED = 60  # missed ticks that are named; all are counted
HISTORY = timedelta(hours=1)  # that passes are looked through for missed ticks and failures
# A cold start takes seconds: a slot is missed when it had this long, and an interval, for a pass.
START_SECONDS = 5
# "Most checks fail" begins after the last pass of which this does not hold.
MOST_FAIL = "errors * 2 > checked"


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A worker's pass that has begun and not ended."""

    tick: datetime | None
    started_at: datetime
    alive: bool


class Overview:
    """Reads the monitor's tables. It writes nothing, and locks no row."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def read(self) -> JsonObject:
        """The whole answer; its form is `Status` in `handlers/openapi.json`.

        Raises:
            StoreError: the database cannot be used.
        """
        return self._database.run(self._read)

    def _read(self) -> JsonObject:
        now = self._database.now()
        paused_until, counts, counted_at = self._shared()
        last_pass_at, has_api_key = self._newest_tick()
        ticks = self._ticks(since=now - HISTORY)
        under_way = self._under_way(now)
        since = max(self._first_tick() or now, now - HISTORY)
        slots, missed = self._missed(ticks, since, now)
        failing = self._failing()
        killed = [p.started_at for p in under_way if not p.alive and p.started_at > now - HISTORY]
        facts = Facts(
            now=now,
            interval_seconds=self._settings.interval_seconds,
            last_pass_at=last_pass_at,
            installed_at=None if last_pass_at else self._installed_at(),
            open=counts["open"] if counts else None,
            outcomes=counts["outcomes"] if counts else {},
            overdue_seconds=self._overdue_seconds(now),
            paused_until=paused_until if paused_until and paused_until > now else None,
            has_api_key=has_api_key,
            expected_ticks=slots,
            missed_ticks=len(missed),
            last_missed=missed[0] if missed else None,
            killed_pass_at=max(killed, default=None),
        )
        if facts.most_fail:
            worst = next(iter(facts.failed))
            alike = [one for one in failing if one["outcome"] == worst.value]
            facts = replace(
                facts,
                failing_since=self._failing_since(alike, now),
                failing_code=alike[0]["status_code"] if alike else None,
            )
        return {
            "timestamp": iso(now),
            "verdict": judge(facts).as_dict(),
            "open": {
                "count": facts.open,
                "counted_at": _iso(counted_at),
                "outcomes": {name or "unchecked": n for name, n in facts.outcomes.items()},
                "failed": sum(facts.failed.values()),
                "ages": counts["ages"] if counts else {},
            },
            "overdue_seconds": round(facts.overdue_seconds, 3),
            "paused_until": _iso(facts.paused_until),
            "last_pass_at": _iso(last_pass_at),
            "passes": self._passes(ticks, under_way, now),
            "missed_ticks": {
                "since": iso(since),
                "expected": slots,
                "missed": len(missed),
                "newest": [iso(slot) for slot in missed[:MISSED]],
            },
            "failing": failing,
            "changes": self._changes(),
            "settings": settings_in_force(self._settings),
        }

    def _shared(self) -> tuple[datetime | None, dict[str, Any], datetime | None]:
        """The row that all workers share: the pause, and what the last whole count found."""
        rows = self._database.query(
            "SELECT paused_until, counts, counted_at FROM checkout_session_pause WHERE id = 1"
        )
        for paused_until, counts, counted_at in rows:
            found = json.loads(counts) if isinstance(counts, str) else {}
            return moment(paused_until), found, moment_or_none(counted_at)
        return None, {}, None

    def _newest_tick(self) -> tuple[datetime | None, bool]:
        """When the newest pass of a tick began, and whether it had a key to ask billing with."""
        rows = self._database.query(
            "SELECT started_at, skipped FROM checkout_session_run WHERE reason = %s"
            " ORDER BY id DESC LIMIT 1",
            (Reason.TICK.value,),
        )
        for started_at, skipped in rows:
            return moment(started_at), Skip.NO_API_KEY.value not in json.loads(str(skipped))
        return None, True

    def _installed_at(self) -> datetime | None:
        rows = self._database.query(
            "SELECT started_at FROM checkout_session_run ORDER BY id LIMIT 1"
        )
        return moment(rows[0][0]) if rows else None

    def _first_tick(self) -> datetime | None:
        """Of those that are kept; before it no tick is missed: there was no loop yet."""
        rows = self._database.query(
            "SELECT tick FROM checkout_session_run WHERE tick IS NOT NULL ORDER BY tick LIMIT 1"
        )
        return moment(rows[0][0]) if rows else None

    def _ticks(self, since: datetime) -> list[datetime]:
        """Those that had a pass, the newest first."""
        rows = self._database.query(
            "SELECT DISTINCT tick FROM checkout_session_run WHERE tick > %s ORDER BY tick DESC",
            (since,),
        )
        return [moment(tick) for (tick,) in rows]

    def _missed(
        self, ticks: Sequence[datetime], since: datetime, now: datetime
    ) -> tuple[int, list[datetime]]:
        """How many slots there were, and those without a pass, the newest first."""
        interval = timedelta(seconds=self._settings.interval_seconds)
        slot = slot_at(now - max(interval, timedelta(seconds=START_SECONDS)), interval.seconds)
        had = set(ticks)
        slots = []
        while slot >= since:
            slots.append(slot)
            slot -= interval
        return len(slots), [slot for slot in slots if slot not in had]

    def _under_way(self, now: datetime) -> list[_UnderWay]:
        rows = self._database.query(
            "SELECT tick, started_at, duration_ms FROM checkout_session_run"
            " WHERE finished_at IS NULL"
        )
        return [
            _UnderWay(
                moment_or_none(tick),
                moment(started_at),
                now - moment(started_at) - timedelta(milliseconds=integer(so_far))
                <= timedelta(seconds=ALIVE_SECONDS),
            )
            for tick, started_at, so_far in rows
        ]

    def _passes(
        self, ticks: Sequence[datetime], under_way: Sequence[_UnderWay], now: datetime
    ) -> list[JsonObject]:
        """The newest first. A tick with all its workers is one pass; others were asked for."""
        rows: list[Row] = []
        if ticks:
            rows += self._database.query(
                "SELECT tick, MIN(reason), MIN(started_at), MAX(finished_at), COUNT(*),"
                " SUM(checked), SUM(errors), SUM(status_changes), MAX(latency_p95_ms)"
                " FROM checkout_session_run WHERE tick >= %s GROUP BY tick",
                (ticks[:PASSES][-1],),
            )
        rows += self._database.query(
            "SELECT tick, reason, started_at, finished_at, 1, checked, errors, status_changes,"
            " latency_p95_ms FROM checkout_session_run"
            " WHERE tick IS NULL AND reason <> %s AND started_at > %s"
            f" ORDER BY id DESC LIMIT {BY_HAND:d}",
            (Reason.START.value, ticks[:PASSES][-1] if ticks else now - HISTORY),
        )
        # Of the workers of one tick the living count for more than the killed.
        under_way = sorted(under_way, key=lambda worker: worker.alive)
        alive = {worker.tick or worker.started_at: worker.alive for worker in under_way}
        passes = [_pass(row, alive, now) for row in rows]
        passes.sort(key=lambda told: str(told["started_at"]), reverse=True)
        return passes

    def _overdue_seconds(self, now: datetime) -> float:
        """How late the most overdue session is that nobody is checking."""
        [(due,)] = self._database.query(f"SELECT {longest_due(self._database)}")
        due_at = moment_or_none(due)
        return max(0.0, (now - due_at).total_seconds()) if due_at else 0.0

    def _failing(self) -> list[dict[str, Any]]:
        rows = self._database.query(
            "SELECT c.session_id, s.billing_checkout_id, c.last_outcome, c.last_status_code,"
            " c.consecutive_failures, c.failing_since, c.last_checked_at, c.next_check_at"
            " FROM checkout_session_check c"
            " LEFT JOIN checkout_session s ON s.id = c.session_id"
            " WHERE c.consecutive_failures > 0"
            f" ORDER BY c.consecutive_failures DESC LIMIT {FAILING:d}"
        )
        return [
            {
                "session_id": str(session_id),
                "billing_checkout_id": None if checkout_id is None else str(checkout_id),
                "outcome": outcome,
                "status_code": status_code,
                "consecutive_failures": failures,
                "failing_since": _iso(moment_or_none(since)),
                "last_checked_at": _iso(moment_or_none(checked_at)),
                "next_check_at": _iso(moment_or_none(next_at)),
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

    def _failing_since(
        self, failing: Sequence[Mapping[str, Any]], now: datetime
    ) -> datetime | None:
        """Since when every pass in which something was checked has failed in most of its checks.

        None: the newest has not. For longer than HISTORY, the session that has failed since the
        earliest of `failing` tells.
        """
        since = now - HISTORY
        well = self._database.query(
            "SELECT tick FROM checkout_session_run"
            f" WHERE tick > %s AND checked > 0 AND NOT {MOST_FAIL} ORDER BY tick DESC LIMIT 1",
            (since,),
        )
        first = self._database.query(
            f"SELECT started_at FROM checkout_session_run WHERE tick > %s AND {MOST_FAIL}"
            " ORDER BY tick LIMIT 1",
            (moment(well[0][0]) if well else since,),
        )
        if not first:
            return None
        if well:
            return moment(first[0][0])
        earlier = [one["failing_since"] for one in failing if one["failing_since"]]
        return min([moment(first[0][0]), *map(datetime.fromisoformat, earlier)])

    def _changes(self) -> list[JsonObject]:
        rows = self._database.query(
            "SELECT session_id, billing_checkout_id, new_status, billing_status, changed_at"
            f" FROM checkout_session_change ORDER BY id DESC LIMIT {CHANGES:d}"
        )
        return [
            {
                "session_id": str(session_id),
                "billing_checkout_id": None if checkout_id is None else str(checkout_id),
                "new_status": new_status,
                "billing_status": billing_status,
                "changed_at": iso(moment(changed_at)),
            }
            for session_id, checkout_id, new_status, billing_status, changed_at in rows
        ]


def _pass(row: Row, alive: Mapping[datetime, bool], now: datetime) -> JsonObject:
    tick, reason, started_at, finished_at, workers, checked, errors, changes, p95 = row
    began = moment(started_at)
    state = {None: "complete", True: "running", False: "killed"}[
        alive.get(moment_or_none(tick) or began)
    ]
    ended = now if state == "running" else moment_or_none(finished_at)
    return {
        "tick": _iso(moment_or_none(tick)),
        "reason": reason,
        "started_at": iso(began),
        "state": state,
        "duration_ms": None if ended is None else round((ended - began).total_seconds() * 1000),
        "workers": integer(workers),
        "checked": integer(checked),
        "errors": integer(errors),
        "status_changes": integer(changes),
        "latency_p95_ms": p95,
    }


def settings_in_force(settings: Settings) -> JsonObject:
    """Every setting by the name of its variable; of secrets only whether there is one."""
    reader = settings.status_reader
    match settings.database:
        case MySQLAddress(host, port, _, _, name):
            database: str | None = f"mysql://{host}:{port}/{name}"
        case SQLitePath(path):
            database = f"sqlite:///{path}"
        case None:
            database = None
    return {
        "APIKEY": "set" if settings.api_key else None,
        "APIKEY_SECRET_ARN": settings.api_key_secret_arn,
        "DATABASE_URL": database,
        "DATABASE_SECRET_ARN": settings.database_secret_arn,
        "BILLING_API_URL": settings.billing_api_url,
        "CHECK_INTERVAL_SECONDS": settings.interval_seconds,
        "CHECK_CADENCE": str(settings.cadence),
        "CHECK_BACKOFF_MAX_SECONDS": settings.backoff_max_seconds,
        "REQUEST_TIMEOUT_SECONDS": settings.request_timeout_seconds,
        "MAX_CONCURRENCY": settings.max_concurrency,
        "MAX_WORKERS": settings.max_workers,
        "STATUS_UPDATES": reader is not None,
        "BILLING_STATUS_PATH": reader.path if reader else None,
        "BILLING_STATUS_MAP": dict(reader.words) if reader else None,
        "SESSION_EXPIRES_AFTER": settings.expires_after_seconds,
        "EVENT_BUS_NAME": settings.event_bus_name,
        "LOG_LINES_ACTIVE": settings.log_lines_active,
        "DEBUG": settings.debug,
    }


def _iso(at: datetime | None) -> str | None:
    return iso(at) if at else None

"""`checkout_session_run`, the log of passes: a row from a pass's beginning on, for a day.

It is the heartbeat, and tells which passes are under way.
"""

import json
import random
from collections import Counter
from datetime import datetime, timedelta

from core.database.port import Database, Value, integer, marks, moment
from core.domain.model import Outcome, Reason, Skip, Summary

KEEP_RUNS = timedelta(days=1)

# A pass that is under way says so every second. One that has said nothing for this long was killed,
# or is frozen: nobody needs to wait for it.
ALIVE_SECONDS = 5.0


class Runs:
    """Writes and reads the log. Every method raises StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._last_id = 0

    def prepare(self) -> None:
        """Say since when there is a monitor: one that has just been installed is not late."""
        if self.last_sign_of_life() is None:
            now = self._database.run(self._database.now)
            summary = Summary(Reason.START, now)
            self.end(self.begin(summary), summary)

    def begin(self, summary: Summary) -> int:
        """Add the row of a pass that begins, and return its id.

        The id is made here, of the time: a statement that is sent again after a connection broke
        adds no second row.
        """
        nanoseconds = round(summary.started_at.timestamp() * 1000) * 1_000_000
        run_id = nanoseconds + random.randrange(1_000_000)  # noqa: S311 (no secret)
        run_id = self._last_id = max(run_id, self._last_id + 1)
        row: dict[str, Value] = {
            "id": run_id,
            "reason": summary.reason.value,
            "tick": summary.tick,
            "started_at": summary.started_at,
            **_told(summary),
        }
        self._database.run(
            lambda: self._database.execute(
                f"{self._database.insert_or_ignore} INTO checkout_session_run ({', '.join(row)})"
                f" VALUES {marks(row)}",
                tuple(row.values()),
            )
        )
        return run_id

    def progress(self, run_id: int, *, seconds: float, checked: int, errors: int) -> None:
        """Say that the pass is under way, and how far it has come."""
        duration_ms = round(seconds * 1000)
        self._update(run_id, {"duration_ms": duration_ms, "checked": checked, "errors": errors})

    def end(self, run_id: int, summary: Summary) -> None:
        self._update(run_id, {"finished_at": summary.finished_at, **_told(summary)})

    def forget_old(self) -> None:
        def work() -> None:
            day_ago = self._database.now() - KEEP_RUNS
            self._database.execute(
                "DELETE FROM checkout_session_run WHERE finished_at < %s", (day_ago,)
            )
            self._database.execute(
                "DELETE FROM checkout_session_run WHERE finished_at IS NULL AND started_at < %s",
                (day_ago,),
            )

        self._database.run(work)

    def under_way(self) -> int:
        """How many ticks' passes have begun, not ended, and given a sign of life of late."""

        def work() -> int:
            since = self._database.now() - timedelta(seconds=ALIVE_SECONDS)
            rows = self._database.query(
                "SELECT started_at, duration_ms FROM checkout_session_run"
                " WHERE finished_at IS NULL AND reason = %s",
                (Reason.TICK.value,),
            )
            return sum(
                moment(started_at) + timedelta(milliseconds=integer(so_far)) >= since
                for started_at, so_far in rows
            )

        return self._database.run(work)

    def last_sign_of_life(self) -> datetime | None:
        """When the newest pass began, or the monitor was installed; None before both."""
        rows = self._database.run(
            lambda: self._database.query(
                "SELECT started_at FROM checkout_session_run ORDER BY id DESC LIMIT 1"
            )
        )
        return moment(rows[0][0]) if rows else None

    def _update(self, run_id: int, row: dict[str, Value]) -> None:
        columns = ", ".join(f"{name} = %s" for name in row)
        self._database.run(
            lambda: self._database.execute(
                f"UPDATE checkout_session_run SET {columns} WHERE id = %s", (*row.values(), run_id)
            )
        )


def _told(summary: Summary) -> dict[str, Value]:
    latency = summary.latency_ms
    return {
        "duration_ms": round(summary.duration_seconds * 1000),
        "open_sessions": summary.open,
        "checked": summary.checked,
        "errors": summary.errors,
        "status_changes": summary.status_changes,
        "outcomes": _json(summary.outcomes),
        "skipped": _json(summary.skipped),
        "overdue_ms": round(summary.overdue_seconds * 1000),
        "latency_p50_ms": latency.get("p50"),
        "latency_p95_ms": latency.get("p95"),
        "latency_p99_ms": latency.get("p99"),
        "latency_max_ms": latency.get("max"),
    }


def _json(counts: Counter[Outcome] | Counter[Skip]) -> str:
    return json.dumps({name.value: count for name, count in counts.items()})

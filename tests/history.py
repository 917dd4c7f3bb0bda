"""The monitor's tables as its passes leave them, written row by row: a past to look back on."""

import itertools
import json
import sqlite3
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import pymysql

from core.settings import Settings
from core.store import SqlStore
from core.worker import open_database
from tests.support import NOON, FakeClock, Shop, add_sessions, settings_for

SECOND = timedelta(seconds=1)

_TO_COME = """
ALTER TABLE checkout_session_check ADD COLUMN failing_since DATETIME(3) NULL;
CREATE INDEX checkout_session_check_failing ON checkout_session_check (consecutive_failures);
DROP TABLE checkout_session_run;
CREATE TABLE checkout_session_run (id BIGINT PRIMARY KEY, reason VARCHAR(16), tick DATETIME(3),
  started_at DATETIME(3), finished_at DATETIME(3), duration_ms INT, open_sessions INT, checked INT,
  errors INT, status_changes INT, outcomes VARCHAR(1000), skipped VARCHAR(1000), overdue_ms BIGINT,
  latency_p50_ms DOUBLE, latency_p95_ms DOUBLE, latency_p99_ms DOUBLE, latency_max_ms DOUBLE);
CREATE INDEX checkout_session_run_finished ON checkout_session_run (finished_at);
CREATE INDEX checkout_session_run_tick ON checkout_session_run (tick);
ALTER TABLE checkout_session_pause ADD COLUMN counts VARCHAR(2000) NULL;
ALTER TABLE checkout_session_pause ADD COLUMN counted_at DATETIME(3) NULL;
CREATE TABLE checkout_session_change (id BIGINT PRIMARY KEY, session_id VARCHAR(255),
  billing_checkout_id VARCHAR(255), new_status VARCHAR(16), billing_status VARCHAR(255),
  changed_at DATETIME(3))"""


class History:
    """Of a shop whose monitor has checked every 5 seconds; `now` is 2 seconds into a slot."""

    def __init__(self, shop: Shop, now: datetime = NOON + 2 * SECOND) -> None:
        self.shop = shop
        self.now = now
        self._ids = itertools.count(1)
        store = SqlStore(open_database(settings_for(shop), clock=FakeClock(now)))
        store.prepare()
        store.close()
        for statement in _TO_COME.split(";"):
            with suppress(sqlite3.OperationalError, pymysql.OperationalError):
                shop.run(statement)
        shop.run("DELETE FROM checkout_session_run")

    @property
    def slot(self) -> datetime:
        return self.now - 2 * SECOND

    def settings(self, **env: str) -> Settings:
        return settings_for(self.shop, **env)

    def run(self, reason: str, started_at: datetime, **columns: Any) -> None:  # noqa: ANN401
        """A row of the log of passes; what is not given is that of a pass over nothing."""
        self._insert("checkout_session_run", [self._run(reason, started_at, columns)])

    def passes(
        self,
        count: int,
        *,
        missed: Collection[int] = (),
        row: Callable[[int], Mapping[str, Any]] = lambda _ago: {},
    ) -> None:
        """One pass in each of the last `count` slots, but for those missed.

        0 is the slot of now, 1 the one before; `row` says more of one.
        """
        ticks = {ago: self.slot - ago * 5 * SECOND for ago in reversed(range(count))}
        rows = [
            self._run(
                "tick",
                tick + SECOND / 50,
                {"tick": tick, "checked": 10, "latency_p95_ms": 104.0, **row(ago)},
            )
            for ago, tick in ticks.items()
            if ago not in missed
        ]
        self._insert("checkout_session_run", rows)

    def _run(self, reason: str, started_at: datetime, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": next(self._ids),
            "reason": reason,
            "tick": None,
            "started_at": started_at,
            "finished_at": started_at + SECOND / 2,
            "duration_ms": 500,
            "open_sessions": 0,
            "checked": 0,
            "errors": 0,
            "status_changes": 0,
            "outcomes": "{}",
            "skipped": "{}",
            "overdue_ms": 0,
            "latency_p95_ms": None,
            **columns,
        }

    def counted(self, outcomes: Mapping[str, int], ages: Mapping[str, int] | None = None) -> None:
        """What the last whole count found."""
        count = sum(outcomes.values())
        self.set_shared(
            counted_at=self.now - SECOND,
            counts=json.dumps(
                {"open": count, "outcomes": outcomes, "ages": ages or {"10m": count}}
            ),
        )

    def set_shared(self, **columns: Any) -> None:  # noqa: ANN401
        self.shop.run(
            f"UPDATE checkout_session_pause SET {', '.join(f'{name} = %s' for name in columns)}",
            [_plain(self.shop, value) for value in columns.values()],
        )

    def session(
        self,
        session_id: str,
        checkout_id: str | None,
        **columns: Any,  # noqa: ANN401
    ) -> None:
        """An open session, checked and well; its next check is in the next slot."""
        add_sessions(self.shop, {session_id: checkout_id})
        row = {
            "session_id": session_id,
            "next_check_at": self.slot + 5 * SECOND,
            "first_seen_at": self.now - 600 * SECOND,
            "last_checked_at": self.now - SECOND,
            "last_outcome": "active",
            "last_status_code": 200,
            **columns,
        }
        self._insert("checkout_session_check", [row])

    def failing(self, session_id: str, checkout_id: str | None, **columns: Any) -> None:  # noqa: ANN401
        """An open session whose last three checks failed with a 500."""
        failure = {
            "last_outcome": "unexpected_status",
            "last_status_code": 500,
            "consecutive_failures": 3,
            "failing_since": self.now - 60 * SECOND,
        }
        self.session(session_id, checkout_id, **{**failure, **columns})

    def change(self, session_id: str, **columns: Any) -> None:  # noqa: ANN401
        row = {
            "id": next(self._ids),
            "session_id": session_id,
            "billing_checkout_id": f"checkout_{session_id}",
            "new_status": "success",
            "billing_status": "paid",
            "changed_at": self.now - 30 * SECOND,
            **columns,
        }
        self._insert("checkout_session_change", [row])

    def _insert(self, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
        names = list(rows[0])
        self.shop.run(
            f"INSERT INTO {table} ({', '.join(names)}) VALUES "
            + ", ".join([f"({', '.join(['%s'] * len(names))})"] * len(rows)),
            [_plain(self.shop, row[name]) for row in rows for name in names],
        )


def _plain(shop: Shop, value: Any) -> Any:  # noqa: ANN401
    """A moment as the engine keeps it; SQLite's adapter is registered already."""
    if isinstance(value, datetime) and shop.url.startswith("mysql"):
        return value.replace(tzinfo=None)
    return value

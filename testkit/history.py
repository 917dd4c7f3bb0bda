"""Writes rows into the monitor's tables as its passes would have left them."""

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from core.settings import Settings
from core.store.store import Store
from core.worker import open_database
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, settings_for

SECOND = timedelta(seconds=1)


class History:
    """The past of a shop that was checked every 5 seconds; `now` is 2 seconds into a slot."""

    def __init__(self, shop: Shop, now: datetime = NOON + 2 * SECOND) -> None:
        self.shop = shop
        self.now = now
        self._ids = itertools.count(1)
        store = Store(open_database(settings_for(shop), clock=FakeClock(now)))
        store.prepare()
        store.state.read_pause()  # puts the row there
        store.close()
        shop.run("DELETE FROM checkout_session_run")

    @property
    def slot(self) -> datetime:
        return self.now - 2 * SECOND

    def settings(self, **env: str) -> Settings:
        return settings_for(self.shop, **env)

    def run(self, reason: str, started_at: datetime, **columns: Any) -> None:  # noqa: ANN401
        """Add a row of the run table, by default that of a pass without sessions."""
        self._insert("checkout_session_run", [self._run(reason, started_at, columns)])

    def passes(
        self,
        count: int,
        *,
        missed: Collection[int] = (),
        row: Callable[[int], Mapping[str, Any]] = lambda _ago: {},
    ) -> None:
        """Add one pass in each of the last `count` slots, except those missed.

        Slot 0 is the current one, 1 the one before. `row` returns more columns for a slot.
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
        """Set what the last complete reconciliation counted."""
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
        """Add an open, healthy session in a batch of its own; it is due in the next slot."""
        add_sessions(self.shop, {session_id: checkout_id})
        batch_id = next(self._ids)
        due = columns.get("next_check_at", self.slot + 5 * SECOND)
        batch = {
            "id": batch_id,
            "next_check_at": due,
            "due_at": due,
            "claimed_until": columns.pop("claimed_until", None),
        }
        self._insert("checkout_session_batch", [batch])
        row = {
            "session_id": session_id,
            "batch_id": batch_id,
            "next_check_at": due,
            "first_seen_at": self.now - 600 * SECOND,
            "last_checked_at": self.now - SECOND,
            "last_outcome": "active",
            "last_status_code": 200,
            **columns,
        }
        self._insert("checkout_session_check", [row])

    def failing(self, session_id: str, checkout_id: str | None, **columns: Any) -> None:  # noqa: ANN401
        """Add an open session whose last three checks failed with a 500."""
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
    """A time as the engine stores it; SQLite's adapter is already registered."""
    if isinstance(value, datetime) and shop.url.startswith("mysql"):
        return value.replace(tzinfo=None)
    return value

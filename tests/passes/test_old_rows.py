"""Rows that are kept for a while are deleted some at a time, beside the checks."""

import pytest

from core.database.port import as_int
from core.domain.model import Reason
from core.domain.summary import Summary
from core.store import old_rows
from core.store.store import Store
from testkit.clock import NOON
from tests.passes.virtual import VirtualMonitor


def test_a_new_session_does_not_wait_until_old_rows_are_deleted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(old_rows, "ROWS_AT_ONCE", 5)
    left: list[int] = []

    def count() -> int:
        sql = "SELECT COUNT(*) FROM checkout_session_run WHERE started_at < '2026-01-10'"
        [(rows,)] = monitor.database.run(lambda connection: connection.query(sql))
        return as_int(rows)

    def latency(_checkout_id: str, _earlier: int) -> float:
        left.append(count())
        return 0.1

    monitor = VirtualMonitor(latency)
    store = Store(monitor.database)
    store.prepare()
    for _ in range(20):
        store.history.begin(Summary(Reason.TICK, NOON))
    monitor.execute("UPDATE checkout_session_run SET started_at = '2026-01-01T00:00:00.000+00:00'")
    monitor.open(1)
    monitor.run(ticks=2)
    at_first_check, at_second = left
    assert at_first_check > at_second

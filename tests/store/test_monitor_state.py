"""The one row that all workers share: who leads a tick, and until when billing is not asked."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import httpx
import pytest

from core.database.mysql import MySQLConnection
from core.database.port import Value
from core.domain import rate
from core.domain.rate import Budget
from core.store.monitor_state import StateRow
from core.store.store import Store
from core.worker import Worker
from testkit.clock import NOON, FakeClock
from testkit.shops import MySQLShop, Shop, add_sessions, connect, numbered, settings_for
from tests.due_sessions import add_due_sessions
from tests.support import database_of, note_statements


def test_only_one_of_many_workers_leads_a_tick(shop: Shop, clock: FakeClock) -> None:
    add_due_sessions(shop, clock, 1)
    together = threading.Barrier(4)

    def lead_all() -> list[bool]:
        store = Store(database_of(shop, clock))
        led = []
        for second in range(0, 100, 5):
            together.wait()
            tick = NOON + timedelta(seconds=second)
            led.append(store.take_lead(store.look(tick, interval_seconds=100)))
        store.close()
        return led

    with ThreadPoolExecutor(4) as threads:
        of_each = [thread.result() for thread in [threads.submit(lead_all) for _ in range(4)]]
    assert [sum(led) for led in zip(*of_each, strict=True)] == [1] * 20


def test_a_tick_is_led_once_and_never_after_a_later_one(shop: Shop, clock: FakeClock) -> None:
    databases = [database_of(shop, clock) for _ in range(2)]
    first, second = (Store(database) for database in databases)
    first.prepare()
    first.state.read_pause()  # inserts the row

    def leads(store: Store, seconds: int) -> bool:
        tick, soon = (NOON + timedelta(seconds=s) for s in (seconds, 60))
        return store.state.take_lead(tick, not_after=soon)

    assert [leads(first, 5), leads(second, 5), leads(second, 0)] == [True, False, False]
    assert [leads(second, 10), leads(first, 10), leads(first, 5)] == [True, False, False]
    first.close()
    second.close()


def test_a_pause_is_never_shortened_and_only_the_newest_can_end(
    shop: Shop, clock: FakeClock
) -> None:
    store, other = (Store(database_of(shop, clock)) for _ in range(2))
    assert store.prepare() == []
    before, _now = store.state.read_pause()
    long = store.state.pause(30)
    assert other.state.pause(5) == other.state.pause(None) == long
    other.state.end_pauses(before)
    assert store.state.read_pause()[0] == long
    other.state.end_pauses(long)
    assert store.state.read_pause()[0].in_a_row == 0
    store.close()
    other.close()


def test_the_longer_of_two_simultaneous_pauses_wins(
    server_shop: MySQLShop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(database_of(server_shop, clock))
    store.prepare()
    store.state.read_pause()  # inserts the row
    longer = NOON + timedelta(seconds=30)
    execute, writing = MySQLConnection.execute, threading.Event()

    def note(connection: MySQLConnection, sql: str, parameters: Sequence[Value] = ()) -> int:
        if sql.startswith("UPDATE"):
            writing.set()
        return execute(connection, sql, parameters)

    monkeypatch.setattr(MySQLConnection, "execute", note)
    with (
        connect(server_shop.server, server_shop.database) as other,
        other.cursor() as cursor,
        ThreadPoolExecutor(1) as thread,
    ):
        other.begin()
        cursor.execute("UPDATE checkout_session_pause SET paused_until = %s", (longer,))
        shorter = thread.submit(store.state.pause, 5)
        assert writing.wait(10)
        other.commit()
        assert shorter.result().until == longer
    store.close()


def test_the_shared_row_is_restored_after_somebody_deletes_it(shop: Shop, clock: FakeClock) -> None:
    """Also in an execution environment that has seen the row before."""
    add_sessions(shop, numbered(1))
    healthy = httpx.MockTransport(lambda _request: httpx.Response(200))
    worker = Worker(settings_for(shop), transport=healthy, clock=clock)
    for _ in range(2):
        summary = worker.check_open_checkout_sessions(clock.now)
        assert (summary.led, summary.checked) == (True, 1)
        shop.run("DELETE FROM checkout_session_pause")
        clock.advance(5)
    worker.close()
    store = Store(database_of(shop, clock))
    assert store.state.pause(30).until == clock.now + timedelta(seconds=30)
    store.close()


def test_workers_that_reserve_at_the_same_time_never_get_the_same_times(
    shop: Shop, clock: FakeClock
) -> None:
    first = Store(database_of(shop, clock))
    first.prepare()
    first.close()
    begun = Budget(100, 0, 0, 0, 0, 100, 100, 0)

    def reserve_some() -> list[float]:
        store = Store(database_of(shop, clock))
        times: list[float] = []
        for _ in range(10):
            reserved: tuple[float, ...] = ()

            def change(row: StateRow) -> Budget:
                nonlocal reserved
                after, reserved = rate.reserved(row.budget or begun, 3, 1000, now=1000)
                return after

            store.state.exchange(change)
            times += reserved
        store.close()
        return times

    with ThreadPoolExecutor(4) as threads:
        of_each = [thread.result() for thread in [threads.submit(reserve_some) for _ in range(4)]]
    assert sorted(time for times in of_each for time in times) == pytest.approx(
        [1000 + n / 1000 for n in range(120)], abs=0.0005
    )


def test_without_a_limit_the_shared_row_is_only_read(
    sqlite_shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(database_of(sqlite_shop, clock))
    store.prepare()
    store.state.read_pause()  # inserts the row
    statements = note_statements(sqlite_shop, monkeypatch)
    assert store.state.exchange(lambda _row: None).budget is None
    assert [statement.split()[0] for statement in statements] == ["SELECT"]
    store.close()

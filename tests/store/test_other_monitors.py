"""Two monitors on one database: what is recorded of them, and when they are told of each other."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest

from core.domain.model import Reason
from core.domain.other_monitors import Monitor
from core.domain.summary import Summary
from core.passes.check_pass import check_open_checkout_sessions
from core.passes.running_pass import PassOptions
from core.settings import Settings
from core.store.other_monitors import MAX_VALUE_LENGTH, monitor_of
from core.store.store import Store
from core.worker import Worker
from testkit.clock import NOON, FakeClock
from testkit.history import SECOND
from testkit.shops import MySQLShop, Shop, add_sessions, numbered, settings_for
from tests.due_sessions import add_due_sessions
from tests.support import FakeBilling, database_of, note_statements


def paid(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"status": "paid"})


@contextmanager
def monitor(shop: Shop, clock: FakeClock, name: str, **env: str) -> Iterator[Worker]:
    worker = Worker(
        settings_for(shop, **env), transport=httpx.MockTransport(paid), clock=clock, name=name
    )
    try:
        yield worker
    finally:
        worker.close()


def tick(clock: FakeClock, slots: int, *workers: Worker) -> None:
    """Give each worker its tick, in this order, in so many slots of five seconds."""
    for _ in range(slots):
        for worker in workers:
            worker.check_open_checkout_sessions(clock.now)
        clock.advance(5)


def verdict(worker: Worker) -> dict[str, object]:
    found = worker.status()["verdict"]
    assert isinstance(found, dict)
    return found


def is_alone(worker: Worker) -> bool:
    return worker.health().checks["other_monitors"]


@pytest.mark.slow
def test_a_monitor_whose_every_tick_another_one_leads_says_so(
    shop: Shop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The other one does not write statuses, and takes every check: paid sessions stay open."""
    add_sessions(shop, numbered(20))
    with (
        monitor(shop, clock, "without") as without,
        monitor(shop, clock, "with", STATUS_UPDATES="true") as updating,
    ):
        tick(clock, 24, without, updating)
        assert is_alone(without)
        assert is_alone(updating)
        tick(clock, 36, without, updating)
        for worker, other in ((without, "with"), (updating, "without")):
            assert not is_alone(worker)
            assert not worker.health().ok
            found = verdict(worker)
            assert found["level"] == "critical"
            assert found["text"] == (
                f"Another monitor with other settings works on the same sessions: {other}"
            )
        assert verdict(updating)["notes"] == [
            "without (STATUS_UPDATES is false there and true here)."
        ]
        caplog.clear()
        tick(clock, 36, without, updating)
    lines = Counter(line for line in caplog.messages if "monitor" in line)  # in three minutes
    said = "⚠️ Another monitor with other settings works on the same sessions: "
    assert lines == {
        f"{said}with (STATUS_UPDATES is true there and false here)": 3,
        f"{said}without (STATUS_UPDATES is false there and true here)": 3,
    }
    assert shop.run("SELECT COUNT(*) FROM checkout_session WHERE status = 'open'") == [(20,)]


@pytest.mark.slow
def test_nothing_is_said_any_more_two_minutes_after_the_other_one_stopped(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    with (
        monitor(sqlite_shop, clock, "a") as a,
        monitor(sqlite_shop, clock, "b", CHECK_INTERVAL_SECONDS="10") as b,
    ):
        tick(clock, 40, a, b)
        assert not is_alone(a)
        tick(clock, 40, a)
        assert is_alone(a)
        assert is_alone(b)  # it makes no passes any more


@pytest.mark.slow
def test_a_deployment_with_new_settings_says_nothing(sqlite_shop: Shop, clock: FakeClock) -> None:
    """Workers with the old settings make passes for a minute beside the new ones."""
    with (
        monitor(sqlite_shop, clock, "stack") as old,
        monitor(sqlite_shop, clock, "stack", STATUS_UPDATES="true") as new,
    ):
        tick(clock, 60, old)
        for _ in range(12):
            tick(clock, 1, new, old)
            assert is_alone(old)
            assert is_alone(new)
        for _ in range(60):
            tick(clock, 1, new)
            assert is_alone(new)
            assert verdict(new)["level"] == "ok"


def test_two_regions_with_equal_settings_share_a_database(shop: Shop, clock: FakeClock) -> None:
    """How many requests and workers each has may differ, and so may the key and the log."""
    allowed = {
        "MAX_CONCURRENCY": "7",
        "MAX_WORKERS": "2",
        "APIKEY": "another",
        "LOG_LINES_ACTIVE": "0",
        "REQUEST_TIMEOUT_SECONDS": "3",
        "CHECK_CADENCE": "5s",  # the default in other words
    }
    with monitor(shop, clock, "east") as east, monitor(shop, clock, "west", **allowed) as west:
        tick(clock, 30, east, west)
        for worker in (east, west):
            assert is_alone(worker)
            assert verdict(worker)["level"] == "ok"
    [(text, passes)] = shop.run(
        "SELECT settings, COUNT(*) FROM checkout_session_run WHERE tick IS NOT NULL"
        " GROUP BY settings"
    )
    assert (Monitor.from_text(text).name, passes) == ("east", 30)  # none of the other is needed


def test_a_region_that_hangs_in_a_pass_delays_its_sessions_by_a_lease(
    sqlite_shop: Shop, clock: FakeClock
) -> None:
    """Nothing it does afterwards counts."""
    add_sessions(sqlite_shop, numbered(20))
    asked, workers = threading.Event(), list[Worker]()

    async def hang(_: httpx.Request) -> httpx.Response:
        asked.set()
        return await asyncio.Future()

    def hanging_region() -> None:
        transport = httpx.MockTransport(hang)
        settings = settings_for(sqlite_shop, STATUS_UPDATES="true")
        workers.append(Worker(settings, transport=transport, clock=lambda: NOON, name="us"))
        with suppress(asyncio.CancelledError):
            workers[0].check_open_checkout_sessions(NOON)
        workers[0].close()

    region = threading.Thread(target=hanging_region)
    region.start()
    assert asked.wait(10)
    with monitor(sqlite_shop, clock, "eu", STATUS_UPDATES="true") as eu:
        assert eu.check_open_checkout_sessions(clock.now).checked == 0  # the other region has them
        clock.advance(30)
        assert eu.check_open_checkout_sessions(clock.now).status_changes == 20
        workers[0].stop()
        region.join()
        assert is_alone(eu)
    assert sqlite_shop.run("SELECT DISTINCT status FROM checkout_session") == [("success",)]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("BILLING_API_URL", "https://billing.example/v2"),
        ("BILLING_HEADERS", '{"b": "{APIKEY}{TOKEN}"}'),
        ("BILLING_TOKEN_URL", "https://billing.example/token"),
        ("BILLING_OK", "200,202"),
        ("BILLING_NOT_FOUND", "400"),
        ("CHECK_INTERVAL_SECONDS", "10"),
        ("CHECK_CADENCE", "5s until 10m, 1m"),
        ("STATUS_UPDATES", "false"),
        ("BILLING_STATUS_PATH", "data.state"),
        ("BILLING_STATUS_MAP", '{"paid": "failure"}'),
        ("BILLING_ID_PATH", "id"),
        ("BILLING_AMOUNT_PATH", "amount"),
        ("BILLING_CURRENCY_PATH", "currency"),
        ("SESSION_EXPIRES_AFTER", "24h"),
        ("LATE_PAYMENTS_FOR", "0"),
        ("LATE_STATUS_UPDATES", "true"),
        ("EVENT_BUS_NAME", "shop-events"),
    ],
)
def test_each_setting_that_decides_what_is_asked_or_written_differs(
    sqlite_shop: Shop, clock: FakeClock, setting: str, value: str
) -> None:
    env = {
        "STATUS_UPDATES": "true",
        "BILLING_TOKEN_URL": "https://auth.example/token",
        "BILLING_HEADERS": '{"a": "{APIKEY}{TOKEN}"}',
        "APIKEY_SECRET_ARN": "arn",
    }
    store = Store(
        database_of(sqlite_shop, clock), monitor=monitor_of(settings_for(sqlite_shop, **env), "a")
    )
    other = monitor_of(settings_for(sqlite_shop, **{**env, setting: value}), "b")
    assert store.others.differ(other.as_text())
    store.close()


def test_what_is_recorded_has_no_secret_and_fits_into_its_column() -> None:
    long = {
        "BILLING_API_URL": "https://billing.example/" + "x" * 5000,
        "CHECK_CADENCE": ", ".join(f"{n}s until {n}m" for n in range(5, 500)) + ", 1d",
        "STATUS_UPDATES": "true",
        "BILLING_STATUS_PATH": f'"{"😀" * 5000}"',
        "BILLING_STATUS_MAP": json.dumps({f"word-{n}": "open" for n in range(5000)}),
        "SESSION_EXPIRES_AFTER": "999999d",
        "EVENT_BUS_NAME": "b" * 1600,
    }
    secrets = {"DATABASE_URL": "mysql://user:secret-password@db/shop", "APIKEY": "secret-key"}
    text = monitor_of(Settings.from_env({**secrets, **long}), "\x00" * 5000).as_text()
    assert len(text) < 2000 - 5 * MAX_VALUE_LENGTH  # with room for settings to come
    assert "secret" not in text
    for setting in ("BILLING_API_URL", "BILLING_STATUS_PATH", "BILLING_STATUS_MAP"):
        changed = long[setting].replace("x" * 9, "y" * 9).replace("😀😀😀", "😀😀!")
        env = {**secrets, **long, setting: changed.replace("word-7", "word-seven")}
        assert monitor_of(Settings.from_env(env), "\x00" * 5000).as_text() != text


def test_passes_of_the_version_before_say_nothing(shop: Shop, clock: FakeClock) -> None:
    """Their rows have no settings."""
    old = Store(database_of(shop, clock))
    old.prepare()
    with monitor(shop, clock, "a") as a:
        for _ in range(30):
            tick(clock, 1, a)
            summary = Summary(Reason.TICK, clock.now, clock.now)
            old.history.end(old.history.begin(summary), summary)
        view = old.look(clock.now, interval_seconds=5)
        assert view.newest_settings is None
        assert not old.others.differ(view.newest_settings)
        assert is_alone(a)
        assert verdict(a)["level"] == "ok"
    old.close()


@pytest.mark.slow
def test_rows_of_a_clock_that_was_ahead_are_not_compared(shop: Shop, clock: FakeClock) -> None:
    with monitor(shop, clock, "a") as a:
        with monitor(shop, clock, "b", STATUS_UPDATES="true") as b:
            clock.advance(1200)
            tick(clock, 30, b, a)
            assert not is_alone(a)
        clock.advance(-1800)
        tick(clock, 30, a)
        assert is_alone(a)
    store = Store(database_of(shop, clock))
    newest = store.look(clock.now, interval_seconds=5).newest_settings
    assert newest is not None
    assert Monitor.from_text(newest).name == "a"
    store.close()


def test_a_monitor_that_is_seen_anyway_records_no_empty_pass(shop: Shop, clock: FakeClock) -> None:
    """And one that is not seen records one a minute, whatever the interval."""
    names = {"settings": monitor_of(settings_for(shop), "a").as_text()}
    store = Store(database_of(shop, clock), monitor=Monitor.from_text(names["settings"]))
    store.prepare()
    clock.advance(120)  # since the row of the installation
    old = Store(database_of(shop, clock))  # of the version before
    old.history.begin(Summary(Reason.TICK, clock.now))
    old.close()
    recorded = []
    for _ in range(61):
        recorded.append(store.others.show_this(Summary(Reason.TICK, clock.now, clock.now)))
        clock.advance(5)
    assert [n * 5 for n, was in enumerate(recorded) if was] == [0, 60, 120, 180, 240, 300]
    store.close()


@pytest.mark.parametrize(
    ("helps", "busy", "recorded"), [(False, False, 1), (True, False, 0), (False, True, 1)]
)
async def test_a_worker_that_leads_records_itself_but_a_helper_does_not(
    sqlite_shop: Shop, clock: FakeClock, helps: bool, busy: bool, recorded: int
) -> None:
    """Whether the other monitor left nothing due, or has as many passes as may be under way."""
    others = Store(
        database_of(sqlite_shop, clock),
        monitor=monitor_of(settings_for(sqlite_shop, STATUS_UPDATES="true"), "other"),
    )
    others.prepare()
    clock.advance(120)
    if busy:
        add_due_sessions(sqlite_shop, clock, 3)
    others.take_lead(others.look(clock.now, interval_seconds=5))
    others.history.begin(Summary(Reason.TICK, clock.now, clock.now))
    others.close()
    settings = settings_for(sqlite_shop, MAX_WORKERS="1")
    this = Store(database_of(sqlite_shop, clock), monitor=monitor_of(settings, "this"))
    with ThreadPoolExecutor(1) as thread:
        summary = await check_open_checkout_sessions(
            this,
            FakeBilling(),
            settings,
            PassOptions(Reason.TICK, clock.now, helps=helps),
            database_thread=thread,
        )
        thread.submit(this.close).result()
    assert summary.checked == 0
    rows = sqlite_shop.run("SELECT settings FROM checkout_session_run WHERE reason = 'tick'")
    assert sum('"this"' in text for (text,) in rows) == recorded


def test_a_tick_that_another_monitor_leads_costs_two_statements(
    server_shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        monitor(server_shop, clock, "a") as a,
        monitor(server_shop, clock, "b", STATUS_UPDATES="true") as b,
    ):
        tick(clock, 2, a, b)
        tick(clock, 1, a)
        clock.advance(-5)
        statements = note_statements(server_shop, monkeypatch)
        tick(clock, 1, b)
    assert len(statements) == 2, statements


def test_a_table_of_the_version_before_gets_the_column(shop: Shop, clock: FakeClock) -> None:
    """Its rows stay, and a worker of that version that still runs adds more."""
    before = Store(database_of(shop, clock))
    before.prepare()
    before.close()
    for column in ("settings", "unknown_words"):
        shop.run(f"ALTER TABLE checkout_session_run DROP COLUMN {column}")
    stores = [Store(database_of(shop, clock), monitor=Monitor("a", {})) for _ in range(2)]
    for store in stores:
        assert store.prepare() == []
        summary = Summary(Reason.TICK, clock.now, clock.now)
        store.history.end(store.history.begin(summary), summary)
        store.close()
    old = "INSERT INTO checkout_session_run (id, reason, started_at, duration_ms, open_sessions,"
    old += " checked, errors, status_changes, outcomes, skipped, overdue_ms)"
    shop.run(f"{old} VALUES (1, 'tick', %s, 0, 0, 0, 0, 0, '{{}}', '{{}}', 0)", (at(shop, clock),))
    rows = shop.run("SELECT reason, settings FROM checkout_session_run")
    assert sorted(rows, key=str) == sorted(
        [("start", None), ("tick", '{"name": "a"}'), ("tick", '{"name": "a"}'), ("tick", None)],
        key=str,
    )


def at(shop: Shop, clock: FakeClock) -> str:
    now = clock.now - 600 * SECOND
    return f"{now:%Y-%m-%d %H:%M:%S}" if isinstance(shop, MySQLShop) else now.isoformat()

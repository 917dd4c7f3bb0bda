"""The report of `/api/status`, read from the tables of every engine."""

import json
from datetime import timedelta
from typing import Any

import pytest

from core.database.port import Database
from core.domain.model import iso
from core.domain.rate import Budget
from core.settings import Settings
from core.store.settings_in_force import settings_in_force
from core.store.status_report import read_status
from core.worker import open_database
from testkit.clock import NOON, FakeClock
from testkit.history import SECOND, History
from testkit.shops import Shop, add_sessions
from tests.conftest import MYSQL
from tests.support import setting_variables


@pytest.fixture
def history(shop: Shop) -> History:
    return History(shop)


def report(history: History, **env: str) -> dict[str, Any]:
    """The answer as JSON delivers it."""
    settings = history.settings(**env)
    database = open_database(settings, clock=FakeClock(history.now))
    try:
        return json.loads(json.dumps(read_status(database, settings)))  # type: ignore[no-any-return]
    finally:
        database.close()


def test_before_the_first_pass_the_verdict_is_waiting(history: History) -> None:
    history.run("start", history.now - 3 * SECOND)
    status = report(history)
    assert status["verdict"]["text"] == "Waiting for the first pass"
    assert (status["passes"], status["failing"], status["changes"]) == ([], [], [])
    assert (status["last_pass_at"], status["open"]["count"]) == (None, None)


def test_all_is_well(history: History) -> None:
    history.run("start", history.now - timedelta(hours=2))
    history.passes(720)
    history.counted({"active": 128})
    status = report(history)
    assert status["verdict"] == {
        "level": "ok",
        "text": "All 128 open sessions checked on time",
        "notes": [],
    }
    assert status["open"]["count"] == 128
    assert status["open"]["outcomes"] == {"active": 128}
    assert len(status["passes"]) == 60
    assert status["passes"][0] == {
        "tick": "2026-01-15T12:00:00.000Z",
        "reason": "tick",
        "started_at": "2026-01-15T12:00:00.020Z",
        "state": "complete",
        "duration_ms": 500,
        "workers": 1,
        "checked": 10,
        "errors": 0,
        "status_changes": 0,
        "latency_p95_ms": 104.0,
    }
    # The newest slot does not count until a pass has had time to begin.
    assert status["missed_ticks"]["expected"] == 719
    assert status["missed_ticks"]["missed"] == 0


def test_a_ticks_workers_are_one_pass(history: History) -> None:
    history.passes(2)
    later = {"tick": history.slot, "checked": 7, "errors": 2, "latency_p95_ms": 210.0}
    began = history.slot + SECOND
    history.run("tick", began, **{**later, "finished_at": began + SECOND})
    newest = report(history)["passes"][0]
    assert newest["workers"] == 2
    assert (newest["checked"], newest["errors"], newest["latency_p95_ms"]) == (17, 2, 210.0)
    assert newest["duration_ms"] == 1980


def test_a_running_pass_is_distinguished_from_a_killed_one(history: History) -> None:
    history.passes(4)
    for ago, duration_ms in ((1, 6500), (2, 1000)):
        began = history.slot - ago * 5 * SECOND
        history.run("tick", began, tick=began, finished_at=None, duration_ms=duration_ms, checked=3)
    status = report(history)
    assert [p["state"] for p in status["passes"]] == ["complete", "running", "killed", "complete"]
    assert status["passes"][1]["duration_ms"] == 7000
    assert status["verdict"]["notes"] == [
        "The pass of 11:59:50 UTC was killed; its claims expire on their own."
    ]


def test_slots_without_a_pass_are_missed_ticks(history: History) -> None:
    history.run("start", history.now - timedelta(hours=2))
    history.passes(720, missed=(3, 4, 700))
    history.counted({"active": 10})
    status = report(history)
    missed = status["missed_ticks"]
    assert (missed["expected"], missed["missed"]) == (719, 3)
    assert missed["newest"] == [iso(history.slot - ago * 5 * SECOND) for ago in (3, 4, 700)]
    assert status["verdict"]["notes"] == [
        "3 of 719 ticks of the last hour were missed, the last at 11:59:45 UTC."
    ]


def test_no_tick_is_missed_before_the_first_one(history: History) -> None:
    history.run("start", history.now - 60 * SECOND)
    history.passes(10)
    missed = report(history)["missed_ticks"]
    assert (missed["expected"], missed["missed"]) == (9, 0)


def test_a_manual_pass_is_listed_with_the_ticks(history: History) -> None:
    history.passes(2)
    history.run("manual", history.slot + SECOND, checked=8)
    status = report(history)
    assert [p["reason"] for p in status["passes"]] == ["manual", "tick", "tick"]
    assert status["passes"][0]["tick"] is None


def test_a_stopped_loop_is_the_verdict(history: History) -> None:
    history.passes(100, missed=range(8))
    history.counted({"active": 10})
    verdict = report(history)["verdict"]
    assert (verdict["level"], verdict["text"]) == ("critical", "No pass for 42 s")


def test_lateness_is_that_of_the_most_overdue_unclaimed_session(
    history: History,
) -> None:
    history.passes(3)
    history.counted({"active": 2})
    due = history.now - 23 * SECOND
    history.session("late", "c", next_check_at=due)
    history.session(
        "in-flight",
        "c",
        next_check_at=due - 60 * SECOND,
        claimed_until=history.now + 10 * SECOND,
    )
    assert report(history)["overdue_seconds"] == 23.0


def test_a_pause_is_reported_while_it_lasts(history: History) -> None:
    history.passes(3)
    history.counted({"active": 2})
    history.set_shared(paused_until=history.now + 28 * SECOND)
    status = report(history)
    assert status["verdict"]["text"] == "Billing asked for a pause until 12:00:30 UTC"
    assert status["paused_until"] == "2026-01-15T12:00:30.000Z"
    history.set_shared(paused_until=history.now)
    assert report(history)["paused_until"] is None


def test_what_billing_allows_is_reported_beside_what_is_wanted(history: History) -> None:
    history.passes(3)
    ages = {"10m": 100, "1h": 900}
    history.counted({"active": 1000}, ages=ages)
    assert report(history)["billing_rate"] is None
    budget = Budget(25, 0, 0, 0, 0, 25, 24.9, 0)
    history.set_shared(budget=budget.as_json())
    status = report(history)
    assert status["billing_rate"] == {
        "allowed_per_second": 24.9,
        "source": "billing",
        "demand_per_second": 200,
    }
    assert status["verdict"]["text"].startswith("Billing allows about 25 checks a second")
    assert "CHECK_CADENCE='30s until 10m, 2m until 1h, 15m'" in status["verdict"]["notes"][0]


def test_sessions_wait_since_they_failed_or_were_due(history: History) -> None:
    """By cause; the longest first. A failing one counts once, and a claim changes nothing."""
    history.passes(60)
    history.counted({"active": 5, "timeout": 2, "unauthorized": 1})
    minute = 60 * SECOND
    failed = {"last_outcome": "timeout", "last_status_code": None}
    history.failing("slow", "c", failing_since=history.now - 3 * minute, **failed)
    history.failing("due", "c", next_check_at=history.now - minute, **failed)
    refused = {"last_outcome": "unauthorized", "last_status_code": 401}
    history.failing("refused", "c", failing_since=history.now - 10 * SECOND, **refused)
    history.failing("just-now", "c", failing_since=history.now - 9 * SECOND)
    claimed = history.now + 10 * SECOND
    history.session("late", "c", next_check_at=history.now - 2 * minute, claimed_until=claimed)
    history.session("fine", "c", next_check_at=history.now - 9 * SECOND)
    # Billing was asked, and has not answered.
    history.session("hangs", "c", failing_since=history.now - 11 * SECOND, next_check_at=claimed)
    # A clock was ahead.
    history.session("far", "c", next_check_at=history.now + 60 * minute)
    waiting = report(history)["waiting"]
    assert (waiting["sessions"], waiting["longest_seconds"]) == (6, 180)
    assert waiting["causes"] == {"timeout": 3, "not_asked": 2, "unauthorized": 1}
    first = [(one["session_id"], one["cause"], one["seconds"]) for one in waiting["first"]]
    assert first == [
        ("slow", "timeout", 180),
        ("late", "not_asked", 120),
        ("due", "timeout", 60),
        ("hangs", "timeout", 11),
        ("refused", "unauthorized", 10),
        ("far", "not_asked", 10),
    ]
    assert waiting["first"][-2] == {
        "session_id": "refused",
        "since": iso(history.now - 10 * SECOND),
        "seconds": 10.0,
        "cause": "unauthorized",
        "status_code": 401,
    }


def test_billings_unknown_words_are_in_the_verdict(history: History) -> None:
    words = {0: "[\"'settled'\"]", 1: "[\"nothing at 'status'\", \"'settled'\"]"}
    history.passes(60, row=lambda ago: {"unknown_words": words.get(ago)})
    history.counted({"active": 7, "unknown_status": 3})
    for n in range(3):
        history.failing(f"s{n}", "c", last_outcome="unknown_status", last_status_code=200)
    verdict = report(history, STATUS_UPDATES="true")["verdict"]
    assert verdict["text"].startswith(
        "Billing says what BILLING_STATUS_MAP does not have ('settled', nothing at 'status'): 3 of"
    )


@pytest.mark.parametrize(
    ("earlier", "level"),
    [({"not_found": 5, "active": 5}, "ok"), ({"not_found": 1, "active": 9}, "warning")],
)
def test_404s_are_compared_with_those_of_the_last_day(
    history: History, earlier: dict[str, int], level: str
) -> None:
    history.passes(300, row=lambda _: {"outcomes": json.dumps(earlier)})
    history.counted({"not_found": 60, "active": 40})
    assert report(history)["verdict"]["level"] == level


@pytest.mark.parametrize(
    ("every", "lull", "quiet", "text"),
    [
        (2, 0, 40, "No session was closed for 40 min, usual is 2 min"),
        (2, 0, 19, "All 10 open sessions checked on time"),
        (2, 30, 40, "All 10 open sessions checked on time"),  # it was as quiet in the morning
        (5, 0, 40, "All 10 open sessions checked on time"),
    ],
)
def test_a_shop_that_closes_nothing_for_unusually_long_is_reported(
    history: History, every: int, lull: int, quiet: int, text: str
) -> None:
    minute = timedelta(minutes=1)
    last = history.now - quiet * minute
    for n in range(100):
        pause = lull * minute if n > 95 else timedelta(0)
        history.change(f"s{n}", changed_at=last - n * every * minute - pause)
    history.passes(60)
    history.counted({"active": 10}, ages={"10m": 5, "1h": 5})
    verdict = report(history, STATUS_UPDATES="true")["verdict"]
    assert verdict["text"] == text
    assert report(history)["verdict"]["level"] == "ok"  # nothing is ever closed


def test_no_tick_was_missed_at_another_interval(history: History) -> None:
    before = '{"name": "shop", "CHECK_INTERVAL_SECONDS": 10, "CHECK_CADENCE": "5s"}'
    now = before.replace("10,", "5,")
    history.passes(
        720,
        missed=[ago for ago in range(60, 720) if ago % 2],
        row=lambda ago: {"settings": before if ago > 58 else now},
    )
    missed = report(history)["missed_ticks"]
    assert (missed["expected"], missed["missed"]) == (59, 0)


def test_the_ten_failing_sessions_that_wait_longest_are_listed(history: History) -> None:
    history.session("fine", "checkout_active_1")
    for n in range(1, 15):
        since = history.now - n * 60 * SECOND
        history.failing(f"s{n}", f"checkout_500_{n}", consecutive_failures=3, failing_since=since)
    failing = report(history)["failing"]
    assert [f["session_id"] for f in failing] == [f"s{n}" for n in range(14, 4, -1)]
    assert failing[0] == {
        "session_id": "s14",
        "billing_checkout_id": "checkout_500_14",
        "outcome": "unexpected_status",
        "status_code": 500,
        "consecutive_failures": 3,
        "failing_since": iso(history.now - 14 * 60 * SECOND),
        "last_checked_at": iso(history.now - SECOND),
        "next_check_at": iso(history.slot + 5 * SECOND),
    }


def test_the_latest_status_changes_are_listed(history: History) -> None:
    for n in range(12):
        history.change(f"s{n}")
    changes = report(history)["changes"]
    assert [c["session_id"] for c in changes] == [f"s{n}" for n in range(11, 1, -1)]
    assert changes[0]["new_status"] == "success"
    assert changes[0]["changed_at"] == "2026-01-15T11:59:32.000Z"


def test_a_missing_key_is_reported(history: History) -> None:
    history.passes(1, row=lambda _: {"skipped": '{"no_api_key": 3}'})
    assert report(history)["verdict"]["text"] == "No API key: billing is not asked"
    history.counted({})
    history.passes(2)
    assert report(history, APIKEY="")["verdict"]["text"] == "No API key: billing is not asked"


def test_sessions_with_the_same_checkout_are_named(history: History) -> None:
    add_sessions(history.shop, {"a": "c1", "b": "c1", "c": "C1", "d": None, "e": None, "f": "c2"})
    history.shop.run(
        "INSERT INTO checkout_session_check (session_id, next_check_at, first_seen_at)"
        " SELECT id, %s, %s FROM checkout_session ORDER BY id",
        (NOON.replace(tzinfo=None), NOON.replace(tzinfo=None)),
    )
    assert report(history)["verdict"]["notes"] == [
        "2 open sessions have the checkout c1, so the same answer closes them all: a, b."
    ]
    history.shop.run("UPDATE checkout_session SET status = 'success' WHERE id = 'a'")
    assert report(history)["verdict"]["notes"] == []


# SQLite does not count what it reads.
@pytest.mark.parametrize("shop", ["mariadb", *(["mysql"] if MYSQL else [])], indirect=True)
def test_a_report_reads_a_bounded_number_of_rows(
    history: History,
) -> None:
    """Even if all of 10,000 sessions fail or are late, which is when somebody looks."""
    history.shop.run(
        "INSERT INTO checkout_session (id, billing_checkout_id, status)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100)"
        " SELECT CONCAT('s', a.i, '-', b.i), 'c', 'open' FROM n a, n b"
    )
    history.shop.run(
        "INSERT INTO checkout_session_batch (id, next_check_at, due_at)"
        " WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200)"
        " SELECT i, %s, %s FROM n",
        ((NOON - 60 * SECOND).replace(tzinfo=None),) * 2,
    )
    history.shop.run(
        "INSERT INTO checkout_session_check"
        " (session_id, batch_id, next_check_at, first_seen_at, last_outcome, consecutive_failures,"
        " failing_since)"
        " SELECT id, 1 + CRC32(id) MOD 200, %s, %s, 'timeout', 3,"
        " CASE WHEN CRC32(id) MOD 2 THEN %s END FROM checkout_session",
        ((NOON - 60 * SECOND).replace(tzinfo=None),) * 3,
    )
    history.passes(720, row=lambda _: {"errors": 10})
    history.counted({"timeout": 5_000, "active": 5_000})
    for table in ("checkout_session", "checkout_session_check", "checkout_session_run"):
        history.shop.run(f"ANALYZE TABLE {table}")
    settings = history.settings()
    database = open_database(settings, clock=FakeClock(history.now))
    read_status(database, settings)  # the connection's first statements read the schema
    before = rows_read(database)
    report: Any = read_status(database, settings)
    read = rows_read(database) - before
    causes = report["waiting"]["causes"]
    assert causes["timeout"] == 5_000  # as counted
    assert 4_000 < causes["not_asked"] <= 5_000  # half of each batch
    database.close()
    assert read < 11_000  # of the passes of the last hour, and of those that wait


def rows_read(database: Database) -> int:
    """How many rows and index entries the connection has made the server read."""
    sql = "SHOW SESSION STATUS LIKE 'Handler_read_%'"
    rows = database.run(lambda connection: connection.query(sql))
    return sum(int(str(count)) for _name, count in rows)


def test_every_setting_is_listed_under_its_variable(history: History) -> None:
    assert set(settings_in_force(history.settings())) == setting_variables()


def test_the_listed_settings_contain_no_secret() -> None:
    settings = Settings.from_env(
        {
            "DATABASE_URL": "mysql://monitor:hidden-pass@db:3306/shop",
            "APIKEY": "hidden-key",
            "STATUS_UPDATES": "true",
            "CHECK_CADENCE": "5s until 10m, 30s until 1h, 5m",
        }
    )
    listed = settings_in_force(settings)
    assert "hidden" not in json.dumps(listed)
    assert listed["DATABASE_URL"] == "mysql://db:3306/shop"
    assert listed["APIKEY"] == "set"
    assert listed["CHECK_CADENCE"] == "5s until 10m, 30s until 1h, 5m"

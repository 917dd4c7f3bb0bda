"""`make run` on tables that another monitor works on: it asks for a flag."""

import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from core.domain.model import Reason
from core.domain.summary import Summary
from core.settings import Settings
from core.store.other_monitors import monitor_of
from core.store.store import Store
from core.worker import open_database
from local import sharing
from testkit.shops import Shop, SQLiteShop, settings_for
from tests.local.test_run import request, running


def make_passes(settings: Settings, name: str, *seconds_ago: float) -> None:
    """Record passes of a monitor of this name, by the real clock."""
    store = Store(open_database(settings), monitor=monitor_of(settings, name))
    store.prepare()
    for seconds in seconds_ago:
        summary = Summary(Reason.TICK, store.now() - timedelta(seconds=seconds))
        store.history.end(store.history.begin(summary), summary)
    store.close()


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_another_monitor_of_any_settings_is_named(shop: Shop) -> None:
    settings = settings_for(shop)
    make_passes(settings, "shop-monitor-prod", 40, 5)
    why = sharing.refusal(settings)
    assert why is not None
    assert re.match(
        r"Another monitor, shop-monitor-prod, works on the tables of this database: its last pass "
        r"began \d+ s ago\. .* start anyway with make run ARGS=\"--share-database\"\.$",
        why,
    )
    assert sharing.refusal(settings_for(shop, STATUS_UPDATES="true")) is not None


@pytest.mark.parametrize("seconds_ago", [121, 3600])
def test_a_monitor_that_has_stopped_does_not_count(sqlite_shop: Shop, seconds_ago: float) -> None:
    settings = settings_for(sqlite_shop)
    make_passes(settings, "shop-monitor-prod", seconds_ago)
    assert sharing.refusal(settings) is None


def test_a_make_run_of_this_machine_counts_while_its_process_runs(sqlite_shop: Shop) -> None:
    settings = settings_for(sqlite_shop)
    here = socket.gethostname()
    make_passes(settings, f"make run ({here}, process {ended_process()})", 2)
    make_passes(settings, f"make run ({here}, process {10**30})", 2)
    make_passes(settings, f"make run ({here}, process {os.getpid()})", 2)  # before it was restarted
    assert sharing.refusal(settings) is None
    make_passes(settings, f"make run ({here}, process {os.getppid()})", 2)
    assert f"process {os.getppid()}" in str(sharing.refusal(settings))


def test_a_make_run_of_another_machine_counts_for_two_minutes(sqlite_shop: Shop) -> None:
    settings = settings_for(sqlite_shop)
    make_passes(settings, f"make run (another, process {ended_process()})", 100)
    assert "make run (another, " in str(sharing.refusal(settings))


def test_a_database_without_tables_or_without_a_server_has_no_other(
    shop: Shop, tmp_path: Path
) -> None:
    assert sharing.refusal(settings_for(shop)) is None
    tables = shop.run("SELECT * FROM checkout_session")
    assert tables == []
    assert sharing.refusal(settings_for(SQLiteShop(tmp_path / "no" / "file.db"))) is None
    gone = {"DATABASE_URL": "mysql://shop:pass@127.0.0.1:1/shop"}
    assert sharing.refusal(Settings.from_env(gone)) is None


def test_two_make_runs_on_one_file_need_the_flag(tmp_path: Path) -> None:
    with running(tmp_path, {"APIKEY": "k"}) as first:
        first.until("Checking 11 open checkout sessions")
        with running(tmp_path, {"APIKEY": "k"}) as second:
            second.until(
                rf"^❌ Another monitor, make run \(.*, process {first.pid}\), works on the tables "
                r'.* make run ARGS="--share-database"\.$'
            )
            assert second.exit_code() == 1
        assert "Traceback" not in "".join(second.printed)
        with running(tmp_path, {"APIKEY": "k"}, "--share-database") as second:
            second.until("The monitor's page")
            assert second.interrupt() == 0
        assert first.interrupt() == 0


def test_make_run_starts_again_at_once_after_it_was_stopped_or_killed(tmp_path: Path) -> None:
    for _ in range(2):
        with running(tmp_path, {"APIKEY": "k"}) as monitor:  # killed at the end of the block
            monitor.until("Checking 11 open checkout sessions")
    with running(tmp_path, {"APIKEY": "k"}) as monitor:
        monitor.until("The monitor's page")
        assert monitor.interrupt() == 0


def test_with_the_flag_the_page_and_health_name_the_other_one(tmp_path: Path) -> None:
    env = {"APIKEY": "k", "BILLING_API_URL": "http://127.0.0.1:1/pay"}
    with running(tmp_path, env) as monitor:  # makes the file
        monitor.until("Checking 11 open checkout sessions")
    url = {"DATABASE_URL": f"sqlite:///{tmp_path}/.local/checkout.db"}
    ours = Settings.from_env({**env, **url, "CHECK_INTERVAL_SECONDS": "1"})
    others = Settings.from_env({**env, **url, "STATUS_UPDATES": "true"})
    make_passes(ours, "before", 240, 120)
    make_passes(others, "shop-monitor-prod", 240, 120, 1)
    with running(tmp_path, env, "--share-database") as monitor:
        api = monitor.until(r"API: (http://\S+)/api/health")[1]
        monitor.until("Checkout session check complete")
        _, status = request(f"{api}/api/status", "GET")
        verdict = status["verdict"]
        assert isinstance(verdict, dict)
        assert str(verdict["text"]).startswith(  # then, if the machine is slow, who waits
            "Another monitor with other settings works on the same sessions: shop-monitor-prod"
        )
        code, health = request(f"{api}/api/health", "GET")
        checks = health["checks"]
        assert isinstance(checks, dict)
        assert (code, checks["other_monitors"]) == (503, "failed")
        assert monitor.interrupt() == 0

"""The worker's Lambda, as the loop invokes it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aws_lambda_powertools.utilities.typing import LambdaContext

from core.errors import SettingsError, StoreError
from handlers import check
from local.billing import SimulatedBilling
from testkit.queue import make_due
from testkit.shops import Shop, add_sessions
from tests.support import event

SRC = Path(__file__).parents[2] / "src"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("name", ["tick", "no-tick"])
def test_a_tick_checks_the_open_sessions_and_returns_the_summary(
    sqlite_shop: Shop, context: LambdaContext, name: str
) -> None:
    add_sessions(sqlite_shop, {"a": "checkout_active_1", "b": "checkout_404_2", "c": None})
    summary = check.handler(event(name), context)
    assert summary["open"] == summary["checked"] == 3
    assert summary["outcomes"] == {"active": 1, "not_found": 1, "invalid_session": 1}
    assert summary["reason"] == "tick"
    json.dumps(summary)


@pytest.mark.usefixtures("environment")
def test_a_second_pass_reuses_the_connection(
    sqlite_shop: Shop, simulated: SimulatedBilling, context: LambdaContext
) -> None:
    add_sessions(sqlite_shop, {"a": "checkout_active_1"})
    check.handler({}, context)
    opened = simulated.connections
    make_due(sqlite_shop, "2026-01-01T00:00:00.000Z")
    assert check.handler({}, context)["checked"] == 1
    assert simulated.connections == opened


@pytest.mark.usefixtures("environment")
def test_each_pass_emits_its_metrics_once(
    context: LambdaContext, capsys: pytest.CaptureFixture[str]
) -> None:
    check.handler({}, context)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    [metrics] = [record for record in records if "_aws" in record]
    assert metrics["PassesCompleted"] == 1


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("tick", ["soon", 5, "2026-01-15T10:30:05", "0001-01-01T00:00:00+01:00"])
def test_an_invalid_tick_is_refused_with_the_reason(context: LambdaContext, tick: object) -> None:
    with pytest.raises(check.TickError, match=r"tick is .*; it must be an ISO 8601 time"):
        check.handler({"tick": tick}, context)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("event", [None, "x", [], 5])
def test_an_event_that_is_no_object_is_refused_with_the_reason(
    context: LambdaContext,
    event: Any,  # noqa: ANN401 (what JSON may be)
) -> None:
    with pytest.raises(check.EventError, match=r"The event is .*; it must be a JSON object"):
        check.handler(event, context)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("helper", [None, 0, 1, "true", "", [], {}])
def test_an_invalid_helper_is_refused_with_the_reason(
    context: LambdaContext, caplog: pytest.LogCaptureFixture, helper: object
) -> None:
    with pytest.raises(check.HelperError) as raised:
        check.handler({"helper": helper}, context)
    sentence = f"The event's helper is {helper!r}; it must be true or false, or be left out."
    assert str(raised.value) == sentence
    assert f"❌ {sentence}" in caplog.messages


@pytest.mark.usefixtures("environment")
def test_a_helper_checks_what_is_due_and_leaves_the_lead_to_others(
    sqlite_shop: Shop, simulated: SimulatedBilling, context: LambdaContext
) -> None:
    add_sessions(sqlite_shop, {"a": "checkout_active_1"})
    late = event("helper")
    assert check.handler(late, context)["checked"] == 0  # nothing is in the queue yet
    assert check.handler({**late, "helper": False}, context)["checked"] == 1
    make_due(sqlite_shop, "2026-01-01T00:00:00.000Z")
    led = sqlite_shop.run("SELECT last_tick FROM checkout_session_pause")
    assert check.handler(late, context)["checked"] == 1
    assert sqlite_shop.run("SELECT last_tick FROM checkout_session_pause") == led
    assert simulated.requests.total() == 2


def test_an_invalid_setting_fails_only_its_own_invocation(
    environment: pytest.MonkeyPatch, context: LambdaContext, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged, and the next invocation reads the settings again."""
    with environment.context() as wrong:
        wrong.setenv("MAX_CONCURRENCY", "many")
        with pytest.raises(SettingsError):
            check.handler({}, context)
    sentence = "❌ MAX_CONCURRENCY is 'many'; it must be a whole number from 1 to 1000."
    assert sentence in caplog.messages
    assert check.handler({}, context)["open"] == 0


def test_a_database_error_fails_only_its_own_invocation(
    environment: pytest.MonkeyPatch,
    sqlite_shop: Shop,
    context: LambdaContext,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is counted in PassesFailed; the next invocation works again."""
    sqlite_shop.run("ALTER TABLE checkout_session RENAME TO renamed")
    with pytest.raises(StoreError, match="no table checkout_session"):
        check.handler({}, context)
    assert '"PassesFailed":1' in capsys.readouterr().out
    sqlite_shop.run("ALTER TABLE renamed RENAME TO checkout_session")
    assert check.handler({}, context)["open"] == 0


def test_without_an_api_key_the_pass_sends_nothing_and_succeeds(
    environment: pytest.MonkeyPatch,
    sqlite_shop: Shop,
    simulated: SimulatedBilling,
    context: LambdaContext,
) -> None:
    environment.delenv("APIKEY")
    add_sessions(sqlite_shop, {"a": "checkout_active_1"})
    assert check.handler({}, context)["skipped"] == {"no_api_key": 1}
    assert simulated.requests.total() == 0


@pytest.mark.usefixtures("environment")
def test_a_bug_counts_as_a_failed_pass(
    context: LambdaContext, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("core.worker.check_pass.Store.look", lambda *_args, **_kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check.handler({}, context)
    assert '"PassesFailed":1' in capsys.readouterr().out


@pytest.mark.slow
def test_the_garbage_collector_is_off_during_the_import_only() -> None:
    program = (
        "import gc, sys; gc.collect(); before = gc.get_stats(); import handlers.check;"
        " sys.exit(gc.get_stats() != before or not gc.isenabled() or not gc.get_freeze_count())"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=SRC, check=False)
    assert ran.returncode == 0

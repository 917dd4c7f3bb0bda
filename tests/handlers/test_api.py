"""The API's Lambda, invoked with the events of the events folder."""

import json
import threading
from datetime import timedelta
from typing import Any

import pytest
from aws_lambda_powertools.utilities.typing import LambdaContext

import core.worker
from core.domain.model import Reason
from core.domain.summary import Summary
from core.store.store import Store
from core.worker import open_database
from handlers import api, check
from local.billing import SimulatedBilling
from testkit.shops import Shop, add_sessions
from tests.support import event

pytestmark = pytest.mark.usefixtures("environment")

SENTENCE = (
    'The body must be empty or a JSON object {"session_ids": [...]} with 1 to 100 strings of 1 to '
    "255 characters, and nothing else"
)


def call(name: str, context: LambdaContext, body: str | None = None) -> tuple[int, dict[str, Any]]:
    request = event(name)
    if body is not None:
        request["body"] = body
    answer = api.handler(request, context)
    assert answer["multiValueHeaders"]["Content-Type"] == ["application/json"]
    return answer["statusCode"], json.loads(answer["body"])


def test_a_monitor_that_has_just_started_is_healthy(context: LambdaContext) -> None:
    status, body = call("health", context)
    assert status == 200
    assert body["status"] == "ok"
    assert set(body) == {"status", "timestamp", "checks", "last_pass_at"}
    assert body["checks"] == {
        "database": "ok",
        "last_pass": "ok",
        "starts_on_time": "ok",
        "api_key": "ok",
        "answers": "ok",
        "other_monitors": "ok",
    }


def test_health_is_degraded_six_intervals_after_the_last_pass(
    sqlite_shop: Shop, context: LambdaContext
) -> None:
    call("health", context)
    store = Store(open_database(check.worker()._settings))
    for late, status in ((29, 200), (31, 503)):
        sqlite_shop.run("DELETE FROM checkout_session_run")
        store.history.begin(Summary(Reason.TICK, store.now() - timedelta(seconds=late)))
        actual, body = call("health", context)
        assert actual == status
    store.close()
    assert body["status"] == "degraded"
    assert body["checks"]["last_pass"] == "failed"


def test_an_idle_monitor_stays_healthy(context: LambdaContext, sqlite_shop: Shop) -> None:
    call("health", context)
    sqlite_shop.run("UPDATE checkout_session_run SET started_at = '2026-01-01T00:00:00.000Z'")
    check.handler({}, context)
    assert call("health", context)[0] == 200


def test_a_lost_database_degrades_health_without_showing_its_address(
    sqlite_shop: Shop, context: LambdaContext
) -> None:
    sqlite_shop.run("DROP TABLE checkout_session")
    status, body = call("health", context)
    assert status == 503
    assert body["checks"]["database"] == "failed"
    assert "shop.db" not in json.dumps(body)


def test_a_database_that_hangs_is_said_in_time(
    environment: pytest.MonkeyPatch, context: LambdaContext
) -> None:
    call("health", context)
    environment.setattr(core.worker, "READ_SECONDS", 0.01)
    answered = threading.Event()
    check.worker()._database_thread.submit(answered.wait)
    status, body = call("status", context)
    assert (status, body["message"]) == (503, "The database has not answered within 0 s.")
    assert call("health", context)[1]["checks"]["database"] == "failed"
    answered.set()
    environment.setattr(core.worker, "READ_SECONDS", 7.0)
    assert call("status", context)[0] == 200


def test_a_missing_api_key_degrades_health(
    environment: pytest.MonkeyPatch, context: LambdaContext
) -> None:
    environment.delenv("APIKEY")
    status, body = call("health", context)
    assert (status, body["checks"]["api_key"]) == (503, "failed")


def test_an_invalid_setting_degrades_health(
    environment: pytest.MonkeyPatch, context: LambdaContext
) -> None:
    environment.setenv("CHECK_CADENCE", "often")
    status, body = call("health", context)
    assert (status, body["checks"]) == (503, {"settings": "failed"})


def test_the_trigger_checks_all_open_sessions_due_or_not(
    sqlite_shop: Shop, context: LambdaContext
) -> None:
    add_sessions(sqlite_shop, {"a": "checkout_active_1", "b": "checkout_500_2"})
    check.handler({}, context)
    status, body = call("trigger", context)
    assert status == 200
    assert body["success"] is True
    assert body["message"] == "Checked 2 of 2 open checkout sessions."
    assert body["timestamp"].endswith("Z")
    assert body["summary"]["outcomes"] == {"active": 1, "unexpected_status": 1}


def test_the_trigger_with_ids_checks_those_and_reports_the_rest(
    sqlite_shop: Shop, simulated: SimulatedBilling, context: LambdaContext
) -> None:
    add_sessions(sqlite_shop, {"a": "checkout_active_1", "b": "checkout_active_2"})
    status, body = call("trigger-with-ids", context, '{"session_ids": ["b", "nobody"]}')
    assert status == 200
    assert body["message"] == "Checked 1 of 1 open checkout sessions; skipped: 1 not_open."
    assert simulated.requests == {"checkout_active_2": 1}


@pytest.mark.parametrize(
    "body",
    [
        "not JSON",
        "[]",
        '"cart-1"',
        "null",
        '{"session_ids": []}',
        '{"session_ids": "cart-1"}',
        '{"session_ids": [1]}',
        '{"session_ids": [""]}',
        '{"session_ids": ["a"], "more": 1}',
        '{"ids": ["a"]}',
        json.dumps({"session_ids": ["x" * 256]}),
        json.dumps({"session_ids": ["x"] * 101}),
    ],
)
def test_any_other_body_is_refused_with_what_is_allowed(
    simulated: SimulatedBilling, context: LambdaContext, body: str
) -> None:
    status, answer = call("trigger", context, body)
    assert status == 400
    assert answer["success"] is False
    assert answer["message"].startswith(SENTENCE)
    assert simulated.requests.total() == 0


def test_the_bad_body_of_the_events_folder_is_refused(context: LambdaContext) -> None:
    assert call("trigger-bad-body", context)[0] == 400


@pytest.mark.parametrize("body", ["", " ", "{}"])
def test_an_empty_body_means_all_open_sessions(context: LambdaContext, body: str) -> None:
    assert call("trigger", context, body)[0] == 200


def test_the_largest_allowed_body_is_accepted(context: LambdaContext) -> None:
    ids = json.dumps({"session_ids": ["é" * 255] * 100})
    assert call("trigger-with-ids", context, ids)[0] == 200


def test_the_trigger_without_a_database_is_503(sqlite_shop: Shop, context: LambdaContext) -> None:
    sqlite_shop.run("DROP TABLE checkout_session")
    status, body = call("trigger", context)
    assert status == 503
    assert body["success"] is False
    assert "no table checkout_session" in body["message"]


@pytest.mark.parametrize("name", ["health", "trigger"])
def test_an_impossible_database_address_is_503(
    environment: pytest.MonkeyPatch, context: LambdaContext, name: str
) -> None:
    environment.setenv("DATABASE_URL", f"mysql://u:hidden-pass@{'x' * 64}/shop")
    status, body = call(name, context)
    assert status == 503
    assert "hidden-pass" not in json.dumps(body)


def test_the_trigger_with_an_invalid_setting_is_500_with_the_reason(
    environment: pytest.MonkeyPatch, context: LambdaContext
) -> None:
    environment.setenv("DATABASE_URL", "postgres://x:hidden-pass@y/z")
    status, body = call("trigger", context)
    assert status == 500
    assert body["message"].startswith("DATABASE_URL (postgres://…) has an unsupported scheme")
    assert "hidden-pass" not in json.dumps(body)

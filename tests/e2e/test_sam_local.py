"""The deployed functions: built by SAM and run in its containers."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from local.billing import SimulatedBilling
from tests.e2e.support import EVENTS, PASSWORD, Sam, Shop, curl, run, trigger

SESSIONS = {
    "session_a": "checkout_active_1",
    "session_b": "checkout_404_1",
    "session_c": "checkout_reset_1",
}
# last_outcome, last_status_code, consecutive_failures
RECORDED = {
    "session_a": ("active", 200, 0),
    "session_b": ("not_found", 404, 0),
    "session_c": ("network_error", None, 1),
}


def recorded(shop: Shop) -> Mapping[str, tuple[str, int | None, int]]:
    return {
        row["session_id"]: (
            row["last_outcome"],
            row["last_status_code"],
            row["consecutive_failures"],
        )
        for row in shop.rows("checkout_session_check")
    }


def test_sam_validates_the_template() -> None:
    run(["sam", "validate", "--lint"])


@pytest.mark.parametrize("event", ["tick.json", "no-tick.json"])
def test_invocation_checks_and_records_every_open_session_once(
    event: str, sam: Sam, shop: Shop, billing: SimulatedBilling
) -> None:
    shop.add(SESSIONS)
    shop.add({"session_d": "checkout_active_2"}, status="success")
    shop.show("Before")

    result, log = sam.invoke("CheckSessionsFunction", event)

    shop.show("After")
    assert (result["open"], result["checked"], result["errors"]) == (3, 3, 1)
    assert result["outcomes"] == {"active": 1, "not_found": 1, "network_error": 1}
    assert recorded(shop) == RECORDED
    # A reset is retried once, because a closed keep-alive connection looks the same.
    once = dict.fromkeys(SESSIONS.values(), 1)
    assert billing.requests == {**once, "checkout_reset_1": 2}
    [row] = [row for row in shop.rows("checkout_session_run") if row["reason"] == "tick"]
    assert (row["open_sessions"], row["checked"], row["errors"]) == (3, 3, 1)
    assert "✅ Success: Checkout session session_a (checkout_active_1) is still active" in log
    assert "Checkout session check complete: 2 success, 1 errors" in log


def test_refused_database_password_fails_the_invocation_but_is_not_shown(
    package: Path, tmp_path: Path, variables: Mapping[str, str]
) -> None:
    wrong = {"DATABASE_URL": variables["DATABASE_URL"].replace(PASSWORD, f"{PASSWORD}x")}
    sam = Sam(package, tmp_path, {**variables, **wrong})

    result, _ = sam.invoke("CheckSessionsFunction", "tick.json")

    assert result["errorType"] == "StoreError"
    assert "Access denied" in result["errorMessage"]


def test_health_is_ok_with_an_empty_shop(api: str) -> None:
    reply = curl(f"{api}/api/health")

    assert (reply.status, reply.body["status"]) == (200, "ok")


def test_trigger_checks_every_open_session(api: str, shop: Shop) -> None:
    shop.add(SESSIONS)
    shop.show("Before")

    reply = trigger(api, "trigger.json")

    shop.show("After")
    assert (reply.status, reply.body["success"]) == (200, True)
    assert reply.body["summary"]["checked"] == 3
    assert recorded(shop) == RECORDED


def test_trigger_with_ids_checks_only_those(
    api: str, shop: Shop, billing: SimulatedBilling
) -> None:
    body = json.loads((EVENTS / "trigger-with-ids.json").read_text())["body"]
    wanted = json.loads(body)["session_ids"]
    shop.add({session_id: f"checkout_active_{session_id}" for session_id in wanted})
    shop.add(SESSIONS)
    shop.show("Before")

    reply = trigger(api, "trigger-with-ids.json")

    shop.show("After")
    assert reply.status == 200
    assert reply.body["summary"]["checked"] == len(wanted)
    assert billing.requests == {f"checkout_active_{session_id}": 1 for session_id in wanted}


def test_trigger_refuses_a_bad_body(api: str, billing: SimulatedBilling) -> None:
    reply = trigger(api, "trigger-bad-body.json")

    assert (reply.status, reply.body["success"]) == (400, False)
    assert not billing.requests

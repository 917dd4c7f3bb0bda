"""The lines and the metrics of a pass, as a person and an alarm see them."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import observability
from core.model import Answer, Claim, Outcome, Reason, Summary
from core.observability import LINES_PER_OUTCOME, PassLog, line, logger
from tests.support import NOON

STATUS_CODES = {
    Outcome.NOT_FOUND: 404,
    Outcome.UNEXPECTED_STATUS: 500,
    Outcome.RATE_LIMITED: 429,
    Outcome.UNAUTHORIZED: 401,
}


def claim(session_id: str = "cart-1", checkout_id: str | None = "checkout_1") -> Claim:
    return Claim(session_id, checkout_id, NOON, 0, NOON, NOON + timedelta(seconds=20))


@pytest.mark.parametrize(
    ("answer", "text", "level"),
    [
        (
            Answer(Outcome.ACTIVE, 200, 0.1),
            "✅ Success: Checkout session cart-1 (checkout_1) is still active",
            logging.INFO,
        ),
        (
            Answer(Outcome.TIMEOUT, None, 10.0),
            "⏰ Timeout: Checkout session request timed out: cart-1 (checkout_1)",
            logging.WARNING,
        ),
        (
            Answer(Outcome.NETWORK_ERROR, None, 0.1, "Connection refused"),
            "❌ Error checking session cart-1 (checkout_1): Network error: Connection refused",
            logging.WARNING,
        ),
        (
            Answer(Outcome.NETWORK_ERROR, None, 0.1),
            "❌ Error checking session cart-1 (checkout_1): Network error",
            logging.WARNING,
        ),
        (
            Answer(Outcome.INVALID_SESSION, detail="no URL can carry its id"),
            "❌ Error checking session cart-1 (checkout_1): no URL can carry its id",
            logging.WARNING,
        ),
        *(
            (
                Answer(outcome, code, 0.1),
                f"ℹ️ Checkout session cart-1 (checkout_1) returned status {code}",
                logging.WARNING if outcome.is_error else logging.INFO,
            )
            for outcome, code in STATUS_CODES.items()
        ),
    ],
)
def test_each_check_is_one_line(
    caplog: pytest.LogCaptureFixture, answer: Answer, text: str, level: int
) -> None:
    PassLog().checked(claim(), answer)
    assert [(record.levelno, record.message) for record in caplog.records] == [(level, text)]


def test_a_session_without_a_billing_id_has_a_dash_for_it() -> None:
    answer = Answer(Outcome.INVALID_SESSION, detail="it has no billing_checkout_id")
    assert line(claim(checkout_id=None), answer) == (
        "❌ Error checking session cart-1 (-): it has no billing_checkout_id"
    )


def test_on_lambda_a_line_is_a_json_record_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    PassLog().checked(claim("cart\n1", "a\x1b[31mb"), Answer(Outcome.NOT_FOUND, 404, 0.1))
    written = logger.registered_handler.format(caplog.records[0])
    assert written.isprintable()
    record = json.loads(written)
    assert (
        record
        | {
            "level": "INFO",
            "message": r"ℹ️ Checkout session cart\n1 (a\x1b[31mb) returned status 404",
            "session_id": "cart\n1",
            "billing_checkout_id": "a\x1b[31mb",
            "outcome": "not_found",
            "status_code": 404,
        }
        == record
    )


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logger.registered_handler
    monkeypatch.setattr(handler, "formatter", handler.formatter)
    observability.use_plain_text()


@pytest.mark.usefixtures("on_a_terminal")
def test_on_a_terminal_a_line_is_the_message_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    PassLog().checked(claim(), Answer(Outcome.ACTIVE, 200, 0.1))
    written = logger.registered_handler.format(caplog.records[0])
    assert written == "✅ Success: Checkout session cart-1 (checkout_1) is still active"


ANY_TEXT = st.text(st.characters()) | st.text("a\n\r\t\x00\x1b\x7f\x85\u2028\u202e\ud800")


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.sampled_from(Outcome))
def test_neither_an_id_nor_a_detail_can_break_its_line(
    session_id: str, checkout_id: str, detail: str, outcome: Outcome
) -> None:
    said = line(claim(session_id, checkout_id), Answer(outcome, 200, detail=detail))
    assert said.isprintable()
    assert said.encode()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1))
def test_an_id_that_can_be_shown_is_shown_as_it_is(session_id: str) -> None:
    assert f" {session_id} " in line(claim(session_id), Answer(Outcome.ACTIVE, 200))


def test_a_pass_is_told_from_its_beginning_to_its_end(caplog: pytest.LogCaptureFixture) -> None:
    log = PassLog()
    log.begins(NOON, 3)
    log.checked(claim("a"), Answer(Outcome.ACTIVE, 200, 0.1))
    log.checked(claim("b"), Answer(Outcome.NOT_FOUND, 404, 0.1))
    log.checked(claim("c"), Answer(Outcome.TIMEOUT, None, 10.0))
    outcomes = Counter([Outcome.ACTIVE, Outcome.NOT_FOUND, Outcome.TIMEOUT])
    log.ends(Summary(Reason.TICK, NOON, open=3, outcomes=outcomes, duration_seconds=10.25))
    assert caplog.messages == [
        "🔍 [2026-01-15T12:00:00.000Z] Checking 3 open checkout sessions...",
        "✅ Success: Checkout session a (checkout_1) is still active",
        "ℹ️ Checkout session b (checkout_1) returned status 404",
        "⏰ Timeout: Checkout session request timed out: c (checkout_1)",
        "📊 [2026-01-15T12:00:10.250Z] Checkout session check complete: 2 success, 1 errors",
    ]


def test_a_pass_without_open_sessions_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log = PassLog()
    log.begins(NOON, 0)
    log.ends(Summary(Reason.TICK, NOON))
    assert caplog.messages == ["🔍 [2026-01-15T12:00:00.000Z] Checking 0 open checkout sessions..."]


def test_what_is_beyond_fifty_lines_of_an_outcome_is_counted_in_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert LINES_PER_OUTCOME == 50
    log = PassLog()
    for outcome, count in ((Outcome.ACTIVE, 1050), (Outcome.NOT_FOUND, 50), (Outcome.TIMEOUT, 51)):
        for n in range(count):
            log.checked(claim(f"{outcome}-{n}"), Answer(outcome, 404))
    assert len(caplog.messages) == 150
    caplog.clear()
    log.ends(Summary(Reason.TICK, NOON))
    assert caplog.messages == ["… and 1000 more: active", "… and 1 more: timeout"]


def test_a_refused_api_key_is_said_once_a_pass(caplog: pytest.LogCaptureFixture) -> None:
    outcomes = Counter({Outcome.UNAUTHORIZED: 3})
    PassLog().ends(Summary(Reason.TICK, NOON, outcomes=outcomes))
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.ERROR, "⚠️ The billing service refuses the API key (status 401 or 403)")
    ]


@pytest.fixture
def level_kept() -> Iterator[None]:
    level = logger.log_level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("level_kept")
@pytest.mark.parametrize("debug", [False, True])
def test_debug_lines_are_for_those_who_ask_for_them(
    caplog: pytest.LogCaptureFixture, debug: bool
) -> None:
    observability.set_level(debug=debug)
    logger.debug("for those who ask")
    assert caplog.messages == (["for those who ask"] if debug else [])


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Lambda, where POWERTOOLS_SERVICE_NAME is set before anything is imported."""
    monkeypatch.setattr(observability.metrics, "service", "a-stack")


def emitted(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, float], dict[str, str]]:
    """The values and the units of the one EMF record that was written, which holds no more."""
    [written] = capsys.readouterr().out.splitlines()
    record: dict[str, Any] = json.loads(written)
    [directive] = record.pop("_aws")["CloudWatchMetrics"]
    assert directive["Namespace"] == "CheckoutSessionMonitor"
    assert directive["Dimensions"] == [["service"]]
    assert record.pop("service") == "a-stack"
    units = {metric["Name"]: metric["Unit"] for metric in directive["Metrics"]}
    assert set(record) == set(units)
    return {name: value for name, [value] in record.items()}, units


@pytest.mark.usefixtures("stack")
def test_a_pass_is_one_record_of_metrics_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes = Counter({outcome: n for n, outcome in enumerate(STATUS_CODES, start=1)})
    observability.measure(
        Summary(
            Reason.TICK,
            NOON,
            open=99,
            outcomes=outcomes + Counter({Outcome.ACTIVE: 80}),
            overdue_seconds=2.5,
            status_changes=7,
            latencies=[n / 1000 for n in range(1, 101)],
            duration_seconds=1.5,
        )
    )
    values, units = emitted(capsys)
    expected = {
        "SessionsOpen": 99,
        "SessionsChecked": 90,
        "ChecksActive": 80,
        "ChecksNotFound": 1,
        "ChecksUnexpectedStatus": 2,
        "ChecksRateLimited": 3,
        "ChecksUnauthorized": 4,
        "ChecksTimeout": 0,
        "ChecksNetworkError": 0,
        "ChecksInvalidSession": 0,
        "ChecksFailed": 9,
        "StatusChanges": 7,
        "OverdueSeconds": 2.5,
        "PassDuration": 1500,
        "BillingLatencyP50": 50,
        "BillingLatencyP95": 95,
        "BillingLatencyP99": 99,
        "PassesCompleted": 1,
        "PassesFailed": 0,
    }
    assert expected.items() <= values.items()
    in_milliseconds = {"PassDuration", *(f"BillingLatencyP{at}" for at in (50, 95, 99))}
    for name, unit in units.items():
        usual = "Milliseconds" if name in in_milliseconds else "Count"
        assert unit == ("Seconds" if name == "OverdueSeconds" else usual)


@pytest.mark.usefixtures("stack")
def test_a_record_holds_nothing_of_the_pass_before(capsys: pytest.CaptureFixture[str]) -> None:
    observability.measure(Summary(Reason.TICK, NOON, open=5, latencies=[0.1]))
    emitted(capsys)
    observability.measure(Summary(Reason.TICK, NOON))
    values, _ = emitted(capsys)
    assert values["SessionsOpen"] == 0
    assert not any(name.startswith("BillingLatency") for name in values)


@pytest.mark.usefixtures("stack")
def test_a_failed_pass_is_counted_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    observability.measure_failure()
    assert emitted(capsys) == ({"PassesFailed": 1}, {"PassesFailed": "Count"})

"""The log lines of a pass, as a person reads them."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core import log
from core.domain.model import Answer, Claim, Outcome, Reason
from core.domain.summary import Summary
from core.log import LINES_PER_OUTCOME, PassLog, check_line, logger
from testkit.clock import NOON

STATUS_CODES = {
    Outcome.NOT_FOUND: 404,
    Outcome.UNEXPECTED_STATUS: 500,
    Outcome.RATE_LIMITED: 429,
    Outcome.UNAUTHORIZED: 401,
}


def claim(session_id: str = "cart-1", checkout_id: str | None = "checkout_1") -> Claim:
    return Claim(1, session_id, checkout_id, NOON, 0, NOON, NOON + timedelta(seconds=20))


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
    PassLog().check(claim(), answer)
    assert [(record.levelno, record.message) for record in caplog.records] == [(level, text)]


def test_a_missing_billing_id_is_shown_as_a_dash() -> None:
    answer = Answer(Outcome.INVALID_SESSION, detail="it has no billing_checkout_id")
    assert check_line(claim(checkout_id=None), answer) == (
        "❌ Error checking session cart-1 (-): it has no billing_checkout_id"
    )


def test_on_lambda_a_line_is_a_json_record_with_fields(caplog: pytest.LogCaptureFixture) -> None:
    PassLog().check(claim("cart\n1", "a\x1b[31mb"), Answer(Outcome.NOT_FOUND, 404, 0.1))
    written = logger.registered_handler.format(caplog.records[0])
    assert written.isprintable()
    record = json.loads(written)
    assert record == {
        "level": "INFO",
        "message": r"ℹ️ Checkout session cart\n1 (a\x1b[31mb) returned status 404",
        "session_id": "cart\n1",
        "billing_checkout_id": "a\x1b[31mb",
        "outcome": "not_found",
        "status_code": 404,
    }


async def test_a_record_has_no_unused_fields(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_X_AMZN_TRACE_ID", "Root=1-5759e988-bd862e3fe1be46a994272793;Sampled=0")

    logger.warning("⚠️ A warning of a task on Lambda")
    [record] = caplog.records
    assert json.loads(logger.registered_handler.format(record)) == {
        "level": "WARNING",
        "message": "⚠️ A warning of a task on Lambda",
    }


def test_a_logged_summary_omits_zeros_and_what_its_line_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every byte of a log is paid for."""
    outcomes = Counter({Outcome.ACTIVE: 3})
    summary = Summary(Reason.TICK, NOON, tick=NOON, open=3, outcomes=outcomes, latencies=[0.1])
    PassLog().end(summary)
    record = json.loads(logger.registered_handler.format(caplog.records[0]))
    assert record["summary"] == {
        "reason": "tick",
        "tick": "2026-01-15T12:00:00.000Z",
        "open": 3,
        "checked": 3,
        "outcomes": {"active": 3},
        "billing_latency_ms": {"p50": 100.0, "p95": 100.0, "p99": 100.0, "max": 100.0},
    }


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logger.registered_handler
    monkeypatch.setattr(handler, "formatter", handler.formatter)
    log.use_plain_text()


@pytest.mark.usefixtures("on_a_terminal")
def test_on_a_terminal_a_line_is_only_the_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    PassLog().check(claim(), Answer(Outcome.ACTIVE, 200, 0.1))
    written = logger.registered_handler.format(caplog.records[0])
    assert written == "✅ Success: Checkout session cart-1 (checkout_1) is still active"


ANY_TEXT = st.text(st.characters()) | st.text("a\n\r\t\x00\x1b\x7f\x85\u2028\u202e\ud800")


@settings(deadline=None)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, st.sampled_from(Outcome))
def test_neither_an_id_nor_a_detail_can_break_its_line(
    session_id: str, checkout_id: str, detail: str, outcome: Outcome
) -> None:
    logged = check_line(claim(session_id, checkout_id), Answer(outcome, 200, detail=detail))
    assert logged.isprintable()
    assert logged.encode()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1))
def test_a_printable_id_is_shown_unchanged(session_id: str) -> None:
    assert f" {session_id} " in check_line(claim(session_id), Answer(Outcome.ACTIVE, 200))


def test_a_pass_is_logged_from_beginning_to_end(caplog: pytest.LogCaptureFixture) -> None:
    log = PassLog()
    log.start(NOON, 3)
    log.check(claim("a"), Answer(Outcome.ACTIVE, 200, 0.1))
    log.check(claim("b"), Answer(Outcome.NOT_FOUND, 404, 0.1))
    log.check(claim("c"), Answer(Outcome.TIMEOUT, None, 10.0))
    outcomes = Counter([Outcome.ACTIVE, Outcome.NOT_FOUND, Outcome.TIMEOUT])
    log.end(Summary(Reason.TICK, NOON, open=3, outcomes=outcomes, duration_seconds=10.25))
    assert caplog.messages == [
        "🔍 [2026-01-15T12:00:00.000Z] Checking 3 open checkout sessions...",
        "✅ Success: Checkout session a (checkout_1) is still active",
        "ℹ️ Checkout session b (checkout_1) returned status 404",
        "⏰ Timeout: Checkout session request timed out: c (checkout_1)",
        "📊 [2026-01-15T12:00:10.250Z] Checkout session check complete: 2 success, 1 errors",
    ]


def test_failures_come_first_among_lines_that_waited(caplog: pytest.LogCaptureFixture) -> None:
    log = PassLog(waits=True)
    log.check(claim("a"), Answer(Outcome.ACTIVE, 200, 0.1))
    log.check(claim("b"), Answer(Outcome.TIMEOUT, None, 10.0))
    log.start(NOON, 2)
    assert [message[0] for message in caplog.messages] == ["🔍", "⏰", "✅"]


def test_a_pass_without_open_sessions_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log = PassLog()
    log.start(NOON, 0)
    log.end(Summary(Reason.TICK, NOON))
    assert caplog.messages == ["🔍 [2026-01-15T12:00:00.000Z] Checking 0 open checkout sessions..."]


def test_beyond_fifty_lines_an_outcome_is_only_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert LINES_PER_OUTCOME == 50
    log = PassLog()
    for outcome, count in ((Outcome.ACTIVE, 1050), (Outcome.NOT_FOUND, 50), (Outcome.TIMEOUT, 51)):
        for n in range(count):
            log.check(claim(f"{outcome}-{n}"), Answer(outcome, 404))
    assert len(caplog.messages) == 150
    caplog.clear()
    log.end(Summary(Reason.TICK, NOON))
    assert caplog.messages == ["… and 1000 more: active", "… and 1 more: timeout"]


@pytest.mark.parametrize(
    ("max_active", "lines", "rest"),
    [
        (5, 5, ["… and 95 more: active", "… and 10 more: timeout"]),
        (0, 0, ["… and 100 more: active", "… and 10 more: timeout"]),
        (None, 100, ["… and 10 more: timeout"]),
    ],
)
def test_lines_of_active_sessions_have_their_own_limit(
    caplog: pytest.LogCaptureFixture, max_active: int | None, lines: int, rest: list[str]
) -> None:
    """With DEBUG=true there is no limit on them."""
    log = PassLog(max_active=max_active)
    for n in range(100):
        log.check(claim(f"cart-{n}"), Answer(Outcome.ACTIVE, 200))
    assert len(caplog.messages) == lines
    for n in range(60):
        log.check(claim(f"cart-{n}"), Answer(Outcome.TIMEOUT))
    assert len(caplog.messages) == lines + 50
    caplog.clear()
    log.end(Summary(Reason.TICK, NOON))
    assert caplog.messages == rest


@pytest.mark.parametrize(
    ("sent_headers", "rest"),
    [
        ("", ""),
        ("authorization, shop-version", ", sent with the headers authorization, shop-version"),
    ],
)
def test_a_refused_api_key_is_logged_once_per_pass(
    caplog: pytest.LogCaptureFixture, sent_headers: str, rest: str
) -> None:
    log = PassLog(sent_headers=sent_headers)
    for n in range(3):
        log.check(claim(f"cart-{n}"), Answer(Outcome.UNAUTHORIZED, 401))
    caplog.clear()
    log.end(Summary(Reason.TICK, NOON))
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.ERROR, f"⚠️ The billing service refuses the API key (status 401 or 403){rest}")
    ]


def test_a_missing_token_is_no_refused_api_key(caplog: pytest.LogCaptureFixture) -> None:
    """A line of its own has said why there is none."""
    log = PassLog()
    no_token = Answer(Outcome.UNAUTHORIZED, 400, detail="BILLING_TOKEN_URL answers with status 400")
    log.check(claim("cart-1"), no_token)
    caplog.clear()
    log.end(Summary(Reason.TICK, NOON))
    assert not caplog.messages


@pytest.fixture
def restored_level() -> Iterator[None]:
    level = logger.log_level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("restored_level")
@pytest.mark.parametrize("debug", [False, True])
def test_debug_lines_are_logged_only_on_request(
    caplog: pytest.LogCaptureFixture, debug: bool
) -> None:
    log.set_level(debug=debug)
    logger.debug("a detail")
    assert caplog.messages == (["a detail"] if debug else [])

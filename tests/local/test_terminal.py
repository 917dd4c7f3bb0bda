"""The lines of the log that a terminal shows."""

import io
import logging
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from local.terminal import MAX_LINES_PER_PASS, MAX_NEW_SESSIONS, ChangesOnly, width
from testkit.clock import NOON
from testkit.shops import SQLiteShop, add_sessions, numbered, statements

ROOT = Path(__file__).parents[2]

type Log = Callable[..., str]


@pytest.fixture
def log() -> Log:
    """A function that logs one record and returns the output without control codes."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(ChangesOnly())
    handler.terminator = ""

    def log(message: str, **fields: Any) -> str:  # noqa: ANN401
        written.truncate(0)
        written.seek(0)
        record = logging.makeLogRecord({"msg": message, "created": NOON.timestamp(), **fields})
        handler.emit(record)
        return written.getvalue().replace("\r\x1b[2K", "")

    return log


def lines_of_pass(log: Log, outcomes: dict[str, str]) -> list[str]:
    """The output of a pass with these outcomes by session."""
    log(f"🔍 Checking {len(outcomes)} …")
    lines = [log(f"{i}: {o}", session_id=i, outcome=o) for i, o in outcomes.items()]
    return [line for line in lines if line]


def test_repeated_line_of_a_session_is_not_shown(log: Log) -> None:
    assert lines_of_pass(log, {"a": "active", "b": "timeout"}) == ["a: active\n", "b: timeout\n"]
    assert lines_of_pass(log, {"a": "active", "b": "timeout"}) == []
    assert lines_of_pass(log, {"a": "timeout", "b": "active"}) == ["a: timeout\n", "b: active\n"]


def test_few_of_thousands_of_active_sessions_are_shown(
    log: Log,
) -> None:
    active = {f"s{n}": "active" for n in range(3000)}
    assert len(lines_of_pass(log, active)) == MAX_NEW_SESSIONS
    assert lines_of_pass(log, {**active, "s7": "timeout"}) == ["s7: timeout\n"]
    assert lines_of_pass(log, active) == ["s7: active\n"]


def test_failures_without_room_are_counted_and_shown_by_a_later_pass(log: Log) -> None:
    lines_of_pass(log, {f"s{n}": "active" for n in range(3000)})
    failing = {f"s{n}": "timeout" for n in range(50)}
    assert len(lines_of_pass(log, failing)) == MAX_LINES_PER_PASS
    assert log("… and 2950 more: active") == log("… and 950 more: timeout") == ""
    assert log("📊 complete").startswith("❌ … and 980 more failed\n📊 ")
    assert lines_of_pass(log, failing) == [f"s{n}: timeout\n" for n in range(20, 40)]
    assert log("📊 complete").startswith("❌ … and 10 more failed\n📊 ")
    assert lines_of_pass(log, failing) == [f"s{n}: timeout\n" for n in range(40, 50)]
    assert log("📊 complete").startswith("📊 ")
    assert lines_of_pass(log, failing) == []
    log("… and 950 more: timeout")
    assert log("📊 complete").startswith("📊 ")


def test_every_failure_of_a_small_shop_is_shown_beside_its_active_sessions(log: Log) -> None:
    sessions = {f"s{n}": "active" for n in range(17)} | {f"f{n}": "timeout" for n in range(16)}
    lines = lines_of_pass(log, sessions)
    assert sum("timeout" in line for line in lines) == 16


SUMMARY = {
    "tick": "t",
    "open": 3000,
    "failing": 16,
    "waiting": {"sessions": 4},
    "checked": 1000,
    "errors": 3,
    "duration_ms": 412.0,
    "billing_latency_ms": {"p95": 104.0},
}


def test_last_line_adds_up_the_workers_of_a_tick(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    begin = "📊 12:00:00 UTC · 16 failing · 4 waiting · 3,000 open"
    end = "95 % of answers within 104 ms"
    assert log("📊 complete", summary=SUMMARY) == f"{begin} · 1,000 checked in 0.4 s · {end}"
    assert log("📊 complete", summary=SUMMARY) == (
        f"{begin} · 2,000 checked in 0.4 s · 2 workers · {end}"
    )
    assert "1,000 checked" in log("📊 complete", summary={**SUMMARY, "tick": "u"})
    first = {"tick": "v", "open": 5, "errors": 2}  # before it nothing was counted
    assert "· 2 failing · 0 waiting · 5 open ·" in log("📊 complete", summary=first)
    manual = {"reason": "manual", "open": 5, "errors": 2}  # does not find out who waits
    assert "· 2 failing · 5 open ·" in log("📊 complete", summary=manual)


@pytest.mark.parametrize("columns", [30, 60, 80, 120])
def test_lines_fit_the_terminal(log: Log, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    last = log("📊 complete", summary={**SUMMARY, "paused_until": "2026-01-15T12:00:30.000Z"})
    assert last.startswith("📊 12:00:00 UTC · 16 failing")
    line = log(
        "❌ Error checking session cart-1009 (checkout_reset_1009): Network error: Conn. reset",
        session_id="cart-1009",
        outcome="network_error",
    )
    for shown in (last, *line.splitlines()):
        assert width(shown) <= columns
    assert " ".join(line.split()).endswith("(checkout_reset_1009): Network error: Conn. reset")


def test_other_lines_are_shown_and_counts_of_omitted_lines_are_not(log: Log) -> None:
    warning = "⚠️ checkout_session has no index on status. " * 5
    assert " ".join(log(warning).split()) == warning.strip()
    assert log("… and 2950 more: active") == ""


def test_terminal_shows_few_lines_for_three_hundred_sessions(tmp_path: Path) -> None:
    (tmp_path / ".local").mkdir()
    shop = SQLiteShop(tmp_path / ".local" / "checkout.db")
    for statement in statements("sqlite"):
        shop.run(statement)
    add_sessions(shop, numbered(300))
    screen, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "local", "--api-port", "0", "--billing-port", "0"],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            "CHECK_INTERVAL_SECONDS": "1",
            "APIKEY": "k",
        },
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    ) as process:
        os.close(terminal)
        shown = ""
        while shown.count("📊") < 3:
            shown += os.read(screen, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        process.wait(20)
    os.close(screen)
    assert shown.startswith("The monitor's page: http://localhost:")
    assert "300 open" in shown
    assert shown.count("\n") < 10 + MAX_NEW_SESSIONS, shown

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

from local.terminal import MAX_LINES_PER_PASS, MAX_NEW_SESSIONS, ChangesOnly
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


def test_pass_shows_a_limited_number_of_lines(log: Log) -> None:
    lines_of_pass(log, {f"s{n}": "active" for n in range(3000)})
    assert len(lines_of_pass(log, {f"s{n}": "timeout" for n in range(3000)})) == MAX_LINES_PER_PASS


def test_last_line_adds_up_the_workers_of_a_tick(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    one = {"tick": "t", "open": 3000, "checked": 1000, "errors": 3, "duration_ms": 412.0}
    one["billing_latency_ms"] = {"p95": 104.0}
    assert log("📊 complete", summary=one) == (
        "📊 12:00:00 UTC · 3,000 open · 1,000 checked in 0.4 s · 3 failed"
        " · 95 % of answers within 104 ms"
    )
    assert log("📊 complete", summary=one) == (
        "📊 12:00:00 UTC · 3,000 open · 2,000 checked in 0.4 s · 6 failed · 2 workers"
        " · 95 % of answers within 104 ms"
    )
    assert "1,000 checked" in log("📊 complete", summary={**one, "tick": "u"})
    monkeypatch.setenv("COLUMNS", "40")
    assert len(log("📊 complete", summary=one)) == 38


def test_other_lines_are_shown_and_counts_of_omitted_lines_are_not(log: Log) -> None:
    warning = "⚠️ checkout_session has no index on status. " * 5
    assert log(warning) == f"{warning}\n"
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

"""What a terminal shows of the log, and what a pipe does."""

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

from local.terminal import MOST_IN_A_PASS, MOST_NEW, NewsOnly
from testkit.clock import NOON
from testkit.shops import SQLiteShop, add_sessions, numbered, statements

ROOT = Path(__file__).parents[2]

type Say = Callable[..., str]


@pytest.fixture
def say() -> Say:
    """Logs one record and returns what is written, the control codes left out."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(NewsOnly())
    handler.terminator = ""

    def say(message: str, **fields: Any) -> str:  # noqa: ANN401
        written.truncate(0)
        written.seek(0)
        record = logging.makeLogRecord({"msg": message, "created": NOON.timestamp(), **fields})
        handler.emit(record)
        return written.getvalue().replace("\r\x1b[2K", "")

    return say


def a_pass(say: Say, sessions: dict[str, str]) -> list[str]:
    """What is written of a pass in which each session has that outcome."""
    say(f"🔍 Checking {len(sessions)} …")
    said = [say(f"{i}: {o}", session_id=i, outcome=o) for i, o in sessions.items()]
    return [line for line in said if line]


def test_what_is_said_of_a_session_again_is_no_news(say: Say) -> None:
    assert a_pass(say, {"a": "active", "b": "timeout"}) == ["a: active\n", "b: timeout\n"]
    assert a_pass(say, {"a": "active", "b": "timeout"}) == []
    assert a_pass(say, {"a": "timeout", "b": "active"}) == ["a: timeout\n", "b: active\n"]


def test_of_thousands_that_are_well_a_few_are_shown_and_then_only_those_that_change(
    say: Say,
) -> None:
    well = {f"s{n}": "active" for n in range(3000)}
    assert len(a_pass(say, well)) == MOST_NEW
    assert a_pass(say, {**well, "s7": "timeout"}) == ["s7: timeout\n"]
    assert a_pass(say, well) == ["s7: active\n"]


def test_when_all_of_them_change_a_pass_shows_a_screenful(say: Say) -> None:
    a_pass(say, {f"s{n}": "active" for n in range(3000)})
    assert len(a_pass(say, {f"s{n}": "timeout" for n in range(3000)})) == MOST_IN_A_PASS


def test_the_newest_line_is_written_over_and_adds_up_the_workers_of_a_tick(
    say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    one = {"tick": "t", "open": 3000, "checked": 1000, "errors": 3, "duration_ms": 412.0}
    one["billing_latency_ms"] = {"p95": 104.0}
    assert say("📊 complete", summary=one) == (
        "📊 12:00:00 UTC · 3,000 open · 1,000 checked in 0.4 s · 3 failed"
        " · 95 % of answers within 104 ms"
    )
    assert say("📊 complete", summary=one) == (
        "📊 12:00:00 UTC · 3,000 open · 2,000 checked in 0.4 s · 6 failed · 2 workers"
        " · 95 % of answers within 104 ms"
    )
    assert "1,000 checked" in say("📊 complete", summary={**one, "tick": "u"})
    monkeypatch.setenv("COLUMNS", "40")
    assert len(say("📊 complete", summary=one)) == 38


def test_other_lines_are_shown_whole_and_counts_of_lines_left_out_are_not(say: Say) -> None:
    warning = "⚠️ checkout_session has no index on status. " * 5
    assert say(warning) == f"{warning}\n"
    assert say("… and 2950 more: active") == ""


def test_on_a_terminal_three_hundred_sessions_stay_readable(tmp_path: Path) -> None:
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
    assert shown.count("\n") < 10 + MOST_NEW, shown

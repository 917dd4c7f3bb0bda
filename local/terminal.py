"""The log on a terminal: only the changes, and a last line about the newest pass.

The log has a line for each session at each tick. A terminal shows a session's line only when it
differs from the session's last one. It shows new active sessions only while there are few. The last
line is updated with each pass. A pipe gets the whole log.
"""

import logging
import shutil
import sys
from datetime import UTC, datetime
from typing import Any

from core.log import logger

MAX_NEW_SESSIONS = 20  # new active sessions whose lines are shown
MAX_LINES_PER_PASS = 20
MAX_KNOWN_SESSIONS = 100_000  # sessions whose last line is kept
CLEAR_LINE = "\r\x1b[2K"


class ChangesOnly(logging.Formatter):
    """Returns a line with its line end, or an empty text if nothing has changed."""

    def __init__(self) -> None:
        super().__init__("%(message)s")
        self._last_lines: dict[str, str] = {}
        self._lines_in_pass = 0
        self._workers: list[dict[str, Any]] = []  # summaries of the newest tick's workers

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        match text[0]:
            case "🔍":  # a pass starts
                self._lines_in_pass = 0
                return self._update_last_line(text)
            case "📊":
                return self._update_last_line(self._pass_line(record))
            case "…":  # the number of omitted lines
                return ""
        session_id = getattr(record, "session_id", None)
        if session_id is None or self._is_change(session_id, text, record):
            return f"{CLEAR_LINE}{text}\n"
        return ""

    def _is_change(self, session_id: str, text: str, record: logging.LogRecord) -> bool:
        before = self._last_lines.get(session_id)
        if before == text:
            return False
        if len(self._last_lines) >= MAX_KNOWN_SESSIONS:
            self._last_lines.clear()
        self._last_lines[session_id] = text
        active = getattr(record, "outcome", None) == "active"
        if before is None and active and len(self._last_lines) > MAX_NEW_SESSIONS:
            return False
        self._lines_in_pass += 1
        return self._lines_in_pass <= MAX_LINES_PER_PASS

    def _update_last_line(self, text: str) -> str:
        return f"{CLEAR_LINE}{text[: shutil.get_terminal_size().columns - 2]}"

    def _pass_line(self, record: logging.LogRecord) -> str:
        """One line about a tick, from the summaries of its workers, which omit zero values."""
        newest: dict[str, Any] = getattr(record, "summary", {})
        if self._workers and newest.get("tick") != self._workers[0].get("tick"):
            self._workers.clear()
        self._workers.append(newest)
        workers = self._workers
        seconds = max(one.get("duration_ms", 0) for one in workers) / 1000
        latencies = [one.get("billing_latency_ms", {}).get("p95", 0) for one in workers]
        parts = [
            f"{datetime.fromtimestamp(record.created, UTC):%H:%M:%S} UTC",
            f"{newest.get('open', 0):,} open",
            f"{sum(one.get('checked', 0) for one in workers):,} checked in {seconds:.1f} s",
            f"{sum(one.get('errors', 0) for one in workers):,} failed",
        ]
        if len(workers) > 1:
            parts.append(f"{len(workers)} workers")
        if any(latencies):
            parts.append(f"95 % of answers within {max(latencies):,.0f} ms")
        if paused_until := newest.get("paused_until"):
            parts.append(f"paused until {paused_until[11:19]}")
        return f"📊 {' · '.join(parts)}"


def show_changes_only(*, debug: bool) -> None:
    """Show only changes on a terminal, unless DEBUG asks for every line."""
    handler = logger.registered_handler
    if sys.stdout.isatty() and not debug and isinstance(handler, logging.StreamHandler):
        handler.setFormatter(ChangesOnly())
        handler.terminator = ""


def end_last_line() -> None:
    if sys.stdout.isatty():
        print()

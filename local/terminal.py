"""What a person at a terminal sees of the log: what is new, and one line that is always up to date.

A pass says the same of every session at every tick. On a terminal a session's line is shown when it
differs from the last one, new sessions that are well only while they are few, and the last line
tells what the newest pass did. Piped, the log is plain lines, and all of them.
"""

import logging
import shutil
import sys
from datetime import UTC, datetime
from typing import Any

from core.log import logger

# New sessions that are well, and lines in one pass: the newest line tells how many there are.
MOST_NEW = MOST_IN_A_PASS = 20
MOST_KNOWN = 100_000  # sessions whose last line is kept
CLEAR_LINE = "\r\x1b[2K"


class NewsOnly(logging.Formatter):
    """Writes whole lines itself, line ends included; what is no news becomes an empty text."""

    def __init__(self) -> None:
        super().__init__("%(message)s")
        self._said: dict[str, str] = {}
        self._in_pass = 0
        self._workers: list[dict[str, Any]] = []  # the summaries of the newest tick's

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        match text[0]:
            case "🔍":  # a pass begins
                self._in_pass = 0
                return self._newest(text)
            case "📊":
                return self._newest(self._digest(record))
            case "…":  # how many lines were left out
                return ""
        session_id = getattr(record, "session_id", None)
        if session_id is None or self._is_news(session_id, text, record):
            return f"{CLEAR_LINE}{text}\n"
        return ""

    def _is_news(self, session_id: str, text: str, record: logging.LogRecord) -> bool:
        before = self._said.get(session_id)
        if before == text:
            return False
        if len(self._said) >= MOST_KNOWN:
            self._said.clear()
        self._said[session_id] = text
        well = getattr(record, "outcome", None) == "active"
        if before is None and well and len(self._said) > MOST_NEW:
            return False
        self._in_pass += 1
        return self._in_pass <= MOST_IN_A_PASS

    def _newest(self, text: str) -> str:
        return f"{CLEAR_LINE}{text[: shutil.get_terminal_size().columns - 2]}"

    def _digest(self, record: logging.LogRecord) -> str:
        """A tick's pass in one line, from the summaries of its workers; what is zero they lack."""
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


def show_news_only(*, debug: bool) -> None:
    """Where a person looks on: a terminal, and not every line asked for by DEBUG."""
    handler = logger.registered_handler
    if sys.stdout.isatty() and not debug and isinstance(handler, logging.StreamHandler):
        handler.setFormatter(NewsOnly())
        handler.terminator = ""


def end_newest_line() -> None:
    if sys.stdout.isatty():
        print()

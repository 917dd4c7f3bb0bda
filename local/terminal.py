"""What a person at a terminal sees of the log: what is new, and one line that is always up to date.

A pass says the same of every session at every tick. On a terminal a session's line is shown when it
differs from the last one, new sessions that are well only while they are few, and the last line
tells what the newest pass did. Piped, the log is plain lines, and all of them.
"""

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from core.observability import logger

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
        self._workers: list[Mapping[str, Any]] = []  # the summaries of the newest tick's

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if hasattr(record, "summary"):
            if self._workers and record.summary["tick"] != self._workers[0]["tick"]:
                self._workers.clear()
            self._workers.append(record.summary)
            return self._newest(digest(self._workers))
        if hasattr(record, "open_sessions"):  # a pass begins
            self._in_pass = 0
            return self._newest(text)
        session_id = getattr(record, "session_id", None)
        if session_id is not None:
            return self._line(text) if self._is_news(session_id, text, record) else ""
        if hasattr(record, "outcome"):  # how many lines of it were left out
            return ""
        return self._line(text)

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

    def _line(self, text: str) -> str:
        return f"{CLEAR_LINE}{text}\n"

    def _newest(self, text: str) -> str:
        return f"{CLEAR_LINE}{text[: shutil.get_terminal_size().columns - 2]}"


def digest(workers: Sequence[Mapping[str, Any]]) -> str:
    """A tick's pass in one line, from the summaries of its workers."""
    newest = workers[-1]
    seconds = max(one["duration_ms"] for one in workers) / 1000
    latencies = [one["billing_latency_ms"].get("p95", 0) for one in workers]
    parts = [
        f"{newest['started_at'][11:19]} UTC",
        f"{newest['open']:,} open",
        f"{sum(one['checked'] for one in workers):,} checked in {seconds:.1f} s",
        f"{sum(one['errors'] for one in workers):,} failed",
    ]
    if len(workers) > 1:
        parts.append(f"{len(workers)} workers")
    if any(latencies):
        parts.append(f"95 % of answers within {max(latencies):,.0f} ms")
    if newest["paused_until"]:
        parts.append(f"paused until {newest['paused_until'][11:19]}")
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

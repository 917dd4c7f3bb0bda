"""The log on a terminal: only the changes, above all failures, and a last line on the newest pass.

The log has a line for each session at each tick. A terminal shows a session's line only when it
differs from the last one that was shown. It shows new active sessions only while there are few. The
last line is updated with each pass. A pipe gets the whole log.
"""

import logging
import re
import shutil
import sys
import textwrap
import unicodedata
from datetime import UTC, datetime
from typing import Any

from core.domain.model import Outcome
from core.log import logger

MAX_NEW_SESSIONS = 20  # new active sessions whose lines are shown
MAX_LINES_PER_PASS = 20  # of failures, and as many others
MAX_KNOWN_SESSIONS = 100_000  # sessions whose last line is kept
CLEAR_LINE = "\r\x1b[2K"

FAILURES = frozenset(outcome.value for outcome in Outcome if outcome.is_error)


class ChangesOnly(logging.Formatter):
    """Returns lines with their line ends, or an empty text if nothing has changed."""

    def __init__(self) -> None:
        super().__init__("%(message)s")
        self._last_lines: dict[str, str] = {}  # of sessions, as they were shown
        # Lines of this pass, with those for which there is no room here; those omitted by the log.
        self._failures = self._others = self._omitted = 0
        self._workers: list[dict[str, Any]] = []  # summaries of the newest tick's workers

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        match text[0]:
            case "🔍":  # a pass starts
                self._failures = self._others = self._omitted = 0
                return self._update_last_line([text])
            case "📊":
                return self._left_out() + self._update_last_line(self._parts_of_pass(record))
            case "…":  # the number of lines that the log itself omits
                self._omitted += _failures_in(text)
                return ""
        session_id = getattr(record, "session_id", None)
        if session_id is None or self._is_shown(session_id, text, record):
            return f"{CLEAR_LINE}{wrapped(text)}\n"
        return ""

    def _is_shown(self, session_id: str, text: str, record: logging.LogRecord) -> bool:
        before = self._last_lines.get(session_id)
        if before == text:
            return False
        if len(self._last_lines) >= MAX_KNOWN_SESSIONS:
            self._last_lines.clear()
        outcome = getattr(record, "outcome", None)
        if outcome in FAILURES:
            self._failures += 1
            shown = self._failures <= MAX_LINES_PER_PASS
        elif outcome == Outcome.ACTIVE and before is None:
            # Not shown if it is one of many, and not later either.
            self._last_lines[session_id] = text
            return len(self._last_lines) <= MAX_NEW_SESSIONS
        else:
            self._others += 1
            shown = self._others <= MAX_LINES_PER_PASS
        if shown:  # otherwise a later pass shows it
            self._last_lines[session_id] = text
        return shown

    def _left_out(self) -> str:
        """The line about failures of this pass that had no room."""
        more = max(0, self._failures - MAX_LINES_PER_PASS)
        if self._failures:  # otherwise those that the log omits are most likely not new either
            more += self._omitted
        self._failures = self._omitted = 0
        return f"{CLEAR_LINE}❌ … and {more:,} more failed\n" if more else ""

    def _update_last_line(self, parts: list[str]) -> str:
        """As many of the parts as fit on a line, the first of them always."""
        columns = shutil.get_terminal_size().columns - 1  # the cursor takes one
        while len(parts) > 1 and width(" · ".join(parts)) > columns:
            parts = parts[:-1]
        line = " · ".join(parts)
        while width(line) > columns:
            line = line[:-1]
        return f"{CLEAR_LINE}{line}"

    def _parts_of_pass(self, record: logging.LogRecord) -> list[str]:
        """A tick from the summaries of its workers, which omit zero values; what matters first."""
        newest: dict[str, Any] = getattr(record, "summary", {})
        if self._workers and newest.get("tick") != self._workers[0].get("tick"):
            self._workers.clear()
        self._workers.append(newest)
        workers = self._workers
        seconds = max(one.get("duration_ms", 0) for one in workers) / 1000
        latencies = [one.get("billing_latency_ms", {}).get("p95", 0) for one in workers]
        failed = sum(one.get("errors", 0) for one in workers)
        # The count is that before the pass.
        failing = max(failed, *(one.get("failing", 0) for one in workers))
        waiting = max((one.get("waiting") or {}).get("sessions", 0) for one in workers)
        parts = [
            f"📊 {datetime.fromtimestamp(record.created, UTC):%H:%M:%S} UTC",
            f"{failing:,} failing",
        ]
        if newest.get("reason") != "manual":  # such a pass does not find out who waits
            parts.append(f"{waiting:,} waiting")
        parts.append(f"{newest.get('open', 0):,} open")
        if paused_until := newest.get("paused_until"):
            parts.append(f"paused until {paused_until[11:19]}")
        checked = sum(one.get("checked", 0) for one in workers)
        parts.append(f"{checked:,} checked in {seconds:.1f} s")
        if len(workers) > 1:
            parts.append(f"{len(workers)} workers")
        if any(latencies):
            parts.append(f"95 % of answers within {max(latencies):,.0f} ms")
        return parts


def _failures_in(omitted: str) -> int:
    """How many failures a line like `… and 950 more: timeout` stands for."""
    match = re.search(r"(\d+) more: (\w+)", omitted)
    return int(match[1]) if match and match[2] in FAILURES else 0


def wrapped(text: str) -> str:
    """A line in lines that fit the terminal; an id or a URL stays whole."""
    columns = shutil.get_terminal_size().columns
    if width(text) <= columns:
        return text
    return textwrap.fill(
        text,
        columns - 2,  # a sign may be wider than a letter
        subsequent_indent="   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def width(text: str) -> int:
    """How many columns a text takes, or one more for each sign that some terminals draw wide."""
    wide = sum(
        unicodedata.east_asian_width(letter) in "WF" or letter == "\ufe0f" for letter in text
    )
    return len(text) + wide - text.count("\ufe0f")


def show_changes_only(*, debug: bool) -> None:
    """Show only changes on a terminal, unless DEBUG asks for every line."""
    handler = logger.registered_handler
    if sys.stdout.isatty() and not debug and isinstance(handler, logging.StreamHandler):
        handler.setFormatter(ChangesOnly())
        handler.terminator = ""


def end_last_line() -> None:
    if sys.stdout.isatty():
        print()

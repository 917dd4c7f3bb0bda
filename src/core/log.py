"""The log lines of a pass: JSON records with fields on Lambda, plain text on a terminal.

The messages are the same in both. A line of every pass is paid for half a million times a month, so
it holds only what somebody reads.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial

from aws_lambda_powertools import Logger

from core.domain.model import Answer, Claim, Outcome, Refusal, SessionStatus, StatusChange, iso
from core.domain.summary import Summary

# Lines of one outcome in one pass; the others are only counted. 10,000 lines of 200 bytes every 5 s
# would be 34 GB a day.
LINES_PER_OUTCOME = 50
# Different unknown words in one pass's line.
MAX_WORDS = 5

# Fields of a summary that are left out of its record, because the message holds them.
IN_MESSAGE = frozenset(("started_at", "success"))

logging.logAsyncioTasks = False  # type: ignore[attr-defined]  # a record's `taskName`
# CloudWatch keeps the time of every record, and the log group names the function.
logger = Logger(location=None, timestamp=None, xray_trace_id=None)
logger.remove_keys(["service"])


def set_level(*, debug: bool) -> None:
    logger.setLevel(logging.DEBUG if debug else logging.INFO)


def use_plain_text() -> None:
    """Log bare messages, for a terminal, instead of JSON records."""
    logger.registered_handler.setFormatter(logging.Formatter("%(message)s"))


def _log_check(claim: Claim, answer: Answer) -> None:
    fields = {
        "session_id": claim.session_id,
        "billing_checkout_id": claim.billing_checkout_id,
        "outcome": answer.outcome.value,
        "status_code": answer.status_code,
    }
    write = logger.warning if answer.outcome.is_error else logger.info
    write(check_line(claim, answer), extra=fields)


def log_paid_late(
    session_id: str, billing_checkout_id: str, billing_status: str, status: SessionStatus
) -> None:
    """`status` is the session's now: `timeout`, or what LATE_STATUS_UPDATES made of it."""
    now = "" if status is SessionStatus.TIMEOUT else f" and is {status.value} now"
    logger.warning(
        f"💶 Checkout session {shown(session_id)} ({shown(billing_checkout_id)}) was paid after it "
        f"had become timeout{now}; billing says {shown(billing_status)}",
        extra={
            "session_id": session_id,
            "billing_checkout_id": billing_checkout_id,
            "billing_status": billing_status,
        },
    )


def log_unusable(answers: Sequence[tuple[str, Answer]]) -> None:
    """Log answers about sessions that are `timeout`, by session id, if there are any."""
    if answers:
        details = Counter(shown(answer.detail) for _, answer in answers)
        logger.warning(
            "⚠️ Answers about sessions that are timeout cannot be used, e.g. that about "
            f"{shown(answers[0][0])}: {_most_common(details)}"
        )


class PassLog:
    """The lines of one pass, at most LINES_PER_OUTCOME of each outcome.

    `max_active` is the limit for `active`; None: no limit. With `waits`, lines are held back until
    the first one, which says how many sessions are open: checks begin before that is known. Those
    of failures then come first.
    `sent_headers` are the names of the headers with credentials, where they are not the default.
    """

    def __init__(
        self,
        *,
        max_active: int | None = LINES_PER_OUTCOME,
        waits: bool = False,
        sent_headers: str = "",
    ) -> None:
        self._max_lines: dict[Outcome, float] = dict.fromkeys(Outcome, LINES_PER_OUTCOME)
        self._max_lines[Outcome.ACTIVE] = math.inf if max_active is None else max_active
        self._sent_headers = sent_headers
        self._lines = dict.fromkeys(Outcome, 0)
        self._unknown: Counter[str] = Counter()
        self._key_refused = False
        self._waiting: list[tuple[Outcome, Callable[[], None]]] | None = [] if waits else None

    def start(self, at: datetime, open_sessions: int) -> None:
        waiting, self._waiting = self._waiting, None
        logger.info(f"🔍 [{iso(at)}] Checking {open_sessions} open checkout sessions...")
        for _, write in sorted(waiting or (), key=lambda line: not line[0].is_error):
            write()

    def check(self, claim: Claim, answer: Answer) -> None:
        outcome = answer.outcome
        if outcome is Outcome.UNKNOWN_STATUS:
            self._unknown[answer.detail] += 1
            return
        if outcome is Outcome.UNAUTHORIZED and not answer.detail:  # not by BILLING_TOKEN_URL
            self._key_refused = True
        if self._count_line(outcome):
            self._write(outcome, partial(_log_check, claim, answer))

    def status_changes(self, changes: Sequence[StatusChange]) -> None:
        """Log status changes that have been committed."""
        for change in changes:
            fields = {
                "session_id": change.claim.session_id,
                "billing_checkout_id": change.claim.billing_checkout_id,
                "new_status": change.new_status,
                "billing_status": change.answer.billing_status,
            }
            if self._count_line(Outcome.CLOSED):
                self._write(Outcome.CLOSED, partial(logger.info, change_line(change), extra=fields))

    def refusals(self, refusals: Sequence[Refusal]) -> None:
        """Log status changes that the shop's database refused."""
        for change, why in refusals:
            claim = change.claim
            session, checkout = shown(claim.session_id), shown(claim.billing_checkout_id or "-")
            message = (
                f"❌ Checkout session {session} ({checkout}) cannot become {change.new_status}: "
                f"the database refuses it: {shown(why)}"
            )
            fields = {"session_id": claim.session_id, "outcome": Outcome.REFUSED.value}
            if self._count_line(Outcome.REFUSED):
                self._write(Outcome.REFUSED, partial(logger.error, message, extra=fields))

    def _count_line(self, outcome: Outcome) -> bool:
        """Count a line; returns whether it is written."""
        self._lines[outcome] = lines = self._lines[outcome] + 1
        return lines <= self._max_lines[outcome]

    def _write(self, outcome: Outcome, write: Callable[[], None]) -> None:
        if self._waiting is None:
            write()
        else:
            self._waiting.append((outcome, write))

    @property
    def unknown_words(self) -> list[str]:
        """What the answers of `unknown_status` had instead of a known word, most frequent first."""
        return [seen for seen, _ in self._unknown.most_common(MAX_WORDS)]

    def end(self, summary: Summary) -> None:
        for outcome, count in self._lines.items():
            if count > self._max_lines[outcome]:
                more = count - int(self._max_lines[outcome])
                logger.info(f"… and {more} more: {outcome.value}")
        if self._unknown:
            logger.warning(
                f"⚠️ {self._unknown.total()} answers had a status that is not in "
                f"BILLING_STATUS_MAP; their sessions stay open: {_most_common(self._unknown)}"
            )
        if summary.paused_until is not None:
            logger.warning(
                f"⏸️ No checks until {iso(summary.paused_until)}: "
                "the billing service limits the rate (status 429 or 503)"
            )
        if self._key_refused:
            sent = f", sent with the headers {self._sent_headers}" if self._sent_headers else ""
            logger.error(f"⚠️ The billing service refuses the API key (status 401 or 403){sent}")
        if summary.open:
            logger.info(
                f"📊 [{iso(summary.finished_at)}] Checkout session check complete: "
                f"{summary.successes} success, {summary.errors} errors",
                summary={
                    name: value
                    for name, value in summary.as_dict().items()
                    if value and name not in IN_MESSAGE
                },
            )


def _most_common(details: Counter[str]) -> str:
    return ", ".join(f"{what} ({n})" for what, n in details.most_common(MAX_WORDS))


def check_line(claim: Claim, answer: Answer) -> str:
    """The line of one check. Ids are escaped so that they cannot break the line."""
    session, checkout = shown(claim.session_id), shown(claim.billing_checkout_id or "-")
    detail = shown(answer.detail)
    match answer.outcome:
        case Outcome.ACTIVE:
            return f"✅ Success: Checkout session {session} ({checkout}) is still active"
        case Outcome.TIMEOUT:
            return f"⏰ Timeout: Checkout session request timed out: {session} ({checkout})"
        case Outcome.NETWORK_ERROR:
            error = f"Network error: {detail}" if detail else "Network error"
            return f"❌ Error checking session {session} ({checkout}): {error}"
        case _ if detail:
            return f"❌ Error checking session {session} ({checkout}): {detail}"
        case _:
            return f"ℹ️ Checkout session {session} ({checkout}) returned status {answer.status_code}"


def change_line(change: StatusChange) -> str:
    """The line of a session whose status was changed."""
    claim = change.claim
    session, checkout = shown(claim.session_id), shown(claim.billing_checkout_id or "-")
    return (
        f"🏁 Checkout session {session} ({checkout}) is now {change.new_status}; "
        f"billing says {change.answer.billing_status}"
    )


def shown(text: str) -> str:
    """The text itself if all of it is printable, otherwise with backslash escapes."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")

"""What a person or an alarm sees of a pass: log lines and metrics. Session ids are never metrics.

The log messages are the same on Lambda, inside JSON records with fields, and on a terminal. What is
written at every pass is paid for half a million times a month: it holds what somebody reads.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial

from aws_lambda_powertools import Logger

from core.domain.model import Answer, Claim, Outcome, Result, Summary, iso

# Lines of one outcome in one pass; the rest is counted. 10,000 lines of 200 bytes every 5 s would
# be 34 GB a day.
LINES_PER_OUTCOME = 50
# Different unknown words in one pass's line.
MOST_WORDS = 5

# Fields of a summary that its line says itself; left out there, as is what is none, zero or empty.
SAID = frozenset(("started_at", "success"))

logging.logAsyncioTasks = False  # type: ignore[attr-defined]  # a record's `taskName`
# CloudWatch keeps the time of every record, and the log group's name says whose it is.
logger = Logger(location=None, timestamp=None, xray_trace_id=None)
logger.remove_keys(["service"])


def set_level(*, debug: bool) -> None:
    logger.setLevel(logging.DEBUG if debug else logging.INFO)


def use_plain_text() -> None:
    """Log bare messages, for a terminal, instead of JSON records."""
    logger.registered_handler.setFormatter(logging.Formatter("%(message)s"))


def _say_checked(claim: Claim, answer: Answer) -> None:
    fields = {
        "session_id": claim.session_id,
        "billing_checkout_id": claim.billing_checkout_id,
        "outcome": answer.outcome.value,
        "status_code": answer.status_code,
    }
    say = logger.warning if answer.outcome.is_error else logger.info
    say(line(claim, answer), extra=fields)


class PassLog:
    """The lines of one pass, bounded by outcome; of `active`, all of them where None is given.

    With `waits`, the others wait for the first one, which tells how many sessions are open: checks
    begin before that is known.
    """

    def __init__(self, *, most_active: int | None = LINES_PER_OUTCOME, waits: bool = False) -> None:
        self._most_active = most_active
        self._lines: Counter[Outcome] = Counter()
        self._unknown: Counter[str] = Counter()
        self._waiting: list[Callable[[], None]] | None = [] if waits else None

    def begins(self, at: datetime, open_sessions: int) -> None:
        waiting, self._waiting = self._waiting, None
        logger.info(f"🔍 [{iso(at)}] Checking {open_sessions} open checkout sessions...")
        for say in waiting or ():
            say()

    def checked(self, claim: Claim, answer: Answer) -> None:
        outcome = answer.outcome
        if outcome is Outcome.UNKNOWN_STATUS:
            self._unknown[answer.detail] += 1
            return
        self._bounded(outcome, partial(_say_checked, claim, answer))

    def changed(self, results: Sequence[Result]) -> None:
        """Tell of status changes that have been committed."""
        for result in results:
            fields = {
                "session_id": result.claim.session_id,
                "billing_checkout_id": result.claim.billing_checkout_id,
                "new_status": result.new_status,
                "billing_status": result.answer.billing_status,
            }
            self._bounded(Outcome.CLOSED, partial(logger.info, change_line(result), extra=fields))

    def refused(self, refusals: Sequence[tuple[Result, str]]) -> None:
        """Tell of status changes that the shop's database does not take."""
        for result, why in refusals:
            claim = result.claim
            session, checkout = shown(claim.session_id), shown(claim.billing_checkout_id or "-")
            said = (
                f"❌ Checkout session {session} ({checkout}) cannot become {result.new_status}: "
                f"the database refuses it: {shown(why)}"
            )
            fields = {"session_id": claim.session_id, "outcome": Outcome.REFUSED.value}
            self._bounded(Outcome.REFUSED, partial(logger.error, said, extra=fields))

    def _bounded(self, outcome: Outcome, say: Callable[[], None]) -> None:
        self._lines[outcome] += 1
        most = self._most(outcome)
        if most is not None and self._lines[outcome] > most:
            return
        if self._waiting is None:
            say()
        else:
            self._waiting.append(say)

    def _most(self, outcome: Outcome) -> int | None:
        return self._most_active if outcome is Outcome.ACTIVE else LINES_PER_OUTCOME

    def ends(self, summary: Summary) -> None:
        for outcome, count in self._lines.items():
            most = self._most(outcome)
            if most is not None and count > most:
                logger.info(f"… and {count - most} more: {outcome.value}")
        if self._unknown:
            seen = ", ".join(f"{what} ({n})" for what, n in self._unknown.most_common(MOST_WORDS))
            logger.warning(
                f"⚠️ {self._unknown.total()} answers say nothing that BILLING_STATUS_MAP knows, and "
                f"their sessions stay open: {seen}"
            )
        if summary.paused_until is not None:
            logger.warning(
                f"⏸️ No checks until {iso(summary.paused_until)}: "
                "the billing service limits the rate (status 429 or 503)"
            )
        if summary.outcomes[Outcome.UNAUTHORIZED]:
            logger.error("⚠️ The billing service refuses the API key (status 401 or 403)")
        if summary.open:
            logger.info(
                f"📊 [{iso(summary.finished_at)}] Checkout session check complete: "
                f"{summary.successes} success, {summary.errors} errors",
                summary={
                    name: value
                    for name, value in summary.as_dict().items()
                    if value and name not in SAID
                },
            )


def line(claim: Claim, answer: Answer) -> str:
    """What is said of one check. Ids are shown so that they cannot break the line."""
    session, checkout = shown(claim.session_id), shown(claim.billing_checkout_id or "-")
    detail = shown(answer.detail)
    match answer.outcome:
        case Outcome.ACTIVE:
            return f"✅ Success: Checkout session {session} ({checkout}) is still active"
        case Outcome.TIMEOUT:
            return f"⏰ Timeout: Checkout session request timed out: {session} ({checkout})"
        case Outcome.NETWORK_ERROR:
            said = f"Network error: {detail}" if detail else "Network error"
            return f"❌ Error checking session {session} ({checkout}): {said}"
        case Outcome.INVALID_SESSION:
            return f"❌ Error checking session {session} ({checkout}): {detail}"
        case _:
            return f"ℹ️ Checkout session {session} ({checkout}) returned status {answer.status_code}"


def change_line(result: Result) -> str:
    """What is said of a session whose status was written."""
    claim = result.claim
    session, checkout = shown(claim.session_id), shown(claim.billing_checkout_id or "-")
    return (
        f"🏁 Checkout session {session} ({checkout}) is now {result.new_status}; "
        f"billing says {result.answer.billing_status}"
    )


def shown(text: str) -> str:
    """The text itself when all of it is printable, else with backslash escapes."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")

"""What the person on call does next: a sentence under the verdict, and where the guide has more.

`docs/operate.md` has the same sentences in its table of what the page says; a test compares them.
"""

from collections.abc import Mapping
from typing import NamedTuple

from core.domain.model import JsonObject, Outcome
from core.domain.other_monitors import OTHER_MONITOR
from core.domain.verdict import (
    FAILED_LAST_CHECK,
    REFUSES_SOME,
    TROUBLE,
    Level,
    Verdict,
)
from core.domain.waiting import NOT_ASKED


class Step(NamedTuple):
    """A sentence, and the heading of `docs/operate.md` under which there is more."""

    text: str
    heading: str

    def as_dict(self) -> JsonObject:
        return self._asdict()


_REACH = Step("See whether billing is up and can be reached from here.", "SessionsWaiting")
_LIMITED = Step(
    "Set a slower CHECK_CADENCE, or agree on a higher limit with the billing service.", "Limited"
)
_BY_CAUSE: Mapping[str, Step] = {
    Outcome.UNAUTHORIZED: Step(
        "Put the valid key into its secret; the next check uses it.", "Unauthorized"
    ),
    Outcome.TIMEOUT: _REACH,
    Outcome.NETWORK_ERROR: _REACH,
    Outcome.UNEXPECTED_STATUS: _REACH,
    Outcome.RATE_LIMITED: _LIMITED,
    Outcome.UNKNOWN_STATUS: Step("Add billing's words to BILLING_STATUS_MAP.", "UnknownStatus"),
    Outcome.MISMATCH: Step(
        "Compare the log's line of one session with BILLING_STATUS_PATH and BILLING_ID_PATH.",
        "SessionsWaiting",
    ),
    Outcome.DEFERRED: Step(
        "The log says whether the event bus or the shop's table does not accept them.",
        "EventsFailed",
    ),
    Outcome.REFUSED: Step(
        "The log has the database's message: it lacks a right, or the table refuses the status.",
        "SessionsWaiting",
    ),
    Outcome.INTERNAL_ERROR: Step("The log names the session and the error.", "SessionsWaiting"),
    Outcome.INVALID_SESSION: Step(
        "Find out why the shop opens sessions without a billing_checkout_id.", "SessionsWaiting"
    ),
    NOT_ASKED: Step(
        "See whether billing's limit, MaxConcurrency or MaxWorkers holds the checks up.",
        "Overdue",
    ),
}
_BY_TEXT: Mapping[str, Step] = {
    "No pass for": Step(
        "See whether the workers fail, the loop fails, or the schedule is off.", "NoPass"
    ),
    "No API key": Step("Set APIKEY, or put the key into its secret.", "When health is degraded"),
    OTHER_MONITOR: Step(
        "Give both the same settings, or stop one of them.", "Two monitors on one database"
    ),
    "Billing asked for a pause": Step("Wait; if it keeps coming back, ask less often.", "Limited"),
    "Billing allows about": _LIMITED,
    "Passes start": Step("See whether Lambda throttles the worker.", "WorkerThrottles"),
    REFUSES_SOME: Step("Look at one of them in billing.", "Unauthorized"),
    "Billing does not know": Step(
        "Compare the URL of one session with billing's documentation: a wrong path, or a test key.",
        "SessionsWaiting",
    ),
    "No session was closed": Step(
        "Ask billing about a session that should be paid, and compare the answer with "
        "BILLING_STATUS_MAP.",
        "SessionsWaiting",
    ),
    # Without what stands in brackets.
    **{TROUBLE[cause].partition(" (")[0]: step for cause, step in _BY_CAUSE.items()},
}


def next_step(verdict: Verdict) -> Step | None:
    """What to do about the verdict; None if there is nothing to do but wait."""
    if verdict.level in (Level.OK, Level.WAITING):
        return None
    if verdict.text.endswith(FAILED_LAST_CHECK):
        return Step("Look again in ten seconds.", "SessionsWaiting")
    return next((step for text, step in _BY_TEXT.items() if verdict.text.startswith(text)), None)

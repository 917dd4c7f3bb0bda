"""What the person on call does next, by what the verdict has found.

`docs/operate.md` has the same sentences in its table of what the page says; a test compares them.
"""

from collections.abc import Mapping
from typing import NamedTuple

from core.domain.model import JsonObject, Outcome
from core.domain.waiting import NOT_ASKED


class Step(NamedTuple):
    """A sentence, and the heading of `docs/operate.md` under which there is more."""

    text: str
    heading: str

    def as_dict(self) -> JsonObject:
        return self._asdict()


_REACH = Step("See whether billing is up and can be reached from here.", "SessionsWaiting")
LIMITED = Step(
    "Set a slower CHECK_CADENCE, or agree on a higher limit with the billing service.", "Limited"
)
BY_CAUSE: Mapping[str, Step] = {
    Outcome.UNAUTHORIZED: Step(
        "Put the valid key into its secret; the next check uses it.", "Unauthorized"
    ),
    Outcome.TIMEOUT: _REACH,
    Outcome.NETWORK_ERROR: _REACH,
    Outcome.UNEXPECTED_STATUS: _REACH,
    Outcome.RATE_LIMITED: LIMITED,
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
NO_PASS = Step("See whether the workers fail, the loop fails, or the schedule is off.", "NoPass")
NO_API_KEY = Step("Set APIKEY, or put the key into its secret.", "When health is degraded")
OTHER_SETTINGS = Step(
    "Give both the same settings, or stop one of them.", "Two monitors on one database"
)
PAUSED = Step("Wait; if it keeps coming back, ask less often.", "Limited")
STARTS_LATE = Step("See whether Lambda throttles the worker.", "WorkerThrottles")
REFUSED_SOME = Step("Look at one of them in billing.", "Unauthorized")
NOT_KNOWN = Step(
    "Compare the URL of one session with billing's documentation: a wrong path, or a test key.",
    "SessionsWaiting",
)
NOTHING_CLOSED = Step(
    "Ask billing about a session that should be paid, and compare the answer with "
    "BILLING_STATUS_MAP.",
    "SessionsWaiting",
)
LOOK_AGAIN = Step("Look again in ten seconds.", "SessionsWaiting")

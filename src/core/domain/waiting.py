"""Who waits: the open sessions about which billing has said nothing usable for too long.

A session's wait is how much longer that is than its cadence promises. For one whose checks fail it
began when the first of them was due, for one that is not asked about when it was due.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from core.domain.model import JsonObject, Outcome, iso

# A session waits from this many intervals on. Less is a slow answer or a worker's cold start.
LATE_INTERVALS = 2
# The monitor is blind if more than this share of the open sessions waits; new ones cannot yet.
BLIND_SHARE = 0.9
# From here on it is critical, for the verdict and for the alarms: so many sessions wait with an
# unknown word, or nobody has asked about one for this long, or billing knows none of so many.
CRITICAL_UNKNOWN = 3
OVERDUE_SECONDS = 60
MIN_UNKNOWN_TO_BILLING = 10
# Billing refuses the key if it refuses at least this share of all open sessions; fewer are theirs.
MOST = 0.5
MAX_FIRST = 10  # sessions that are named
# Those that fail are counted up to this number; of more, the last counts of all sessions say how
# many there are.
MAX_COUNTED = 1_000
# The cause of a session that was due and not asked about; the others are outcomes that failed.
NOT_ASKED = "not_asked"


class Wait(NamedTuple):
    """How many sessions wait for one cause, and since when the first of them does."""

    sessions: int
    since: datetime


def together(waits: Iterable[Wait]) -> Wait:
    """One or more waits as one."""
    numbers, times = zip(*waits, strict=True)
    return Wait(sum(numbers), min(times))


class WaitingSession(NamedTuple):
    """One of the sessions that have waited longest."""

    session_id: str
    since: datetime
    cause: str
    status_code: int | None  # of billing's last answer that failed; None: there was none


class Waiting(NamedTuple):
    """All sessions that wait, by cause: the most frequent first, those without an id last."""

    now: datetime
    longest_seconds: float = 0.0  # of any open session, also of one that does not count as waiting
    causes: Mapping[str, Wait] = {}
    first: Sequence[WaitingSession] = ()  # the longest first
    failing: int = 0  # those that fail, waiting or not, counted up to a bound

    @property
    def sessions(self) -> int:
        return sum(wait.sessions for wait in self.causes.values())

    @property
    def all(self) -> Wait:
        """Of all causes together; there is one."""
        return together(self.causes.values())

    @property
    def for_billing(self) -> Mapping[str, Wait]:
        """The causes without sessions that have no checkout id: billing cannot be asked there."""
        no_id = Outcome.INVALID_SESSION.value
        return {cause: wait for cause, wait in self.causes.items() if cause != no_id}

    @property
    def sessions_for_billing(self) -> int:
        return sum(wait.sessions for wait in self.for_billing.values())

    def status_code(self, cause: str) -> int | None:
        """The HTTP status of one of those that wait for this cause, if it is known."""
        codes = (one.status_code for one in self.first if one.cause == cause)
        return next((code for code in codes if code is not None), None)

    def is_blind(self, open_sessions: int) -> bool:
        """Whether nearly all open sessions wait, so that nothing is known about any."""
        return self.sessions_for_billing > BLIND_SHARE * open_sessions

    def as_dict(self) -> JsonObject:
        return {
            "sessions": self.sessions,
            "longest_seconds": round(self.longest_seconds, 3),
            "causes": {cause: wait.sessions for cause, wait in self.causes.items()},
            "first": [
                {
                    "session_id": one.session_id,
                    "since": iso(one.since),
                    "seconds": round((self.now - one.since).total_seconds(), 3),
                    "cause": one.cause,
                    "status_code": one.status_code,
                }
                for one in self.first
            ],
        }


def waits_from(interval_seconds: int) -> timedelta:
    """How long a session waits before it counts."""
    return timedelta(seconds=LATE_INTERVALS * interval_seconds)

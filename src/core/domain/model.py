"""What travels through a pass: a claim goes out, an answer comes back, a result is kept."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

type JsonObject = dict[str, object]


class SessionStatus(StrEnum):
    """What `checkout_session.status` may be. Only an open session is checked, or ever changed."""

    OPEN = "open"
    SUCCESS = "success"
    FAILURE = "failure"
    TIMEOUT = "timeout"


class Outcome(StrEnum):
    """What one check found out; kept as `last_outcome`, counted in every summary."""

    ACTIVE = "active"  # 200
    # With STATUS_UPDATES, of a 200 whose word closes the session:
    CLOSED = "closed"  # its status has followed, or the shop had closed it already
    DEFERRED = "deferred"  # not yet: locked by the shop, not published, or another checkout by now
    REFUSED = "refused"  # the shop's database takes no such change of it
    UNKNOWN_STATUS = "unknown_status"  # 200 without a word of BILLING_STATUS_MAP in it; likewise
    NOT_FOUND = "not_found"  # 404, 410
    UNEXPECTED_STATUS = "unexpected_status"  # any other status
    RATE_LIMITED = "rate_limited"  # 429, and 503 with Retry-After
    UNAUTHORIZED = "unauthorized"  # 401, 403
    TIMEOUT = "timeout"  # no whole answer within REQUEST_TIMEOUT_SECONDS
    NETWORK_ERROR = "network_error"  # refused, reset, no such host, TLS, not HTTP
    INVALID_SESSION = "invalid_session"  # no billing_checkout_id, or one that no URL can carry

    @property
    def is_error(self) -> bool:
        """Whether the check did not do what it is for; in a row they count as failures."""
        return self not in _NO_ERRORS


_NO_ERRORS = (Outcome.ACTIVE, Outcome.CLOSED, Outcome.NOT_FOUND)


class Reason(StrEnum):
    """Why a pass ran."""

    TICK = "tick"
    MANUAL = "manual"
    START = "start"  # no pass: the row written when the run table is empty, so a new stack is fresh


class Skip(StrEnum):
    """Why an open session was not checked in a pass."""

    NOT_DUE = "not_due"
    IN_FLIGHT = "in_flight"  # claimed by another pass
    DEADLINE = "deadline"  # left for the next pass: this one had no time left
    PAUSED = "paused"  # billing asked for a pause
    NO_API_KEY = "no_api_key"
    NOT_OPEN = "not_open"  # asked for by id, but there is no open session with it


class Claim(NamedTuple):
    """A session that this pass, and no other, may check until `claimed_until`."""

    rowid: int  # of the queue's row
    session_id: str
    billing_checkout_id: str | None
    first_seen_at: datetime
    consecutive_failures: int
    claimed_at: datetime
    claimed_until: datetime  # to the millisecond: it tells this claim from every other one


class Answer(NamedTuple):
    """What billing said, or why it could not be asked. `detail` is for people, never a secret."""

    outcome: Outcome
    status_code: int | None = None
    seconds: float | None = None  # None: no request was sent
    detail: str = ""
    status: SessionStatus | None = None  # by the answer's body; None: not read, or not known
    billing_status: str = ""  # billing's own word for it
    retry_after: float | None = None  # seconds, of a rate-limited request whose answer says so


class Result(NamedTuple):
    """What is recorded of one check."""

    claim: Claim
    answer: Answer
    next_check_at: datetime  # where the session stays open, or the database refuses its new status
    new_status: SessionStatus | None = None  # None: it stays open
    try_again_at: datetime | None = None  # where a new status cannot be written yet: the next slot


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of some results."""

    changed: Sequence[Result] = ()  # those whose new status was written
    outcomes: Mapping[Outcome, int] = field(default_factory=dict)  # of all of them
    unpublished: int = 0  # of the deferred: their event could not be published
    refusals: Sequence[tuple[Result, str]] = ()  # with the database's words

    def __add__(self, other: "Recorded") -> "Recorded":
        return Recorded(
            [*self.changed, *other.changed],
            Counter(self.outcomes) + Counter(other.outcomes),
            self.unpublished + other.unpublished,
            [*self.refusals, *other.refusals],
        )


class StatusChange(NamedTuple):
    """A session that leaves `open`; what its event tells."""

    session_id: str
    billing_checkout_id: str | None
    billing_order_id: str | None
    new_status: SessionStatus
    billing_status: str
    first_seen_at: datetime
    changed_at: datetime


class Pause(NamedTuple):
    """Until when no worker may ask billing, and how many pauses that makes in a row (0: none)."""

    until: datetime
    in_a_row: int


@dataclass(frozen=True, slots=True)
class Count:
    """How the open sessions stood when they were last counted, as a whole."""

    open: int = 0
    in_flight: int = 0  # claimed
    not_due: int = 0
    outcomes: Mapping[str, int] = field(
        default_factory=dict
    )  # by last outcome; "": not checked yet
    ages: Mapping[str, int] = field(default_factory=dict)  # by AGES


# Upper bounds of a session's age, in seconds, by the name under which they are counted.
AGES: Mapping[str, float] = {"10m": 600, "1h": 3600, "24h": 86_400, "older": float("inf")}


@dataclass(slots=True)
class Summary:
    """One pass, as it is logged, returned, measured and kept as a `checkout_session_run` row.

    Of the passes of a tick one has `led`. Where it has `counted` too, what it tells of all open
    sessions is true now; elsewhere `open` is what the last count brought.
    """

    reason: Reason
    started_at: datetime
    tick: datetime | None = None
    led: bool = False
    counted: bool = False
    open: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    skipped: Counter[Skip] = field(default_factory=Counter)
    overdue_seconds: float = 0.0
    status_changes: int = 0
    unpublished: int = 0  # status changes not made, because their event could not be published
    workers_started: int = 0
    paused_until: datetime | None = None
    latencies: list[float] = field(default_factory=list)  # seconds, one a request
    duration_seconds: float = 0.0

    @property
    def checked(self) -> int:
        return self.outcomes.total()

    @property
    def errors(self) -> int:
        return sum(count for outcome, count in self.outcomes.items() if outcome.is_error)

    @property
    def successes(self) -> int:
        return self.checked - self.errors

    @property
    def finished_at(self) -> datetime:
        return self.started_at + timedelta(seconds=self.duration_seconds)

    @property
    def latency_ms(self) -> Mapping[str, float]:
        """Milliseconds by name: p50, p95, p99, max. Empty when no request was sent."""
        if not self.latencies:
            return {}
        ordered = sorted(self.latencies)
        return {name: round(percentile(ordered, at) * 1000, 1) for name, at in PERCENTILES.items()}

    def as_dict(self) -> JsonObject:
        return {
            "reason": self.reason.value,
            "started_at": iso(self.started_at),
            "tick": iso(self.tick) if self.tick else None,
            "open": self.open,
            "checked": self.checked,
            "success": self.successes,
            "errors": self.errors,
            "outcomes": {outcome.value: count for outcome, count in self.outcomes.items()},
            "skipped": {skip.value: count for skip, count in self.skipped.items()},
            "status_changes": self.status_changes,
            "unpublished": self.unpublished,
            "workers_started": self.workers_started,
            "paused_until": iso(self.paused_until) if self.paused_until else None,
            "overdue_seconds": round(self.overdue_seconds, 3),
            "duration_ms": round(self.duration_seconds * 1000, 1),
            "billing_latency_ms": dict(self.latency_ms),
        }


PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "max": 1.0}


def percentile(ordered: Sequence[float], at: float) -> float:
    """The smallest value that is not below `at` (0 to 1) of the values: the nearest-rank rule."""
    rank = -(-len(ordered) * at // 1)
    return ordered[max(0, int(rank) - 1)]


def iso(at: datetime) -> str:
    """`2026-01-15T10:30:00.000Z`, the form in log lines, answers and events."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

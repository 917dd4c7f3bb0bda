"""What travels through a pass: a claim goes out, an answer comes back, a result is kept."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

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
    CLOSED = "closed"  # 200, and the session's status follows; only with STATUS_UPDATES
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
        """Whether billing failed to say what became of the session; such a session backs off."""
        return self not in (Outcome.ACTIVE, Outcome.CLOSED, Outcome.NOT_FOUND)


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


@dataclass(frozen=True, slots=True)
class Claim:
    """A session that this pass, and no other, may check until `claimed_until`."""

    session_id: str
    billing_checkout_id: str | None
    first_seen_at: datetime
    consecutive_failures: int
    claimed_at: datetime
    claimed_until: datetime

    def asking(self, billing_checkout_id: str | None) -> "Claim":
        """The same claim, with the id to ask billing about."""
        return Claim(
            self.session_id,
            billing_checkout_id,
            self.first_seen_at,
            self.consecutive_failures,
            self.claimed_at,
            self.claimed_until,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What billing said, or why it could not be asked. `detail` is for people, never a secret."""

    outcome: Outcome
    status_code: int | None = None
    seconds: float | None = None  # None: no request was sent
    detail: str = ""
    status: SessionStatus | None = None  # by the answer's body; None: not read, or not known
    billing_status: str = ""  # billing's own word for it
    retry_after: float | None = None  # seconds, of a rate-limited request whose answer says so


@dataclass(frozen=True, slots=True)
class Result:
    """What is recorded of one check."""

    claim: Claim
    outcome: Outcome
    status_code: int | None
    next_check_at: datetime
    new_status: SessionStatus | None = None  # None: the session stays open
    billing_status: str = ""  # billing's word, of which the new status is what it means to the shop


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of the status changes among some results."""

    changed: Sequence[Result] = ()  # written; the others were not open, or locked by the shop
    unpublished: int = 0  # of the others: left open, because their event could not be published


@dataclass(frozen=True, slots=True)
class StatusChange:
    """A session that leaves `open`; what its event tells."""

    session_id: str
    billing_checkout_id: str | None
    billing_order_id: str | None
    new_status: SessionStatus
    billing_status: str
    first_seen_at: datetime
    changed_at: datetime


@dataclass(frozen=True, slots=True)
class Pause:
    """Until when no worker may ask billing, and how many pauses in a row this is (0: none)."""

    until: datetime
    count: int


@dataclass(frozen=True, slots=True)
class OpenSessions:
    """How the open sessions stand when a pass begins; `open` is the sum of due and the others."""

    open: int
    in_flight: int
    not_due: int
    overdue_seconds: float  # of the most overdue session that nobody is checking; 0.0 when on time


@dataclass(slots=True)
class Summary:
    """One pass, as it is logged, returned, measured and kept as a `checkout_session_run` row."""

    reason: Reason
    started_at: datetime
    tick: datetime | None = None
    open: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    skipped: Counter[Skip] = field(default_factory=Counter)
    overdue_seconds: float = 0.0
    status_changes: int = 0
    unpublished: int = 0  # status changes not made, because their event could not be published
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

"""What the monitor speaks of: a claim goes out, an answer comes back, a decision is written."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

type JsonObject = dict[str, object]
type Amount = str | int | float


class SessionStatus(StrEnum):
    """The values of `checkout_session.status`. Only an open session is checked or changed."""

    OPEN = "open"
    SUCCESS = "success"
    FAILURE = "failure"
    TIMEOUT = "timeout"


class Meaning(StrEnum):
    """What billing's word says about a session."""

    OPEN = "open"
    IN_PROGRESS = "in_progress"  # a payment is under way: open, and never expired
    SUCCESS = "success"
    FAILURE = "failure"
    TIMEOUT = "timeout"

    @property
    def status(self) -> SessionStatus:
        return SessionStatus.OPEN if self is Meaning.IN_PROGRESS else SessionStatus(self)


class Outcome(StrEnum):
    """What one check found; kept as `last_outcome` and counted in every summary."""

    ACTIVE = "active"  # 200
    # With STATUS_UPDATES, of a 200 whose word closes the session:
    CLOSED = "closed"  # its status was changed, or the shop had closed it already
    DEFERRED = "deferred"  # locked by the shop, event not published, or another checkout by now
    REFUSED = "refused"  # the shop's database refuses the change
    UNKNOWN_STATUS = "unknown_status"  # 200 without a word of BILLING_STATUS_MAP, or with a page
    MISMATCH = "mismatch"  # 200 about another checkout (BILLING_ID_PATH), or with two statuses
    NOT_FOUND = "not_found"  # 404, 410
    UNEXPECTED_STATUS = "unexpected_status"  # any other status
    RATE_LIMITED = "rate_limited"  # 429, and 503 with Retry-After
    UNAUTHORIZED = "unauthorized"  # 401, 403
    TIMEOUT = "timeout"  # no complete answer within REQUEST_TIMEOUT_SECONDS
    NETWORK_ERROR = "network_error"  # refused, reset, no such host, TLS, not HTTP
    INVALID_SESSION = "invalid_session"  # no billing_checkout_id, or one that no URL can carry
    INTERNAL_ERROR = "internal_error"  # an unexpected error of the monitor itself

    __hash__ = str.__hash__  # Enum's is a Python function; each check is counted by its outcome

    is_error: bool
    """Whether the check failed; failures in a row make its session back off."""

    def __init__(self, value: str) -> None:
        self.is_error = value not in {"active", "closed", "not_found"}


class Reason(StrEnum):
    """Why a pass started."""

    TICK = "tick"
    MANUAL = "manual"
    START = "start"  # not a pass: the first row of the pass history, so that a new stack is fresh


class Skip(StrEnum):
    """Why a pass did not check an open session."""

    NOT_DUE = "not_due"
    IN_FLIGHT = "in_flight"  # claimed by another pass
    DEADLINE = "deadline"  # this pass ran out of time
    PAUSED = "paused"  # billing asked for a pause
    RATE_LIMITED = "rate_limited"  # billing's rate limit left no time for it
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
    claimed_until: datetime  # to the millisecond; identifies the claim
    batch_id: int | None = None  # None: the claim is on the session's row, not on its batch
    last_outcome: str | None = None  # None: never checked
    last_status_code: int | None = None
    has_due_time: bool = False  # it has one of its own; otherwise its batch's is its
    last_checked_at: datetime | None = None
    due_at: datetime | None = None  # that time; None: not known


class BatchClaim(NamedTuple):
    """A claim on a batch, and the sessions that it hands out."""

    id: int
    claimed_at: datetime
    claimed_until: datetime
    next_check_at: datetime  # of the sessions that have no due time of their own
    is_due: bool  # these sessions are handed out; otherwise only some with a due time of their own
    claims: Sequence[Claim]
    closed: Sequence[int]  # the numbers of rows whose session is not open any more


class Answer(NamedTuple):
    """What billing answered, or why it was not asked. `detail` is for people, never a secret."""

    outcome: Outcome
    status_code: int | None = None
    seconds: float | None = None  # None: no request was sent
    detail: str = ""
    status: SessionStatus | None = None  # from the answer's body; None: not read, or unknown
    billing_status: str = ""  # billing's own word for it
    retry_after: float | None = None  # seconds, where a rate-limited answer gives them
    used_up: bool = False  # billing says that it allows no further request for now
    in_progress: bool = False  # a payment is under way, so an open session does not expire
    amount: Amount | None = None  # as billing writes it; None: not read
    currency: str | None = None  # not read


class Recheck(NamedTuple):
    """The decision that a session stays open and is checked again."""

    claim: Claim
    answer: Answer
    next_check_at: datetime


class StatusChange(NamedTuple):
    """The decision that a session leaves `open`."""

    claim: Claim
    answer: Answer
    new_status: SessionStatus
    retry_at: datetime  # if the change cannot be made yet: the next slot
    retry_after_refusal_at: datetime  # if the database refuses the new status: after a backoff


type Decision = Recheck | StatusChange


class StatusChangedEvent(NamedTuple):
    """What others are told of a status change.

    With `expired_at`, it is a late payment: the session became `timeout` at that time, the payment
    was found at `changed_at`, and `new_status` is the status since: still `timeout`, or `success`.
    """

    session_id: str
    billing_checkout_id: str | None
    billing_order_id: str | None
    new_status: SessionStatus
    billing_status: str
    first_seen_at: datetime
    changed_at: datetime
    amount: Amount | None = None
    currency: str | None = None
    expired_at: datetime | None = None


class Refusal(NamedTuple):
    """A status change that the shop's database refused, with the database's message."""

    change: StatusChange
    message: str


class Recorded(NamedTuple):
    """What was written of some decisions."""

    outcomes: Mapping[Outcome, int] = {}  # of all of them
    changed: Sequence[StatusChange] = ()  # those whose new status was written
    gone: Sequence[StatusChange] = ()  # those whose session was closed already
    unpublished: int = 0  # of the deferred: their event could not be published
    refusals: Sequence[Refusal] = ()
    untried: Sequence[StatusChange] = ()  # refused together; each is still to be made by itself


class Pause(NamedTuple):
    """Until when no worker may ask billing, and how many pauses in a row that makes (0: none)."""

    until: datetime
    in_a_row: int


class OpenCounts(NamedTuple):
    """All open sessions, counted by the leader when it reconciled last."""

    open: int = 0
    in_flight: int = 0  # claimed
    not_due: int = 0
    outcomes: Mapping[str, int] = {}  # by last outcome; "": unchecked
    ages: Mapping[str, int] = {}  # by the names of AGES

    @property
    def failing(self) -> int:
        """How many failed their last check."""
        return sum(self.outcomes.get(outcome.value, 0) for outcome in Outcome if outcome.is_error)

    @property
    def only_not_found(self) -> int:
        """How many billing does not know, if it knows none of those that were checked; else 0."""
        checked = sum(sessions for outcome, sessions in self.outcomes.items() if outcome)
        not_found = self.outcomes.get(Outcome.NOT_FOUND.value, 0)
        return not_found if not_found == checked else 0


# Upper bounds of a session's age in seconds, by the name under which it is counted.
AGES: Mapping[str, float] = {"10m": 600, "1h": 3600, "24h": 86_400, "older": float("inf")}


def iso(at: datetime) -> str:
    """`2026-01-15T10:30:00.000Z`, the form in log lines, answers and events."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

"""One pass, as it is logged, returned, measured and kept as a `checkout_session_run` row."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from core.domain.model import JsonObject, Outcome, Reason, Skip, iso
from core.domain.waiting import Waiting

PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "max": 1.0}


class Summary(NamedTuple):
    """What a pass did; made once, at its end.

    One pass of each tick has `led`. If it has `counted` too, `open` is the number of open sessions
    now; otherwise it is the number of the last count.
    """

    reason: Reason
    started_at: datetime
    tick: datetime | None = None
    led: bool = False
    counted: bool = False
    open: int = 0
    failing: int = 0  # open sessions whose last check failed, by the count before the pass
    only_not_found: int = 0  # sessions of which billing knows none, by that count
    outcomes: Mapping[Outcome, int] = {}
    skipped: Mapping[Skip, int] = {}
    overdue_seconds: float = 0.0
    waiting: Waiting | None = None  # when a pass that has led began its checks
    unknown_words: Sequence[str] = ()  # of `unknown_status`, the most frequent first
    status_changes: int = 0
    unpublished: int = 0  # events refused by the bus: the changes were not made
    workers_started: int = 0
    paused_until: datetime | None = None
    allowed: float | None = None  # checks a second that billing allows; None: no limit
    demand: float = 0.0  # checks a second that the open sessions want, where there is a limit
    latencies: Sequence[float] = ()  # seconds, one for each request
    duration_seconds: float = 0.0

    @property
    def checked(self) -> int:
        return sum(self.outcomes.values())

    @property
    def errors(self) -> int:
        return count_errors(self.outcomes)

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
            "failing": self.failing,
            "checked": self.checked,
            "success": self.successes,
            "errors": self.errors,
            "outcomes": {outcome.value: count for outcome, count in self.outcomes.items()},
            "skipped": {skip.value: count for skip, count in self.skipped.items()},
            "status_changes": self.status_changes,
            "unpublished": self.unpublished,
            "workers_started": self.workers_started,
            "paused_until": iso(self.paused_until) if self.paused_until else None,
            "allowed_per_second": None if self.allowed is None else round(self.allowed, 1),
            "demand_per_second": round(self.demand, 1),
            "overdue_seconds": round(self.overdue_seconds, 3),
            "waiting": self.waiting.as_dict() if self.waiting and self.waiting.sessions else None,
            "unknown_words": list(self.unknown_words),
            "duration_ms": round(self.duration_seconds * 1000, 1),
            "billing_latency_ms": dict(self.latency_ms),
        }


def count_errors(outcomes: Mapping[Outcome, int]) -> int:
    return sum(count for outcome, count in outcomes.items() if outcome.is_error)


def percentile(ordered: Sequence[float], at: float) -> float:
    """The smallest value that is not below `at` (0 to 1) of the values: the nearest-rank rule."""
    rank = -(-len(ordered) * at // 1)
    return ordered[max(0, int(rank) - 1)]

"""The budget: how many requests a second billing allows, for all workers together.

There is none until billing limits a request, or the operator sets BILLING_MAX_PER_SECOND. Then the
rate falls to BETA of what billing really answered, and grows again along the cubic curve of CUBIC
(RFC 9438), as in the adaptive retry mode of AWS's SDKs: quickly back to where billing limited last,
slowly past it, then faster and faster. Unlike theirs, the curve has the same shape at every rate,
because services allow from 4 requests a second to hundreds, and it only advances while checks wait
for the budget.

Requests are reserved as times, not counted as tokens: each worker takes the next times of one
schedule, so together they never send faster than the rate, and a killed worker loses only what it
has reserved. All times are seconds since 1970 by the database's clock. Everything here is pure.
"""

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

from core.domain.cadence import Cadence
from core.domain.model import AGES

# What is left of the answered rate after a limit.
BETA = 0.7
# The rate is back where billing limited last after this long, or after this many requests.
RECOVERY_SECONDS, RECOVERY_REQUESTS = 5.0, 60.0
# The mean of the curve until then, as a share of its end.
MEAN_SHARE = 1 - (1 - BETA) / 4
# However few answers were counted, a rate falls to no less than this share at once, and the first
# one falls from no less than this: a service may limit the second of two requests that meet.
MIN_SHARE, MIN_FIRST_PEAK = 0.5, 8.0
MIN_RATE = 0.1
# Billing's answers are counted over about this long, and over this long for people.
ANSWERED_SECONDS, TYPICAL_SECONDS = 1.0, 30.0
# Limits of requests that were sent until this long after a fall belong to it, and so do the answers
# that come after the first limit: requests that are already reserved still leave at the old rate.
SETTLE_SECONDS = 0.5
# A worker reserves for this long ahead, and nothing while others have reserved more than that.
RESERVE_SECONDS, MAX_RESERVED_SECONDS = 0.4, 0.5
# A request that could not leave within this time of its reserved one, as on a busy machine, is
# reserved again. Billing's own limit has room for bursts. A known one must hold in every
# second: it is used up to a share that allows for what is late, at most r + 3 % of a rate r.
LATE_SECONDS, KNOWN_LIMIT_LATE_SECONDS = 0.1, 0.015
KNOWN_LIMIT_SHARE = 0.965
# The threshold of the alarm Limited; what billing allows is measured.
LIMITED_SHARE = 1.05
# The mean latency is of about so many healthy answers. A worker has this share of its permits in
# use; the rest is for answers that take longer.
LATENCY_ANSWERS, BUSY_SHARE = 100, 0.8
# A budget without a limit for this long is dropped; billing may have raised its limit.
FORGET_SECONDS = 3600.0
# Under a budget, what is due is spread over this share of the interval, but in a small shop at no
# less than this rate: a turn that is lost must not cost the tick.
SPREAD_SHARE, MIN_BUDGET_PACE = 0.8, 2.0
# Without one, over this share: no burst, and no check leaves late. Few checks leave at the lowest
# rate; the processor of a worker is not faster than the highest.
UNLIMITED_SPREAD_SHARE, MIN_PACE, MAX_PACE = 0.1, 200.0, 20_000.0


# What may help a shop whose sessions want more checks than billing allows.
SLOWER_CADENCES = (
    "5s until 10m, 30s until 1h, 5m",
    "15s until 10m, 1m until 1h, 10m",
    "30s until 10m, 2m until 1h, 15m",
    "1m until 10m, 5m until 1h, 30m",
)


class Budget(NamedTuple):
    """The budget as the shared row keeps it. Rates are requests a second."""

    peak: float  # the answered rate when billing limited last
    grown: float  # seconds for which checks have waited for the budget since then
    limited_at: float
    next_at: float  # what is reserved next leaves no earlier
    answers: float  # since billing limited last
    answered: float  # the rate that billing answered in about the last second
    typical: float  # the same over about half a minute
    seen_at: float  # when these were brought up to date
    latency: float = 0.0  # mean seconds of the last healthy answers; 0: none yet
    falls: int = 0  # since it began

    @classmethod
    def from_json(cls, text: str) -> "Budget | None":
        """None for the budget of a version with other fields."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError):
            return None

    def as_json(self) -> str:
        return json.dumps({name: round(value, 4) for name, value in self._asdict().items()})

    @property
    def recovery_seconds(self) -> float:
        return max(RECOVERY_SECONDS, RECOVERY_REQUESTS / self.peak)

    @property
    def rate(self) -> float:
        """The rate now, but for a limit that the operator knows."""
        return self.peak * (1 + (1 - BETA) * (self.grown / self.recovery_seconds - 1) ** 3)


class Seen(NamedTuple):
    """What a worker has seen of billing since it last looked at the budget."""

    answered: int = 0  # requests that were answered, and not limited
    best: float = 0.0  # the highest rate of those that it has seen in about a second
    limited: bool = False  # billing has limited requests, and not because of their sessions
    sent_ago: float = 0.0  # seconds since the newest of those, or of the answered, was sent
    waited: bool = False  # checks wait for the budget, and would use more of it
    healthy: int = 0  # of these answers
    healthy_seconds: float = 0.0  # their latencies together


def is_below(budget: Budget, known_limit: float | None) -> bool:
    """Whether billing allows less than the limit that the operator knows."""
    return budget.rate < (known_limit or math.inf) * KNOWN_LIMIT_SHARE


def rate_in_force(budget: Budget | None, known_limit: float | None) -> float | None:
    """The rate at which requests may leave; None: no limit."""
    if known_limit is None:
        return None if budget is None else budget.rate
    known = known_limit * KNOWN_LIMIT_SHARE
    return known if budget is None else min(budget.rate, known)


def is_too_low(allowed_per_second: float | None, demand_per_second: float) -> bool:
    """Whether the open sessions want more checks than billing allows; None: it allows any."""
    return allowed_per_second is not None and demand_per_second > LIMITED_SHARE * allowed_per_second


def allowed(budget: Budget | None, known_limit: float | None) -> float | None:
    """About how many checks a second billing allows, for people; None: no limit.

    The rate goes up and down; while checks wait for it, their number says what is allowed.
    """
    rate = rate_in_force(budget, known_limit)
    known = (known_limit or math.inf) * KNOWN_LIMIT_SHARE
    if budget is None or rate is None or math.isclose(rate, known, rel_tol=0.001):
        return rate
    return max(budget.typical, rate * MEAN_SHARE)


def updated(
    budget: Budget | None, seen: Seen, *, now: float, known_limit: float | None = None
) -> Budget | None:
    """The budget after what a worker has seen; None: no limit."""
    if budget is not None and now - budget.limited_at > FORGET_SECONDS:
        budget = None
    if budget is None:
        if seen.limited and seen.best:
            return _begun(max(seen.best, MIN_FIRST_PEAK), now, limited=True)
        return None if known_limit is None else _begun(known_limit * KNOWN_LIMIT_SHARE, now)
    rate = budget.rate
    since = max(0.0, now - budget.seen_at)
    answered = _counted(budget.answered, seen.answered, since, ANSWERED_SECONDS)
    grows = seen.waited and is_below(budget, known_limit)
    budget = budget._replace(
        grown=budget.grown + min(since, RECOVERY_SECONDS) if grows else budget.grown,
        answers=budget.answers + seen.answered,
        answered=answered,
        typical=_counted(budget.typical, seen.answered, since, TYPICAL_SECONDS),
        seen_at=now,
        latency=_mean_latency(budget.latency, seen),
    )
    counts_for_fall = seen.limited or not budget.falls
    if counts_for_fall and not _is_new(budget, seen, now):  # not all answers had been counted then
        return budget._replace(peak=max(budget.peak, answered))
    if not seen.limited:
        return budget
    if budget.answers == 0:  # says nothing about the rate; see `answers_nothing`
        return budget._replace(limited_at=now)
    peak = max(min(answered, rate), rate * MIN_SHARE / BETA, MIN_RATE)
    return budget._replace(
        peak=peak, grown=0.0, limited_at=now, answers=0.0, falls=budget.falls + 1
    )


def answers_nothing(budget: Budget | None, seen: Seen, now: float) -> bool:
    """Whether billing limits requests and answers none, so that no rate can be right."""
    if not seen.limited or seen.answered:
        return False
    if budget is None:
        return not seen.best
    return _is_new(budget, seen, now) and budget.answers == 0


def reserved(
    budget: Budget, count: int, rate: float, *, now: float
) -> tuple[Budget, tuple[float, ...]]:
    """Reserve `count` requests at `rate`, or none if others have reserved enough for now.

    Returns the budget, and the times at which these requests may leave.
    """
    begin = next_time(budget, rate, now)
    if begin > now + MAX_RESERVED_SECONDS:
        return budget, ()
    times = tuple(begin + number / rate for number in range(count))
    return budget._replace(next_at=begin + count / rate), times


def late_seconds(known_limit: float | None) -> float:
    """How long after its time a reserved request may leave."""
    return LATE_SECONDS if known_limit is None else KNOWN_LIMIT_LATE_SECONDS


def next_time(budget: Budget, rate: float, now: float) -> float:
    """The first time that nobody has reserved."""
    longest = MAX_RESERVED_SECONDS + max(RESERVE_SECONDS, 1 / rate) + 1
    # Later than that, it came from a clock that was ahead.
    return max(now, budget.next_at) if budget.next_at <= now + longest else now


def given_up(budget: Budget, begin: float, end: float) -> Budget:
    """Give up what was reserved from `begin` to `end`.

    If others have reserved since, those times are lost: two workers must not use them.
    """
    is_last = math.isclose(budget.next_at, end, rel_tol=0, abs_tol=0.001)
    return budget._replace(next_at=begin) if is_last else budget


def portion(rate: float) -> int:
    """How many requests a worker reserves at once, those included that it still has."""
    return math.ceil(rate * RESERVE_SECONDS)


def workers(per_second: float, latency: float, *, in_flight: int, interval_seconds: int) -> int:
    """How many workers send so many requests a second, by Little's law.

    Each has `in_flight` permits. An answer holds one for its latency, or until the workers of the
    next tick take over.
    """
    held = min(latency, interval_seconds)
    return max(1, math.ceil(per_second * held / (in_flight * BUSY_SHARE)))


def demand(ages: Mapping[str, int], cadence: Cadence, interval_seconds: int) -> float:
    """Checks a second that open sessions of these ages want, as `OpenCounts.ages` counts them."""
    wanted, youngest = 0.0, 0.0
    for name, oldest in AGES.items():
        every = max(cadence.every_seconds(youngest), interval_seconds)
        wanted += ages.get(name, 0) / every
        youngest = oldest
    return wanted


def slower_cadence(
    ages: Mapping[str, int], allowed_per_second: float, interval_seconds: int
) -> tuple[str, float] | None:
    """A cadence that needs clearly less than billing allows, and its checks a second; or None."""
    for text in SLOWER_CADENCES:
        wanted = demand(ages, Cadence.parse(text), interval_seconds)
        if wanted <= SPREAD_SHARE * allowed_per_second:
            return text, wanted
    return None


def _begun(rate: float, now: float, *, limited: bool = False) -> Budget:
    begun = Budget(rate, 0.0, now, now, 0.0, rate, rate * BETA, now)
    return begun if limited else begun._replace(grown=begun.recovery_seconds)


def _is_new(budget: Budget, seen: Seen, now: float) -> bool:
    """Whether the requests were sent after the last fall had its effect."""
    sent_at = now - seen.sent_ago
    # A fall in the future is of a clock that was ahead.
    return sent_at > budget.limited_at + SETTLE_SECONDS or budget.limited_at > now


def _mean_latency(latency: float, seen: Seen) -> float:
    if not seen.healthy:
        return latency
    share = seen.healthy / (seen.healthy + LATENCY_ANSWERS) if latency else 1.0
    return latency + share * (seen.healthy_seconds / seen.healthy - latency)


def _counted(rate: float, more: int, since: float, seconds: float) -> float:
    """A rate of which the past counts less and less, after `more` since then."""
    return rate * math.exp(-since / seconds) + more / seconds

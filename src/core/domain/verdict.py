"""The verdict: whether open sessions are checked on time, in one sentence."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from core.domain.model import JsonObject, Outcome
from core.domain.other_monitors import OTHER_MONITOR, OtherMonitor

# A monitor whose newest pass began longer ago than this many intervals does not work.
FRESH_INTERVALS = 6
# The schedule starts the loop for the first time within two minutes of the deployment.
FIRST_PASS_SECONDS = 120
# A session that is later than this many intervals has missed a slot.
LATE_INTERVALS = 2
# The thresholds of the alarms Overdue and FailedChecks.
OVERDUE_SECONDS = 60
FAILED_SHARE = 0.5
# The threshold of the alarm Limited.
LIMITED_SHARE = 1.05
# Passes start late if at least so many did, and most of them by this much. A cold start takes less.
MIN_LATE_STARTS = 3
LATE_START_SECONDS = 10
# Lambda drops the event of a tick after a minute. A start that is later is of a wrong clock.
MAX_START_SECONDS = 75
MAX_NAMED = 3  # checkouts that several sessions have, and sessions of one

BILLING_TROUBLE = {
    Outcome.UNAUTHORIZED: "Billing refuses the key",
    Outcome.TIMEOUT: "Billing does not answer in time",
    Outcome.NETWORK_ERROR: "Billing cannot be reached",
    Outcome.UNEXPECTED_STATUS: "Billing answers with errors",
    Outcome.RATE_LIMITED: "Billing limits the rate",
    Outcome.UNKNOWN_STATUS: "Billing's answers have unknown words (see BILLING_STATUS_MAP)",
    Outcome.MISMATCH: "Billing's answers contradict themselves or the request (see the log)",
    Outcome.DEFERRED: "Sessions that billing has closed cannot be updated yet",
    Outcome.REFUSED: "The shop's database refuses what billing says",
    Outcome.INTERNAL_ERROR: "The monitor has unexpected errors (see its log)",
    Outcome.INVALID_SESSION: "Most sessions have no checkout id to ask billing about",
}


class Level(StrEnum):
    """How serious it is."""

    OK = "ok"
    WAITING = "waiting"  # too early to judge
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the person on call reads first, and what they read next."""

    level: Level
    text: str
    notes: tuple[str, ...] = ()

    def as_dict(self) -> JsonObject:
        return {"level": self.level.value, "text": self.text, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the verdict depends on."""

    now: datetime
    interval_seconds: int
    last_pass_at: datetime | None  # when the newest pass of a tick began; None: there was none
    installed_at: datetime | None  # if there was no pass yet
    open: int | None  # None: not counted yet
    outcomes: Mapping[str, int]  # the last outcome of each open session; "": not checked yet
    overdue_seconds: float
    paused_until: datetime | None = None  # None: no pause is in force
    allowed: float | None = None  # checks a second that billing allows; None: no limit
    demand: float = 0.0  # checks a second that the open sessions want
    slower_cadence: tuple[str, float] | None = None  # one that fits, with its checks a second
    has_api_key: bool = True
    other_monitors: Sequence[OtherMonitor] = ()
    # Among the newest sessions: checkouts that several open ones have, with the ids of those.
    shared_checkouts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    paid_late: Sequence[str] = ()  # sessions that were paid after they had become `timeout`
    failing_since: datetime | None = None  # since when most checks of each pass have failed
    failing_code: int | None = None  # the HTTP status of the failing answers, if they have one
    expected_ticks: int = 0  # in the last hour
    missed_ticks: int = 0
    last_missed: datetime | None = None
    killed_pass_at: datetime | None = None  # when the newest of them began
    starts_late_by: float | None = None  # seconds; None: passes start on time
    on_lambda: bool = False

    @property
    def failed(self) -> Mapping[Outcome, int]:
        """How many open sessions failed their last check, by outcome, the most frequent first."""
        failed = {o: self.outcomes.get(o.value, 0) for o in Outcome if o.is_error}
        return dict(sorted(((o, n) for o, n in failed.items() if n), key=lambda f: -f[1]))

    @property
    def limited_to(self) -> float | None:
        """Checks a second that billing allows, if the open sessions want more."""
        # What is allowed is measured.
        return self.allowed if self.demand > LIMITED_SHARE * (self.allowed or math.inf) else None

    @property
    def most_fail(self) -> bool:
        checked = sum(n for outcome, n in self.outcomes.items() if outcome)
        return sum(self.failed.values()) > FAILED_SHARE * checked


def judge(facts: Facts) -> Verdict:
    """The worst finding as a sentence, and the others as notes."""
    (level, text), *others = _findings(facts)
    notes = [f"{other}." for found, other in others if found not in (Level.OK, Level.WAITING)]
    return Verdict(level, text, (*notes, *_notes(facts)))


def starts_late_by(delays: Sequence[float]) -> float | None:
    """By how many seconds passes start late, from the delays of recent ones; None: on time.

    It is the median, so most of them start that late or later. Lambda retries a throttled start
    after 1 s at first, then after longer and longer.
    """
    plausible = sorted(delay for delay in delays if delay <= MAX_START_SECONDS)
    if len(plausible) < MIN_LATE_STARTS:
        return None
    median = plausible[(len(plausible) - 1) // 2]
    return median if median >= LATE_START_SECONDS else None


def _findings(facts: Facts) -> Iterator[tuple[Level, str]]:
    """All that applies, the worst first."""
    began = facts.last_pass_at or facts.installed_at
    silent = (facts.now - began).total_seconds() if began else 0.0
    fresh = FRESH_INTERVALS * facts.interval_seconds
    if silent > (fresh if facts.last_pass_at else max(fresh, FIRST_PASS_SECONDS)):
        yield Level.CRITICAL, f"No pass for {duration(silent)}"
    if facts.last_pass_at is None:
        yield Level.WAITING, "Waiting for the first pass"
    if not facts.has_api_key:
        yield Level.CRITICAL, "No API key: billing is not asked"
    if facts.other_monitors:
        names = ", ".join(other.name for other in facts.other_monitors)
        yield Level.CRITICAL, f"{OTHER_MONITOR}: {names}"
    if facts.paused_until is not None:
        until = clock(facts.paused_until, facts.now, seconds=True)
        yield Level.WARNING, f"Billing asked for a pause until {until}"
    if facts.most_fail and facts.failing_since is not None:
        yield Level.CRITICAL, _billing_trouble(facts, facts.failing_since)
    elif facts.most_fail:
        yield Level.WARNING, f"Billing answers, but {_failed(facts)}"
    if facts.limited_to is not None and facts.open:
        yield Level.WARNING, _limited(facts.open, facts.limited_to)
    yield from _late(facts)
    yield _on_time(facts.open)


def _late(facts: Facts) -> Iterator[tuple[Level, str]]:
    if facts.starts_late_by is not None:
        text = f"Passes start {duration(facts.starts_late_by)} after their tick"
        if facts.on_lambda:
            text += ": Lambda probably throttles the worker (see WorkerThrottles)"
        yield Level.CRITICAL, text
    if facts.overdue_seconds > LATE_INTERVALS * facts.interval_seconds:
        worse = facts.overdue_seconds > OVERDUE_SECONDS
        text = f"Checks are up to {duration(facts.overdue_seconds)} late"
        yield Level.CRITICAL if worse else Level.WARNING, text


def _on_time(open_sessions: int | None) -> tuple[Level, str]:
    match open_sessions:
        case None:
            return Level.WAITING, "The open sessions are being counted"
        case 0:
            return Level.OK, "No open sessions, and the monitor is running on time"
        case 1:
            return Level.OK, "1 open session checked on time"
        case count:
            return Level.OK, f"All {count:,} open sessions checked on time"


def _billing_trouble(facts: Facts, since: datetime) -> str:
    text = f"{BILLING_TROUBLE[next(iter(facts.failed))]} since {clock(since, facts.now)}"
    return text if facts.failing_code is None else f"{text} ({facts.failing_code})"


def _limited(open_sessions: int, allowed: float) -> str:
    every = duration(open_sessions / allowed)
    each = "the open session" if open_sessions == 1 else f"each of {open_sessions:,} sessions"
    return (
        f"Billing allows about {_rounded(allowed)} checks a second: {each} is checked every {every}"
    )


def _rounded(per_second: float) -> str:
    """Two digits of a rate: `0.25`, `4.8`, `25`, `120`."""
    return f"{float(f'{per_second:.2g}'):,.10g}"


def _what_helps(facts: Facts) -> str:
    helps = f"a limit of {math.ceil(facts.demand):,} checks a second"
    if facts.slower_cadence is not None:
        cadence, wanted = facts.slower_cadence
        helps = f"CHECK_CADENCE='{cadence}', which wants {_rounded(wanted)} a second, or {helps}"
    return f"The open sessions want {_rounded(facts.demand)} checks a second. What helps: {helps}."


def _failed(facts: Facts) -> str:
    return f"{sum(facts.failed.values()):,} of {facts.open or 0:,} failed their last check"


def _notes(facts: Facts) -> list[str]:
    notes = [f"{other}." for other in facts.other_monitors]
    if facts.limited_to is not None and facts.open:
        notes.append(_what_helps(facts))
    notes += [
        f"{len(sessions):,} open sessions have the checkout {checkout}, so the same answer closes "
        f"them all: {', '.join(sessions[:MAX_NAMED])}."
        for checkout, sessions in list(facts.shared_checkouts.items())[:MAX_NAMED]
    ]
    if facts.paid_late:
        notes.append(
            "Paid within the last day after they had become timeout, and still timeout: "
            f"{', '.join(facts.paid_late)}."
        )
    if facts.failed:
        kinds = ", ".join(f"{n:,} {o.value.replace('_', ' ')}" for o, n in facts.failed.items())
        notes.append(f"{_failed(facts)}: {kinds}.")
    if facts.missed_ticks and facts.last_missed:
        notes.append(
            f"{facts.missed_ticks:,} of {facts.expected_ticks:,} ticks of the last hour were "
            f"missed, the last at {clock(facts.last_missed, facts.now, seconds=True)}."
        )
    if facts.killed_pass_at is not None:
        notes.append(
            f"The pass of {clock(facts.killed_pass_at, facts.now, seconds=True)} was "
            "killed; its claims expire on their own."
        )
    return notes


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 5 min`, `2 days`."""
    minutes, hours, days = (int(seconds // size) for size in (60, 3600, 86_400))
    if minutes < 2:  # noqa: PLR2004 (up to two minutes are shown in seconds)
        return f"{seconds:.0f} s"
    if not hours:
        return f"{minutes} min"
    if not days:
        return f"{hours} h {minutes % 60} min"
    return f"{days} day{'s' if days > 1 else ''}"


def clock(at: datetime, now: datetime, *, seconds: bool = False) -> str:
    """`10:31 UTC`, or on another day `24 Nov 10:31 UTC`. The database's times are UTC."""
    day = "" if at.date() == now.date() else f"{at:%-d %b} "
    return f"{day}{at:%H:%M:%S} UTC" if seconds else f"{day}{at:%H:%M} UTC"

"""The verdict: whether billing's last word about every open session is fresh, in one sentence."""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

from core.domain import next_step
from core.domain.model import JsonObject, Outcome
from core.domain.next_step import Step
from core.domain.other_monitors import OTHER_MONITOR, OtherMonitor
from core.domain.rate import is_too_low
from core.domain.waiting import (
    CRITICAL_UNKNOWN,
    MAX_COUNTED,
    MIN_UNKNOWN_TO_BILLING,
    MOST,
    NOT_ASKED,
    OVERDUE_SECONDS,
    Wait,
    Waiting,
)

# A monitor whose newest pass began longer ago than this many intervals does not work.
FRESH_INTERVALS = 6
# The schedule starts the loop for the first time within two minutes of the deployment.
FIRST_PASS_SECONDS = 120
# It is critical if this share of the open sessions waits.
CRITICAL_SHARE = 0.1
# Passes start late if at least so many did, and most of them by this much. A cold start takes less.
MIN_LATE_STARTS = 3
LATE_START_SECONDS = 10
# Lambda drops the event of a tick after a minute. A start that is later is of a wrong clock.
MAX_START_SECONDS = 75
# Billing knows fewer sessions than usual if the share that it does not know has grown by this much,
# and to twice the usual one.
UNUSUAL_SHARE, UNUSUAL_FACTOR = 0.2, 2
MAX_NAMED = 3  # checkouts that several sessions have, and sessions of one

# What is wrong, by cause.
TROUBLE: Mapping[str, str] = {
    Outcome.UNAUTHORIZED: "Billing refuses the key",
    Outcome.TIMEOUT: "Billing does not answer in time",
    Outcome.NETWORK_ERROR: "Billing cannot be reached",
    Outcome.UNEXPECTED_STATUS: "Billing answers with errors",
    Outcome.RATE_LIMITED: "Billing limits the rate",
    Outcome.UNKNOWN_STATUS: "Billing says what BILLING_STATUS_MAP does not have",
    Outcome.MISMATCH: "Billing's answers contradict themselves or the request (see the log)",
    Outcome.DEFERRED: "Sessions that billing has closed cannot be updated yet",
    Outcome.REFUSED: "The shop's database refuses what billing says",
    Outcome.INTERNAL_ERROR: "The monitor has unexpected errors (see its log)",
    Outcome.INVALID_SESSION: "The shop's data has sessions without a checkout id",
    NOT_ASKED: "Checks are late",
}


class Level(StrEnum):
    """How serious it is, the most serious first."""

    CRITICAL = "critical"
    WARNING = "warning"
    WAITING = "waiting"  # too early to judge
    OK = "ok"


_ORDER = list(Level)


class Verdict(NamedTuple):
    """What the person on call reads first, and what they read next."""

    level: Level
    text: str
    notes: tuple[str, ...] = ()
    next_step: Step | None = None

    def as_dict(self) -> JsonObject:
        return {"level": self.level.value, "text": self.text, "notes": list(self.notes)}


class Quiet(NamedTuple):
    """How long no status was changed, where that is unusual for this shop."""

    seconds: float
    usual_seconds: float  # from one change to the next


class Facts(NamedTuple):
    """What the verdict depends on."""

    waiting: Waiting
    interval_seconds: int
    last_pass_at: datetime | None  # when the newest pass of a tick began; None: there was none
    installed_at: datetime | None  # if there was no pass yet
    open: int | None  # None: not counted yet
    outcomes: Mapping[str, int]  # the last outcome of each open session; "": not checked yet
    unknown_words: Sequence[str] = ()  # what billing's answers had instead of a known word
    usual_not_found: float | None = None  # the share of 404s in the last day; None: not known
    quiet: Quiet | None = None
    paused_until: datetime | None = None  # None: no pause is in force
    allowed: float | None = None  # checks a second that billing allows; None: no limit
    demand: float = 0.0  # checks a second that the open sessions want
    slower_cadence: tuple[str, float] | None = None  # one that fits, with its checks a second
    has_api_key: bool = True
    other_monitors: Sequence[OtherMonitor] = ()
    # Among the newest sessions: checkouts that several open ones have, with the ids of those.
    shared_checkouts: Mapping[str, Sequence[str]] = {}
    paid_late: Sequence[str] = ()  # sessions that were paid after they had become `timeout`
    expected_ticks: int = 0  # in the last hour, or since the interval was changed
    missed_ticks: int = 0
    last_missed: datetime | None = None
    killed_pass_at: datetime | None = None  # when the newest of them began
    starts_late_by: float | None = None  # seconds; None: passes start on time
    on_lambda: bool = False

    @property
    def now(self) -> datetime:
        return self.waiting.now

    @property
    def failed(self) -> Mapping[Outcome, int]:
        """How many open sessions failed their last check, by outcome, the most frequent first."""
        failed = {o: self.outcomes.get(o.value, 0) for o in Outcome if o.is_error}
        return dict(sorted(((o, n) for o, n in failed.items() if n), key=lambda f: -f[1]))

    @property
    def checked(self) -> int:
        """How many open sessions have been checked."""
        return sum(n for outcome, n in self.outcomes.items() if outcome)

    @property
    def total(self) -> int:
        """The open sessions, those included that came after they were counted."""
        return max(self.open or 0, self.waiting.sessions)

    @property
    def limited_to(self) -> float | None:
        """Checks a second that billing allows, if the open sessions want more."""
        return self.allowed if is_too_low(self.allowed, self.demand) else None


class _Finding(NamedTuple):
    level: Level
    text: str
    step: Step | None = None  # None: there is nothing to do
    names_waiting: bool = False  # it says who waits


def judge(facts: Facts) -> Verdict:
    """The worst finding as a sentence, and the others as notes. The sentence names who waits."""
    first, *others = sorted(_findings(facts), key=lambda finding: _ORDER.index(finding.level))
    text = first.text
    if facts.waiting.causes and not first.names_waiting:
        text += f"; {_who(facts, facts.waiting.all)}"
    quiet = (Level.OK, Level.WAITING)
    notes = [f"{other.text}." for other in others if other.level not in quiet]
    return Verdict(first.level, text, (*notes, *_notes(facts)), first.step)


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


def _findings(facts: Facts) -> Iterator[_Finding]:
    """All that applies; of equally serious ones, what explains the others comes first."""
    if facts.last_pass_at is None:
        yield _Finding(Level.WAITING, "Waiting for the first pass")
    stops, causes = list(_what_stops_checks(facts)), dict(facts.waiting.causes)
    if stops and NOT_ASKED in causes:
        text = f"{stops[0].text}; {_who(facts, causes.pop(NOT_ASKED))}"
        stops[0] = _Finding(Level.CRITICAL, text, stops[0].step, names_waiting=True)
    yield from stops
    if facts.other_monitors:
        names = ", ".join(other.name for other in facts.other_monitors)
        yield _Finding(Level.CRITICAL, f"{OTHER_MONITOR}: {names}", next_step.OTHER_SETTINGS)
    for cause, wait in causes.items():
        trouble, step = _trouble(facts, cause, wait)
        text = f"{trouble}: {_who(facts, wait)}"
        yield _Finding(_level(facts, cause, wait), text, step, names_waiting=True)
    yield from _not_found(facts)
    if facts.quiet is not None:
        quiet, usual = duration(facts.quiet.seconds), duration(facts.quiet.usual_seconds)
        text = f"No session was closed for {quiet}, usual is {usual}"
        yield _Finding(Level.WARNING, text, next_step.NOTHING_CLOSED)
    if not facts.waiting.sessions:
        # The outcomes may be counted long ago.
        failed = min(sum(facts.failed.values()), facts.waiting.failing)
        if failed > min(MOST * facts.checked, MAX_COUNTED - 1):
            yield _Finding(Level.WARNING, _failed(facts), next_step.LOOK_AGAIN)
        yield _on_time(facts)


def _what_stops_checks(facts: Facts) -> Iterator[_Finding]:
    """Why sessions that are due are not asked about, or not as often as they should be."""
    began = facts.last_pass_at or facts.installed_at
    silent = (facts.now - began).total_seconds() if began else 0.0
    fresh = FRESH_INTERVALS * facts.interval_seconds
    if silent > (fresh if facts.last_pass_at else max(fresh, FIRST_PASS_SECONDS)):
        yield _Finding(Level.CRITICAL, f"No pass for {duration(silent)}", next_step.NO_PASS)
    if not facts.has_api_key:
        yield _Finding(Level.CRITICAL, "No API key: billing is not asked", next_step.NO_API_KEY)
    if facts.paused_until is not None:
        until = clock(facts.paused_until, facts.now, seconds=True)
        yield _Finding(Level.WARNING, f"Billing asked for a pause until {until}", next_step.PAUSED)
    if facts.limited_to is not None and facts.open:
        yield _Finding(Level.WARNING, _limited(facts.open, facts.limited_to), next_step.LIMITED)
    if facts.starts_late_by is not None:
        text = f"Passes start {duration(facts.starts_late_by)} after their tick"
        if facts.on_lambda:
            text += ": Lambda probably throttles the worker (see WorkerThrottles)"
        yield _Finding(Level.CRITICAL, text, next_step.STARTS_LATE)


def _level(facts: Facts, cause: str, wait: Wait) -> Level:
    """How serious it is that sessions wait for this cause; some always do."""
    if cause == Outcome.INVALID_SESSION:
        return Level.WARNING
    if facts.waiting.sessions_for_billing >= CRITICAL_SHARE * facts.total:
        return Level.CRITICAL
    every_paid = cause == Outcome.UNKNOWN_STATUS and wait.sessions >= CRITICAL_UNKNOWN
    overdue = cause == NOT_ASKED and (facts.now - wait.since).total_seconds() > OVERDUE_SECONDS
    return Level.CRITICAL if every_paid or overdue else Level.WARNING


def _trouble(facts: Facts, cause: str, wait: Wait) -> tuple[str, Step]:
    """What is wrong, and what to do about it."""
    text, step = TROUBLE[cause], next_step.BY_CAUSE[cause]
    if cause == Outcome.UNAUTHORIZED and wait.sessions < MOST * facts.total:
        text, step = "Billing refuses some sessions", next_step.REFUSED_SOME
    if cause == Outcome.UNKNOWN_STATUS and facts.unknown_words:
        return f"{text} ({', '.join(facts.unknown_words)})", step
    code = facts.waiting.status_code(cause)
    if code is None or cause == Outcome.UNKNOWN_STATUS:
        return text, step
    return f"{text} ({code})", step


def _who(facts: Facts, wait: Wait) -> str:
    """`12 of 200 open sessions have waited for up to 3 min`."""
    waited = duration((facts.now - wait.since).total_seconds())
    match wait.sessions, facts.total:
        case 1, 1:
            return f"the open session has waited for {waited}"
        case 1, total:
            return f"1 of {total:,} open sessions has waited for {waited}"
        case sessions, total if sessions == total:
            return f"all {total:,} open sessions have waited for up to {waited}"
        case sessions, total:
            return f"{sessions:,} of {total:,} open sessions have waited for up to {waited}"


def _not_found(facts: Facts) -> Iterator[_Finding]:
    """More sessions that billing does not know than this shop usually has."""
    unknown, checked, usual = (
        facts.outcomes.get("not_found", 0),
        facts.checked,
        facts.usual_not_found,
    )
    if not unknown:
        return
    share = unknown / checked
    if share == 1:
        is_usual = usual is not None and share < usual + UNUSUAL_SHARE
        critical = unknown >= MIN_UNKNOWN_TO_BILLING and not is_usual
        none_of = "the open session" if unknown == 1 else f"any of {unknown:,} open sessions"
        text = (
            f"Billing does not know {none_of} (404): is BILLING_API_URL right, and the key's mode?"
        )
        level = Level.CRITICAL if critical else Level.WARNING
        yield _Finding(level, text, next_step.NOT_KNOWN)
    elif share >= max((usual or 0.0) + UNUSUAL_SHARE, UNUSUAL_FACTOR * (usual or 0.0)):
        text = f"Billing does not know {unknown:,} of {checked:,} open sessions (404)"
        if usual is not None:
            text += f", usual is {usual:.0%}"
        yield _Finding(Level.WARNING, text, next_step.NOT_KNOWN)


def _on_time(facts: Facts) -> _Finding:
    match facts.open:
        case None:
            return _Finding(Level.WAITING, "The open sessions are being counted")
        case 0:
            return _Finding(Level.OK, "No open sessions, and the monitor is running on time")
        case count if not facts.checked:
            return _Finding(
                Level.WAITING, f"The first check of {count:,} open sessions is under way"
            )
        case 1:
            return _Finding(Level.OK, "1 open session checked on time")
        case count:
            return _Finding(Level.OK, f"All {count:,} open sessions checked on time")


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

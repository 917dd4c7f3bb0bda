"""Facts of a monitor that is well, and what may be wrong with it."""

from collections.abc import Mapping
from datetime import datetime, timedelta

from core.domain.verdict import Facts, Verdict, judge
from core.domain.waiting import Wait, Waiting, WaitingSession
from testkit.clock import NOON

WELL = {
    "waiting": Waiting(NOON),
    "interval_seconds": 5,
    "last_pass_at": NOON - timedelta(seconds=2),
    "installed_at": NOON - timedelta(days=1),
    "open": 128,
    "outcomes": {"active": 128},
}
PAUSED = {"paused_until": NOON + timedelta(minutes=1)}
LIMITED = {"open": 1000, "allowed": 25.4, "demand": 200.0}


def ago(seconds: float) -> datetime:
    return NOON - timedelta(seconds=seconds)


def waiting(seconds: float = 180, code: int | None = None, **causes: int) -> dict[str, Waiting]:
    """Sessions that have waited for so long, by cause."""
    first = [WaitingSession("s", ago(seconds), cause, code) for cause in causes]
    waits = {cause: Wait(sessions, ago(seconds)) for cause, sessions in causes.items()}
    return {"waiting": Waiting(NOON, seconds, waits, first)}


def verdict_of(facts: Mapping[str, object]) -> Verdict:
    return judge(Facts(**{**WELL, **facts}))  # type: ignore[arg-type]

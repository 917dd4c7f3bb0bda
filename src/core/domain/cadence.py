"""When a session is checked next: by its age, and by how often billing failed on it in a row.

Every time here is a slot, a whole multiple of the interval since the Unix epoch, as the loop's
ticks are. A due time therefore never falls between two ticks, and never depends on how long a
check took.
"""

import itertools
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
FORM = (
    "a number with s, m, h or d, e.g. '5s', or steps that grow with a session's age, "
    "e.g. '5s until 10m, 30s until 1h, 5m'"
)

# Dates that are further away than some thousand years cannot be computed, nor kept by a database.
MAX_DAYS = 3650

_DURATION = re.compile(r"(\d{1,6})([smhd])")


class Step(NamedTuple):
    """Check every `every_seconds` while the session is younger than `until_seconds`."""

    every_seconds: float
    until_seconds: float


class Cadence(NamedTuple):
    """How often a session is checked as it ages. The last step has no end."""

    steps: tuple[Step, ...]

    @classmethod
    def parse(cls, text: str) -> "Cadence":
        """`5s`, or `5s until 10m, 30s until 1h, 5m`, with `-` where a space cannot be written.

        Raises:
            ValueError: the text has another form, an age that does not grow, a step that checks
                older sessions more often than younger ones, or more than MAX_DAYS.
        """
        *younger, oldest = (part.strip() for part in text.split(","))
        steps = []
        for part in younger:
            every, separator, until = part.replace("-", " ").partition(" until ")
            if not separator:
                raise ValueError(f"the step {part!r} lacks 'until' and an age")
            steps.append(Step(parse_duration(every), parse_duration(until)))
        steps.append(Step(parse_duration(oldest), math.inf))
        finite = [seconds for step in steps for seconds in step if math.isfinite(seconds)]
        if max(finite) > MAX_DAYS * UNIT_SECONDS["d"]:
            raise ValueError(f"no step and no age can be longer than {MAX_DAYS}d")
        for step, older in itertools.pairwise(steps):
            if older.until_seconds <= step.until_seconds:
                raise ValueError("each 'until' must be a greater age than the one before it")
            if older.every_seconds < step.every_seconds:
                raise ValueError("an older session cannot be checked more often than a younger one")
        return cls(tuple(steps))

    def __str__(self) -> str:
        return ", ".join(
            f"{_duration(step.every_seconds)} until {_duration(step.until_seconds)}"
            if math.isfinite(step.until_seconds)
            else _duration(step.every_seconds)
            for step in self.steps
        )

    def every_seconds(self, age_seconds: float) -> float:
        for step in self.steps:
            if age_seconds < step.until_seconds:
                return step.every_seconds
        return self.steps[-1].every_seconds


def parse_duration(text: str) -> int:
    """Seconds in `90s`, `10m`, `2h` or `1d`.

    Raises:
        ValueError: the text has another form, or is zero.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise ValueError(f"{text.strip()!r} is not a duration")
    return int(match[1]) * UNIT_SECONDS[match[2]]


def _duration(seconds: float) -> str:
    unit, size = [(u, size) for u, size in UNIT_SECONDS.items() if seconds % size == 0][-1]
    return f"{seconds / size:.0f}{unit}"


@lru_cache(maxsize=8)  # the sessions of a batch were claimed at the same time
def slot_at(time: datetime, interval_seconds: int) -> datetime:
    """The last multiple of the interval since the epoch that is not after `time`."""
    return datetime.fromtimestamp(time.timestamp() // interval_seconds * interval_seconds, UTC)


def next_check(
    slot: datetime,
    *,
    interval_seconds: int,
    every_seconds: float,
    failures: int,
    backoff_max_seconds: int,
    choose: Callable[[int, int], int],
) -> datetime:
    """The slot in which a session checked in `slot` is due again.

    `failures` in a row double the wait up to `backoff_max_seconds` (0: no backoff); it is never
    shorter than a healthy session's. `choose(low, high)` draws the jitter, a random whole number of
    slots between half of the wait and all of it, so that sessions that failed together are not
    checked together again.
    """
    regular = max(1, math.ceil(every_seconds / interval_seconds))
    max_slots = max(regular, backoff_max_seconds // interval_seconds)
    slots = regular
    if failures > 0 and max_slots > regular:
        # 2**20 intervals is beyond every cap that settings allow; the bound keeps the power small.
        longest = min(max_slots, regular * 2 ** min(failures, 20))
        slots = choose(max(regular, math.ceil(longest / 2)), longest)
    return slot + timedelta(seconds=slots * interval_seconds)

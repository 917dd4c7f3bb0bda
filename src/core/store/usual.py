"""What is usual for this shop, from its last day: shares of 404s, and times between changes.

Both read something only if the present looks unusual.
"""

import json
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta

from core.database.port import Connection, as_datetime
from core.domain.model import Outcome
from core.domain.verdict import UNUSUAL_SHARE, Quiet

DAY = timedelta(days=1)
# The passes that are compared began at least this long ago: a sample of each hour.
PAST = timedelta(minutes=10)
SAMPLES, SAMPLE_PASSES = 24, 5
# Status changes are rare for at least this long, for this many usual times between two, and for
# twice as long as ever in the last day. The usual time is that of so many changes, and no fewer.
MIN_QUIET = timedelta(minutes=20)
QUIET_FACTOR, LONGEST_FACTOR = 10, 2
MAX_CHANGES, MIN_CHANGES = 100, 20


def usual_not_found(
    connection: Connection, now: datetime, outcomes: Mapping[str, int]
) -> float | None:
    """The share of checks of the last day that billing answered with 404.

    `outcomes` are the last ones of the open sessions. None: there were no checks, or few of these
    are 404s.
    """
    unknown = outcomes.get(Outcome.NOT_FOUND.value, 0)
    if unknown < UNUSUAL_SHARE * sum(outcomes.values()):
        return None
    found: Counter[str] = Counter()
    for hour in range(SAMPLES):
        until = now - PAST - hour * DAY / SAMPLES
        for (text,) in connection.query(
            "SELECT outcomes FROM checkout_session_run WHERE tick > %s AND tick <= %s"
            f" AND checked > 0 ORDER BY tick DESC LIMIT {SAMPLE_PASSES:d}",
            (until - PAST, until),
        ):
            found.update(json.loads(str(text)))
    return found[Outcome.NOT_FOUND.value] / found.total() if found.total() else None


def unusually_quiet(connection: Connection, now: datetime) -> Quiet | None:
    """None: the time since the last status change is not unusual, or too little is known."""
    newest = [
        as_datetime(at)
        for (at,) in connection.query(
            "SELECT changed_at FROM checkout_session_change WHERE changed_at BETWEEN %s AND %s"
            f" ORDER BY changed_at DESC LIMIT {MAX_CHANGES:d}",
            (now - DAY, now),
        )
    ]
    if len(newest) < MIN_CHANGES:
        return None
    quiet, usual = now - newest[0], (newest[0] - newest[-1]) / (len(newest) - 1)
    if quiet < max(MIN_QUIET, QUIET_FACTOR * usual):
        return None
    if quiet < LONGEST_FACTOR * _longest_gap(connection, now - DAY, newest[0]):
        return None
    return Quiet(quiet.total_seconds(), usual.total_seconds())


def _longest_gap(connection: Connection, since: datetime, last: datetime) -> timedelta:
    """The longest time between two changes of those that are long enough to matter."""
    step = MIN_QUIET / LONGEST_FACTOR
    marks = [last - number * step for number in range(1, (last - since) // step + 1)]
    if not marks:
        return timedelta(0)
    around = (
        "SELECT (SELECT MAX(changed_at) FROM checkout_session_change"
        " WHERE changed_at BETWEEN %s AND %s) AS earlier,"
        " (SELECT MIN(changed_at) FROM checkout_session_change WHERE changed_at > %s) AS later"
    )
    rows = connection.query(
        " UNION ".join([around] * len(marks)),
        [time for mark in marks for time in (since, mark, mark)],
    )
    return max(
        (as_datetime(later) - as_datetime(earlier) for earlier, later in rows if earlier),
        default=timedelta(0),
    )

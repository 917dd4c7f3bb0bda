"""How many requests a month a cadence sends: the numbers in docs/settings.md are computed."""

from datetime import timedelta
from pathlib import Path

import pytest

from core.domain.cadence import Cadence, next_check
from testkit.clock import NOON

SETTINGS = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
RECOMMENDED = "5s until 10m, 30s until 1h, 5m"
DAYS = 30
# New sessions per day by how long they stay open; 70 % are abandoned and expire after 24 hours.
SESSIONS_A_DAY = {
    timedelta(minutes=1): 5_000,
    timedelta(minutes=3): 7_500,
    timedelta(minutes=15): 2_500,
    timedelta(hours=24): 35_000,
}


def requests(cadence: Cadence, lifetime: timedelta) -> int:
    """How often a healthy session is checked while it is open."""
    at, count = NOON, 0
    while at - NOON < lifetime:
        count += 1
        at = next_check(
            at,
            interval_seconds=5,
            every_seconds=cadence.every_seconds((at - NOON).total_seconds()),
            failures=0,
            backoff_max_seconds=60,
            choose=max,
        )
    return count


def month(cadence: str) -> int:
    parsed = Cadence.parse(cadence)
    return DAYS * sum(n * requests(parsed, life) for life, n in SESSIONS_A_DAY.items())


@pytest.mark.parametrize(("cadence", "count"), [("5s", 18_167_400_000), (RECOMMENDED, 540_450_000)])
def test_the_docs_state_the_requests_per_month_of_a_cadence(cadence: str, count: int) -> None:
    assert month(cadence) == count
    assert f"| `{cadence}` | {count:,} |" in SETTINGS


def test_the_recommended_cadence_sends_under_a_twentieth_of_the_requests() -> None:
    assert month(RECOMMENDED) < month("5s") / 20

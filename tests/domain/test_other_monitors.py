"""When monitors on the same tables count as working together, and what differs between them."""

from collections.abc import Mapping
from datetime import timedelta

import pytest

from core.domain.other_monitors import (
    Monitor,
    OtherMonitor,
    Seen,
    SettingValue,
    differences,
    others_at_work,
)
from testkit.clock import NOON

HERE: Mapping[str, SettingValue] = {"STATUS_UPDATES": True, "CHECK_INTERVAL_SECONDS": 5}
THERE: Mapping[str, SettingValue] = {**HERE, "STATUS_UPDATES": False}


def seen(
    name: str, settings: Mapping[str, SettingValue], first_ago: float, last_ago: float
) -> Seen:
    """A monitor whose first and last passes began so many seconds before noon."""
    first, last = (NOON - timedelta(seconds=ago) for ago in (first_ago, last_ago))
    return Seen(Monitor(name, settings), first, last)


@pytest.mark.parametrize(
    ("ours", "theirs", "together"),
    [
        ((300, 2), (300, 3), True),
        ((300, 2), (122, 2), True),  # it has worked beside this one for two minutes
        ((300, 2), (121, 2), False),
        ((122, 2), (300, 2), True),  # and the other way round
        ((121, 2), (300, 2), False),
        # A deployment: the new workers began, and old ones made passes for a minute more.
        ((60, 2), (300, 2), False),
        ((120, 2), (300, 60), False),
        ((200, 2), (300, 140), False),
        ((300, 140), (200, 2), False),
        # It worked beside this one, but it has stopped.
        ((300, 2), (300, 120), True),
        ((300, 2), (300, 121), False),
        ((300, 121), (300, 2), False),  # this one has stopped
        # Both have an interval of a minute.
        ((299, 59), (270, 30), True),
    ],
)
def test_monitors_work_together_after_two_minutes_side_by_side(
    ours: tuple[float, float], theirs: tuple[float, float], together: bool
) -> None:
    found = others_at_work(HERE, [seen("a", HERE, *ours), seen("b", THERE, *theirs)], NOON)
    assert [other.name for other in found] == (["b"] if together else [])


def test_monitors_with_equal_settings_may_share_the_tables() -> None:
    assert others_at_work(HERE, [seen("a", HERE, 300, 2), seen("b", HERE, 300, 3)], NOON) == []


def test_a_monitor_that_makes_no_passes_has_no_others_beside_it() -> None:
    assert others_at_work(HERE, [seen("b", THERE, 300, 3)], NOON) == []


def test_monitors_with_the_same_other_settings_are_one_by_the_newest_name() -> None:
    """Its process may be started anew again and again."""
    others = [seen(f"b{n}", THERE, 300 - 30 * n, 275 - 30 * n) for n in range(10)]
    [other] = others_at_work(HERE, [seen("a", HERE, 300, 2), *others], NOON)
    assert other.name == "b9"


def test_settings_that_only_one_version_knows_do_not_differ() -> None:
    there: Mapping[str, SettingValue] = {"CHECK_INTERVAL_SECONDS": 2, "A_NEW_ONE": True}
    [difference] = differences({**HERE, "AN_OLD_ONE": None}, there)
    assert (
        str(OtherMonitor("b", (difference,))) == "b (CHECK_INTERVAL_SECONDS is 2 there and 5 here)"
    )


def test_a_monitor_is_the_same_after_being_recorded() -> None:
    monitor = Monitor("shop-ä", {**HERE, "EVENT_BUS_NAME": None, "BILLING_STATUS_PATH": "a.😀"})
    assert Monitor.from_text(monitor.as_text()) == monitor
    assert monitor.as_text().isascii()

"""The cadence an operator writes, backoff, and the slot in which a session is due again."""

import itertools
import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.domain.cadence import Cadence, Step, next_check, parse_duration, slot_at
from testkit.clock import NOON

INTERVALS = st.integers(1, 60)
SECONDS = st.integers(1, 100_000)
FAILURES = st.integers(0, 1000)
CAPS = st.integers(0, 86_400)
TIMES = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 (`timezones` sets it)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("5s", [(5, math.inf)]),
        (" 90s ", [(90, math.inf)]),
        ("10m", [(600, math.inf)]),
        ("2h", [(7200, math.inf)]),
        ("1d", [(86_400, math.inf)]),
        ("5s until 10m, 30s until 1h, 5m", [(5, 600), (30, 3600), (300, math.inf)]),
        ("5s until 10m,5s", [(5, 600), (5, math.inf)]),
        ("5s until 3649d, 3650d", [(5, 3649 * 86_400), (3650 * 86_400, math.inf)]),
        ("  5s  until  10m  ,  1m  ", [(5, 600), (60, math.inf)]),
    ],
)
def test_a_cadence_is_parsed(text: str, steps: list[tuple[float, float]]) -> None:
    assert Cadence.parse(text) == Cadence(tuple(Step(*step) for step in steps))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not a duration"),
        ("often", "'often' is not a duration"),
        ("5", "'5' is not a duration"),
        ("s", "'s' is not a duration"),
        ("0s", "'0s' is not a duration"),
        ("-5s", "'-5s' is not a duration"),
        ("1.5s", "'1.5s' is not a duration"),
        ("5 s", "'5 s' is not a duration"),
        ("5S", "'5S' is not a duration"),
        ("5w", "'5w' is not a duration"),
        ("1000000s", "'1000000s' is not a duration"),
        ("5s until 10m", "'5s until 10m' is not a duration"),
        ("5s until 10m until 1h, 5m", "'10m until 1h' is not a duration"),
        ("5s until, 5m", "the step '5s until' lacks 'until' and an age"),
        ("5s,", "the step '5s' lacks 'until' and an age"),
        (", 5s", "the step '' lacks 'until' and an age"),
        ("5s until 1h, 30s until 10m, 5m", "each 'until' must be a greater age"),
        ("5s until 10m, 30s until 600s, 5m", "each 'until' must be a greater age"),
        ("5s until 10m, 4s", "an older session cannot be checked more often"),
        ("1m until 1h, 30s until 2h, 5m", "an older session cannot be checked more often"),
        ("3651d", "no step and no age can be longer than 3650d"),
        ("999999d", "no step and no age can be longer than 3650d"),
        ("5s until 999999d, 5m", "no step and no age can be longer than 3650d"),
        ("5s until 10m, 99999h", "no step and no age can be longer than 3650d"),
    ],
)
def test_a_malformed_cadence_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Cadence.parse(text)


@settings(deadline=None)
@given(st.integers(1, 999_999), st.sampled_from([("s", 1), ("m", 60), ("h", 3600), ("d", 86_400)]))
def test_a_duration_is_its_number_times_its_unit(number: int, unit: tuple[str, int]) -> None:
    assert parse_duration(f"{number}{unit[0]}") == number * unit[1]


@st.composite
def cadences(draw: st.DrawFn) -> Cadence:
    ages = sorted(draw(st.sets(SECONDS, max_size=5)))
    waits = sorted(draw(st.lists(SECONDS, min_size=len(ages) + 1, max_size=len(ages) + 1)))
    younger = (f"{wait}s until {age}s" for wait, age in zip(waits, ages, strict=False))
    return Cadence.parse(", ".join([*younger, f"{waits[-1]}s"]))


@settings(deadline=None)
@given(cadences(), st.lists(st.floats(-1e6, 1e6), min_size=2))
def test_a_session_is_never_checked_more_often_as_it_ages(
    cadence: Cadence, ages: list[float]
) -> None:
    waits = [cadence.every_seconds(age) for age in sorted(ages)]
    assert all(earlier <= later for earlier, later in itertools.pairwise(waits))


def test_a_step_ends_at_its_age() -> None:
    cadence = Cadence.parse("5s until 10m, 30s until 1h, 5m")
    ages = (-1, 0, 599.9, 600, 3599.9, 3600, 1e9)
    assert [cadence.every_seconds(age) for age in ages] == [5, 5, 5, 30, 30, 300, 300]


@settings(deadline=None)
@given(TIMES, INTERVALS)
def test_a_slot_is_the_latest_multiple_of_the_interval(time: datetime, interval: int) -> None:
    slot = slot_at(time, interval)
    assert slot.timestamp() % interval == 0
    assert slot <= time < slot + timedelta(seconds=interval)


@settings(deadline=None)
@given(data=st.data(), time=TIMES, interval=INTERVALS, every=SECONDS, failures=FAILURES, cap=CAPS)
def test_the_next_check_is_in_a_slot_neither_early_nor_late(
    *, data: st.DataObject, time: datetime, interval: int, every: int, failures: int, cap: int
) -> None:
    slot = slot_at(time, interval)
    due = next_check(
        slot,
        interval_seconds=interval,
        every_seconds=every,
        failures=failures,
        backoff_max_seconds=cap,
        choose=lambda low, high: data.draw(st.integers(low, high)),
    )
    wait = (due - slot).total_seconds()
    assert slot_at(due, interval) == due
    assert wait >= max(interval, every)
    assert wait < max(every + interval, cap + 1)


def slots(
    failures: int, *, every: float = 5, cap: int = 60, share: float = 1.0, interval: int = 5
) -> float:
    """In how many intervals the next check is due, with jitter at this share of its range."""
    due = next_check(
        NOON,
        interval_seconds=interval,
        every_seconds=every,
        failures=failures,
        backoff_max_seconds=cap,
        choose=lambda low, high: low + int((high - low) * share),
    )
    return (due - NOON).total_seconds() / interval


def test_backoff_doubles_up_to_the_cap_and_a_success_resets_it() -> None:
    assert [slots(n) for n in (0, 1, 2, 3, 4, 1000, 0)] == [1, 2, 4, 8, 12, 12, 1]


def test_jitter_is_between_half_the_wait_and_the_whole_wait() -> None:
    assert [slots(n, share=0) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 6, 6]


def test_backoff_starts_from_the_cadence_of_the_sessions_age() -> None:
    assert [slots(n, every=30, cap=300) for n in (0, 1, 2, 3, 4)] == [6, 12, 24, 48, 60]


@settings(deadline=None)
@given(FAILURES, SECONDS, INTERVALS, st.floats(0, 1))
def test_a_cap_of_zero_turns_backoff_off(
    failures: int, every: int, interval: int, share: float
) -> None:
    healthy = slots(0, every=every, interval=interval)
    assert slots(failures, every=every, interval=interval, cap=0, share=share) == healthy


@settings(deadline=None)
@given(FAILURES, SECONDS, INTERVALS, CAPS, st.floats(0, 1))
def test_backoff_never_shortens_the_wait(
    failures: int, every: int, interval: int, cap: int, share: float
) -> None:
    healthy = slots(0, every=every, interval=interval, cap=cap)
    assert slots(failures, every=every, interval=interval, cap=cap, share=share) >= healthy

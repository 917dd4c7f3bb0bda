"""Percentiles, the totals of a summary, and how a time is formatted."""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.domain.model import Outcome, Reason, Skip, iso
from core.domain.summary import PERCENTILES, Summary, percentile
from testkit.clock import NOON

FAILURES = {
    Outcome.UNEXPECTED_STATUS,
    Outcome.RATE_LIMITED,
    Outcome.UNAUTHORIZED,
    Outcome.TIMEOUT,
    Outcome.NETWORK_ERROR,
    Outcome.INVALID_SESSION,
}


def nearest_rank(values: Sequence[int], share: Fraction) -> int:
    """The nearest-rank percentile by definition: `share` of the values are at most this value."""
    return min(v for v in values if sum(w <= v for w in values) >= share * len(values))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=250), st.sampled_from([*PERCENTILES.values()])
)
def test_percentiles_are_nearest_rank(values: list[int], share: float) -> None:
    expected = nearest_rank(values, Fraction(str(share)))
    assert percentile(sorted(values), share) == expected


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(Outcome), st.integers(0, 10_000)))
def test_every_check_is_a_success_or_an_error(counts: dict[Outcome, int]) -> None:
    summary = Summary(Reason.TICK, NOON, outcomes=Counter(counts))
    assert summary.checked == summary.successes + summary.errors == sum(counts.values())


@pytest.mark.parametrize("outcome", [Outcome.ACTIVE, Outcome.NOT_FOUND, *sorted(FAILURES)])
def test_only_an_answer_about_the_session_is_a_success(
    outcome: Outcome,
) -> None:
    summary = Summary(Reason.TICK, NOON, outcomes=Counter({outcome: 3}))
    failed = outcome in FAILURES
    assert outcome.is_error is failed
    assert (summary.successes, summary.errors) == ((0, 3) if failed else (3, 0))


def test_latencies_are_in_milliseconds_in_any_order() -> None:
    latencies = [n / 1000 for n in range(200, 0, -1)]
    summary = Summary(Reason.TICK, NOON, latencies=latencies)
    assert summary.latency_ms == {"p50": 100.0, "p95": 190.0, "p99": 198.0, "max": 200.0}


def test_a_pass_that_sent_no_request_has_no_latencies() -> None:
    assert Summary(Reason.TICK, NOON).latency_ms == {}


def test_a_summary_as_a_dict_can_be_written_as_json() -> None:
    summary = Summary(
        Reason.MANUAL,
        NOON,
        tick=NOON - timedelta(seconds=5),
        open=9,
        outcomes=Counter({Outcome.ACTIVE: 4, Outcome.TIMEOUT: 1}),
        skipped=Counter({Skip.IN_FLIGHT: 4}),
        overdue_seconds=1.23456,
        latencies=[0.25],
        duration_seconds=0.98765,
    )
    written = json.loads(json.dumps(summary.as_dict()))
    assert (
        written
        | {
            "reason": "manual",
            "started_at": "2026-01-15T12:00:00.000Z",
            "tick": "2026-01-15T11:59:55.000Z",
            "open": 9,
            "checked": 5,
            "success": 4,
            "errors": 1,
            "outcomes": {"active": 4, "timeout": 1},
            "skipped": {"in_flight": 4},
            "overdue_seconds": 1.235,
            "duration_ms": 987.6,
            "billing_latency_ms": {"p50": 250.0, "p95": 250.0, "p99": 250.0, "max": 250.0},
        }
        == written
    )
    assert iso(summary.finished_at) == "2026-01-15T12:00:00.987Z"


def test_a_summary_without_a_tick_has_null_for_it() -> None:
    assert Summary(Reason.START, NOON).as_dict()["tick"] is None


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (datetime(2026, 1, 15, 10, 30, tzinfo=UTC), "2026-01-15T10:30:00.000Z"),
        (datetime(2026, 1, 15, 10, 30, 0, 999_999, tzinfo=UTC), "2026-01-15T10:30:00.999Z"),
        (
            datetime(2026, 1, 15, 1, 0, tzinfo=timezone(timedelta(hours=5, minutes=30))),
            "2026-01-14T19:30:00.000Z",
        ),
    ],
)
def test_a_time_is_formatted_in_utc_with_milliseconds(at: datetime, text: str) -> None:
    assert iso(at) == text

"""The verdict of `/api/status`: the one line that the person on call reads first."""

from datetime import timedelta

import pytest

from core.domain.model import Outcome
from core.domain.other_monitors import Difference, OtherMonitor
from core.domain.verdict import Facts, Level, clock, duration, judge, starts_late_by
from testkit.clock import NOON

WELL = {
    "now": NOON,
    "interval_seconds": 5,
    "last_pass_at": NOON - timedelta(seconds=2),
    "installed_at": NOON - timedelta(days=1),
    "open": 128,
    "outcomes": {"active": 128},
    "overdue_seconds": 0.4,
}
FAILING_SINCE = NOON - timedelta(minutes=89)
THROTTLED = ": Lambda probably throttles the worker (see WorkerThrottles)"


def ago(seconds: float) -> object:
    return NOON - timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("facts", "level", "text"),
    [
        ({}, Level.OK, "All 128 open sessions checked on time"),
        ({"open": 3000}, Level.OK, "All 3,000 open sessions checked on time"),
        ({"open": 1}, Level.OK, "1 open session checked on time"),
        ({"open": 0}, Level.OK, "No open sessions, and the monitor is running on time"),
        ({"open": None, "outcomes": {}}, Level.WAITING, "The open sessions are being counted"),
        ({"last_pass_at": ago(30)}, Level.OK, "All 128 open sessions checked on time"),
        ({"last_pass_at": ago(40)}, Level.CRITICAL, "No pass for 40 s"),
        (
            {"last_pass_at": None, "installed_at": ago(119)},
            Level.WAITING,
            "Waiting for the first pass",
        ),
        ({"last_pass_at": None, "installed_at": ago(900)}, Level.CRITICAL, "No pass for 15 min"),
        ({"has_api_key": False}, Level.CRITICAL, "No API key: billing is not asked"),
        (
            {"paused_until": NOON + timedelta(minutes=1), "overdue_seconds": 40},
            Level.WARNING,
            "Billing asked for a pause until 12:01:00 UTC",
        ),
        (
            {"open": 1000, "allowed": 25.4, "demand": 200.0, "overdue_seconds": 35},
            Level.WARNING,
            "Billing allows about 25 checks a second: each of 1,000 sessions is checked every 39 s",
        ),
        (
            {"open": 1, "allowed": 0.1, "demand": 0.2},
            Level.WARNING,
            "Billing allows about 0.1 checks a second: the open session is checked every 10 s",
        ),
        (
            {"allowed": 25, "demand": 26},
            Level.OK,
            "All 128 open sessions checked on time",
        ),
        (
            {"starts_late_by": 14.2, "on_lambda": True, "overdue_seconds": 23},
            Level.CRITICAL,
            f"Passes start 14 s after their tick{THROTTLED}",
        ),
        ({"starts_late_by": 14.2}, Level.CRITICAL, "Passes start 14 s after their tick"),
        ({"overdue_seconds": 10.0}, Level.OK, "All 128 open sessions checked on time"),
        ({"overdue_seconds": 23.4}, Level.WARNING, "Checks are up to 23 s late"),
        ({"overdue_seconds": 61}, Level.CRITICAL, "Checks are up to 61 s late"),
        (
            {
                "outcomes": {"unauthorized": 100, "active": 28},
                "failing_since": FAILING_SINCE,
                "failing_code": 401,
            },
            Level.CRITICAL,
            "Billing refuses the key since 10:31 UTC (401)",
        ),
        (
            {"outcomes": {"timeout": 65, "active": 63}, "failing_since": FAILING_SINCE},
            Level.CRITICAL,
            "Billing does not answer in time since 10:31 UTC",
        ),
        (
            {"outcomes": {"timeout": 64, "active": 64}},
            Level.OK,
            "All 128 open sessions checked on time",
        ),
        # Passes succeed again, but the failed sessions still back off.
        (
            {"outcomes": {"network_error": 120, "active": 8}},
            Level.WARNING,
            "Billing answers, but 120 of 128 failed their last check",
        ),
        ({"outcomes": {"": 128}}, Level.OK, "All 128 open sessions checked on time"),
        ({"outcomes": {"not_found": 128}}, Level.OK, "All 128 open sessions checked on time"),
    ],
)
def test_the_verdict_is_the_worst_finding(
    facts: dict[str, object], level: Level, text: str
) -> None:
    verdict = judge(Facts(**{**WELL, **facts}))  # type: ignore[arg-type]
    assert (verdict.level, verdict.text) == (level, text)


@pytest.mark.parametrize(
    ("delays", "late_by"),
    [
        ([], None),
        ([14, 14], None),  # too few to judge
        ([10, 14, 31], 14),
        ([0.1, 14, 31], 14),
        ([0.1, 0.1, 14, 31], None),  # half of them are on time
        ([6, 6, 6, 6], None),  # cold starts
        ([600, 600, 600], None),  # a wrong clock
        ([-600, -600, -600], None),
    ],
)
def test_passes_start_late_if_most_of_several_do(
    delays: list[float], late_by: float | None
) -> None:
    assert starts_late_by(delays) == late_by


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome.is_error])
def test_the_verdict_names_what_most_checks_fail_with(outcome: Outcome) -> None:
    facts = {"outcomes": {outcome.value: 128}, "failing_since": FAILING_SINCE}
    verdict = judge(Facts(**{**WELL, **facts}))  # type: ignore[arg-type]
    assert verdict.level is Level.CRITICAL
    assert verdict.text.endswith(" since 10:31 UTC")


def test_other_findings_are_notes() -> None:
    facts = {
        "last_pass_at": ago(3700),
        "outcomes": {"timeout": 2, "network_error": 3, "active": 123},
        "overdue_seconds": 3690,
        "expected_ticks": 719,
        "missed_ticks": 718,
        "last_missed": ago(5),
        "killed_pass_at": ago(3600),
    }
    assert judge(Facts(**{**WELL, **facts})).notes == (  # type: ignore[arg-type]
        "Checks are up to 1 h 1 min late.",
        "5 of 128 failed their last check: 3 network error, 2 timeout.",
        "718 of 719 ticks of the last hour were missed, the last at 11:59:55 UTC.",
        "The pass of 11:00:00 UTC was killed; its claims expire on their own.",
    )


def test_another_monitor_with_other_settings_is_the_verdict() -> None:
    differences = (
        Difference("STATUS_UPDATES", here=True, there=False),
        Difference("EVENT_BUS_NAME", here="shop-events", there=None),
    )
    facts = {"other_monitors": [OtherMonitor("shop-b", differences)], "overdue_seconds": 23}
    verdict = judge(Facts(**{**WELL, **facts}))  # type: ignore[arg-type]
    assert verdict.level is Level.CRITICAL
    assert verdict.text.endswith("works on the same sessions: shop-b")
    assert verdict.notes == (
        "Checks are up to 23 s late.",
        f"shop-b ({differences[0]}; EVENT_BUS_NAME is not set there and shop-events here).",
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(40, "40 s"), (119, "119 s"), (120, "2 min"), (7500, "2 h 5 min"), (90_000, "1 day")],
)
def test_a_duration_is_formatted_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_time_of_another_day_is_shown_with_its_day() -> None:
    assert clock(NOON - timedelta(days=1), NOON) == "14 Jan 12:00 UTC"


@pytest.mark.parametrize(
    ("slower", "helps"),
    [
        (None, "a limit of 200 checks a second"),
        (
            ("30s until 10m, 2m", 12.3456),
            "CHECK_CADENCE='30s until 10m, 2m', which wants 12 a second, or {limit}",
        ),
    ],
)
def test_where_billing_limits_the_rate_a_note_says_what_helps(
    slower: tuple[str, float] | None, helps: str
) -> None:
    facts = {"open": 1000, "allowed": 25.4, "demand": 199.7, "slower_cadence": slower}
    helps = helps.format(limit="a limit of 200 checks a second")
    note = f"The open sessions want 200 checks a second. What helps: {helps}."
    assert judge(Facts(**{**WELL, **facts})).notes == (note,)  # type: ignore[arg-type]


def test_checkouts_of_several_sessions_are_named() -> None:
    shared = {f"c{n}": [f"s{n}{i}" for i in range(n)] for n in range(2, 7)}
    notes = judge(Facts(**{**WELL, "shared_checkouts": shared})).notes  # type: ignore[arg-type]
    assert [note.split(":")[-1] for note in notes] == [
        " s20, s21.",
        " s30, s31, s32.",
        " s40, s41, s42.",
    ]
    assert notes[0].startswith("2 open sessions have the checkout c2, so the same answer closes")

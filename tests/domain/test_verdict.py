"""The verdict of `/api/status`: the one line that the person on call reads first."""

from datetime import timedelta

import pytest

from core.domain.model import Outcome
from core.domain.other_monitors import Difference, OtherMonitor
from core.domain.verdict import (
    Level,
    Quiet,
    clock,
    duration,
    starts_late_by,
)
from core.domain.waiting import NOT_ASKED, Waiting
from testkit.clock import NOON
from tests.domain.facts import LIMITED, PAUSED, ago, verdict_of, waiting

THROTTLED = ": Lambda probably throttles the worker (see WorkerThrottles)"
ALLOWED = "Billing allows about 25 checks a second: each of 1,000 sessions is checked every 39 s"
UNKNOWN = "Billing says what BILLING_STATUS_MAP does not have"
NO_ID = "The shop's data has sessions without a checkout id"
WAITED = "open sessions have waited for up to"
IS_IT_RIGHT = "is BILLING_API_URL right, and the key's mode?"
ON_TIME = "All 128 open sessions checked on time"


@pytest.mark.parametrize(
    ("facts", "level", "text"),
    [
        ({}, Level.OK, ON_TIME),
        ({"open": 3000}, Level.OK, "All 3,000 open sessions checked on time"),
        ({"open": 1}, Level.OK, "1 open session checked on time"),
        ({"open": 0}, Level.OK, "No open sessions, and the monitor is running on time"),
        ({"open": None, "outcomes": {}}, Level.WAITING, "The open sessions are being counted"),
        (
            {"outcomes": {"": 128}},
            Level.WAITING,
            "The first check of 128 open sessions is under way",
        ),
        ({"last_pass_at": ago(30)}, Level.OK, ON_TIME),
        ({"last_pass_at": ago(40)}, Level.CRITICAL, "No pass for 40 s"),
        (
            {"last_pass_at": None, "installed_at": ago(119)},
            Level.WAITING,
            "Waiting for the first pass",
        ),
        ({"last_pass_at": None, "installed_at": ago(900)}, Level.CRITICAL, "No pass for 15 min"),
        ({"has_api_key": False}, Level.CRITICAL, "No API key: billing is not asked"),
        (
            {"has_api_key": False, "open": 0, "outcomes": {}},
            Level.CRITICAL,
            "No API key: billing is not asked",
        ),
        (
            {"has_api_key": False, **waiting(128, not_asked=128)},
            Level.CRITICAL,
            f"No API key: billing is not asked; all 128 {WAITED} 2 min",
        ),
        (PAUSED, Level.WARNING, "Billing asked for a pause until 12:01:00 UTC"),
        (
            {**PAUSED, **waiting(40, not_asked=5)},
            Level.CRITICAL,
            f"Billing asked for a pause until 12:01:00 UTC; 5 of 128 {WAITED} 40 s",
        ),
        (
            LIMITED,
            Level.WARNING,
            ALLOWED,
        ),
        (
            {**LIMITED, **waiting(34, not_asked=620)},
            Level.CRITICAL,
            f"{ALLOWED}; 620 of 1,000 {WAITED} 34 s",
        ),
        (
            {"open": 1, "allowed": 0.1, "demand": 0.2},
            Level.WARNING,
            "Billing allows about 0.1 checks a second: the open session is checked every 10 s",
        ),
        ({"allowed": 25, "demand": 26}, Level.OK, ON_TIME),
        (
            {"starts_late_by": 14.2, "on_lambda": True, **waiting(23, not_asked=2)},
            Level.CRITICAL,
            f"Passes start 14 s after their tick{THROTTLED}; 2 of 128 {WAITED} 23 s",
        ),
        ({"starts_late_by": 14.2}, Level.CRITICAL, "Passes start 14 s after their tick"),
        (
            waiting(23.4, not_asked=12),
            Level.WARNING,
            f"Checks are late: 12 of 128 {WAITED} 23 s",
        ),
        (
            waiting(23.4, not_asked=13),
            Level.CRITICAL,
            f"Checks are late: 13 of 128 {WAITED} 23 s",
        ),
        (
            waiting(61, not_asked=1),
            Level.CRITICAL,
            "Checks are late: 1 of 128 open sessions has waited for 61 s",
        ),
        (
            waiting(5400, 401, unauthorized=128),
            Level.CRITICAL,
            f"Billing refuses the key (401): all 128 {WAITED} 1 h 30 min",
        ),
        (
            {"open": 200, **waiting(1560, 403, unauthorized=1)},
            Level.WARNING,
            "Billing refuses some sessions (403): 1 of 200 open sessions has waited for 26 min",
        ),
        (
            waiting(180, timeout=12),
            Level.WARNING,
            f"Billing does not answer in time: 12 of 128 {WAITED} 3 min",
        ),
        # Together they are a tenth.
        (
            waiting(180, network_error=9, timeout=4),
            Level.CRITICAL,
            f"Billing cannot be reached: 9 of 128 {WAITED} 3 min",
        ),
        (
            {"open": 10_000, "unknown_words": ["'settled'"], **waiting(180, unknown_status=240)},
            Level.CRITICAL,
            f"{UNKNOWN} ('settled'): 240 of 10,000 {WAITED} 3 min",
        ),
        (
            {"open": 1, **waiting(180, invalid_session=1)},
            Level.WARNING,
            f"{NO_ID}: the open session has waited for 3 min",
        ),
        (
            {
                "waiting": Waiting(NOON, failing=120),
                "outcomes": {"network_error": 120, "active": 8},
            },
            Level.WARNING,
            "120 of 128 failed their last check",
        ),
        ({"outcomes": {"network_error": 120, "active": 8}}, Level.OK, ON_TIME),  # no longer
        ({"outcomes": {"timeout": 64, "active": 64}}, Level.OK, ON_TIME),
        (
            {"outcomes": {"not_found": 128}},
            Level.CRITICAL,
            f"Billing does not know any of 128 open sessions (404): {IS_IT_RIGHT}",
        ),
        (
            {"outcomes": {"not_found": 1}, "open": 1},
            Level.WARNING,
            f"Billing does not know the open session (404): {IS_IT_RIGHT}",
        ),
        (
            {"outcomes": {"not_found": 60, "active": 68}, "usual_not_found": 0.05},
            Level.WARNING,
            "Billing does not know 60 of 128 open sessions (404), usual is 5%",
        ),
        (
            {"outcomes": {"not_found": 60, "active": 68}, "usual_not_found": 0.4},
            Level.OK,
            ON_TIME,
        ),
        (
            {"quiet": Quiet(2400, 120)},
            Level.WARNING,
            "No session was closed for 40 min, usual is 2 min",
        ),
    ],
)
def test_the_verdict_is_the_worst_finding(
    facts: dict[str, object], level: Level, text: str
) -> None:
    verdict = verdict_of(facts)
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


@pytest.mark.parametrize("cause", [*(o.value for o in Outcome if o.is_error), NOT_ASKED])
def test_the_verdict_names_each_cause_and_who_waits(cause: str) -> None:
    verdict = verdict_of(waiting(180, **{cause: 128}))
    assert verdict.level in (Level.CRITICAL, Level.WARNING)
    assert verdict.text.endswith(": all 128 open sessions have waited for up to 3 min")


def test_other_findings_are_notes() -> None:
    facts = {
        "last_pass_at": ago(3700),
        **waiting(3690, network_error=3, timeout=2, not_asked=100),
        "expected_ticks": 719,
        "missed_ticks": 718,
        "last_missed": ago(5),
        "killed_pass_at": ago(3600),
    }
    assert verdict_of(facts).notes == (
        f"Billing cannot be reached: 3 of 128 {WAITED} 1 h 1 min.",
        f"Billing does not answer in time: 2 of 128 {WAITED} 1 h 1 min.",
        "718 of 719 ticks of the last hour were missed, the last at 11:59:55 UTC.",
        "The pass of 11:00:00 UTC was killed; its claims expire on their own.",
    )


def test_another_monitor_with_other_settings_is_the_verdict() -> None:
    differences = (
        Difference("STATUS_UPDATES", here=True, there=False),
        Difference("EVENT_BUS_NAME", here="shop-events", there=None),
    )
    facts = {"other_monitors": [OtherMonitor("shop-b", differences)], **waiting(23, not_asked=1)}
    verdict = verdict_of(facts)
    assert verdict.level is Level.CRITICAL
    assert verdict.text.endswith(
        "works on the same sessions: shop-b; 1 of 128 open sessions has waited for 23 s"
    )
    assert verdict.notes == (
        "Checks are late: 1 of 128 open sessions has waited for 23 s.",
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
    assert verdict_of(facts).notes == (note,)


def test_checkouts_of_several_sessions_are_named() -> None:
    shared = {f"c{n}": [f"s{n}{i}" for i in range(n)] for n in range(2, 7)}
    notes = verdict_of({"shared_checkouts": shared}).notes
    assert [note.split(":")[-1] for note in notes] == [
        " s20, s21.",
        " s30, s31, s32.",
        " s40, s41, s42.",
    ]
    assert notes[0].startswith("2 open sessions have the checkout c2, so the same answer closes")

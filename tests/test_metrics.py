"""The metrics of a pass, as an alarm reads them."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from core import metrics
from core.domain.model import Outcome, Reason
from core.domain.summary import Summary
from core.domain.waiting import Wait, Waiting
from core.metrics import representatives
from testkit.clock import NOON


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "a-stack")


type Values = dict[str, float | list[float]]


def emitted(capsys: pytest.CaptureFixture[str]) -> tuple[Values, dict[str, str]]:
    """The values and units of the one EMF record that was written; it has no other fields."""
    [written] = capsys.readouterr().out.splitlines()
    record: dict[str, Any] = json.loads(written)
    [directive] = record.pop("_aws")["CloudWatchMetrics"]
    assert directive["Namespace"] == "CheckoutSessionMonitor"
    assert directive["Dimensions"] == [["service"]]
    assert record.pop("service") == "a-stack"
    units = {metric["Name"]: metric["Unit"] for metric in directive["Metrics"]}
    assert set(record) == set(units)
    return record, units


@pytest.mark.usefixtures("stack")
def test_a_healthy_pass_sends_six_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    metrics.measure(
        Summary(
            Reason.TICK,
            NOON,
            led=True,
            counted=True,
            open=90,
            outcomes=Counter({Outcome.ACTIVE: 80}),
            latencies=[0.1, 0.0504],
            duration_seconds=1.5,
        )
    )
    values, units = emitted(capsys)
    assert values == {
        "SessionsOpen": 90,
        "OverdueSeconds": 0.0,
        "SessionsChecked": 80,
        "PassDuration": 1500,
        "PassesCompleted": 1,
        "BillingLatency": [50.4, 100],
    }
    assert {name for name, unit in units.items() if unit != "Count"} == {
        "OverdueSeconds",
        "PassDuration",
        "BillingLatency",
    }
    assert units["OverdueSeconds"] == "Seconds"
    assert units["PassDuration"] == units["BillingLatency"] == "Milliseconds"


@pytest.mark.usefixtures("stack")
def test_other_metrics_are_sent_only_if_not_zero(
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes = Counter(
        {
            Outcome.NOT_FOUND: 1,
            Outcome.UNEXPECTED_STATUS: 2,
            Outcome.RATE_LIMITED: 3,
            Outcome.UNAUTHORIZED: 4,
        }
    )
    metrics.measure(
        Summary(
            Reason.TICK,
            NOON,
            led=True,
            open=99,
            outcomes=outcomes + Counter({Outcome.CLOSED: 7}),
            overdue_seconds=2.5,
            status_changes=7,
            unpublished=5,
        )
    )
    values, _ = emitted(capsys)
    assert values == {
        "SessionsOpen": 99,  # of the last count; alarms divide by it
        "OverdueSeconds": 2.5,
        "PassDuration": 0,
        "PassesCompleted": 1,
        "SessionsChecked": 17,
        "ChecksNotFound": 1,
        "ChecksUnexpectedStatus": 2,
        "ChecksRateLimited": 3,
        "ChecksUnauthorized": 4,
        "ChecksFailed": 9,
        "StatusChanges": 7,
        "EventsFailed": 5,
    }


@pytest.mark.usefixtures("stack")
@pytest.mark.parametrize(
    ("waiting", "given", "of_alarms"),
    [
        ({"timeout": 3}, {}, {"WaitingOther": 3}),
        # Billing cannot be asked about one without a checkout id.
        ({"timeout": 3, "invalid_session": 9}, {}, {"WaitingOther": 3}),
        # Below the threshold of its own alarm, a cause counts with the others.
        ({"unauthorized": 49, "timeout": 1}, {}, {"WaitingOther": 50}),
        ({"unauthorized": 50, "timeout": 1}, {}, {"WaitingUnauthorized": 50, "WaitingOther": 1}),
        ({"unknown_status": 2}, {}, {"WaitingOther": 2}),
        ({"unknown_status": 3}, {}, {"WaitingUnknownStatus": 3}),
        ({"deferred": 5}, {}, {"WaitingOther": 5}),
        ({"deferred": 5}, {"unpublished": 1}, {}),
        ({"not_asked": 5}, {}, {"NotAskedSeconds": 61.5}),
        ({"not_asked": 5}, {"allowed": 10.0, "demand": 10.5}, {"NotAskedSeconds": 61.5}),
        ({"not_asked": 5, "timeout": 1}, {"allowed": 10.0, "demand": 11.0}, {"WaitingOther": 1}),
    ],
)
def test_a_session_that_waits_counts_in_one_alarm(
    waiting: Mapping[str, int],
    given: Mapping[str, Any],
    of_alarms: Mapping[str, float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    since = NOON - timedelta(seconds=61.5)
    waits = {cause: Wait(sessions, since) for cause, sessions in waiting.items()}
    if "invalid_session" in waits:
        waits["invalid_session"] = Wait(9, NOON - timedelta(days=1))
    summary = Summary(Reason.TICK, NOON, led=True, open=100, waiting=Waiting(NOON, 61.5, waits))
    metrics.measure(summary._replace(**given))
    values, _ = emitted(capsys)
    sessions = sum(n for cause, n in waiting.items() if cause != "invalid_session")
    assert (values["SessionsWaiting"], values["LongestWaitSeconds"]) == (sessions, 61.5)
    names = {"NotAskedSeconds", "WaitingUnauthorized", "WaitingUnknownStatus", "WaitingOther"}
    assert {name: value for name, value in values.items() if name in names} == of_alarms


@pytest.mark.usefixtures("stack")
def test_only_a_leader_sends_the_totals(
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics.measure(Summary(Reason.TICK, NOON, open=5, overdue_seconds=9))
    values, _ = emitted(capsys)
    assert values == {"PassDuration": 0, "PassesCompleted": 1}


@pytest.mark.parametrize("count", [1, 99, 100, 101, 1_000, 12_345])
def test_the_latencies_sent_have_the_percentiles_of_all(count: int) -> None:
    """However many requests a pass sent, at most a hundred values are sent."""
    values = [n**1.5 for n in range(count)]
    sent = representatives(values)
    assert len(sent) == min(count, 100)
    for at in range(1, 101):
        # Nearest rank.
        assert sent[math.ceil(len(sent) * at / 100) - 1] == values[math.ceil(count * at / 100) - 1]


@pytest.mark.usefixtures("stack")
def test_a_failed_pass_is_one_metric(capsys: pytest.CaptureFixture[str]) -> None:
    metrics.measure_failure()
    assert emitted(capsys) == ({"PassesFailed": 1}, {"PassesFailed": "Count"})

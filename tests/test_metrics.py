"""The metrics of a pass, as an alarm reads them."""

import json
import math
from collections import Counter
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


# Those without a checkout id do not count.
WAITS = {"timeout": Wait(3, NOON), "invalid_session": Wait(9, NOON)}
WAITING = Waiting(NOON, 60.5, WAITS)


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
            waiting=WAITING,
            status_changes=7,
            unpublished=5,
        )
    )
    values, _ = emitted(capsys)
    assert values == {
        "OverdueSeconds": 2.5,
        "SessionsWaiting": 3,
        "LongestWaitSeconds": 60.5,
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
def test_only_a_leader_that_counted_sends_the_totals(
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

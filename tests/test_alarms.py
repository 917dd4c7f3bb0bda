"""Every alarm of the template, on the metrics that passes emit: raised for its cause only."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from core import metrics
from core.domain.model import Outcome, Reason
from core.domain.summary import Summary
from testkit.clock import NOON
from tests.cloudwatch import CloudWatch

TEMPLATE = yaml_parse((Path(__file__).parents[1] / "template.yaml").read_text(encoding="utf-8"))
ALARMS: Mapping[str, Mapping[str, Any]] = {
    name: resource["Properties"]
    for name, resource in TEMPLATE["Resources"].items()
    if resource["Type"] == "AWS::CloudWatch::Alarm"
}
PASSES_A_MINUTE = 12

type Minute = Callable[[CloudWatch], None]


def passes(**given: Any) -> Minute:  # noqa: ANN401 (a Summary's fields)
    """A minute of passes with this summary."""

    def emit(watch: CloudWatch) -> None:
        scheduled(watch)
        for _pass in range(PASSES_A_MINUTE):
            summary = Summary(Reason.TICK, NOON, led=True, counted=True, duration_seconds=0.2)
            metrics.measure(replace(summary, **given))

    return emit


def checks(*outcomes: Outcome, **given: Any) -> Minute:  # noqa: ANN401 (a Summary's fields)
    return passes(open=10, outcomes=Counter(outcomes), latencies=[0.1] * len(outcomes), **given)


def aws(namespace: str, name: str, *values: float) -> Minute:
    """A healthy minute, with a metric of AWS itself."""

    def put(watch: CloudWatch) -> None:
        HEALTHY(watch)
        watch.put(namespace, name, values)

    return put


def nothing(_: CloudWatch) -> None:
    """A minute without any metric: the schedule has stopped."""


def scheduled(watch: CloudWatch) -> None:
    """The schedule tries to start the loop; no pass reports."""
    watch.put("AWS/Scheduler", "InvocationAttemptCount", [1])


def failures(watch: CloudWatch) -> None:
    scheduled(watch)
    for _pass in range(PASSES_A_MINUTE):
        metrics.measure_failure()


def zeroes(watch: CloudWatch) -> None:
    HEALTHY(watch)
    for namespace, name in (
        ("AWS/Lambda", "Errors"),
        ("AWS/Lambda", "Throttles"),
        ("AWS/SQS", "NumberOfMessagesSent"),
        ("AWS/States", "ExecutionsFailed"),
    ):
        watch.put(namespace, name, [0])


HEALTHY = checks(*[Outcome.ACTIVE] * 10)
IDLE = passes()

# The causes of each alarm, and after how many such minutes in a row it must be raised.
CAUSES: Mapping[str, list[tuple[Minute, int]]] = {
    "NoPassAlarm": [(scheduled, 2), (failures, 2), (nothing, 2)],
    "OverdueAlarm": [
        (checks(Outcome.ACTIVE, overdue_seconds=61), 3),
        (passes(open=10, overdue_seconds=3600), 3),  # nothing checked: billing asked for a pause
    ],
    "LimitedAlarm": [(checks(Outcome.ACTIVE, allowed=25.0, demand=27.0), 10)],
    "FailedChecksAlarm": [
        (checks(Outcome.TIMEOUT), 5),
        (checks(Outcome.TIMEOUT, Outcome.NETWORK_ERROR, Outcome.ACTIVE), 5),
        (checks(*[Outcome.UNKNOWN_STATUS] * 51, *[Outcome.CLOSED] * 49), 5),
    ],
    "UnauthorizedAlarm": [(checks(Outcome.UNAUTHORIZED, *[Outcome.ACTIVE] * 9), 2)],
    "EventsFailedAlarm": [(checks(*[Outcome.CLOSED] * 5, unpublished=1), 2)],
    "WorkerErrorsAlarm": [(aws("AWS/Lambda", "Errors", 0, 1, 0), 2)],
    "WorkerThrottlesAlarm": [(aws("AWS/Lambda", "Throttles", 3), 2)],
    "FailedChecksQueueAlarm": [(aws("AWS/SQS", "NumberOfMessagesSent", 1), 1)],
    "LoopFailedAlarm": [
        (aws("AWS/States", "ExecutionsFailed", 1), 1),
        (aws("AWS/States", "ExecutionsTimedOut", 1), 1),
    ],
}
# Minutes for which no alarm may be raised.
NO_CAUSE: Mapping[str, Minute] = {
    "all checks succeed": HEALTHY,
    "no session is open": IDLE,
    "half of the checks fail": checks(Outcome.TIMEOUT, Outcome.ACTIVE),
    "nothing is found": checks(Outcome.NOT_FOUND),
    "billing allows just what is wanted": checks(Outcome.ACTIVE, allowed=25.0, demand=26.0),
    "everything is a little late": checks(Outcome.ACTIVE, overdue_seconds=60),
    "AWS sends zeroes": zeroes,
}


class Minutes:
    """Minutes one after the other, with the states of all alarms after each."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.watch = CloudWatch()

    def __call__(self, minute: Minute, times: int = 1) -> set[str]:
        """The names of the alarms that are not OK afterwards."""
        for _ in range(times):
            self._capsys.readouterr()
            minute(self.watch)
            self.watch.ingest(self._capsys.readouterr().out)
            self.watch.end_minute()
        return {name for name, alarm in ALARMS.items() if self.watch.state(alarm) != "OK"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Minutes:
    run = Minutes(capsys)
    run(HEALTHY, 10)
    return run


CASES = [
    pytest.param(name, minute, after, id=f"{name}-{n}")
    for name, cases in CAUSES.items()
    for n, (minute, after) in enumerate(cases)
]


def test_every_alarm_of_the_template_is_tested() -> None:
    assert set(CAUSES) == set(ALARMS)


@pytest.mark.parametrize(("name", "minute", "after"), CASES)
def test_an_alarm_is_raised_in_time_and_not_before(
    run: Minutes, name: str, minute: Minute, after: int
) -> None:
    assert name not in run(minute, after - 1)
    assert name in run(minute)


@pytest.mark.parametrize(("name", "minute", "after"), CASES)
def test_an_alarm_clears_after_recovery(
    run: Minutes, name: str, minute: Minute, after: int
) -> None:
    run(minute, 2 * after)
    assert run(HEALTHY, after) == set()


@pytest.mark.parametrize(("name", "minute", "after"), CASES)
def test_an_alarm_is_raised_without_earlier_measurements(
    capsys: pytest.CaptureFixture[str], name: str, minute: Minute, after: int
) -> None:
    assert name in Minutes(capsys)(minute, after)


@pytest.mark.parametrize("minute", NO_CAUSE.values(), ids=NO_CAUSE)
def test_no_alarm_is_raised_if_nothing_is_wrong(run: Minutes, minute: Minute) -> None:
    for _ in range(10):
        assert run(minute) == set()


@pytest.mark.parametrize("minute", [nothing, scheduled, failures])
def test_without_a_pass_only_the_no_pass_alarm_is_raised(run: Minutes, minute: Minute) -> None:
    assert run(minute, 10) == {"NoPassAlarm"}


def test_a_monitor_without_any_pass_changes_the_alarms_state(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only a change of state sends an e-mail."""
    run, alarm = Minutes(capsys), ALARMS["NoPassAlarm"]
    run(nothing, 5)
    assert run.watch.state(alarm) == "INSUFFICIENT_DATA"
    run(scheduled, 2)
    assert run.watch.state(alarm) == "ALARM"


def test_ticks_that_expire_at_the_concurrency_limit_are_throttles(
    run: Minutes,
) -> None:
    """They are not failures."""

    def at_the_limit(watch: CloudWatch) -> None:
        HEALTHY(watch)
        watch.put("AWS/Lambda", "Throttles", [3])
        watch.put("AWS/SQS", "NumberOfMessagesSent", [1])

    assert run(at_the_limit, 5) == {"WorkerThrottlesAlarm"}


def test_one_bad_minute_raises_no_alarm(run: Minutes) -> None:
    everything = (Outcome.TIMEOUT, Outcome.UNAUTHORIZED)
    assert run(checks(*everything, overdue_seconds=100, unpublished=1)) == set()
    assert run(HEALTHY, 3) == set()


def test_a_minute_without_failures_counts_as_good(run: Minutes) -> None:
    for _ in range(5):
        run(checks(Outcome.TIMEOUT), 4)
        assert run(HEALTHY) == set()


def test_every_metric_sent_is_known_and_a_healthy_pass_sends_six(
    run: Minutes,
) -> None:
    assert len(run.watch.names(metrics.NAMESPACE)) == 6
    for minute in (
        *NO_CAUSE.values(),
        *(minute for cases in CAUSES.values() for minute, _ in cases),
    ):
        run(minute)
    assert run.watch.names(metrics.NAMESPACE) <= set(metrics.METRICS)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("100 * FILL(failed, 0) / checked", {0: 0.0, 2: 50.0}),
        ("FILL(failed, 0) + FILL(never, 0)", {0: 0.0, 1: 0.0, 2: 1.0}),
        ("failed + never", {}),
        ("SUM([failed, 0 * checked])", {0: 0.0, 2: 1.0}),
        ("IF(checked > 1, failed, 7)", {2: 1.0}),
        ("IF(checked > 1, 7, checked)", {0: 1.0, 2: 7}),
    ],
)
def test_metric_math_follows_cloudwatch(expression: str, expected: dict[int, float]) -> None:
    watch = CloudWatch()
    watch.minutes = 3
    series: dict[str, dict[int, float]] = {"failed": {2: 1.0}, "checked": {0: 1.0, 2: 2.0}}
    assert watch.calculate(expression, series | {"never": {}}) == expected

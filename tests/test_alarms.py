"""Every alarm of the template on the metrics that passes emit: what it is for, and nothing else."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from core import metrics
from core.domain.model import Outcome, Reason, Summary
from testkit.clock import NOON
from tests.alarms import CloudWatch

TEMPLATE = yaml_parse((Path(__file__).parents[1] / "template.yaml").read_text(encoding="utf-8"))
ALARMS: Mapping[str, Mapping[str, Any]] = {
    name: resource["Properties"]
    for name, resource in TEMPLATE["Resources"].items()
    if resource["Type"] == "AWS::CloudWatch::Alarm"
}
PASSES_A_MINUTE = 12

type Minute = Callable[[CloudWatch], None]


def passes(**given: Any) -> Minute:  # noqa: ANN401 (a Summary's fields)
    """A minute of passes that end like this."""

    def emit(watch: CloudWatch) -> None:
        scheduled(watch)
        for _pass in range(PASSES_A_MINUTE):
            summary = Summary(Reason.TICK, NOON, led=True, counted=True, duration_seconds=0.2)
            metrics.measure(replace(summary, **given))

    return emit


def checks(*outcomes: Outcome, **given: Any) -> Minute:  # noqa: ANN401 (a Summary's fields)
    return passes(open=10, outcomes=Counter(outcomes), latencies=[0.1] * len(outcomes), **given)


def aws(namespace: str, name: str, *values: float) -> Minute:
    """A minute that is well, but for a metric of AWS itself."""

    def put(watch: CloudWatch) -> None:
        WELL(watch)
        watch.put(namespace, name, values)

    return put


def nothing(_: CloudWatch) -> None:
    """No metric at all: the schedule has stopped."""


def scheduled(watch: CloudWatch) -> None:
    """The schedule tries to start the loop, and no pass reports."""
    watch.put("AWS/Scheduler", "InvocationAttemptCount", [1])


def failures(watch: CloudWatch) -> None:
    scheduled(watch)
    for _pass in range(PASSES_A_MINUTE):
        metrics.measure_failure()


def zeroes(watch: CloudWatch) -> None:
    WELL(watch)
    for namespace, name in (
        ("AWS/Lambda", "Errors"),
        ("AWS/Lambda", "Throttles"),
        ("AWS/SQS", "NumberOfMessagesSent"),
        ("AWS/States", "ExecutionsFailed"),
    ):
        watch.put(namespace, name, [0])


WELL = checks(*[Outcome.ACTIVE] * 10)
IDLE = passes()

# What each alarm is for, and after how many such minutes in a row it has to say so.
FOR: Mapping[str, list[tuple[Minute, int]]] = {
    "NoPassAlarm": [(scheduled, 2), (failures, 2), (nothing, 2)],
    "OverdueAlarm": [
        (checks(Outcome.ACTIVE, overdue_seconds=61), 3),
        (
            passes(open=10, overdue_seconds=3600),
            3,
        ),  # and nothing checked: billing asked for a pause
    ],
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
# Minutes that no alarm is for.
FINE: Mapping[str, Minute] = {
    "all is well": WELL,
    "no session is open": IDLE,
    "half of the checks fail": checks(Outcome.TIMEOUT, Outcome.ACTIVE),
    "nothing is found": checks(Outcome.NOT_FOUND),
    "everything is late, but not by much": checks(Outcome.ACTIVE, overdue_seconds=60),
    "AWS sends zeroes": zeroes,
}


class Run:
    """Minutes, one after the other, with the states of all alarms after each."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.watch = CloudWatch()

    def __call__(self, minute: Minute, times: int = 1) -> set[str]:
        """The names of the alarms that are not OK afterwards."""
        for _ in range(times):
            self._capsys.readouterr()
            minute(self.watch)
            self.watch.take(self._capsys.readouterr().out)
            self.watch.end_minute()
        return {name for name, alarm in ALARMS.items() if self.watch.state(alarm) != "OK"}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    run = Run(capsys)
    run(WELL, 10)
    return run


CASES = [
    pytest.param(name, minute, after, id=f"{name}-{n}")
    for name, cases in FOR.items()
    for n, (minute, after) in enumerate(cases)
]


def test_each_alarm_is_here() -> None:
    assert set(FOR) == set(ALARMS)


@pytest.mark.parametrize(("name", "minute", "after"), CASES)
def test_an_alarm_comes_when_it_should_and_not_before(
    run: Run, name: str, minute: Minute, after: int
) -> None:
    assert name not in run(minute, after - 1)
    assert name in run(minute)


@pytest.mark.parametrize(("name", "minute", "after"), CASES)
def test_an_alarm_goes_when_all_is_well_again(
    run: Run, name: str, minute: Minute, after: int
) -> None:
    run(minute, 2 * after)
    assert run(WELL, after) == set()


@pytest.mark.parametrize(("name", "minute", "after"), CASES)
def test_an_alarm_comes_as_well_where_nothing_was_measured_before(
    capsys: pytest.CaptureFixture[str], name: str, minute: Minute, after: int
) -> None:
    assert name in Run(capsys)(minute, after)


@pytest.mark.parametrize("minute", FINE.values(), ids=FINE)
def test_no_alarm_comes_when_nothing_is_wrong(run: Run, minute: Minute) -> None:
    for _ in range(10):
        assert run(minute) == set()


@pytest.mark.parametrize("minute", [nothing, scheduled, failures])
def test_where_no_pass_reports_no_other_alarm_than_no_pass_comes(run: Run, minute: Minute) -> None:
    assert run(minute, 10) == {"NoPassAlarm"}


def test_a_monitor_that_never_passes_makes_a_change_of_state_and_so_sends_a_mail(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, alarm = Run(capsys), ALARMS["NoPassAlarm"]
    run(nothing, 5)
    assert run.watch.state(alarm) == "INSUFFICIENT_DATA"
    run(scheduled, 2)
    assert run.watch.state(alarm) == "ALARM"


def test_checks_that_wait_in_vain_at_the_workers_limit_are_throttles_and_no_failures(
    run: Run,
) -> None:
    def at_the_limit(watch: CloudWatch) -> None:
        WELL(watch)
        watch.put("AWS/Lambda", "Throttles", [3])
        watch.put("AWS/SQS", "NumberOfMessagesSent", [1])

    assert run(at_the_limit, 5) == {"WorkerThrottlesAlarm"}


def test_one_bad_minute_is_no_news(run: Run) -> None:
    everything = (Outcome.TIMEOUT, Outcome.UNAUTHORIZED)
    assert run(checks(*everything, overdue_seconds=100, unpublished=1)) == set()
    assert run(WELL, 3) == set()


def test_a_minute_without_failures_among_bad_ones_counts_as_good(run: Run) -> None:
    for _ in range(5):
        run(checks(Outcome.TIMEOUT), 4)
        assert run(WELL) == set()


def test_every_metric_that_is_sent_is_known_and_a_healthy_hour_is_billed_six(
    run: Run,
) -> None:
    assert len(run.watch.names(metrics.NAMESPACE)) == 6
    for minute in (*FINE.values(), *(minute for cases in FOR.values() for minute, _ in cases)):
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
def test_metric_math_is_done_as_cloudwatch_does_it(
    expression: str, expected: dict[int, float]
) -> None:
    watch = CloudWatch()
    watch.minutes = 3
    series: dict[str, dict[int, float]] = {"failed": {2: 1.0}, "checked": {0: 1.0, 2: 2.0}}
    assert watch.calculate(expression, series | {"never": {}}) == expected

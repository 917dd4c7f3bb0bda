"""Every alarm of the template, on the metrics that passes and AWS emit, as late as these may come.

An alarm is raised for its cause only, in the minutes that docs/operate.md promises, and one cause
raises one alarm.
"""

import copy
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from datetime import timedelta
from functools import cache, partial
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from core import metrics
from core.domain.model import Outcome, Reason
from core.domain.summary import Summary
from core.domain.waiting import NOT_ASKED, Wait, Waiting
from testkit.clock import NOON
from tests.cloudwatch import (
    ALARM,
    INSUFFICIENT_DATA,
    OK,
    CloudWatch,
    calculate,
    emf_values,
    next_state,
)
from tests.passes.virtual import VirtualMonitor

ROOT = Path(__file__).parents[1]
TEMPLATE = yaml_parse((ROOT / "template.yaml").read_text(encoding="utf-8"))
ALARMS: Mapping[str, Mapping[str, Any]] = {
    name.removesuffix("Alarm"): resource["Properties"]
    for name, resource in TEMPLATE["Resources"].items()
    if resource["Type"] == "AWS::CloudWatch::Alarm"
}
EMF, STATES, SCHEDULER, LAMBDA = metrics.NAMESPACE, "AWS/States", "AWS/Scheduler", "AWS/Lambda"
WORKER, API = "CheckSessionsFunction", "ApiFunction"
DELAYS = (0, 1, 2, 15)
# After this many healthy minutes every alarm is over, with metrics that are 15 minutes late.
OVER = 36

type Minute = dict[tuple[str, str], list[float]]


class Setup(NamedTuple):
    """Of a shop whose sessions are all old."""

    interval: int = 5
    cadence_minutes: int = 1  # all sessions are checked in one of so many minutes


RECOMMENDED_CADENCE = 5
SETUPS = [Setup(*given) for given in product((5, 60), (1, RECOMMENDED_CADENCE))]

# Each minute of a situation, from its beginning.
type Situation = Callable[[Setup, int], Minute]


def emitted(measure: Callable[[], None], times: int) -> Minute:
    with redirect_stdout(io.StringIO()) as log:
        measure()
    return {metric: values * times for metric, values in emf_values(log.getvalue()).items()}


def passes(
    waiting: Mapping[str, int] | None = None,
    checks: Iterable[Outcome] = (),
    open: int = 100,  # noqa: A002 (a field of the summary)
    growth: int = 0,
    **given: Any,  # noqa: ANN401 (fields of the summary)
) -> Situation:
    """Minutes of passes that find sessions waiting, by cause, and `growth` more in each minute."""

    @cache
    def minute_of(count: int, more: int, *, checked: bool) -> Minute:
        since = NOON - timedelta(minutes=2)
        causes = {cause: Wait(n + more, since) for cause, n in (waiting or {}).items()}
        summary = Summary(
            Reason.TICK,
            NOON,
            led=True,
            counted=True,
            open=open + more,
            waiting=Waiting(NOON, 120.0, causes),
            outcomes=Counter(checks if checked else ()),
            latencies=[0.1] * 100 if checked else [],
            duration_seconds=0.2,
        )
        summary = summary._replace(**given)
        return emitted(lambda: metrics.measure(summary), count) | started(count)

    return lambda setup, minute: minute_of(
        60 // setup.interval, minute * growth, checked=minute % setup.cadence_minutes == 0
    )


@cache
def started(workers: int) -> Minute:
    """What AWS emits while the loop starts workers, and all is well."""
    return {
        (SCHEDULER, "InvocationAttemptCount"): [1.0],
        (LAMBDA, f"Invocations/{WORKER}"): [1.0] * workers,
        (LAMBDA, f"Errors/{WORKER}"): [0.0] * workers,
        (LAMBDA, f"Throttles/{WORKER}"): [0.0] * workers,
    }


ACTIVE = [Outcome.ACTIVE] * 100
healthy = passes(checks=ACTIVE)


def aws(namespace: str, *names: str, value: float = 1.0) -> Situation:
    """Healthy minutes with this value of metrics of AWS."""
    return lambda setup, minute: (
        healthy(setup, minute) | {(namespace, name): [value] for name in names}
    )


def nothing(_setup: Setup, _minute: int) -> Minute:
    """The schedule has stopped."""
    return {}


def unstarted(_setup: Setup, _minute: int) -> Minute:
    """The schedule starts the loop, which can start no worker."""
    return {(SCHEDULER, "InvocationAttemptCount"): [1.0]}


def undelivered(setup: Setup, minute: int) -> Minute:
    """No execution can be started any more; the last one goes on for three minutes."""
    dropped: Minute = {
        (SCHEDULER, "InvocationAttemptCount"): [4.0],
        (SCHEDULER, "InvocationDroppedCount"): [1.0],
    }
    return healthy(setup, minute) | dropped if minute < 4 else dropped


def failing_executions(setup: Setup, minute: int) -> Minute:
    """Every execution fails; the last one before that goes on for three minutes."""
    failed: Minute = unstarted(setup, minute) | {(STATES, "ExecutionsFailed"): [1.0]}
    return healthy(setup, minute) | failed if minute < 4 else failed


def failing_passes(setup: Setup, _minute: int) -> Minute:
    count = 60 // setup.interval
    failed = {(LAMBDA, f"Errors/{WORKER}"): [1.0] * count}
    return emitted(metrics.measure_failure, count) | started(count) | failed


def throttled(setup: Setup, _minute: int) -> Minute:
    """Lambda starts no worker at all."""
    throttles: Minute = {(LAMBDA, f"Throttles/{WORKER}"): [1.0] * (60 // setup.interval)}
    return unstarted(setup, 0) | throttles


UNAUTHORIZED, UNKNOWN = Outcome.UNAUTHORIZED.value, Outcome.UNKNOWN_STATUS.value
TIMEOUT, DEFERRED = Outcome.TIMEOUT.value, Outcome.DEFERRED.value

# The one alarm of each situation, and after how many minutes it comes if no metric is late.
CAUSES: Mapping[str, tuple[str, int, Situation]] = {
    "the schedule stops": ("NoPass", 7, nothing),
    "the loop starts no worker": ("NoPass", 5, unstarted),
    "the loop cannot be started": ("NoPass", 9, undelivered),
    "all executions fail": ("NoPass", 9, failing_executions),
    "billing is away": ("SessionsWaiting", 5, passes({TIMEOUT: 100}, [Outcome.TIMEOUT] * 100)),
    "90 of 100 fail": (
        "SessionsWaiting",
        5,
        passes({"unexpected_status": 90}, [Outcome.UNEXPECTED_STATUS] * 9 + ACTIVE[:10]),
    ),
    "a tenth waits, by several causes": (
        "SessionsWaiting",
        5,
        passes({UNAUTHORIZED: 4, UNKNOWN: 2, TIMEOUT: 4}, ACTIVE[:90]),
    ),
    "billing knows no session": (
        "SessionsWaiting",
        5,
        passes(checks=[Outcome.NOT_FOUND] * 100, only_not_found=100),
    ),
    "a third is of another account": (
        "SessionsWaiting",
        5,
        passes({UNAUTHORIZED: 33}, ACTIVE[:67]),
    ),
    "nobody is asked": ("Overdue", 3, passes({NOT_ASKED: 100})),
    "one session is not asked": ("Overdue", 3, passes({NOT_ASKED: 1}, ACTIVE[:99])),
    "the only open session fails": ("SessionsWaiting", 5, passes({TIMEOUT: 1}, open=1)),
    "the key is refused": (
        "Unauthorized",
        2,
        passes({UNAUTHORIZED: 100}, [Outcome.UNAUTHORIZED] * 100),
    ),
    # Two more payments a minute: 240 in two hours.
    "an unknown word": (
        "UnknownStatus",
        5,
        passes({UNKNOWN: 0}, [Outcome.UNKNOWN_STATUS], open=1000, growth=2),
    ),
    "billing allows too little": (
        "Limited",
        5,
        passes({NOT_ASKED: 60}, allowed=4.0, demand=20.0),
    ),
    "billing allows a little too little": ("Limited", 5, passes(allowed=25.0, demand=27.0)),
    "no event is accepted": (
        "EventsFailed",
        2,
        passes({DEFERRED: 30}, [Outcome.DEFERRED] * 30, unpublished=30),
    ),
    "passes fail": ("WorkerErrors", 2, failing_passes),
    "some passes fail": (
        "WorkerErrors",
        2,
        aws(LAMBDA, f"Errors/{WORKER}"),
    ),
    "no worker gets in": ("WorkerThrottles", 2, throttled),
    "some workers are throttled": (
        "WorkerThrottles",
        2,
        aws(LAMBDA, f"Throttles/{WORKER}"),
    ),
    "an execution in each minute fails": (
        "LoopFailed",
        5,
        aws(STATES, "ExecutionsFailed"),
    ),
    "an execution in each minute times out": (
        "LoopFailed",
        5,
        aws(STATES, "ExecutionsTimedOut"),
    ),
    "starts of the loop are dropped": (
        "LoopFailed",
        5,
        aws(SCHEDULER, "InvocationDroppedCount"),
    ),
    "the API crashes": ("ApiErrors", 2, aws(LAMBDA, f"Errors/{API}")),
}
# No alarm, however long they last.
NO_CAUSE: Mapping[str, Situation] = {
    "all checks succeed": healthy,
    "no session is open": passes(open=0),
    "one of 200 answers 403": passes({UNAUTHORIZED: 1}, [Outcome.UNAUTHORIZED], open=200),
    "a few wait": passes({TIMEOUT: 7, UNKNOWN: 2}, ACTIVE[:91]),
    "half of them are not found": passes(checks=[*[Outcome.NOT_FOUND] * 50, *ACTIVE[:50]]),
    "a few sessions, none of which is found": passes(open=9, only_not_found=9),
    "sessions have no id": passes({"invalid_session": 50}, ACTIVE[:50]),
    "billing allows just what is wanted": passes(checks=ACTIVE, allowed=25.0, demand=26.0),
    # Two regions on one database: the other one leads every tick.
    "another monitor leads": lambda setup, _: started(60 // setup.interval),
    "AWS sends zeroes": lambda setup, minute: (
        aws(STATES, "ExecutionsFailed", "ExecutionsTimedOut", value=0)(setup, minute)
        | aws(SCHEDULER, "InvocationDroppedCount", value=0)(setup, minute)
        | aws(LAMBDA, f"Errors/{API}", value=0)(setup, minute)
    ),
}


def late(delay: int) -> Mapping[str, int]:
    """Every source is late by so many minutes; Lambda's metrics come within two."""
    return {EMF: delay, STATES: delay, SCHEDULER: delay, LAMBDA: min(delay, 2)}


class Stack:
    """The alarms of a stack, minute by minute."""

    def __init__(
        self,
        setup: Setup = Setup(),  # noqa: B008 (immutable)
        delays: Mapping[str, int] | None = None,
        *,
        alarms: Mapping[str, Mapping[str, Any]] = ALARMS,
        more_points: int = 2,
        healthy_minutes: int = OVER,
    ) -> None:
        self._setup = setup
        self.watch = CloudWatch(alarms, delays, more_points)
        self.run(healthy, healthy_minutes)

    def run(self, situation: Situation, minutes: int) -> set[str]:
        """The alarms that are on in any of the minutes."""
        return set().union(*(self.on for _ in self._minutes(situation, minutes)))

    def first(self, situation: Situation, name: str) -> int:
        """In which minute of the situation the alarm comes."""
        return next(m for m in self._minutes(situation, 60) if name in self.on)

    def _minutes(self, situation: Situation, minutes: int) -> Iterator[int]:
        for minute in range(minutes):
            for metric, values in situation(self._setup, minute).items():
                self.watch.put(metric, values)
            self.watch.end_minute()
            yield minute + 1

    @property
    def on(self) -> set[str]:
        """An alarm that had data and has none any more counts as on, because it notifies."""
        return {
            name
            for name, state in self.watch.states.items()
            if state == ALARM
            or (state == INSUFFICIENT_DATA and ALARMS[name].get("InsufficientDataActions"))
        }


@cache
def _healthy_stack() -> Stack:
    return Stack()


def alarms_after(minute: Minute, minutes: int = 20) -> set[str]:
    """The alarms that are on when a healthy stack has emitted this minute so many times."""
    stack = copy.deepcopy(_healthy_stack())
    stack.run(lambda _setup, _minute: minute, minutes)
    return stack.on


def test_every_alarm_of_the_template_has_a_cause() -> None:
    assert {name for name, _, _ in CAUSES.values()} == set(ALARMS)


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("cause", CAUSES)
def test_alarm_comes_in_time_however_late_its_metrics_are(cause: str, setup: Setup) -> None:
    """A metric that is late makes the alarm as late, at most; it is never earlier than promised."""
    name, promised, situation = CAUSES[cause]
    alarm = {name: ALARMS[name]}
    for delay, more_points in (*((delay, 2) for delay in DELAYS), (15, 10)):
        stack = Stack(setup, late(delay), alarms=alarm, more_points=more_points)
        assert stack.on == set()
        came = stack.first(situation, name)
        # Without any data, an alarm waits until the last point has left the range.
        waits = more_points - 2 if name == "NoPass" else 0
        assert promised <= came <= promised + delay + waits


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 15])
@pytest.mark.parametrize("cause", CAUSES)
def test_one_cause_raises_one_alarm_and_tells_when_it_is_over(cause: str, delay: int) -> None:
    name, _, situation = CAUSES[cause]
    stack = Stack(delays=late(delay))
    before = len(stack.watch.notifications)
    assert stack.run(situation, 30) == {name}
    stack.run(healthy, OVER)
    assert stack.on == set()
    told = stack.watch.notifications[before:]
    assert [n.alarm for n in told] == [name, name]
    assert told[1].new == OK
    # CloudWatch tells the end of a schedule's stop as it tells an alarm's birth.
    by_mail = [is_mailed(n.old, n.new) for n in told]
    assert by_mail == [True, told[0].new != INSUFFICIENT_DATA]


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("situation", NO_CAUSE.values(), ids=NO_CAUSE)
def test_no_alarm_is_raised_if_nothing_is_wrong(situation: Situation, setup: Setup) -> None:
    for delay in (0, 15):
        assert Stack(setup, late(delay), healthy_minutes=5).run(situation, 40) == set()


@pytest.mark.parametrize("cause", CAUSES)
def test_one_bad_minute_raises_no_alarm(cause: str) -> None:
    _, _, situation = CAUSES[cause]
    stack = Stack()
    assert stack.run(situation, 1) | stack.run(healthy, OVER) == set()


def test_it_may_be_one_source_alone_that_is_late() -> None:
    for source, delay in product((EMF, STATES, SCHEDULER, LAMBDA), (1, 2, 15)):
        delays = {source: min(delay, 2) if source == LAMBDA else delay}
        assert Stack(delays=delays).run(healthy, 30) == set()


def test_a_few_waiting_sessions_do_not_hide_others() -> None:
    """An alarm that is on for its own sessions takes no others out of SessionsWaiting."""
    both = passes({UNKNOWN: 12, TIMEOUT: 300}, open=1000)
    assert Stack().run(both, 10) == {"UnknownStatus", "SessionsWaiting"}


def test_billing_away_for_105_minutes_at_the_recommended_cadence() -> None:
    """All sessions are over an hour old: a fifth of them is asked in each minute."""

    def away(setup: Setup, minute: int) -> Minute:
        fifth = passes({TIMEOUT: min(100, 20 * (minute + 1))}, [Outcome.TIMEOUT] * 20)
        return fifth(setup, minute)

    stack = Stack()
    assert stack.run(away, 4) == set()
    assert stack.run(away, 101) == {"SessionsWaiting"}
    assert stack.on == {"SessionsWaiting"}


@pytest.mark.slow
class TestPasses:
    """What passes really emit, in virtual time, with all sessions asked in the first minute."""

    @pytest.mark.parametrize(
        ("env", "minutes"),
        [
            # A session waits from two intervals after it was due on.
            ({}, 5),
            ({"CHECK_INTERVAL_SECONDS": "60"}, 7),
            # It is due four minutes after billing has gone.
            ({"CHECK_INTERVAL_SECONDS": "60", "CHECK_CADENCE": "5m"}, 11),
        ],
    )
    def test_billing_goes_after_a_minute(self, env: Mapping[str, str], minutes: int) -> None:
        monitor = VirtualMonitor(lambda *_: 0.1 if monitor.loop.now < 60 else math.inf, **env)
        assert alarms_of(monitor, 1 + minutes) == {"SessionsWaiting": 1 + minutes}

    def test_one_of_twenty_never_answers(self) -> None:
        monitor = VirtualMonitor(
            lambda session, _: math.inf if session == "checkout_7" else 0.1,
            CHECK_INTERVAL_SECONDS="60",
            CHECK_CADENCE="5m",
        )
        assert alarms_of(monitor, 30) == {}


def alarms_of(monitor: VirtualMonitor, minutes: int) -> Mapping[str, int]:
    """After how many minutes of a monitor of 20 sessions each alarm comes."""
    monitor.open(20)
    monitor.run(60 * minutes // monitor.settings.interval_seconds)
    of_minute = defaultdict(list)
    for summary in monitor.summaries:
        of_minute[int((summary.finished_at - NOON).total_seconds() // 60)].append(summary)
    watch = CloudWatch(ALARMS)
    found: dict[str, int] = {}
    for minute in range(minutes):
        log = [emitted(partial(metrics.measure, summary), 1) for summary in of_minute[minute]]
        for metric, values in chain.from_iterable(m.items() for m in (started(12), *log)):
            watch.put(metric, values)
        watch.end_minute()
        found |= {n: minute + 1 for n, s in watch.states.items() if s == ALARM and n not in found}
    return found


class TestBirth:
    """A new stack: its alarms have no data at first."""

    @pytest.mark.parametrize("delay", DELAYS)
    @pytest.mark.parametrize("first_pass", [0, 1, 2])
    def test_a_healthy_stack_sends_nothing(self, delay: int, first_pass: int) -> None:
        stack = Stack(delays=late(delay), healthy_minutes=0)
        stack.run(nothing, 3)
        stack.run(unstarted, first_pass)
        stack.run(healthy, 40)
        assert {n.new for n in stack.watch.notifications} <= {OK}
        assert not [n for n in stack.watch.notifications if is_mailed(n.old, n.new)]

    def test_a_stack_that_never_makes_a_pass_tells_so(self) -> None:
        for situation in (unstarted, failing_passes, throttled):
            stack = Stack(healthy_minutes=0)
            stack.run(situation, 6)
            mailed = [n for n in stack.watch.notifications if is_mailed(n.old, n.new)]
            assert [n.new for n in mailed] == [ALARM]

    @pytest.mark.parametrize(
        ("old", "new", "mailed"),
        [
            (INSUFFICIENT_DATA, OK, False),
            (INSUFFICIENT_DATA, ALARM, True),
            (OK, ALARM, True),
            (ALARM, OK, True),
            (OK, INSUFFICIENT_DATA, True),
        ],
    )
    def test_only_the_first_ok_is_not_mailed(self, old: str, new: str, mailed: bool) -> None:
        assert is_mailed(old, new) == mailed


def is_mailed(old: str, new: str) -> bool:
    """Whether SNS sends CloudWatch's message by e-mail."""
    subscription = TEMPLATE["Resources"]["AlarmSubscription"]["Properties"]
    assert subscription["FilterPolicyScope"] == "MessageBody"
    return is_accepted(subscription["FilterPolicy"], {"OldStateValue": old, "NewStateValue": new})


def is_accepted(policy: Mapping[str, Any], body: Mapping[str, str]) -> bool:
    """Whether the body fits a filter policy of SNS."""
    return all(
        any(is_accepted(either, body) for either in wanted)
        if field == "$or"
        else any(
            body[field] != one["anything-but"] if isinstance(one, dict) else body[field] == one
            for one in wanted
        )
        for field, wanted in policy.items()
    )


class TestRules:
    """The tables of the User Guide."""

    # - is a missing point, o one that is within the threshold, x one that breaches it.
    @pytest.mark.parametrize(
        ("points", "to_alarm", "states"),  # for missing, ignore, breaching, notBreaching
        [
            ("o-x-x", 3, [OK, OK, OK, OK]),
            ("o----", 3, [OK, OK, OK, OK]),
            ("-----", 3, [INSUFFICIENT_DATA, "current", ALARM, OK]),
            ("oxx-x", 3, [ALARM, ALARM, ALARM, ALARM]),
            ("x----", 3, [ALARM, "current", ALARM, OK]),
            ("--x--", 3, [ALARM, "current", ALARM, OK]),
            # Not yet: the next point may be good.
            ("----x", 3, [INSUFFICIENT_DATA, "current", ALARM, OK]),
            ("---x-", 3, [INSUFFICIENT_DATA, "current", ALARM, OK]),
            ("---xo", 3, [OK, OK, OK, OK]),
            ("o-x-x", 2, [ALARM, ALARM, ALARM, ALARM]),
            ("ooxox", 2, [ALARM, ALARM, ALARM, ALARM]),
            ("o-x--", 2, [OK, OK, ALARM, OK]),
            ("----o", 2, [OK, OK, ALARM, OK]),
            ("---x-", 2, [ALARM, "current", ALARM, OK]),
            ("----x", 2, [INSUFFICIENT_DATA, "current", ALARM, OK]),
        ],
    )
    def test_three_of_five_points_are_evaluated(
        self, points: str, to_alarm: int, states: list[str]
    ) -> None:
        parsed = [{"x": True, "o": False}.get(point) for point in points]
        found = [
            next_state(parsed, evaluated=3, to_alarm=to_alarm, missing=how, current="current")
            for how in ("missing", "ignore", "breaching", "notBreaching")
        ]
        assert found == states

    @pytest.mark.parametrize(
        ("expression", "expected"),
        [
            ("a + b", [31, 0, 20, None, 30]),
            ("a - b", [29, 0, -20, None, -30]),
            ("0 * a", [0, 0, None, None, None]),
            ("a / b", [30, None, 0, None, 0]),  # no value where it would divide by zero
            ("b / a", [1 / 30, None, None, None, None]),
            ("a > b", [1, 0, 0, None, 0]),
            ("a < b", [0, 0, 1, None, 1]),
            ("SUM([a, b])", [31, 0, 20, None, 30]),
            ("SUM([a, 0 * b])", [30, 0, 0, None, 0]),
            ("FILL(a, 7)", [30, 0, 7, 7, 7]),
            ("IF(c, a, b)", [30, 0, 20, None, None]),
            ("IF(c, 5, b)", [5, 5, 20, None, None]),
            ("IF(c, b, 5)", [1, 0, 5, 5, None]),
            ("IF(c, b)", [1, 0, None, None, None]),
            ("IF(a > 15, b)", [1, None, None, None, None]),
        ],
    )
    def test_missing_values_in_metric_math(
        self, expression: str, expected: list[float | None]
    ) -> None:
        rows: Mapping[str, list[float | None]] = {
            "a": [30, 0, None, None, None],
            "b": [1, None, 20, None, 30],
            "c": [1, 1, 0, 0, None],
        }
        series = {
            name: {minute: value for minute, value in enumerate(row) if value is not None}
            for name, row in rows.items()
        }
        found = calculate(expression, series, range(5))
        assert [found.get(minute) for minute in range(5)] == expected

    def test_fill_hides_a_metric_that_is_late(self) -> None:
        """So no alarm uses it: an alarm of one minute never sees a point but FILL's."""
        metric = {
            "Namespace": STATES,
            "MetricName": "ExecutionsFailed",
            "Dimensions": [],
        }
        stat = {"Metric": metric, "Stat": "Sum", "Period": 60}
        alarm = {
            "Metrics": [
                {"Id": "failed", "ReturnData": False, "MetricStat": stat},
                {"Id": "filled", "Expression": "FILL(failed, 0)"},
            ],
            "EvaluationPeriods": 1,
            "ComparisonOperator": "GreaterThanOrEqualToThreshold",
            "Threshold": 1,
            "TreatMissingData": "notBreaching",
        }
        for delay, state in ((0, ALARM), (1, OK)):
            watch = CloudWatch({"LoopFailed": alarm}, {STATES: delay})
            for _ in range(10):
                watch.put((STATES, "ExecutionsFailed"), [1])
                watch.end_minute()
            assert watch.states == {"LoopFailed": state}

    def test_alarms_use_no_function_that_the_guide_advises_against(self) -> None:
        used = {
            function
            for alarm in ALARMS.values()
            for query in alarm.get("Metrics", [])
            for function in re.findall(r"[A-Z_]{2,}(?=\()", query.get("Expression", ""))
        }
        assert used <= {"IF", "SUM"}  # SUM of a list of metrics, not over time


def test_every_metric_sent_is_known_and_a_healthy_pass_sends_six() -> None:
    setup = Setup()
    sent = {name for namespace, name in healthy(setup, 0) if namespace == EMF}
    assert len(sent) == 6
    for situation in (*NO_CAUSE.values(), *(situation for _, _, situation in CAUSES.values())):
        sent |= {name for namespace, name in situation(setup, 0) if namespace == EMF}
    assert sent <= set(metrics.METRICS)


@pytest.mark.parametrize("name", ALARMS)
def test_the_promise_of_each_alarm_is_in_its_paragraph(name: str) -> None:
    """A sentence in italics opens it, and says after how many minutes the alarm comes."""
    text = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")
    _, _, paragraph = text.partition(f"\n### {name}\n\n*")
    alarm = ALARMS[name]
    minutes = alarm.get("DatapointsToAlarm", alarm["EvaluationPeriods"])
    word = {2: "two", 3: "three", 5: "five"}[minutes]
    promise = rf"\b{word}( of five)? minutes\b"
    assert re.search(promise, paragraph.partition("*")[0])
    assert re.search(promise, alarm["AlarmDescription"])
    assert f"| [{name}](#{name.lower()}) | {minutes} minutes |" in text

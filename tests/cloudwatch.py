"""CloudWatch as far as the template's alarms need it, by the rules of its User Guide.

"How alarm state is evaluated when data is missing" and "Using metric math" have the rules for
missing values. A metric may come late. An alarm retrieves more data points than it evaluates: the
guide's examples retrieve two more, and it does not promise how many.
"""

import ast
import json
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple

type Series = dict[int, float]  # by minute

OK, ALARM, INSUFFICIENT_DATA = "OK", "ALARM", "INSUFFICIENT_DATA"
# Retrieved beside those that are evaluated.
MORE_POINTS = 2

OPERATORS: Mapping[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
}
BREACHES: Mapping[str, Callable[[float, float], bool]] = {
    "GreaterThanThreshold": operator.gt,
    "GreaterThanOrEqualToThreshold": operator.ge,
    "LessThanThreshold": operator.lt,
    "LessThanOrEqualToThreshold": operator.le,
}
STATISTICS: Mapping[str, Callable[[list[float]], float]] = {
    "Sum": math.fsum,
    "Maximum": max,
    "Average": fmean,
}
ACTIONS = {
    OK: "OKActions",
    ALARM: "AlarmActions",
    INSUFFICIENT_DATA: "InsufficientDataActions",
}


class Notification(NamedTuple):
    """A message to the alarms' topic."""

    minute: int
    alarm: str
    old: str
    new: str


class CloudWatch:
    """Metrics and alarms by minute. There is one stack, so there are no dimensions but functions.

    `delays` says after how many minutes the metrics of a namespace can be read.
    """

    def __init__(
        self,
        alarms: Mapping[str, Mapping[str, Any]],
        delays: Mapping[str, int] | None = None,
        more_points: int = MORE_POINTS,
    ) -> None:
        self.minutes = 0
        self.states = dict.fromkeys(alarms, INSUFFICIENT_DATA)
        self.notifications: list[Notification] = []
        self._alarms = alarms
        self._delays = delays or {}
        self._more_points = more_points
        self._values: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(dict)

    def put(self, metric: tuple[str, str], values: Iterable[float]) -> None:
        """Add values of a metric (see `key`) to the current minute."""
        self._values[metric].setdefault(self.minutes, []).extend(values)

    def end_minute(self) -> None:
        """Evaluate every alarm, and notify of each change of its state."""
        self.minutes += 1
        for name, alarm in self._alarms.items():
            old = self.states[name]
            new = self.states[name] = self._next_state(alarm, old)
            if new != old and alarm.get(ACTIONS[new]):
                self.notifications.append(Notification(self.minutes, name, old, new))

    def _next_state(self, alarm: Mapping[str, Any], current: str) -> str:
        wanted = alarm["EvaluationPeriods"]
        retrieved = range(self.minutes - wanted - self._more_points, self.minutes)
        series = self._watched(alarm, retrieved)
        breaches, threshold = BREACHES[alarm["ComparisonOperator"]], alarm["Threshold"]
        return next_state(
            [breaches(series[m], threshold) if m in series else None for m in retrieved],
            evaluated=wanted,
            to_alarm=alarm.get("DatapointsToAlarm", wanted),
            missing=alarm["TreatMissingData"],
            current=current,
        )

    def _watched(self, alarm: Mapping[str, Any], minutes: range) -> Series:
        """What the alarm watches; all periods are one minute."""
        if "Metrics" not in alarm:
            return self._statistic(alarm, alarm["Statistic"], minutes)
        queries = alarm["Metrics"]
        stats = {query["Id"]: query["MetricStat"] for query in queries if "MetricStat" in query}
        series = {
            id_: self._statistic(stat["Metric"] | {"Period": stat["Period"]}, stat["Stat"], minutes)
            for id_, stat in stats.items()
        }
        [watched] = [query for query in queries if query.get("ReturnData", True)]
        return calculate(watched["Expression"], series, minutes)

    def _statistic(self, metric: Mapping[str, Any], statistic: str, minutes: range) -> Series:
        assert metric["Period"] == 60
        values = self._values.get(key(metric), {})
        readable = self.minutes - self._delays.get(metric["Namespace"], 0)
        return {
            minute: STATISTICS[statistic](values[minute])
            for minute in minutes
            if minute < readable and minute in values
        }


def key(metric: Mapping[str, Any]) -> tuple[str, str]:
    """`(namespace, name)`, the name of a metric of Lambda with its function's: `Errors/F`."""
    if metric["Namespace"] != "AWS/Lambda":
        return metric["Namespace"], metric["MetricName"]
    [dimension] = metric["Dimensions"]
    return metric["Namespace"], f"{metric['MetricName']}/{dimension['Value']['Ref']}"


def emf_values(log: str) -> dict[tuple[str, str], list[float]]:
    """The values of the EMF records in these log lines, by metric."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in log.splitlines():
        record: dict[str, Any] = json.loads(line)
        for directive in record.get("_aws", {}).get("CloudWatchMetrics", []):
            for metric in directive["Metrics"]:
                value = record[metric["Name"]]
                found[directive["Namespace"], metric["Name"]] += (
                    value if isinstance(value, list) else [value]
                )
    return found


def next_state(
    points: Sequence[bool | None],
    *,
    evaluated: int,
    to_alarm: int,
    missing: str,
    current: str,
) -> str:
    """An alarm's state from the data points retrieved, the oldest first.

    A point says whether it breaches; None: it is missing. `missing` is TreatMissingData, which is
    used for as few points as possible: existing ones are evaluated, however old.
    """
    existing = [point for point in points if point is not None][-evaluated:]
    breaching = sum(existing)
    lacking = evaluated - len(existing)
    if lacking and missing == "breaching":
        breaching += lacking
    elif lacking and missing in ("missing", "ignore") and all(existing) and breaching < to_alarm:
        # No point is good. The next ones may be, so one that breaches has to be old enough.
        oldest = len(points) - points.index(True) if existing else 0
        if missing == "ignore":
            return current
        return ALARM if existing and oldest >= to_alarm else INSUFFICIENT_DATA
    return ALARM if breaching >= to_alarm else OK


def calculate(expression: str, series: Mapping[str, Series], minutes: range) -> Series:
    """A metric math expression over the minutes retrieved; `series` are given by their ids."""
    found = _value(_parsed(expression), series, minutes)
    assert isinstance(found, dict), f"{expression} is not a time series"
    return found


@cache
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


def _value(node: ast.expr, series: Mapping[str, Series], minutes: range) -> Series | float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name):
            return series[name]
        case (
            ast.BinOp(left=left, op=op, right=right)
            | ast.Compare(left=left, ops=[op], comparators=[right])
        ):
            values = (_value(n, series, minutes) for n in (left, right))
            return _combined(OPERATORS[type(op)], *values)
        case ast.Call(func=ast.Name(id="IF"), args=[condition, *results]):
            return _chosen(
                _value(condition, series, minutes),
                *(_value(result, series, minutes) for result in results),
            )
        case ast.Call(func=ast.Name(id="SUM"), args=[ast.List(elts=elements)]):
            summed: Series = {}
            for element in elements:
                added = _value(element, series, minutes)
                assert isinstance(added, dict)
                for minute, value in added.items():
                    summed[minute] = summed.get(minute, 0) + value
            return summed
        case ast.Call(func=ast.Name(id="FILL"), args=[filled, ast.Constant(value=number)]):
            given = _value(filled, series, minutes)
            assert isinstance(given, dict)
            return dict.fromkeys(minutes, float(number)) | given  # type: ignore[arg-type]
    raise AssertionError(f"not supported: {ast.unparse(node)}")


def _combined(function: Callable[[float, float], float], *values: Series | float) -> Series | float:
    """Arithmetic or a comparison. A missing value is 0 in a minute in which another one exists.

    A division by zero has no value.
    """
    if not any(isinstance(value, dict) for value in values):
        return function(*(value for value in values if not isinstance(value, dict)))
    found: Series = {}
    for minute in _minutes(values):
        left, right = (v.get(minute, 0) if isinstance(v, dict) else v for v in values)
        if function is not operator.truediv or right:
            found[minute] = function(left, right)
    return found


def _chosen(
    condition: Series | float, then: Series | float, otherwise: Series | float | None = None
) -> Series:
    """IF. Where the condition is true and the value is missing, it is 0; where false, dropped."""
    assert isinstance(condition, dict)
    found: Series = {}
    for minute, true in condition.items():
        if true:
            found[minute] = then.get(minute, 0) if isinstance(then, dict) else then
        elif isinstance(otherwise, dict):
            if minute in otherwise:
                found[minute] = otherwise[minute]
        elif otherwise is not None:
            found[minute] = otherwise
    return found


def _minutes(values: Iterable[Series | float]) -> set[int]:
    return {minute for value in values if isinstance(value, dict) for minute in value}

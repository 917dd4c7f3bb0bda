"""CloudWatch as far as the template's alarms need it: statistics, metric math, alarm states.

A series has values by minute. In a minute without a value an expression has none either, except
for FILL, and for SUM of a list, which adds the values that exist.
"""

import ast
import json
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from statistics import fmean
from typing import Any

type Series = dict[int, float]  # by minute

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


class CloudWatch:
    """Metrics by minute. There is one stack, so dimensions are left out."""

    def __init__(self) -> None:
        self.minutes = 0
        self._values: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(dict)

    def put(self, namespace: str, name: str, values: Iterable[float]) -> None:
        """Add values to the current minute."""
        self._values[namespace, name].setdefault(self.minutes, []).extend(values)

    def ingest(self, log: str) -> None:
        """Add the metrics of the EMF records in these log lines."""
        for line in log.splitlines():
            record: dict[str, Any] = json.loads(line)
            for directive in record.get("_aws", {}).get("CloudWatchMetrics", []):
                for metric in directive["Metrics"]:
                    value = record[metric["Name"]]
                    values = value if isinstance(value, list) else [value]
                    self.put(directive["Namespace"], metric["Name"], values)

    def end_minute(self) -> None:
        self.minutes += 1

    def names(self, namespace: str) -> set[str]:
        return {name for found, name in self._values if found == namespace}

    def state(self, alarm: Mapping[str, Any]) -> str:
        """An alarm's state after the minutes that have ended. Periods are one minute."""
        series, period = self._watched(alarm)
        assert period == 60
        wanted = alarm["EvaluationPeriods"]
        treat = alarm["TreatMissingData"]
        assert treat in ("breaching", "notBreaching", "missing")
        breaches = BREACHES[alarm["ComparisonOperator"]]
        window = range(self.minutes - wanted, self.minutes)
        if treat == "missing" and not any(minute in series for minute in window):
            return "INSUFFICIENT_DATA"
        breaching = sum(
            breaches(series[minute], alarm["Threshold"])
            if minute in series
            else treat == "breaching"
            for minute in window
        )
        return "ALARM" if breaching >= alarm.get("DatapointsToAlarm", wanted) else "OK"

    def _watched(self, alarm: Mapping[str, Any]) -> tuple[Series, int]:
        """The values that the alarm watches, and their period in seconds."""
        if "Metrics" not in alarm:
            return self._statistic(alarm, alarm["Statistic"]), alarm["Period"]
        queries = alarm["Metrics"]
        stats = {query["Id"]: query["MetricStat"] for query in queries if "MetricStat" in query}
        series = {id_: self._statistic(s["Metric"], s["Stat"]) for id_, s in stats.items()}
        [period] = {stat["Period"] for stat in stats.values()}
        [watched] = [query for query in queries if query.get("ReturnData", True)]
        return self.calculate(watched["Expression"], series), period

    def calculate(self, expression: str, series: Mapping[str, Series]) -> Series:
        """A metric math expression by minute; `series` are given by their ids."""
        found = self._value(ast.parse(expression, mode="eval").body, series)
        assert isinstance(found, dict), f"{expression} is not a time series"
        return found

    def _value(  # noqa: PLR0911 (one for each kind of node)
        self, node: ast.expr, series: Mapping[str, Series]
    ) -> Series | float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name):
                return series[name]
            case ast.BinOp(left=left, op=op, right=right):
                return combined(
                    OPERATORS[type(op)], *(self._value(n, series) for n in (left, right))
                )
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return combined(
                    OPERATORS[type(op)], *(self._value(n, series) for n in (left, right))
                )
            case ast.Call(func=ast.Name(id="IF"), args=arguments):
                values = (self._value(argument, series) for argument in arguments)
                return combined(
                    lambda condition, then, otherwise: then if condition else otherwise, *values
                )
            case ast.Call(func=ast.Name(id="SUM"), args=[ast.List(elts=elements)]):
                summed: Series = {}
                for element in elements:
                    added = self._value(element, series)
                    assert isinstance(added, dict)
                    for minute, value in added.items():
                        summed[minute] = summed.get(minute, 0) + value
                return summed
            case ast.Call(func=ast.Name(id="FILL"), args=[filled, ast.Constant(value=number)]):
                given = self._value(filled, series)
                assert isinstance(given, dict)
                return dict.fromkeys(range(self.minutes), float(number)) | given  # type: ignore[arg-type]
        raise AssertionError(f"not supported: {ast.unparse(node)}")

    def _statistic(self, metric: Mapping[str, Any], statistic: str) -> Series:
        values = self._values.get((metric["Namespace"], metric["MetricName"]), {})
        return {minute: STATISTICS[statistic](some) for minute, some in values.items()}


STATISTICS: Mapping[str, Callable[[list[float]], float]] = {
    "Sum": math.fsum,
    "Maximum": max,
    "Average": fmean,
    "SampleCount": len,
}


def combined(function: Callable[..., float], *values: Series | float) -> Series | float:
    """Apply the function in the minutes in which every series has a value."""
    lists = [set(value) for value in values if isinstance(value, dict)]
    if not lists:
        return function(*values)
    return {
        minute: function(*(v[minute] if isinstance(v, dict) else v for v in values))
        for minute in set.intersection(*lists)
    }

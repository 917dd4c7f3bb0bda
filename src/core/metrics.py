"""A pass's metrics, as one EMF record on standard output. Session ids are never metrics."""

import json
import os
import time
from collections.abc import Mapping, Sequence

from core.domain.model import Outcome
from core.domain.rate import is_too_low
from core.domain.summary import Summary
from core.domain.waiting import (
    CRITICAL_UNKNOWN,
    MIN_UNKNOWN_TO_BILLING,
    MOST,
    NOT_ASKED,
    OVERDUE_SECONDS,
    Waiting,
)

NAMESPACE = "CheckoutSessionMonitor"

# One metric for each outcome, except that SessionsChecked and StatusChanges count these two.
CHECKS: Mapping[Outcome, str] = {
    outcome: "Checks" + outcome.value.title().replace("_", "")
    for outcome in Outcome
    if outcome not in (Outcome.ACTIVE, Outcome.CLOSED)
}
# Every metric and its unit. Most are sent only if they are not zero, because a custom metric is
# billed for each hour in which it appears.
METRICS: Mapping[str, str] = {
    "SessionsOpen": "Count",
    "OverdueSeconds": "Seconds",
    "SessionsWaiting": "Count",
    "LongestWaitSeconds": "Seconds",
    "NotAskedSeconds": "Seconds",
    "WaitingUnauthorized": "Count",
    "WaitingUnknownStatus": "Count",
    "WaitingOther": "Count",
    "BudgetDemand": "Percent",
    "PassDuration": "Milliseconds",
    "PassesCompleted": "Count",
    "SessionsChecked": "Count",
    **dict.fromkeys(CHECKS.values(), "Count"),
    "ChecksFailed": "Count",
    "StatusChanges": "Count",
    "EventsFailed": "Count",
    "BillingLatency": "Milliseconds",
    "PassesFailed": "Count",
}
# A metric of an EMF record may have this many values.
MAX_VALUES = 100
# Milliseconds.
WHOLE_FROM = 100


def measure(summary: Summary) -> None:
    """Emit one pass's metrics, in one EMF record."""
    # One pass of each tick leads. A leader that does not count sends the last count, because alarms
    # divide by it.
    gauges: dict[str, float] = {}
    if summary.led:
        if summary.counted or summary.open:
            gauges["SessionsOpen"] = summary.open
        gauges["OverdueSeconds"] = round(summary.overdue_seconds, 3)
        if summary.waiting and summary.waiting.sessions_for_billing:
            gauges |= _waiting(summary.waiting, summary)
        if summary.only_not_found >= MIN_UNKNOWN_TO_BILLING:
            # Its 404s say nothing usable: most likely it is asked at a wrong path, or in test mode.
            gauges["WaitingOther"] = gauges.get("WaitingOther", 0) + summary.only_not_found
        if summary.allowed:
            gauges["BudgetDemand"] = round(100 * summary.demand / summary.allowed, 1)
    counts = {
        "SessionsChecked": summary.checked,
        **{name: summary.outcomes.get(outcome, 0) for outcome, name in CHECKS.items()},
        "ChecksFailed": summary.errors,
        "StatusChanges": summary.status_changes,
        "EventsFailed": summary.unpublished,
    }
    _emit(
        {
            **gauges,
            "PassDuration": round(summary.duration_seconds * 1000, 1),
            "PassesCompleted": 1,
            **{name: count for name, count in counts.items() if count},
        },
        latencies=summary.latencies,
    )


def _waiting(waiting: Waiting, summary: Summary) -> dict[str, float]:
    """All sessions that wait, and of these the ones of each alarm: a session counts in one of them.

    A cause has an alarm of its own from the verdict's threshold on. WaitingOther are the others.
    """
    causes = {cause: wait.sessions for cause, wait in waiting.for_billing.items()}
    longest = min(wait.since for wait in waiting.for_billing.values())
    refused = causes.get(Outcome.UNAUTHORIZED, 0)
    unknown = causes.get(Outcome.UNKNOWN_STATUS, 0)
    limited = is_too_low(summary.allowed, summary.demand)
    not_asked = waiting.causes.get(NOT_ASKED)
    late = 0.0
    if not_asked is not None and not limited:
        late = (waiting.now - not_asked.since).total_seconds()
    has_alarm = {
        Outcome.UNAUTHORIZED: refused >= MOST * summary.open,
        Outcome.UNKNOWN_STATUS: unknown >= CRITICAL_UNKNOWN,
        Outcome.DEFERRED: summary.unpublished > 0,
        NOT_ASKED: limited or late > OVERDUE_SECONDS,
    }
    gauges = {
        "SessionsWaiting": waiting.sessions_for_billing,
        "LongestWaitSeconds": round((waiting.now - longest).total_seconds(), 3),
        "NotAskedSeconds": round(late, 3),
        "WaitingUnauthorized": refused if has_alarm[Outcome.UNAUTHORIZED] else 0,
        "WaitingUnknownStatus": unknown if has_alarm[Outcome.UNKNOWN_STATUS] else 0,
        "WaitingOther": sum(n for cause, n in causes.items() if not has_alarm.get(cause)),
    }
    return {name: value for name, value in gauges.items() if value}


def measure_failure() -> None:
    """Emit that a pass ended without completing."""
    _emit({"PassesFailed": 1})


def _emit(values: Mapping[str, float], latencies: Sequence[float] = ()) -> None:
    """Write an EMF record: CloudWatch makes metrics of it, with the stack's name for `service`.

    Powertools' Metrics is not used, because it takes one value at a time and closes a record at the
    hundredth.
    """
    record: dict[str, object] = {**values}
    if latencies:
        record["BillingLatency"] = [milliseconds(value) for value in representatives(latencies)]
    directive = {
        "Namespace": NAMESPACE,
        "Dimensions": [["service"]],
        "Metrics": [{"Name": name, "Unit": METRICS[name]} for name in record],
    }
    head = {
        "_aws": {"Timestamp": int(time.time() * 1000), "CloudWatchMetrics": [directive]},
        "service": os.environ.get("POWERTOOLS_SERVICE_NAME", "service_undefined"),
    }
    print(json.dumps(head | record, separators=(",", ":")), flush=True)  # noqa: T201 (EMF is read from stdout)


def representatives(values: Sequence[float]) -> list[float]:
    """The values themselves; of more than MAX_VALUES, their 1st, 2nd ... 100th percentile.

    Every whole percentile of the result, the maximum included, is that of all values.
    """
    ordered = sorted(values)
    if len(ordered) <= MAX_VALUES:
        return ordered
    ranks = (-(-len(ordered) * n // MAX_VALUES) for n in range(1, MAX_VALUES + 1))
    return [ordered[rank - 1] for rank in ranks]


def milliseconds(seconds: float) -> float:
    """Rounded to whole ones from WHOLE_FROM on: every pass writes a hundred of these."""
    found = seconds * 1000
    return round(found) if found >= WHOLE_FROM else round(found, 1)

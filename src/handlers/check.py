"""The worker's Lambda: one check pass a tick, started by the loop every interval."""

from handlers import cold_start  # noqa: F401 (imports with the garbage collector off)

# isort: split
import functools
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from core import log, metrics
from core.aws.lambda_workers import LambdaWorkers
from core.domain.model import JsonObject
from core.errors import SettingsError, StoreError
from core.settings import Settings
from core.worker import Worker

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext


class EventError(ValueError):
    """The event cannot be used. The message names the part, what was given, and what is allowed."""


class TickError(EventError):
    """The event's tick is not a valid timestamp."""


class HelperError(EventError):
    """The event's helper is neither true nor false."""


@functools.cache
def worker() -> Worker:
    """This execution environment's worker, made at its first tick.

    Raises:
        SettingsError: a setting cannot be used; the next tick tries again.
    """
    settings = Settings.from_env(os.environ)
    log.set_level(debug=settings.debug)
    # Lambda sets it (and sam local too); without it, this is the only worker.
    function_name = os.environ.get("AWS_LAMBDA_FUNCTION_NAME")
    start_worker = LambdaWorkers(function_name) if function_name else None
    # The stack's name; health and the page of another monitor on the same tables show it.
    name = os.environ.get("POWERTOOLS_SERVICE_NAME") or "a monitor without a name"
    on_lambda = function_name is not None
    return Worker(settings, start_worker=start_worker, name=name, on_lambda=on_lambda)


def handler(event: Mapping[str, Any], context: "LambdaContext") -> JsonObject:
    """Check what is due. `event` is `{"tick": "2026-01-15T10:30:05.000Z"}`, the tick optional.

    A leader adds `"helper": true` for the workers that it starts.

    Returns the pass's summary. Raises SettingsError, EventError or StoreError, each logged in one
    sentence first, so that the invocation counts as an error of the function. Whatever a bug raises
    counts as a failed pass too.
    """
    try:
        summary = worker().check_open_checkout_sessions(
            parse_tick(event),
            helps=parse_helper(event),
            seconds=context.get_remaining_time_in_millis() / 1000,
        )
    except Exception as error:
        if isinstance(error, SettingsError | EventError | StoreError):
            log.logger.error(f"❌ {error}")
        metrics.measure_failure()
        raise
    if summary.led or summary.checked:  # not for a tick that was delivered twice
        metrics.measure(summary)
    return summary.as_dict()


def parse_tick(event: object) -> datetime | None:
    """The time in `event["tick"]`; None if there is none."""
    if not isinstance(event, Mapping):
        raise EventError(f"The event is {event!r}; it must be a JSON object, e.g. {{}}.")
    tick = event.get("tick")
    if tick is None:
        return None
    try:
        time = datetime.fromisoformat(tick)
        if time.tzinfo is not None:
            return time.astimezone(UTC)
    except (TypeError, ValueError, OverflowError):  # the last one before the year 1
        pass
    raise TickError(
        f"The event's tick is {tick!r}; it must be an ISO 8601 time with an offset, "
        "e.g. 2026-01-15T10:30:05.000Z, or be left out."
    )


def parse_helper(event: Mapping[str, Any]) -> bool:
    """Whether a leader started this worker: `event["helper"]`, if it is there."""
    helper = event.get("helper", False)
    if not isinstance(helper, bool):
        raise HelperError(
            f"The event's helper is {helper!r}; it must be true or false, or be left out."
        )
    return helper

"""Publishes status changes to EventBridge.

An event is published before its change is committed, so it may come twice, but is never lost. Its
`event_id` is the same both times.
"""

import json
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from core.aws.clients import make_client
from core.domain.model import JsonObject, StatusChangedEvent, iso
from core.log import logger

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_events.type_defs import PutEventsRequestEntryTypeDef

SOURCE = "checkout-session-monitor"
DETAIL_TYPE = "CheckoutSessionStatusChanged"
PAID_LATE = "CheckoutSessionPaidLate"

# The name space of event ids.
_EVENT_IDS = uuid.UUID("5d1c9be5-4f2b-4d4c-9a35-0d3b6b1f7c11")

# While events are sent, the rows to be changed are locked and nothing else is recorded.
CONNECT_SECONDS = 2
READ_SECONDS = 3
# After a call that failed as a whole, none is tried for this long: each would take as long to fail.
RETRY_AFTER_SECONDS = 5.0

# PutEvents takes up to ten entries and less than 256 KB in one call:
# https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-putevents.html
MAX_ENTRIES = 10
MAX_BYTES = 256 * 1024 - 1
TIME_BYTES = 14  # what an entry's time counts for
# Where the bus is slow, the caller waits for all of them together.
CALLS_AT_ONCE = 5

# A call that is refused with one of these may be refused because of one of its entries.
_OF_AN_ENTRY = frozenset(
    ("ValidationException", "ValidationError", "SerializationException", "InvalidArgument")
)


class _Item(NamedTuple):
    event: StatusChangedEvent
    entry: "PutEventsRequestEntryTypeDef"
    size: int


class _Result(NamedTuple):
    """What came of one call; with none of the last three, it was not made."""

    items: Sequence[_Item]
    rejected: Sequence[str] = ()  # for each item the reason; empty if it was accepted
    of_all: Exception | None = None  # the bus cannot be used
    of_one: Exception | None = None  # any of the items may be the cause


class EventBus:
    """One EventBridge bus, by name or ARN. boto3 is imported when the first event is published."""

    def __init__(self, name: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._monotonic = monotonic
        self._client: EventBridgeClient | None = None
        self._retry_at = 0.0

    def publish(self, events: Sequence[StatusChangedEvent]) -> Collection[str]:
        """Publish events; returns the session ids of those that the bus accepted.

        Why it rejected the others is logged. Never raises: what is wrong with one event delays no
        other.
        """
        if self._stopped() or not events:
            return ()
        try:
            self._client = self._client or _client()
        except Exception as error:  # noqa: BLE001 (no region, no file descriptor, …: whatever boto3 raises)
            self._stop()
            self._log_unusable(error)
            return ()
        results = self._call(_in_calls(self._items(events)))
        # One of ten may be the reason for which a call failed: each of them gets a call.
        alone = [[item] for result in results if result.of_one for item in result.items]
        results = [*(result for result in results if not result.of_one), *self._call(alone)]
        if unusable := [result.of_all for result in results if result.of_all]:
            self._log_unusable(unusable[0])
        accepted = set()
        for result in results:
            for item, reason in zip(result.items, result.rejected, strict=False):
                if reason:
                    self._log_rejected(item.event, reason)
                else:
                    accepted.add(item.event.session_id)
            if result.of_one:
                self._log_rejected(result.items[0].event, _text(result.of_one))
        return accepted or ()

    def _items(self, events: Iterable[StatusChangedEvent]) -> Iterable[_Item]:
        """The events that can be sent."""
        for event in events:
            try:
                entry = self._entry(event)
                texts = (entry["Source"], entry["DetailType"], entry["Detail"])
                size = TIME_BYTES + sum(len(text.encode()) for text in texts)
            except Exception as error:  # noqa: BLE001 (its texts are the shop's and billing's)
                self._log_rejected(event, _text(error))
                continue
            if size > MAX_BYTES:
                self._log_rejected(event, f"it has {size} bytes; {MAX_BYTES} are allowed")
            else:
                yield _Item(event, entry, size)

    def _call(self, calls: Iterable[Sequence[_Item]]) -> list[_Result]:
        """Make the calls, several at once if there are several."""
        calls = list(calls)
        if len(calls) <= 1:
            return [self._put(items) for items in calls]
        try:
            with ThreadPoolExecutor(min(len(calls), CALLS_AT_ONCE)) as threads:
                return list(threads.map(self._put, calls))
        except RuntimeError:  # no thread can be started
            return [self._put(items) for items in calls]

    def _put(self, items: Sequence[_Item]) -> _Result:
        """Make one call, unless another one has just failed as a whole."""
        from botocore.exceptions import (  # noqa: PLC0415 (a second)
            BotoCoreError,
            ClientError,
            ParamValidationError,
        )

        if self._stopped() or self._client is None:
            return _Result(items)
        try:
            answer = self._client.put_events(Entries=[item.entry for item in items])
            rejected = [
                f"{entry['ErrorCode']}: {entry.get('ErrorMessage', '')}"
                if "ErrorCode" in entry
                else ""
                for entry, _ in zip(answer["Entries"], items, strict=True)
            ]
        except ParamValidationError as error:
            return _Result(items, of_one=error)
        except (BotoCoreError, ClientError) as error:
            if isinstance(error, ClientError) and _code(error) in _OF_AN_ENTRY:
                return _Result(items, of_one=error)
            self._stop()
            return _Result(items, of_all=error)
        except Exception as error:  # noqa: BLE001 (boto3 raises others for values that it cannot encode)
            return _Result(items, of_one=error)
        return _Result(items, rejected)

    def _stopped(self) -> bool:
        return self._monotonic() < self._retry_at

    def _stop(self) -> None:
        self._retry_at = self._monotonic() + RETRY_AFTER_SECONDS

    def _log_unusable(self, error: Exception) -> None:
        logger.error(f"❌ No event can be published to {self._name}: {error}")

    def _log_rejected(self, event: StatusChangedEvent, reason: str) -> None:
        logger.error(
            f"❌ {self._name} rejected the event for session {event.session_id!r}: {reason}"
        )

    def _entry(self, event: StatusChangedEvent) -> "PutEventsRequestEntryTypeDef":
        return {
            "EventBusName": self._name,
            "Source": SOURCE,
            "DetailType": PAID_LATE if event.expired_at else DETAIL_TYPE,
            "Time": event.changed_at,
            "Detail": json.dumps(detail(event), ensure_ascii=False),
        }


def _in_calls(items: Iterable[_Item]) -> Iterable[Sequence[_Item]]:
    """The items in groups that one call takes."""
    group: list[_Item] = []
    size = 0
    for item in items:
        if len(group) == MAX_ENTRIES or (group and size + item.size > MAX_BYTES):
            yield group
            group, size = [], 0
        group.append(item)
        size += item.size
    if group:
        yield group


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _code(error: "ClientError") -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def detail(event: StatusChangedEvent) -> JsonObject:
    """The event's `detail`; amount and currency only where billing's answer has them."""
    paid = {"amount": event.amount, "currency": event.currency}
    if event.expired_at is not None:
        what = {
            "status": event.new_status.value,
            "billing_status": event.billing_status,
            "expired_at": iso(event.expired_at),
            "found_at": iso(event.changed_at),
        }
    else:
        what = {
            "old_status": "open",
            "new_status": event.new_status.value,
            "billing_status": event.billing_status,
            "changed_at": iso(event.changed_at),
        }
    return {
        "event_id": event_id(event),
        "session_id": event.session_id,
        "billing_checkout_id": event.billing_checkout_id,
        "billing_order_id": event.billing_order_id,
        **what,
        **{name: value for name, value in paid.items() if value is not None},
    }


def event_id(event: StatusChangedEvent) -> str:
    """The same id for the same change of a session, however often it is published.

    A session that the shop reopened was first seen at another time, so its next change has another.
    A late payment is that of its checkout, however often the session has expired with it.
    """
    same = (
        (event.session_id, event.billing_checkout_id, PAID_LATE)
        if event.expired_at
        else (event.session_id, iso(event.first_seen_at), event.new_status.value)
    )
    return str(uuid.uuid5(_EVENT_IDS, json.dumps(same)))


def _client() -> "EventBridgeClient":
    # The next check is the retry.
    return make_client("events", connect_seconds=CONNECT_SECONDS, read_seconds=READ_SECONDS)

"""Publishes status changes to EventBridge.

An event is published before its change is committed, so it may come twice, but is never lost. Its
`event_id` is the same both times.
"""

import json
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from core.aws.clients import make_client
from core.domain.model import JsonObject, StatusChangedEvent, iso
from core.log import logger

if TYPE_CHECKING:
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_events.type_defs import PutEventsRequestEntryTypeDef

SOURCE = "checkout-session-monitor"
DETAIL_TYPE = "CheckoutSessionStatusChanged"

# The name space of event ids.
_EVENT_IDS = uuid.UUID("5d1c9be5-4f2b-4d4c-9a35-0d3b6b1f7c11")

# While events are sent, the rows to be changed are locked and nothing else is recorded.
CONNECT_SECONDS = 2
READ_SECONDS = 3
# After a call that failed as a whole, none is tried for this long: each would take as long to fail.
RETRY_AFTER_SECONDS = 5.0


class EventBus:
    """One EventBridge bus, by name or ARN. boto3 is imported when the first event is published."""

    def __init__(self, name: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._monotonic = monotonic
        self._client: EventBridgeClient | None = None
        self._retry_at = 0.0

    def publish(self, events: Sequence[StatusChangedEvent]) -> Collection[str]:
        """Publish up to ten events; returns the session ids of those that the bus accepted.

        Why it rejected the others is logged.
        """
        if self._monotonic() < self._retry_at:
            return ()
        try:
            self._client = self._client or _client()
        except Exception as error:  # noqa: BLE001 (no region, no file descriptor, …: whatever boto3 raises)
            return self._none_accepted(error)
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 (a second)

        try:
            answer = self._client.put_events(Entries=[self._entry(event) for event in events])
        except (BotoCoreError, ClientError) as error:
            return self._none_accepted(error)
        accepted = []
        for event, entry in zip(events, answer["Entries"], strict=True):
            if "ErrorCode" in entry:
                logger.error(
                    f"❌ {self._name} rejected the event for session {event.session_id!r}: "
                    f"{entry['ErrorCode']}: {entry.get('ErrorMessage', '')}"
                )
            else:
                accepted.append(event.session_id)
        return accepted

    def _none_accepted(self, error: Exception) -> Collection[str]:
        self._retry_at = self._monotonic() + RETRY_AFTER_SECONDS
        logger.error(f"❌ No event can be published to {self._name}: {error}")
        return ()

    def _entry(self, event: StatusChangedEvent) -> "PutEventsRequestEntryTypeDef":
        return {
            "EventBusName": self._name,
            "Source": SOURCE,
            "DetailType": DETAIL_TYPE,
            "Time": event.changed_at,
            "Detail": json.dumps(detail(event), ensure_ascii=False),
        }


def detail(event: StatusChangedEvent) -> JsonObject:
    """The event's `detail`."""
    return {
        "event_id": event_id(event),
        "session_id": event.session_id,
        "billing_checkout_id": event.billing_checkout_id,
        "billing_order_id": event.billing_order_id,
        "old_status": "open",
        "new_status": event.new_status.value,
        "billing_status": event.billing_status,
        "changed_at": iso(event.changed_at),
    }


def event_id(event: StatusChangedEvent) -> str:
    """The same id for the same change of a session, however often it is published.

    A session that the shop reopened was first seen at another time, so its next change has another.
    """
    same = (event.session_id, iso(event.first_seen_at), event.new_status.value)
    return str(uuid.uuid5(_EVENT_IDS, json.dumps(same)))


def _client() -> "EventBridgeClient":
    # The next check is the retry.
    return make_client("events", connect_seconds=CONNECT_SECONDS, read_seconds=READ_SECONDS)

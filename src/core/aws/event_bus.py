"""Tells others that a session's status changed, through EventBridge.

An event is published before the change is committed: it may come twice, never not at all. Its
`event_id` is the same both times.
"""

import json
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from core.domain.model import JsonObject, StatusChange, iso
from core.log import logger

if TYPE_CHECKING:
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_events.type_defs import PutEventsRequestEntryTypeDef

SOURCE = "checkout-session-monitor"
DETAIL_TYPE = "CheckoutSessionStatusChanged"

# Each is a name space for one event's id, by what makes two events the same one.
_EVENT_IDS = uuid.UUID("5d1c9be5-4f2b-4d4c-9a35-0d3b6b1f7c11")

# The rows to be changed are locked while these are sent, and no result is recorded meanwhile.
CONNECT_SECONDS = 2
READ_SECONDS = 3
# After a call that failed as a whole, as many are not tried: each would take as long to fail.
TRY_AGAIN_SECONDS = 5.0


class EventBus:
    """One EventBridge bus, by name or ARN. boto3 is imported when the first event is published."""

    def __init__(self, name: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._monotonic = monotonic
        self._client: EventBridgeClient | None = None
        self._try_again_at = 0.0

    def publish(self, changes: Sequence[StatusChange]) -> Collection[str]:
        """Publish up to ten changes; returns the session ids of those that the bus took.

        Why it did not take the others is logged.
        """
        if self._monotonic() < self._try_again_at:
            return ()
        try:
            self._client = self._client or _client()
        except Exception as error:  # noqa: BLE001 (no region, no descriptor: whatever boto3 needs)
            return self._none_taken(error)
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 (a second)

        try:
            answer = self._client.put_events(Entries=[self._entry(change) for change in changes])
        except (BotoCoreError, ClientError) as error:
            return self._none_taken(error)
        taken = []
        for change, entry in zip(changes, answer["Entries"], strict=True):
            if "ErrorCode" in entry:
                logger.error(
                    f"❌ The event for session {change.session_id!r} was not taken by "
                    f"{self._name}: {entry['ErrorCode']}: {entry.get('ErrorMessage', '')}"
                )
            else:
                taken.append(change.session_id)
        return taken

    def _none_taken(self, error: Exception) -> Collection[str]:
        self._try_again_at = self._monotonic() + TRY_AGAIN_SECONDS
        logger.error(f"❌ No event can be published to {self._name}: {error}")
        return ()

    def _entry(self, change: StatusChange) -> "PutEventsRequestEntryTypeDef":
        return {
            "EventBusName": self._name,
            "Source": SOURCE,
            "DetailType": DETAIL_TYPE,
            "Time": change.changed_at,
            "Detail": json.dumps(detail(change), ensure_ascii=False),
        }


def detail(change: StatusChange) -> JsonObject:
    """The event's `detail`."""
    return {
        "event_id": event_id(change),
        "session_id": change.session_id,
        "billing_checkout_id": change.billing_checkout_id,
        "billing_order_id": change.billing_order_id,
        "old_status": "open",
        "new_status": change.new_status.value,
        "billing_status": change.billing_status,
        "changed_at": iso(change.changed_at),
    }


def event_id(change: StatusChange) -> str:
    """The same for the same change of the same session, however often it is published.

    A session that the shop opened anew was first seen at another time.
    """
    same = (change.session_id, iso(change.first_seen_at), change.new_status.value)
    return str(uuid.uuid5(_EVENT_IDS, json.dumps(same)))


def _client() -> "EventBridgeClient":
    import boto3  # noqa: PLC0415 (it takes a second)
    from botocore.config import Config  # noqa: PLC0415

    return boto3.client(
        "events",
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"total_max_attempts": 1},  # the next check tries again
        ),
    )

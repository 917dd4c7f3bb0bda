"""The queue's tables, as tests and benchmarks look into them and set them up."""

from datetime import datetime
from typing import Any

from testkit.shops import Shop

# When a session is due, and until when it is claimed; of rows c and their batches b.
OF_SESSIONS = (
    "FROM checkout_session_check c LEFT JOIN checkout_session_batch b ON b.id = c.batch_id"
)
DUE_AT = "COALESCE(c.next_check_at, b.next_check_at)"
CLAIMED_UNTIL = "COALESCE(c.claimed_until, b.claimed_until)"
LAST_CHECK = "CASE WHEN c.next_check_at IS NULL THEN b.checked_at ELSE c.last_checked_at END"


def claimed(shop: Shop) -> int:
    """How many sessions are claimed, by themselves or with their batch."""
    [(count,)] = shop.run(f"SELECT COUNT({CLAIMED_UNTIL}) {OF_SESSIONS}")
    return int(count)


def due_times(shop: Shop) -> dict[str, Any]:
    """When each session is due."""
    return dict(shop.run(f"SELECT c.session_id, {DUE_AT} {OF_SESSIONS}"))


def make_due(shop: Shop, at: datetime | str) -> None:
    """Make all sessions due at that time, with their batches, and claim none."""
    shop.run("UPDATE checkout_session_check SET next_check_at = NULL, claimed_until = NULL")
    shop.run(
        "UPDATE checkout_session_batch SET next_check_at = %s, due_at = %s, claimed_until = NULL",
        (at, at),
    )

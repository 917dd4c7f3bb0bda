"""Payments that come after a session has become `timeout`: looked for at growing distance.

`checkout_session_change` holds when each such session is looked at again, and when a payment was
found. The shop's status stays as it is.
"""

from collections import defaultdict
from datetime import datetime, timedelta
from typing import NamedTuple

from core.database.port import (
    Database,
    Transaction,
    as_datetime,
    as_int,
    as_text,
    as_text_or_none,
    number_list,
)
from core.domain.model import Answer, SessionStatus, StatusChangedEvent
from core.store.status_changes import LATE_CHECK_FIRST, Publisher

# From which age of an expired session on it is looked at how often.
DISTANCES = (
    (timedelta(days=1), timedelta(days=1)),
    (timedelta(hours=6), timedelta(hours=8)),
    (timedelta(hours=1), timedelta(hours=2)),
    (timedelta(0), LATE_CHECK_FIRST),
)
# An event that could not be published is tried again after this time.
PUBLISH_AGAIN = timedelta(minutes=1)


class ExpiredSession(NamedTuple):
    """A session that is `timeout`, and about which billing is asked again."""

    change_id: int  # of its row in checkout_session_change
    session_id: str
    billing_checkout_id: str
    billing_order_id: str | None
    expired_at: datetime


class LatePayments:
    """Every method raises StoreError."""

    def __init__(
        self, database: Database, publisher: Publisher | None, looks_for: timedelta | None
    ) -> None:
        self._database = database
        self._publisher = publisher
        self._looks_for = looks_for

    def claim_due(self, limit: int) -> list[ExpiredSession]:
        """Up to `limit` sessions that are due; each is then due again at a greater distance.

        So no two workers look at one, and one that dies costs a look. A session that the shop has
        changed meanwhile is not looked at any more.
        """
        if self._looks_for is None:
            return []
        return self._database.transaction(lambda t: self._claim(t, limit))

    def _claim(self, transaction: Transaction, limit: int) -> list[ExpiredSession]:
        now = transaction.now()
        due = transaction.query(
            "SELECT id, changed_at FROM checkout_session_change WHERE late_check_at <= %s"
            f" ORDER BY late_check_at LIMIT {limit:d} {self._database.lock_rows}",
            (now,),
        )
        if not due:
            return []
        expired_at = {as_int(number): as_datetime(at) for number, at in due}
        rows = transaction.query(
            # Not `WHERE s.status`: no statistics may make it read every closed session.
            "SELECT c.id, s.id, c.billing_checkout_id, s.billing_order_id,"
            " COALESCE(s.billing_checkout_id, ''), COALESCE(s.status, '')"
            f" FROM checkout_session_change c {self._database.join_in_order} checkout_session s"
            f" ON s.id = c.session_id WHERE c.id IN {number_list(expired_at)}"
        )
        sessions = [
            ExpiredSession(
                as_int(number),
                as_text(session_id),
                as_text(asked),
                as_text_or_none(order_id),
                expired_at[as_int(number)],
            )
            for number, session_id, asked, order_id, checkout_id, status in rows
            if as_text(asked) == as_text(checkout_id) and as_text(status) == SessionStatus.TIMEOUT
        ]
        next_looks = dict.fromkeys(expired_at, None) | {
            session.change_id: next_look(session.expired_at, now, self._looks_for)
            for session in sessions
        }
        by_time: defaultdict[datetime | None, list[int]] = defaultdict(list)
        for number, at in next_looks.items():
            by_time[at].append(number)
        for at, numbers in by_time.items():
            transaction.execute(
                "UPDATE checkout_session_change SET late_check_at = %s"
                f" WHERE id IN {number_list(numbers)}",
                (at,),
            )
        return sessions

    def record_paid(self, session: ExpiredSession, answer: Answer) -> bool:
        """Publish that it was paid, and keep that; returns False where the bus refuses the event.

        The event is published before the commit: it may come twice, but is never lost.
        """

        def record(transaction: Transaction) -> bool:
            now = transaction.now()
            # The row is locked before the event is published.
            transaction.execute(
                "UPDATE checkout_session_change SET late_check_at = NULL, paid_late_at = %s"
                f" WHERE id = {session.change_id:d}",
                (now,),
            )
            if self._publisher is None or self._publisher.publish([_event(session, answer, now)]):
                return True
            transaction.execute(
                "UPDATE checkout_session_change SET late_check_at = %s, paid_late_at = NULL"
                f" WHERE id = {session.change_id:d}",
                (now + PUBLISH_AGAIN,),
            )
            return False

        return self._database.transaction(record)


def next_look(expired_at: datetime, now: datetime, looks_for: timedelta | None) -> datetime | None:
    """When an expired session is looked at again; None: no more."""
    age = now - expired_at
    # A database's clock that was ahead makes an age negative.
    distance = next((d for since, d in DISTANCES if age >= since), LATE_CHECK_FIRST)
    return now + distance if looks_for and age + distance <= looks_for else None


def _event(session: ExpiredSession, answer: Answer, now: datetime) -> StatusChangedEvent:
    return StatusChangedEvent(
        session_id=session.session_id,
        billing_checkout_id=session.billing_checkout_id,
        billing_order_id=session.billing_order_id,
        new_status=SessionStatus.SUCCESS,
        billing_status=answer.billing_status,
        first_seen_at=session.expired_at,
        changed_at=now,
        amount=answer.amount,
        currency=answer.currency,
        expired_at=session.expired_at,
    )

"""Payments that come after a session has become `timeout`: looked for at growing distance.

`checkout_session_change` holds when each such session is looked at again, and when a payment was
found. The shop's status stays `timeout`, unless LATE_STATUS_UPDATES asks for `success`.
"""

from collections.abc import Mapping, Sequence
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
    numbers_by_value,
)
from core.domain.model import Answer, SessionStatus, StatusChangedEvent
from core.errors import RefusedError
from core.log import logger
from core.store.status_changes import (
    LATE_CHECK_FIRST,
    NO_ROLLBACK,
    ChangeRecord,
    Publisher,
    log_changes,
    write_status,
)

# From which age of an expired session on it is looked at how often.
DISTANCES = (
    (timedelta(days=1), timedelta(days=1)),
    (timedelta(hours=6), timedelta(hours=8)),
    (timedelta(hours=1), timedelta(hours=2)),
    (timedelta(0), LATE_CHECK_FIRST),
)
# What could not be published, or written because the shop holds the row, is tried again after this:
# at the next minute's looks, also if they come sooner after the tick.
RECORD_AGAIN = timedelta(seconds=45)

# Used beside an id, as STILL_OPEN is.
_STILL_TIMEOUT = "COALESCE(status, '') = 'timeout'"


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
        self,
        database: Database,
        publisher: Publisher | None,
        looks_for: timedelta,
        *,
        updates_status: bool = False,
    ) -> None:
        self._database = database
        self._publisher = publisher
        self._looks_for = looks_for
        self._updates_status = updates_status
        self._unpublished = 0

    def claim_due(self, limit: int) -> list[ExpiredSession]:
        """Up to `limit` sessions that are due; each is due again in LATE_CHECK_FIRST.

        So no two workers look at one, and one that dies, or about which billing says nothing, is
        looked at again then; `looked_at` is for the others. A session that the shop has changed
        meanwhile is not looked at any more.
        """
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
            " COALESCE(s.billing_checkout_id, ''), COALESCE(s.status, '') = 'timeout'"
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
            for number, session_id, asked, order_id, checkout_id, is_timeout in rows
            if is_timeout and as_text(asked) == as_text(checkout_id)
        ]
        due_again = dict.fromkeys(expired_at, None) | {
            session.change_id: now + LATE_CHECK_FIRST for session in sessions
        }
        _make_due(transaction, due_again)
        return sessions

    def looked_at(self, sessions: Sequence[ExpiredSession]) -> None:
        """Make sessions that are not paid due again at a greater distance, or not at all."""

        def update(transaction: Transaction) -> None:
            now = transaction.now()
            _make_due(
                transaction,
                {s.change_id: next_look(s.expired_at, now, self._looks_for) for s in sessions},
            )

        self._database.transaction(update)

    def record_paid(self, session: ExpiredSession, answer: Answer) -> SessionStatus | None:
        """Publish that it was paid, and keep that; with `updates_status` it becomes `success`.

        Returns the session's status, or None if nothing is kept: the bus refuses the event, or the
        shop has locked or changed the session. The event is published before the commit: it may
        come twice, but is never lost.
        """
        if self._updates_status:
            try:
                return self._database.transaction(
                    lambda t: self._record(t, session, answer, SessionStatus.SUCCESS),
                    refusable=True,
                )
            except RefusedError as error:
                why = ". ".join(filter(None, (str(error), error.remedy)))
                logger.error(
                    f"❌ Session {session.session_id!r} was paid late and stays timeout, because "
                    f"its status cannot be written: {why}"
                )
        return self._database.transaction(
            lambda t: self._record(t, session, answer, SessionStatus.TIMEOUT)
        )

    def take_unpublished(self) -> int:
        """How many events the bus has refused since the last call."""
        unpublished, self._unpublished = self._unpublished, 0
        return unpublished

    def _record(
        self,
        transaction: Transaction,
        session: ExpiredSession,
        answer: Answer,
        status: SessionStatus,
    ) -> SessionStatus | None:
        now = transaction.now()
        succeeds = status is SessionStatus.SUCCESS
        # The row is locked before the event is published. The page lists those that stay timeout.
        self._keep(transaction, session, None, None if succeeds else now)
        transaction.savepoint()
        lock = self._database.lock_rows if succeeds else ""
        if not self._is_timeout(transaction, session, lock):
            # If the shop only holds the row, do not overrule it.
            is_locked = succeeds and self._is_timeout(transaction, session)
            self._keep(transaction, session, now + RECORD_AGAIN if is_locked else None, None)
            return None
        if succeeds:
            self._write_success(transaction, session, answer, now)
        event = _event(session, answer, status, now)
        if self._publisher is None or self._publisher.publish([event]):
            return status
        self._unpublished += 1
        transaction.roll_back_to_savepoint()
        self._keep(transaction, session, now + RECORD_AGAIN, None)
        return None

    def _keep(
        self,
        transaction: Transaction,
        session: ExpiredSession,
        late_check_at: datetime | None,
        paid_late_at: datetime | None,
    ) -> None:
        transaction.execute(
            "UPDATE checkout_session_change SET late_check_at = %s, paid_late_at = %s"
            f" WHERE id = {session.change_id:d}",
            (late_check_at, paid_late_at),
        )

    def _is_timeout(
        self, transaction: Transaction, session: ExpiredSession, lock: str = ""
    ) -> bool:
        """Whether the session is `timeout` and has the checkout that billing was asked about."""
        rows = transaction.query(
            "SELECT COALESCE(billing_checkout_id, '') FROM checkout_session"
            f" WHERE id = %s AND {_STILL_TIMEOUT} {lock}",
            (session.session_id,),
        )
        return any(as_text(checkout) == session.billing_checkout_id for (checkout,) in rows)

    def _write_success(
        self, transaction: Transaction, session: ExpiredSession, answer: Answer, now: datetime
    ) -> None:
        if self._publisher is not None and not self._database.is_transactional:
            raise RefusedError(NO_ROLLBACK)
        status, ids = SessionStatus.SUCCESS, [session.session_id]
        several = "several sessions that are timeout have the same id"
        write_status(transaction, ids, status, only=_STILL_TIMEOUT, several=several)
        log_changes(
            transaction,
            [
                ChangeRecord(
                    session.session_id,
                    session.billing_checkout_id,
                    status,
                    answer.billing_status,
                    now,
                )
            ],
        )


def _make_due(transaction: Transaction, times: Mapping[int, datetime | None]) -> None:
    """Set when changes are looked at again, by their ids."""
    for at, numbers in numbers_by_value(times).items():
        transaction.execute(
            "UPDATE checkout_session_change SET late_check_at = %s"
            f" WHERE id IN {number_list(numbers)}",
            (at,),
        )


def next_look(expired_at: datetime, now: datetime, looks_for: timedelta) -> datetime | None:
    """When an expired session is looked at again; None: no more. The last look is at the end."""
    age, end = now - expired_at, expired_at + looks_for
    # A database's clock that was ahead makes an age negative.
    distance = next((d for since, d in DISTANCES if age >= since), LATE_CHECK_FIRST)
    return min(now + distance, end) if now < end else None


def _event(
    session: ExpiredSession, answer: Answer, status: SessionStatus, now: datetime
) -> StatusChangedEvent:
    return StatusChangedEvent(
        session_id=session.session_id,
        billing_checkout_id=session.billing_checkout_id,
        billing_order_id=session.billing_order_id,
        new_status=status,
        billing_status=answer.billing_status,
        first_seen_at=session.expired_at,
        changed_at=now,
        amount=answer.amount,
        currency=answer.currency,
        expired_at=session.expired_at,
    )

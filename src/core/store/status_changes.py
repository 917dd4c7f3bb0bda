"""Status changes: a session leaves `open` once, by billing's word about its checkout.

Only `status` of the shop's table is ever written, and only from `open`. What was changed is logged
in `checkout_session_change`.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import batched
from typing import NamedTuple, Protocol

from core.database.port import (
    Connection,
    Database,
    Transaction,
    Value,
    number_list,
    placeholders,
)
from core.domain.model import (
    Outcome,
    Recorded,
    Refusal,
    SessionStatus,
    StatusChange,
    StatusChangedEvent,
)
from core.errors import RefusedError
from core.store.queue import CheckRecord, Queue, group_by_token

# In one transaction, so that it locks few of the shop's rows: as many events as one PutEvents call
# takes. With hundreds of ids MariaDB may also read the whole table instead of their rows.
CHANGES_AT_ONCE = 10

# Used beside ids. A plain `status = 'open'` makes MariaDB read every open session by the index on
# status instead of the few by their keys.
STILL_OPEN = "COALESCE(status, '') = 'open'"

KEEP_CHANGES = timedelta(days=1)


class Publisher(Protocol):
    """Publishes status changes; see `core.aws.event_bus.EventBus`."""

    def publish(self, events: Sequence[StatusChangedEvent]) -> Collection[str]:
        """Publish up to CHANGES_AT_ONCE events; returns the session ids of the published ones."""


class _ShopRow(NamedTuple):
    billing_checkout_id: str | None
    billing_order_id: str | None


class StatusChanges:
    """Makes status changes and logs them. Every method raises StoreError."""

    def __init__(self, database: Database, queue: Queue, publisher: Publisher | None) -> None:
        self._database = database
        self._queue = queue
        self._publisher = publisher

    def make(self, changes: Sequence[StatusChange]) -> Recorded:
        """Write the new statuses, and record the changes that cannot be made.

        A session is changed, and its event published, only if it is open, its row is not locked by
        the shop, it still has the checkout that billing was asked about, and the claim on it is
        still valid. A change that the database refuses is not published, and delays no other.
        """
        recorded = Recorded()
        for some in batched(changes, CHANGES_AT_ONCE, strict=False):
            recorded += self._make(some)
        return recorded

    def forget_old(self) -> None:
        """Delete the log's rows that are over a day old."""

        def delete(connection: Connection) -> None:
            connection.execute(
                "DELETE FROM checkout_session_change WHERE changed_at < %s",
                (connection.now() - KEEP_CHANGES,),
            )

        self._database.run(delete)

    def _make(self, changes: Sequence[StatusChange]) -> Recorded:
        try:
            return self._database.transaction(partial(self._change, changes=changes))
        except RefusedError as error:
            if len(changes) > 1:  # find the one that is refused
                half = len(changes) // 2
                return self._make(changes[:half]) + self._make(changes[half:])
            [change] = changes
            self._database.run(partial(self._record_refused, change=change))
            refusal = Refusal(change, str(error))
            return Recorded(outcomes={Outcome.REFUSED: 1}, refusals=[refusal])

    def _change(self, transaction: Transaction, changes: Sequence[StatusChange]) -> Recorded:
        by_id = {change.claim.session_id: change for change in changes}
        ours = self._lock_claimed(transaction, changes)
        rows = self._lock_open(transaction, ours)
        same_checkout = [
            i for i, row in rows.items() if row.billing_checkout_id == _asked(by_id[i])
        ]
        changed = self._write_and_publish(transaction, [by_id[i] for i in same_checkout], rows)
        self._log(transaction, changed)
        # The shop holds these locks because it is writing: neither wait for it nor overrule it.
        locked = self._open(transaction, [i for i in ours if i not in rows])
        closed = [i for i in ours if i not in rows and i not in locked]
        self._queue.drop(transaction, [*closed, *(change.claim.session_id for change in changed)])
        unpublished = [i for i in same_checkout if by_id[i] not in changed]
        now = transaction.now()
        # A session with a new checkout is checked again at once.
        new_checkout = [_deferred(by_id[i], until=now) for i in rows if i not in same_checkout]
        later = [_deferred(by_id[i], until=by_id[i].retry_at) for i in (*locked, *unpublished)]
        self._queue.write_records(transaction, [*new_checkout, *later], now)
        closings = len(closed) + len(changed)
        outcomes = {Outcome.CLOSED: closings, Outcome.DEFERRED: len(changes) - closings}
        return Recorded(+Counter(outcomes), changed, len(unpublished))

    def _lock_claimed(self, transaction: Transaction, changes: Iterable[StatusChange]) -> list[str]:
        """The ids whose claim is still valid, locked until the commit."""
        ours: list[str] = []
        for claimed_until, rowids in group_by_token(change.claim for change in changes).items():
            rows = transaction.query(
                "SELECT session_id FROM checkout_session_check"
                f" WHERE claimed_until = %s AND rowid IN {number_list(rowids)}"
                f" {self._database.lock_rows_or_wait}",
                (claimed_until,),
            )
            ours += [str(session_id) for (session_id,) in rows]
        return ours

    def _lock_open(
        self, transaction: Transaction, session_ids: Sequence[str]
    ) -> dict[str, _ShopRow]:
        """The shop's rows that are open and not locked by it, locked until the commit."""
        if not session_ids:
            return {}
        rows = transaction.query(
            "SELECT id, billing_checkout_id, billing_order_id FROM checkout_session"
            f" WHERE {STILL_OPEN} AND id IN {placeholders(session_ids)} {self._database.lock_rows}",
            session_ids,
        )
        return {str(i): _ShopRow(_text(checkout), _text(order)) for i, checkout, order in rows}

    def _open(self, transaction: Transaction, session_ids: Sequence[str]) -> list[str]:
        if not session_ids:
            return []
        rows = transaction.query(
            "SELECT id FROM checkout_session"
            f" WHERE {STILL_OPEN} AND id IN {placeholders(session_ids)}",
            session_ids,
        )
        return [str(session_id) for (session_id,) in rows]

    def _write_and_publish(
        self,
        transaction: Transaction,
        changes: Sequence[StatusChange],
        rows: Mapping[str, _ShopRow],
    ) -> Sequence[StatusChange]:
        """Returns the changes that were written, and published if there is a publisher."""
        if self._publisher is None or not changes:
            self._write(transaction, changes)
            return changes
        now = transaction.now()
        events = [_event(change, rows[change.claim.session_id], now) for change in changes]
        # Written first, so that a change which the database refuses is not published. Published
        # before the commit, so that a change which is committed was published.
        transaction.savepoint()
        self._write(transaction, changes)
        published = self._publisher.publish(events)
        taken = [change for change in changes if change.claim.session_id in published]
        if len(taken) < len(changes):
            transaction.roll_back_to_savepoint()
            self._write(transaction, taken)
        return taken

    def _write(self, transaction: Transaction, changes: Iterable[StatusChange]) -> None:
        by_status: defaultdict[SessionStatus, list[str]] = defaultdict(list)
        for change in changes:
            by_status[change.new_status].append(change.claim.session_id)
        for status, session_ids in by_status.items():
            transaction.execute(
                "UPDATE checkout_session SET status = %s"
                f" WHERE {STILL_OPEN} AND id IN {placeholders(session_ids)}",
                (status.value, *session_ids),
            )

    def _log(self, transaction: Transaction, changes: Sequence[StatusChange]) -> None:
        if not changes:
            return
        now = transaction.now()
        rows = [
            (c.claim.session_id, _asked(c), c.new_status, c.answer.billing_status[:255], now)
            for c in changes
        ]
        transaction.execute(
            "INSERT INTO checkout_session_change"
            " (session_id, billing_checkout_id, new_status, billing_status, changed_at) VALUES "
            + ", ".join(placeholders(row) for row in rows),
            [value for row in rows for value in row],
        )

    def _record_refused(self, connection: Connection, change: StatusChange) -> None:
        record = CheckRecord(
            change.claim,
            Outcome.REFUSED,
            change.answer.status_code,
            change.retry_after_refusal_at,
        )
        self._queue.write_records(connection, [record], connection.now())


def _asked(change: StatusChange) -> str | None:
    return change.claim.billing_checkout_id


def _text(value: Value) -> str | None:
    return None if value is None else str(value)


def _deferred(change: StatusChange, *, until: datetime) -> CheckRecord:
    return CheckRecord(change.claim, Outcome.DEFERRED, change.answer.status_code, until)


def _event(change: StatusChange, row: _ShopRow, now: datetime) -> StatusChangedEvent:
    return StatusChangedEvent(
        session_id=change.claim.session_id,
        billing_checkout_id=change.claim.billing_checkout_id,
        billing_order_id=row.billing_order_id,
        new_status=change.new_status,
        billing_status=change.answer.billing_status,
        first_seen_at=change.claim.first_seen_at,
        changed_at=now,
    )

"""Status changes: a session leaves `open` once, by billing's word about its checkout.

Only `status` of the shop's table is ever written, here only from `open`; `late_payments` may write
it from `timeout`. What was changed is logged in `checkout_session_change`. Rows are found by the
numbers of the queue's rows: the shop may write an id differently that its collation takes as equal.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple, Protocol

from core.database.port import (
    Database,
    Row,
    Transaction,
    as_int,
    as_text,
    as_text_or_none,
    number_list,
    placeholders,
)
from core.domain.batch import CheckRecord
from core.domain.model import (
    Outcome,
    Recorded,
    Refusal,
    SessionStatus,
    StatusChange,
    StatusChangedEvent,
)
from core.errors import RefusedError, StoreError
from core.log import logger
from core.store.old_rows import delete_some
from core.store.queue_rows import QueueRows

# In one transaction. Few, so that it locks few of the shop's rows (with hundreds of ids MariaDB may
# also read the whole table); enough for a bus that takes 0.2 s a call, which gets them in parallel.
CHANGES_AT_ONCE = 50

# Used beside ids. A plain `status = 'open'` makes MariaDB read every open session by the index on
# status instead of the few by their keys.
STILL_OPEN = "COALESCE(status, '') = 'open'"

KEEP_CHANGES, KEEP_EXPIRED = timedelta(days=1), timedelta(days=30)
# A session that became `timeout` is looked at again for the first time after this time.
LATE_CHECK_FIRST = timedelta(minutes=20)
MAX_LOGGED = 16_000  # characters of a checkout id; MySQL's TEXT holds 65,535 bytes

NO_ROLLBACK = (
    "checkout_session has no transactions, so an event could be published for a change that is not "
    "made"
)

_NO_ROWID = 0  # rows are counted from 1


class Publisher(Protocol):
    """Publishes status changes; see `core.aws.event_bus.EventBus`."""

    def publish(self, events: Sequence[StatusChangedEvent]) -> Collection[str]:
        """Publish up to CHANGES_AT_ONCE events; returns the session ids of the published ones."""


class ChangeRecord(NamedTuple):
    """A row of `checkout_session_change`, by the names of its columns."""

    session_id: str
    billing_checkout_id: str | None
    new_status: SessionStatus
    billing_status: str
    changed_at: datetime
    late_check_at: datetime | None = None  # None: not looked at again


class _ShopRow(NamedTuple):
    id: str
    billing_checkout_id: str | None
    billing_order_id: str | None


class _Open(NamedTuple):
    """A change of a session that is still open, with the shop's row locked."""

    change: StatusChange
    row: _ShopRow


class StatusChanges:
    """Makes status changes and logs them. Every method raises StoreError."""

    def __init__(
        self,
        database: Database,
        rows: QueueRows,
        publisher: Publisher | None,
        late_payments_for: timedelta | None = None,
    ) -> None:
        self._database = database
        self._late_payments_for = late_payments_for
        self._rows = rows
        self._publisher = publisher

    def make(self, changes: Sequence[StatusChange]) -> Recorded:
        """Write up to CHANGES_AT_ONCE new statuses, and record the changes that cannot be made.

        A session is changed, and its event published, only if it is open, its row is not locked by
        the shop, it still has the checkout that billing was asked about, and the claim on it is
        still valid. What is refused is not published. Where one of several changes may be the
        reason, they are returned as `untried`: make each of them by itself.
        """
        if not changes:
            return Recorded()
        try:
            return self._database.transaction(
                partial(self._change, changes=changes), refusable=True
            )
        except Exception as error:  # noqa: BLE001 (whatever it is, it may be about one session)
            why = error
        if isinstance(why, StoreError) and not isinstance(why, RefusedError):
            self._check_usable()  # a trigger that takes too long also looks like a lost connection
        refusal = self._refusal_of_any_row(why)
        if refusal is None and len(changes) > 1:
            return Recorded(untried=changes)
        self._database.transaction(partial(self._record_refused, changes=changes))
        message = refusal or _message(why)
        return Recorded(
            outcomes={Outcome.REFUSED: len(changes)},
            refusals=[Refusal(change, message) for change in changes],
        )

    def forget_old(self) -> bool:
        """Delete rows that are over a day old, and not looked at again; returns if more are left.

        So are those that were looked at for as long as LATE_PAYMENTS_FOR was. Without it, they are
        kept for KEEP_EXPIRED: it may be set again.
        """
        day_ago = self._database.run(lambda connection: connection.now()) - KEEP_CHANGES
        table, late = "checkout_session_change", self._late_payments_for or KEEP_EXPIRED
        condition = "late_check_at IS NULL AND changed_at < %s"
        condition += " AND (paid_late_at IS NULL OR paid_late_at < %s)"
        more = delete_some(self._database, table, condition, (day_ago, day_ago))
        return delete_some(self._database, table, "changed_at < %s", (day_ago - late,)) or more

    def _check_usable(self) -> None:
        """Raise StoreError if nothing can be written at all."""
        self._database.run(
            lambda connection: connection.execute(
                "UPDATE checkout_session_pause SET pauses = pauses WHERE id = 1"
            )
        )

    def _refusal_of_any_row(self, why: Exception) -> str | None:
        """Why every change would be refused; None if it may be about one row."""
        if isinstance(why, RefusedError) and why.of_any_row:
            return str(why)
        # An error's code does not tell: a right that is missing may be one of a trigger's definer.
        # But a statement that changes no row runs no trigger and tests no value.
        try:
            self._database.transaction(self._change_nothing, refusable=True)
        except RefusedError as error:
            return ". ".join(filter(None, (str(error), error.remedy)))
        return None

    def _change_nothing(self, transaction: Transaction) -> None:
        """The statements that read and write the shop's table, for no row."""
        self._lock_open(transaction, [_NO_ROWID])
        transaction.execute(
            f"UPDATE checkout_session SET status = %s WHERE {STILL_OPEN} AND 1 = 0",
            (SessionStatus.TIMEOUT.value,),
        )

    def _change(self, transaction: Transaction, changes: Sequence[StatusChange]) -> Recorded:
        if self._publisher is not None and not self._database.is_transactional:
            raise RefusedError(NO_ROLLBACK, of_any_row=True)
        now = transaction.now()
        claimed = self._rows.lock_claimed(transaction, [c.claim for c in changes], now)
        rows = self._lock_open(transaction, claimed)
        still_open = [_Open(c, rows[c.claim.rowid]) for c in changes if c.claim.rowid in rows]
        same = [one for one in still_open if one.row.billing_checkout_id == _asked(one.change)]
        # The shop holds these locks because it is writing: neither wait for it nor overrule it.
        locked = self._open(transaction, [rowid for rowid in claimed if rowid not in rows])
        not_open = {*claimed} - {*rows} - locked
        gone = [change for change in changes if change.claim.rowid in not_open]
        deferred = [
            # A session with a new checkout is checked again at once.
            *(_deferred(one.change, until=now) for one in still_open if one not in same),
            *(_deferred(c, until=c.retry_at) for c in changes if c.claim.rowid in locked),
        ]
        self._rows.drop(transaction, [change.claim.rowid for change in gone])
        self._rows.write_records(transaction, deferred, now)
        changed = self._write_and_publish(transaction, same, now)
        closed = len(gone) + len(changed)
        outcomes = {Outcome.CLOSED: closed, Outcome.DEFERRED: len(changes) - closed}
        return Recorded(+Counter(outcomes), changed, gone, len(same) - len(changed))

    def _lock_open(self, transaction: Transaction, rowids: Sequence[int]) -> dict[int, _ShopRow]:
        """The shop's rows that are open and not locked by it, locked until the commit."""
        # The checkout id as a claim reads it, or some types would look different here.
        columns = "c.rowid, s.id, COALESCE(s.billing_checkout_id, ''), s.billing_order_id"
        rows = self._shop_rows(transaction, columns, rowids, self._database.lock_rows)
        return {
            as_int(rowid): _ShopRow(as_text(i), as_text(checkout) or None, as_text_or_none(order))
            for rowid, i, checkout, order in rows
        }

    def _open(self, transaction: Transaction, rowids: Sequence[int]) -> set[int]:
        return {as_int(rowid) for (rowid,) in self._shop_rows(transaction, "c.rowid", rowids)}

    def _shop_rows(
        self, transaction: Transaction, columns: str, rowids: Sequence[int], lock: str = ""
    ) -> Sequence[Row]:
        if not rowids:
            return ()
        return transaction.query(
            f"SELECT {columns} FROM checkout_session_check c {self._database.by_rowid}"
            f" {self._database.join_in_order} checkout_session s ON s.id = c.session_id"
            f" WHERE c.rowid IN {number_list(rowids)} AND {STILL_OPEN} {lock}"
        )

    def _write_and_publish(
        self, transaction: Transaction, changes: Sequence[_Open], now: datetime
    ) -> list[StatusChange]:
        """Returns the changes that were written, and published if there is a publisher."""
        if not changes:
            return []
        if self._publisher is None:
            self._write(transaction, changes, now)
            return [one.change for one in changes]
        # Everything is written first, so that what the database refuses is not published. After
        # the last event only the commit is left, so that what was published is committed.
        transaction.savepoint()
        self._write(transaction, changes, now)
        published = self._publish(self._publisher, [_event(one, now) for one in changes])
        accepted = [one for one in changes if one.change.claim.session_id in published]
        if len(accepted) < len(changes):
            # These statements succeeded a moment ago, on rows that are locked since.
            transaction.roll_back_to_savepoint()
            self._write(transaction, accepted, now)
            rejected = [one.change for one in changes if one not in accepted]
            records = [_deferred(change, until=change.retry_at) for change in rejected]
            self._rows.write_records(transaction, records, now)
        return [one.change for one in accepted]

    def _publish(
        self, publisher: Publisher, events: Sequence[StatusChangedEvent]
    ) -> Collection[str]:
        try:
            return publisher.publish(events)
        except Exception as error:
            if len(events) > 1:
                raise RefusedError("one of the events cannot be published") from error
            logger.error(
                f"❌ The event for session {events[0].session_id!r} cannot be published: "
                f"{_message(error)}"
            )
            return ()

    def _write(self, transaction: Transaction, changes: Sequence[_Open], now: datetime) -> None:
        """Write the statuses, log them, and take the sessions off the queue."""
        if not changes:
            return
        by_status: defaultdict[SessionStatus, list[str]] = defaultdict(list)
        for change, row in changes:
            by_status[change.new_status].append(row.id)
        for status, ids in by_status.items():
            several = "several open sessions have the same id"
            write_status(transaction, ids, status, only=STILL_OPEN, several=several)
        records = [
            ChangeRecord(
                row.id,
                _asked(change),
                change.new_status,
                change.answer.billing_status,
                now,
                self._late_check_at(change, now),
            )
            for change, row in changes
        ]
        log_changes(transaction, records)
        self._rows.drop(transaction, [change.claim.rowid for change, _ in changes])

    def _late_check_at(self, change: StatusChange, now: datetime) -> datetime | None:
        expired = change.new_status is SessionStatus.TIMEOUT and bool(_asked(change))
        return now + LATE_CHECK_FIRST if expired and self._late_payments_for else None

    def _record_refused(self, transaction: Transaction, changes: Sequence[StatusChange]) -> None:
        now = transaction.now()
        claimed = self._rows.lock_claimed(transaction, [c.claim for c in changes], now)
        records = [
            CheckRecord(c.claim, Outcome.REFUSED, c.answer.status_code, c.retry_after_refusal_at)
            for c in changes
            if c.claim.rowid in claimed
        ]
        self._rows.write_records(transaction, records, now)


def write_status(
    transaction: Transaction,
    session_ids: Sequence[str],
    status: SessionStatus,
    *,
    only: str,
    several: str,
) -> None:
    """Write the status of sessions for which the condition `only` holds; their rows are locked.

    Raises:
        RefusedError: more rows have these ids, with the text `several`; or a row does not keep it.
    """
    written = transaction.execute(
        f"UPDATE checkout_session SET status = %s WHERE {only} AND id IN"
        f" {placeholders(session_ids)}",
        (status.value, *session_ids),
    )
    if written > len(session_ids):
        raise RefusedError(several)
    [(kept,)] = transaction.query(
        "SELECT COUNT(*) FROM checkout_session"
        f" WHERE COALESCE(status, '') = %s AND id IN {placeholders(session_ids)}",
        (status.value, *session_ids),
    )
    if as_int(kept) < len(session_ids):  # a trigger kept the old status, or wrote another one
        raise RefusedError("the row does not keep the new status")


def log_changes(transaction: Transaction, records: Sequence[ChangeRecord]) -> None:
    """Add rows to the change log, with texts cut to what its columns hold."""
    log = [
        record._replace(
            billing_checkout_id=(record.billing_checkout_id or "")[:MAX_LOGGED] or None,
            billing_status=record.billing_status[:255],
        )
        for record in records
    ]
    transaction.execute(
        f"INSERT INTO checkout_session_change ({', '.join(ChangeRecord._fields)}) VALUES "
        + ", ".join(placeholders(record) for record in log),
        [value for record in log for value in record],
    )


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"


def _asked(change: StatusChange) -> str | None:
    return change.claim.billing_checkout_id


def _deferred(change: StatusChange, *, until: datetime) -> CheckRecord:
    return CheckRecord(change.claim, Outcome.DEFERRED, change.answer.status_code, until)


def _event(one: _Open, now: datetime) -> StatusChangedEvent:
    change, row = one
    return StatusChangedEvent(
        session_id=change.claim.session_id,
        billing_checkout_id=change.claim.billing_checkout_id,
        billing_order_id=row.billing_order_id,
        new_status=change.new_status,
        billing_status=change.answer.billing_status,
        first_seen_at=change.claim.first_seen_at,
        changed_at=now,
        amount=change.answer.amount,
        currency=change.answer.currency,
    )

"""Status changes: a session leaves `open` once, by billing's word about its checkout, and is told.

Of the shop's table only `status` is ever written, and only from `open`.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import batched
from typing import NamedTuple, Protocol

from core.database.port import Database, Value, listed, marks
from core.domain.model import Outcome, Recorded, Result, SessionStatus, StatusChange
from core.errors import RefusedError
from core.store.queue import Queue, by_token

# In one transaction, so that it holds few of the shop's rows: as many events as one PutEvents call
# takes. With hundreds of ids MariaDB may also read the whole table instead of their rows.
CHANGES_AT_ONCE = 10

# Beside ids. As a bare `status = 'open'` it makes MariaDB read every open session by the index on
# status instead of the few by their keys.
STILL_OPEN = "COALESCE(status, '') = 'open'"

KEEP_CHANGES = timedelta(days=1)


class Publisher(Protocol):
    """Tells others of status changes; see `core.aws.event_bus.EventBus`."""

    def publish(self, changes: Sequence[StatusChange]) -> Collection[str]:
        """Publish up to CHANGES_AT_ONCE changes; returns the session ids of those that were."""


class _Row(NamedTuple):
    billing_checkout_id: str | None
    billing_order_id: str | None


class Changes:
    """Writes status changes, and logs them in `checkout_session_change`.

    Every method raises StoreError.
    """

    def __init__(self, database: Database, queue: Queue, publisher: Publisher | None) -> None:
        self._database = database
        self._queue = queue
        self._publisher = publisher

    def make(self, results: Sequence[Result]) -> Recorded:
        """Write the new statuses of these results, and record those that cannot be written.

        A session is changed, and its change published, only while it is open, its row is not
        locked by the shop, it has the checkout that billing was asked about, and its claim is still
        ours. What the database refuses is not published, and holds up no other session.
        """
        recorded = Recorded()
        for some in batched(results, CHANGES_AT_ONCE, strict=False):
            recorded += self._make(some)
        return recorded

    def forget_old(self) -> None:
        self._database.run(
            lambda: self._database.execute(
                "DELETE FROM checkout_session_change WHERE changed_at < %s",
                (self._database.now() - KEEP_CHANGES,),
            )
        )

    def _make(self, results: Sequence[Result]) -> Recorded:
        try:
            return self._database.transaction(lambda: self._change(results))
        except RefusedError as error:
            if len(results) > 1:
                half = len(results) // 2
                return self._make(results[:half]) + self._make(results[half:])
            self._database.run(
                lambda: self._queue.record_as({Outcome.REFUSED: results}, self._database.now())
            )
            return Recorded(outcomes={Outcome.REFUSED: 1}, refusals=[(results[0], str(error))])

    def _change(self, results: Sequence[Result]) -> Recorded:
        by_id = {result.claim.session_id: result for result in results}
        ours = self._still_ours(results)
        rows = self._open_unlocked(ours)
        unlike = [i for i, row in rows.items() if row.billing_checkout_id != _asked(by_id[i])]
        alike = {i: row for i, row in rows.items() if i not in unlike}
        changed = self._write_and_publish([by_id[i] for i in alike], rows)
        self._log(changed)
        # Locked by the shop, which is writing it right now: neither waited for nor overruled.
        locked = self._open([i for i in ours if i not in rows])
        gone = [i for i in ours if i not in rows and i not in locked]
        self._queue.forget([*gone, *(result.claim.session_id for result in changed)])
        unpublished = [i for i in alike if by_id[i] not in changed]
        now = self._database.now()
        deferred = [
            *(by_id[i]._replace(next_check_at=now) for i in unlike),  # about its new checkout
            *(_at_next_slot(by_id[i]) for i in (*locked, *unpublished)),
        ]
        self._queue.record_as({Outcome.DEFERRED: deferred}, now)
        closed = len(gone) + len(changed)
        outcomes = Counter({Outcome.CLOSED: closed, Outcome.DEFERRED: len(results) - closed})
        return Recorded(changed, +outcomes, len(unpublished))

    def _still_ours(self, results: Sequence[Result]) -> list[str]:
        """The ids whose claim has not lapsed and gone to another worker; held until the commit."""
        ours: list[str] = []
        for claimed_until, rowids in by_token(result.claim for result in results).items():
            rows = self._database.query(
                "SELECT session_id FROM checkout_session_check"
                f" WHERE claimed_until = %s AND rowid IN {listed(rowids)}"
                f" {self._database.lock_rows_or_wait}",
                (claimed_until,),
            )
            ours += [str(session_id) for (session_id,) in rows]
        return ours

    def _open_unlocked(self, session_ids: Sequence[str]) -> dict[str, _Row]:
        """The shop's rows of those that are open, held until the commit; none that it holds."""
        if not session_ids:
            return {}
        rows = self._database.query(
            "SELECT id, billing_checkout_id, billing_order_id FROM checkout_session"
            f" WHERE {STILL_OPEN} AND id IN {marks(session_ids)} {self._database.lock_rows}",
            session_ids,
        )
        return {str(i): _Row(_text(checkout), _text(order)) for i, checkout, order in rows}

    def _open(self, session_ids: Sequence[str]) -> list[str]:
        if not session_ids:
            return []
        rows = self._database.query(
            f"SELECT id FROM checkout_session WHERE {STILL_OPEN} AND id IN {marks(session_ids)}",
            session_ids,
        )
        return [str(session_id) for (session_id,) in rows]

    def _write_and_publish(
        self, results: Sequence[Result], rows: Mapping[str, _Row]
    ) -> Sequence[Result]:
        """Returns the results that were written, and published where there is a publisher."""
        if self._publisher is None or not results:
            self._write(results)
            return results
        now = self._database.now()
        changes = [_change(result, rows[result.claim.session_id], now) for result in results]
        # Written first: what the database refuses must not be told. Told before the commit: what
        # is committed must have been.
        self._database.execute("SAVEPOINT unwritten")
        self._write(results)
        published = self._publisher.publish(changes)
        taken = [result for result in results if result.claim.session_id in published]
        if len(taken) < len(results):
            self._database.execute("ROLLBACK TO SAVEPOINT unwritten")
            self._write(taken)
        return taken

    def _write(self, results: Iterable[Result]) -> None:
        by_status: defaultdict[SessionStatus, list[str]] = defaultdict(list)
        for result in results:
            assert result.new_status is not None  # noqa: S101 (such results do not come here)
            by_status[result.new_status].append(result.claim.session_id)
        for status, session_ids in by_status.items():
            self._database.execute(
                "UPDATE checkout_session SET status = %s"
                f" WHERE {STILL_OPEN} AND id IN {marks(session_ids)}",
                (status.value, *session_ids),
            )

    def _log(self, results: Sequence[Result]) -> None:
        if not results:
            return
        now = self._database.now()
        rows = [
            (r.claim.session_id, _asked(r), r.new_status, r.answer.billing_status[:255], now)
            for r in results
        ]
        self._database.execute(
            "INSERT INTO checkout_session_change"
            " (session_id, billing_checkout_id, new_status, billing_status, changed_at) VALUES "
            + ", ".join(marks(row) for row in rows),
            [value for row in rows for value in row],
        )


def _asked(result: Result) -> str | None:
    return result.claim.billing_checkout_id


def _text(value: Value) -> str | None:
    return None if value is None else str(value)


def _at_next_slot(result: Result) -> Result:
    assert result.try_again_at is not None  # noqa: S101 (every result with a new status has it)
    return result._replace(next_check_at=result.try_again_at)


def _change(result: Result, row: _Row, now: datetime) -> StatusChange:
    assert result.new_status is not None  # noqa: S101 (such results do not come here)
    return StatusChange(
        session_id=result.claim.session_id,
        billing_checkout_id=result.claim.billing_checkout_id,
        billing_order_id=row.billing_order_id,
        new_status=result.new_status,
        billing_status=result.answer.billing_status,
        first_seen_at=result.claim.first_seen_at,
        changed_at=now,
    )

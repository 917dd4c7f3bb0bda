"""What `GET /api/status?session=…` and `GET /api/sessions` return: some sessions by id or outcome.

Every query uses an index and reads a bounded number of rows, whatever the size of the shop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from core.database.port import (
    Connection,
    Database,
    Row,
    Value,
    as_datetime,
    as_datetime_or_none,
    as_int,
    as_shown_text,
    number_list,
)
from core.domain.model import JsonObject, Outcome, iso
from core.store.queue_rows import CLAIMED, DUE, LAST_CHECK, MAX_LEASE

FOUND = 10  # sessions with one id or checkout
PAGE = 50  # sessions of an outcome in one answer
READ = 50_000  # rows of the queue that one answer reads: some 25 ms of MySQL's
FEW = 10_000  # failing sessions that one answer finds by their index: some 20 ms
NEWEST = 5_000  # sessions among which a checkout is searched without an index
CHANGES = 1_000  # status changes among which one of a closed session is searched

UNCHECKED = "unchecked"  # the outcome of a session that was not checked yet
OUTCOMES = (*(outcome.value for outcome in Outcome), UNCHECKED)

# Of a row s of the shop, and of the queue's row c and batch b.
_SESSION = (
    "s.id, s.billing_checkout_id, s.status, c.first_seen_at, c.last_outcome, c.last_status_code,"
    f" c.consecutive_failures, c.failing_since, {LAST_CHECK}, {DUE},"
    f" CASE WHEN {CLAIMED.format('c.')} OR ({CLAIMED.format('b.')} AND {DUE} <= %s)"
    " THEN 1 ELSE 0 END"
)


def find_sessions(database: Database, text: str) -> JsonObject:
    """The sessions with this id or checkout id; the form is `Found` in `handlers/openapi.json`.

    Raises:
        StoreError: the database cannot be used.
    """
    return database.run(lambda connection: _Search(connection, database).find(text))


def sessions_of(database: Database, outcome: str, after: int) -> JsonObject:
    """Open sessions whose last check had this outcome (one of OUTCOMES), a page of them.

    `after` is 0 or the `after` of the answer before, which is null at the end. A page may have few
    sessions, or none, and another one behind it: an answer reads READ rows at most. Its form is
    `Sessions` in `handlers/openapi.json`.

    Raises:
        StoreError: the database cannot be used.
    """
    return database.run(lambda connection: _Search(connection, database).page(outcome, after))


@dataclass(frozen=True, slots=True)
class _Search:
    """Reads, on one connection. It locks no row."""

    connection: Connection
    database: Database

    def find(self, text: str) -> JsonObject:
        now = self.connection.now()
        rows, note = list[Row](), None
        if self.database.comparable(text):
            rows = self._sessions(now, "checkout_session s", "s.id = %s", text)
        # Where ids are numbers, a checkout id may still be any text.
        if text.isascii() or self.database.comparable(text):
            shop, note = self._where_checkouts_are()
            known = {row[0] for row in rows}
            found = self._sessions(now, shop, "s.billing_checkout_id = %s", text)
            rows += [row for row in found if row[0] not in known]
        sessions = [_session(row) | {"change": self._change(row[0])} for row in rows[:FOUND]]
        return {
            "timestamp": iso(now),
            "query": as_shown_text(text),
            "sessions": sessions,
            "note": None if sessions else note,
        }

    def _where_checkouts_are(self) -> tuple[str, str | None]:
        """Which rows of the shop's table to search, and what to say if it is not all of them."""
        if self.connection.query(self.database.has_index, ("billing_checkout_id",)):
            return "checkout_session s", None
        newest = (
            "(SELECT session_id FROM checkout_session_check"
            f" ORDER BY rowid DESC LIMIT {NEWEST:d}) newest"
            f" {self.database.join_in_order} checkout_session s ON s.id = newest.session_id"
        )
        return newest, (
            "checkout_session has no index on billing_checkout_id, so checkout ids are searched "
            f"among the newest {NEWEST:,} sessions only."
        )

    def page(self, outcome: str, after: int) -> JsonObject:
        now = self.connection.now()
        few = self._few_fail(outcome)
        last_read = None if few else self._last_of_read(after)
        rowids = self._rows(outcome, after, last_read, few=few)
        page, has_more = rowids[:PAGE], len(rowids) > PAGE
        rows = list[Row]()
        if page:
            rows += self.connection.query(
                # Not `WHERE s.status`: no statistics may make it read every open session.
                f"SELECT COALESCE(s.status, '') = 'open', {_SESSION}"
                f" FROM checkout_session_check c {self.database.by_rowid}"
                f" {self.database.join_in_order} checkout_session s ON s.id = c.session_id"
                " LEFT JOIN checkout_session_batch b ON b.id = c.batch_id"
                f" WHERE c.rowid IN {number_list(page)} ORDER BY c.rowid",
                _times(now),
            )
        # The queue may still have a session that the shop has closed.
        sessions = [_session(row) for is_open, *row in rows if is_open]
        return {
            "timestamp": iso(now),
            "outcome": outcome,
            "sessions": sessions,
            "after": page[-1] if has_more else last_read,
        }

    def _sessions(self, now: datetime, shop: str, condition: str, text: str) -> list[Row]:
        return list(
            self.connection.query(
                f"SELECT {_SESSION} FROM {shop}"
                " LEFT JOIN checkout_session_check c ON c.session_id = s.id"
                " LEFT JOIN checkout_session_batch b ON b.id = c.batch_id"
                f" WHERE {condition} LIMIT {FOUND:d}",
                (*_times(now), text),
            )
        )

    def _change(self, session_id: Value) -> JsonObject | None:
        """The last change of its status by the monitor, if it is among the newest."""
        rows = self.connection.query(
            "SELECT new_status, billing_status, changed_at FROM (SELECT * FROM"
            f" checkout_session_change ORDER BY id DESC LIMIT {CHANGES:d}) newest"
            " WHERE session_id = %s ORDER BY id DESC LIMIT 1",
            (session_id,),
        )
        for new_status, billing_status, changed_at in rows:
            return {
                "new_status": new_status,
                "billing_status": billing_status,
                "changed_at": iso(as_datetime(changed_at)),
            }
        return None

    def _few_fail(self, outcome: str) -> bool:
        """Whether the outcome is a failure, and so few sessions fail that their index serves."""
        if outcome == UNCHECKED or not Outcome(outcome).is_error:
            return False
        [(failing,)] = self.connection.query(
            "SELECT COUNT(*) FROM (SELECT 1 FROM checkout_session_check"
            f" {self.database.by_wait} WHERE failing_since IS NOT NULL LIMIT {FEW + 1:d}) few"
        )
        return as_int(failing) <= FEW

    def _last_of_read(self, after: int) -> int | None:
        """The number of the last row that this answer may read; None: all that are left."""
        rows = self.connection.query(
            f"SELECT rowid FROM checkout_session_check {self.database.by_rowid}"
            f" WHERE rowid > %s ORDER BY rowid LIMIT 1 OFFSET {READ - 1:d}",
            (after,),
        )
        return as_int(rows[0][0]) if rows else None

    def _rows(self, outcome: str, after: int, last: int | None, *, few: bool) -> list[int]:
        """The numbers of the rows with this outcome, one more than a page has."""
        condition, parameters = "last_outcome = %s", [outcome]
        if outcome == UNCHECKED:
            condition, parameters = "last_outcome IS NULL", []
        if few:
            condition += " AND failing_since IS NOT NULL"
        if last is not None:
            condition += f" AND rowid <= {last:d}"
        index = self.database.by_wait if few else self.database.by_rowid
        rows = self.connection.query(
            f"SELECT rowid FROM checkout_session_check {index}"
            f" WHERE {condition} AND rowid > {after:d} ORDER BY rowid LIMIT {PAGE + 1:d}",
            parameters,
        )
        return [as_int(rowid) for (rowid,) in rows]


def _times(now: datetime) -> tuple[datetime, ...]:
    """The parameters of _SESSION."""
    valid = (now, now + MAX_LEASE)
    return (*valid, *valid, now)


def _session(row: Sequence[Value]) -> JsonObject:
    (session_id, checkout_id, status, first_seen, outcome, code, failures, failing, *rest) = row
    checked, due, in_flight = rest
    return {
        "session_id": as_shown_text(session_id),
        "billing_checkout_id": None if checkout_id is None else as_shown_text(checkout_id),
        "status": None if status is None else as_shown_text(status),
        "first_seen_at": _iso(first_seen),
        "outcome": outcome,
        "status_code": code,
        "consecutive_failures": as_int(failures or 0),
        "failing_since": _iso(failing),
        "last_checked_at": _iso(checked),
        "next_check_at": _iso(due),
        "in_flight": bool(in_flight),
    }


def _iso(value: Value) -> str | None:
    at = as_datetime_or_none(value)
    return iso(at) if at else None

"""What the store needs of a database engine; `mysql` and `sqlite` beside this file are the two."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Protocol

type Value = str | bytes | int | float | Decimal | datetime | None
type Row = tuple[Value, ...]

NO_STATUS_INDEX = (
    "checkout_session has no index on status, so every pass reads the whole table. Run: "
    "CREATE INDEX checkout_session_status ON checkout_session (status);"
)

# Ids in one statement: about 20 KB of SQL. MariaDB turns an IN of 1,000 and more into a join with
# a temporary table (in_predicate_conversion_threshold), which is slower here.
STATEMENT_ROWS = 500


class Connection(Protocol):
    """Runs statements; outside a transaction, each is committed by itself.

    Statements take `%s` for a parameter. Times go in and come out as aware UTC datetimes, except
    for those of expressions, which SQLite returns as text; `as_datetime` takes both.
    """

    def query(self, sql: str, parameters: Sequence[Value] = ()) -> Sequence[Row]: ...

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> int:
        """Return how many rows the statement inserted, changed or deleted."""

    def now(self) -> datetime:
        """The database's clock, to the millisecond."""


class Transaction(Connection, Protocol):
    """A connection within a transaction: what is locked stays locked until the commit."""

    def savepoint(self) -> None: ...

    def roll_back_to_savepoint(self) -> None: ...


class Database(Protocol):
    """One connection to one engine, opened when it is first used.

    What differs between engines is here; the SQL does not. Every method raises StoreError. Not for
    use by several threads at once.
    """

    in_due_order: str  # makes a SELECT of checkout_session_batch read its index on due_at
    by_rowid: str  # makes a statement find rows of the queue, or batches, by their numbers
    by_session: str  # the same, by their session ids
    by_batch: str  # the same, by their batches
    by_wait: str  # the same, by since when they fail
    by_status: str  # makes a SELECT read the shop's open sessions in the order of their ids
    lock_rows: str  # after a SELECT: lock its rows, and skip those that others have locked
    lock_rows_or_wait: str  # the same, but wait for the others
    join_in_order: str  # JOIN that reads the table on its left first
    has_index: (
        str  # a SELECT that finds a row if an index of the shop's table begins with column %s
    )
    skip_duplicates: str  # after an INSERT: skip rows whose {key} exists
    is_transactional: bool  # a change of the shop's table can be rolled back

    @property
    def prepared(self) -> bool:
        """Whether the tables exist and fit the shop's, as far as this connection knows."""

    def now_sql(self, *, plus_seconds: int = 0) -> str:
        """The database's clock, to the millisecond, as an expression within a statement."""

    def joined(self, expressions: Iterable[str]) -> str:
        """An expression: the values of others, none NULL, as one text with | between them."""

    def prepare(self) -> Sequence[str]:
        """Make the monitor's tables fit the shop's: create, upgrade and change them if need be.

        Returns warnings about the shop's table, each with the way out.
        """

    def comparable(self, session_id: str) -> bool:
        """Whether the text can be compared with `checkout_session.id` at all."""

    def run[T](self, work: Callable[[Connection], T]) -> T:
        """Run `work`, each of its statements by itself.

        It is run again from its start, a bounded number of times, after a deadlock, a lock timeout,
        on a connection that turned out to be stale, or after the shop's table was changed; it must
        be safe to run twice.
        """

    def transaction[T](self, work: Callable[[Transaction], T], *, refusable: bool = False) -> T:
        """Run `work` in one transaction; like `run`, it may run it again.

        Raises:
            RefusedError: only if `refusable`: the database can be used, but not for these rows,
                because of their values, a trigger, a constraint, a lock or this user's rights.
        """

    def close(self) -> None: ...


def placeholders(values: Iterable[object]) -> str:
    """The placeholders for some values: `(%s, %s, %s)`."""
    return f"({', '.join('%s' for _ in values)})"


def number_list(numbers: Iterable[int]) -> str:
    """Some numbers as they stand in a statement: `(1, 2, 3)`. They need no placeholders."""
    return f"({', '.join(map(str, numbers))})"


def numbers_by_value[T](values: Mapping[int, T]) -> dict[T, list[int]]:
    """The numbers of rows by what is written to them: one statement serves all with one value."""
    groups: dict[T, list[int]] = {}
    for number, value in values.items():
        groups.setdefault(value, []).append(number)
    return groups


def as_int(value: Value) -> int:
    if not isinstance(value, int | Decimal):
        raise TypeError(f"expected a whole number from the database, not {value!r}")
    return int(value)


def as_text(value: Value) -> str:
    """Text, also from a column of a binary type.

    Bytes that are not UTF-8 become lone surrogates, which no URL and no event can carry.
    """
    if isinstance(value, str):  # nearly all
        return value
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


def as_text_or_none(value: Value) -> str | None:
    return None if value is None else as_text(value)


def as_shown_text(value: Value) -> str:
    """Text for people and JSON: bytes that are not UTF-8 are shown as escapes."""
    return as_text(value).encode(errors="backslashreplace").decode()


def as_datetime(value: Value) -> datetime:
    if isinstance(value, str):  # in a text, MySQL's times have no zone
        time = datetime.fromisoformat(value)
        return time if time.tzinfo else time.replace(tzinfo=UTC)
    if not isinstance(value, datetime):
        raise TypeError(f"expected a time from the database, not {value!r}")
    return value


def as_datetime_or_none(value: Value) -> datetime | None:
    return None if value is None else as_datetime(value)

"""What the store needs of a database engine; `mysql` and `sqlite` beside this file are the two."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Protocol

type Value = str | int | float | Decimal | datetime | None
type Row = tuple[Value, ...]

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

    in_due_order: str  # makes a SELECT read the index on next_check_at
    by_rowid: str  # makes a statement find rows of checkout_session_check by their numbers
    by_session: str  # the same, by their session ids
    lock_rows: str  # after a SELECT: lock its rows, and skip those that others have locked
    lock_rows_or_wait: str  # the same, but wait for the others
    insert_or_ignore: str  # INSERT that skips rows whose key exists
    prepared: bool  # the tables exist, as far as this connection knows

    @property
    def now_sql(self) -> str:
        """The database's clock, to the millisecond, as an expression within a statement."""

    def prepare(self) -> bool:
        """Make the monitor's tables, columns and keys where they are missing.

        Returns whether the shop's table has an index that begins with `status`.
        """

    def comparable(self, session_id: str) -> bool:
        """Whether the text can be compared with `checkout_session.id` at all."""

    def run[T](self, work: Callable[[Connection], T]) -> T:
        """Run `work`, each of its statements by itself.

        It is run again from its start, a bounded number of times, after a deadlock, a lock timeout,
        or on a connection that turned out to be stale; it must be safe to run twice.
        """

    def transaction[T](self, work: Callable[[Transaction], T]) -> T:
        """Run `work` in one transaction; like `run`, it may run it again."""

    def close(self) -> None: ...


def placeholders(values: Iterable[object]) -> str:
    """The placeholders for some values: `(%s, %s, %s)`."""
    return f"({', '.join('%s' for _ in values)})"


def number_list(numbers: Iterable[int]) -> str:
    """Some numbers as they stand in a statement: `(1, 2, 3)`. They need no placeholders."""
    return f"({', '.join(map(str, numbers))})"


def as_int(value: Value) -> int:
    if not isinstance(value, int | Decimal):
        raise TypeError(f"expected a whole number from the database, not {value!r}")
    return int(value)


def as_datetime(value: Value) -> datetime:
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        raise TypeError(f"expected a time from the database, not {value!r}")
    return value


def as_datetime_or_none(value: Value) -> datetime | None:
    return None if value is None else as_datetime(value)

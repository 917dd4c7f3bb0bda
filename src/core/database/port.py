"""What the tables need of a database engine; `mysql` and `sqlite` beside this file are the two."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Protocol

type Value = str | int | float | Decimal | datetime | None
type Row = tuple[Value, ...]

# Ids in one statement: about 20 KB of SQL. MariaDB turns an IN of 1,000 and more into a join with
# a temporary table (in_predicate_conversion_threshold), which is slower here.
STATEMENT_ROWS = 500


class Database(Protocol):
    """One connection to one engine. What differs between engines is here; the SQL does not.

    Statements take `%s` for a parameter. Moments go in and come out as aware UTC datetimes, but for
    those of expressions, which SQLite returns as text; `moment` takes both. Every method raises
    StoreError. Not for use by several threads at once.
    """

    in_due_order: str  # what makes a SELECT read the index on next_check_at
    by_rowid: str  # what makes a statement find rows of checkout_session_check by their numbers
    by_session: str  # the same, by their session ids
    lock_rows: str  # after a SELECT: lock its rows, and pass over those that others have locked
    lock_rows_or_wait: str  # the same, but wait for the others
    insert_or_ignore: str  # INSERT that passes over rows whose key exists
    prepared: bool  # the tables are there, as far as this connection knows

    @property
    def now_sql(self) -> str:
        """The database's clock, to the millisecond, as an expression within a statement."""

    def prepare(self) -> bool:
        """Make the monitor's tables, columns and keys where they are missing.

        Returns whether the shop's table has an index that begins with `status`.
        """

    def now(self) -> datetime:
        """The database's clock, to the millisecond."""

    def comparable(self, session_id: str) -> bool:
        """Whether the text can be compared with `checkout_session.id` at all."""

    def transaction[T](self, work: Callable[[], T]) -> T:
        """Run `work` in one transaction; see `run` for what is tried again."""

    def run[T](self, work: Callable[[], T]) -> T:
        """Run `work`, each statement by itself.

        It is run again from its start, a bounded number of times, after a deadlock, a lock timeout
        or on a connection that turned out to be stale; it must bear that.
        """

    def query(self, sql: str, parameters: Sequence[Value] = ()) -> Sequence[Row]: ...

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> int:
        """Returns how many rows the statement inserted, changed or deleted."""

    def close(self) -> None: ...


def marks(values: Iterable[object]) -> str:
    """The placeholders for some values: `(%s, %s, %s)`."""
    return f"({', '.join('%s' for _ in values)})"


def listed(numbers: Iterable[int]) -> str:
    """Some numbers as they stand in a statement: `(1, 2, 3)`. No placeholders: they need none."""
    return f"({', '.join(map(str, numbers))})"


def integer(value: Value) -> int:
    if not isinstance(value, int | Decimal):
        raise TypeError(f"expected a whole number from the database, not {value!r}")
    return int(value)


def moment(value: Value) -> datetime:
    if isinstance(value, str):
        return datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        raise TypeError(f"expected a moment from the database, not {value!r}")
    return value


def moment_or_none(value: Value) -> datetime | None:
    return None if value is None else moment(value)

"""What the store needs of a database engine; `core.mysql` and `core.sqlite` are the two."""

from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Protocol

type Value = str | int | float | Decimal | datetime | None
type Row = tuple[Value, ...]


class StoreError(Exception):
    """The database cannot be used. The message says why, in one sentence, without the password."""


class Database(Protocol):
    """One connection to one engine. What differs between engines is here; the SQL does not.

    Statements take `%s` for a parameter. Moments go in and come out as aware UTC datetimes. Every
    method raises StoreError. Not for use by several threads at once.
    """

    in_due_order: str  # what makes a SELECT read the index on next_check_at
    lock_rows: str  # what follows the SELECT that claims
    insert_or_ignore: str  # INSERT that passes over rows whose key exists
    prepared: bool  # the tables are there, as far as this connection knows

    def prepare(self) -> bool:
        """Make the monitor's tables where they are missing.

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

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> None: ...

    def close(self) -> None: ...


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

"""MySQL 8.0 and later, MariaDB 10.6 and later, through PyMySQL."""

import math
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Protocol

import pymysql
from pymysql.charset import charset_by_name
from pymysql.constants import CR, ER

from core.database import mysql_schema
from core.database.address import MySQLAddress
from core.database.mysql_connection import connect, where
from core.database.port import Connection, Row, Transaction, Value, as_datetime
from core.errors import RefusedError, SettingsError, StoreError

ATTEMPTS = 5

# A connection that the server, a proxy or a firewall has ended since it was last used. 0 is
# PyMySQL's InterfaceError for a socket already closed; 4031 is MySQL's idle disconnect; 1927 is
# MariaDB's error for a connection that was killed.
_STALE = frozenset((0, CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST, ER.SERVER_SHUTDOWN, 4031, 1927))
# A server that takes no writes, because another one does since a failover: read-only by option
# (1290), by transaction (1792), by mode (1836), or a Galera node that is out of its cluster (1047).
_STANDBY = frozenset((1290, 1792, 1836, 1047))
# Deadlocks, lock timeouts, and transactions that a cluster rolled back: MySQL's group replication
# at the commit (3101), Galera's certification (1213 too), MariaDB's snapshot isolation (1020).
_LOCKED = frozenset((ER.LOCK_DEADLOCK, ER.LOCK_WAIT_TIMEOUT, 3101, 1020))
# A lock timeout is only tried again while this much time has not passed.
RETRY_SECONDS = 5.0
# The shop's table is not what it was: no such table, column or index, another collation, ids that
# are too long or too large for our copy of them, or no numbers.
_SCHEMA_CHANGED = frozenset((ER.NO_SUCH_TABLE, ER.BAD_FIELD_ERROR, 1176, 1267, 1406, 1264, 1366))
# Some changes of the shop's table raise no error, so the tables are compared again this often.
PREPARED_SECONDS = 60.0
# This user may not read or write a table, or a column.
_MAY_NOT = frozenset((ER.TABLEACCESS_DENIED_ERROR, ER.COLUMNACCESS_DENIED_ERROR))
# Errors whose message does not say what to do.
_ADVICE = {
    1665: "The server logs in the format STATEMENT; set binlog_format to ROW or MIXED",
}


class Addresses(Protocol):
    """Returns where to connect; with `refresh`, it reads the address again."""

    def __call__(self, *, refresh: bool) -> MySQLAddress: ...


class MySQLConnection:
    """Runs statements on a connection of PyMySQL's; it is a `Transaction` after BEGIN."""

    def __init__(
        self, connection: pymysql.Connection, clock: Callable[[], datetime] | None
    ) -> None:
        self._connection = connection
        self._clock = clock

    def query(self, sql: str, parameters: Sequence[Value] = ()) -> Sequence[Row]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters or None)
            return cursor.fetchall()

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> int:
        with self._connection.cursor() as cursor:
            return cursor.execute(sql, parameters or None)

    def now(self) -> datetime:
        if self._clock is not None:
            return self._clock()
        [(now,)] = self.query("SELECT UTC_TIMESTAMP(3)")
        return as_datetime(now)

    def savepoint(self) -> None:
        self.execute("SAVEPOINT unwritten")

    def roll_back_to_savepoint(self) -> None:
        self.execute("ROLLBACK TO SAVEPOINT unwritten")

    def rolled_back(self) -> bool:
        """Roll back; returns whether the connection can still be used."""
        try:
            self._connection.rollback()
        except pymysql.MySQLError:
            return False
        return True

    @property
    def server_thread(self) -> int:
        return int(self._connection.thread_id())  # type: ignore[no-untyped-call]

    def close(self) -> None:
        if self._connection.open:
            self._connection.close()


class MySQLDatabase:
    """One connection, opened when it is first needed and replaced when it has gone stale.

    When the server denies access, the address is read once more, because a password may have been
    rotated.
    """

    # Without it, the optimizer may sort the whole table instead, and then one pass locks every row
    # and the others find nothing to claim.
    in_due_order = "FORCE INDEX FOR ORDER BY (checkout_session_batch_due)"
    # For hundreds of rows, the optimizer reads the whole of a table that it thinks is small.
    by_rowid = "FORCE INDEX (PRIMARY)"
    by_session = "FORCE INDEX (checkout_session_check_session)"
    by_batch = "FORCE INDEX (checkout_session_check_batch)"
    by_wait = "FORCE INDEX (checkout_session_check_waiting)"
    lock_rows = "FOR UPDATE SKIP LOCKED"
    lock_rows_or_wait = "FOR UPDATE"
    join_in_order = "STRAIGHT_JOIN"
    has_index = (
        "SELECT 1 FROM information_schema.statistics WHERE table_schema = DATABASE()"
        " AND table_name = 'checkout_session' AND seq_in_index = 1 AND column_name = %s LIMIT 1"
    )
    skip_duplicates = "ON DUPLICATE KEY UPDATE {key} = {key}"  # INSERT IGNORE would cut values, too

    def __init__(
        self,
        address: Addresses,
        *,
        clock: Callable[[], datetime] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_transactional = True
        self.by_status = ""
        self._address = address
        self._clock = clock
        self._sleep = sleep
        self._monotonic = monotonic
        self._connection: MySQLConnection | None = None
        self._abandoned_thread: int | None = None  # of the server, on a statement given up here
        self._prepared_until = -math.inf
        self._ids: mysql_schema.IdColumn | None = None  # None: not read yet
        self._where = ""

    @property
    def prepared(self) -> bool:
        return self._monotonic() < self._prepared_until

    def prepare(self) -> Sequence[str]:
        self._prepared_until = -math.inf
        try:
            shop = mysql_schema.prepare(self)
        except pymysql.MySQLError as error:  # of an ALTER
            raise StoreError(self._explained(error, error.args[0])) from error
        self._ids = shop.ids
        self.is_transactional = shop.is_transactional
        # MariaDB reads all open sessions from the first one otherwise, for each piece of a walk.
        self.by_status = f"FORCE INDEX (`{shop.open_index}`)" if shop.open_index else ""
        self._prepared_until = self._monotonic() + PREPARED_SECONDS
        return shop.warnings

    def alter(self, statement: str) -> None:
        """Run a statement that may take minutes, on a connection of its own without time limits.

        Raises:
            pymysql.MySQLError: the server cannot or may not run it.
            StoreError: the server cannot be reached.
        """
        connection = connect(self._address(refresh=False), time_limit=False)
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
        finally:
            connection.close()

    def now_sql(self, *, plus_seconds: int = 0) -> str:
        if self._clock is None:
            now = "UTC_TIMESTAMP(3)"
        else:
            now = f"CAST('{self._clock():%Y-%m-%d %H:%M:%S.%f}' AS DATETIME(3))"
        return f"({now} + INTERVAL {plus_seconds:d} SECOND)" if plus_seconds else now

    def joined(self, expressions: Iterable[str]) -> str:
        return f"CONCAT_WS('|', {', '.join(expressions)})"

    def comparable(self, session_id: str) -> bool:
        if self._ids is None:
            return True
        charset = self._ids.charset
        if charset is None:  # MySQL would take 'abc' for 0
            return _is_in(self._ids.numbers, session_id)
        # The server refuses to compare a text with a column whose character set lacks one of its
        # characters (1267, illegal mix of collations). No id there can be equal to it anyway.
        if charset in ("utf8", "utf8mb3", "ucs2") and any(c > "\uffff" for c in session_id):
            return False
        try:
            unicode = charset.startswith(("utf", "ucs"))
            session_id.encode("utf-8" if unicode else charset_by_name(charset).encoding)
        except UnicodeEncodeError:
            return False
        except LookupError:  # one that Python does not know
            return session_id.isascii()
        return True

    def transaction[T](self, work: Callable[[Transaction], T], *, refusable: bool = False) -> T:
        def atomic(connection: MySQLConnection) -> T:
            connection.execute("BEGIN")
            result = work(connection)
            connection.execute("COMMIT")
            return result

        return self._run(atomic, refusable=refusable)

    def run[T](self, work: Callable[[Connection], T]) -> T:
        return self._run(work)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _run[T](  # noqa: C901 (a branch for each kind of error)
        self, work: Callable[[MySQLConnection], T], *, refusable: bool = False
    ) -> T:
        began = self._monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            kept = self._connection is not None
            last = attempt == ATTEMPTS
            try:
                return work(self._connected())
            except pymysql.MySQLError as error:
                code = error.args[0] if error.args else None
                if code in _LOCKED and self._rolled_back():
                    # Perhaps only one of its rows waits, e.g. in a trigger.
                    waited = refusable and code == ER.LOCK_WAIT_TIMEOUT
                    if not last and not waited and self._monotonic() - began < RETRY_SECONDS:
                        # Both sides of a deadlock try again at different times.
                        self._sleep(random.uniform(0.01, 0.05) * attempt)  # noqa: S311 (no secret)
                        continue
                changed = code in _SCHEMA_CHANGED and not last
                if changed and self._rolled_back() and self._follow_schema():
                    continue
                if refusable and code not in _STALE | _STANDBY and self._rolled_back():
                    raise self._refusal(error, code) from error
                # The next connection may not have this problem: after a failover it leads to
                # another server. After a timeout here, this one's server may still be at work.
                self._drop(gave_up=isinstance(error.__context__, TimeoutError))
                if kept and not last and (code in _STALE or code in _STANDBY):
                    continue
                raise StoreError(self._explained(error, code)) from error
            except RefusedError:
                if not self._rolled_back():
                    self.close()
                raise
            except SettingsError as error:  # the address is in a secret that cannot be read
                raise StoreError(str(error)) from error
            except BaseException:
                self.close()
                raise
        raise AssertionError("unreachable")

    def _connected(self) -> MySQLConnection:
        if self._connection is None:
            address = self._address(refresh=False)
            self._where = where(address)
            self._connection = MySQLConnection(self._connect(address), self._clock)
            self._end_abandoned(self._connection)
        return self._connection

    def _end_abandoned(self, connection: MySQLConnection) -> None:
        """End a statement that the client gave up, which the server would finish or wait with."""
        thread, self._abandoned_thread = self._abandoned_thread, None
        if thread is not None:
            with suppress(pymysql.MySQLError):  # it has ended by itself, or on another server
                connection.execute(f"KILL {thread:d}")

    def _drop(self, *, gave_up: bool) -> None:
        if gave_up and self._connection is not None:
            self._abandoned_thread = self._connection.server_thread
        self.close()

    def _follow_schema(self) -> bool:
        """Make our tables fit the shop's again; returns whether they may have changed."""
        if self._prepared_until == -math.inf:  # they have just been compared, or are being compared
            return False
        self.prepare()
        self._prepared_until = -math.inf  # compared once for one error
        return True

    def _explained(self, error: pymysql.MySQLError, code: object) -> str:
        message = _ADVICE.get(code) if isinstance(code, int) else None
        message = message or _server_message(error)
        if code in _MAY_NOT:
            message += "; docs/deploy.md lists the grants"
        return f"The database {self._where} cannot be used: {message} ({code})."

    def _refusal(self, error: pymysql.MySQLError, code: object) -> RefusedError:
        message = f"{_server_message(error)} ({code})"
        if code not in _MAY_NOT:
            return RefusedError(message)
        if "checkout_session_" in message:  # a table of ours, so it is about every row
            return RefusedError(
                f"{message}. Grant this user what docs/deploy.md lists.", of_any_row=True
            )
        # The definer of a trigger may be the one who lacks a right, and only for some rows.
        return RefusedError(message, remedy=self._grant())

    def _grant(self) -> str:
        """The sentence with the rights that a status change needs."""
        if self._connection is None:
            return ""
        [(account, database)] = self._connection.query("SELECT CURRENT_USER(), DATABASE()")
        user, _, host = str(account).rpartition("@")
        table = f"{database!s}.checkout_session"
        return f"Run: GRANT SELECT, UPDATE (status) ON {table} TO '{user}'@'{host}';"

    def _connect(self, address: MySQLAddress) -> pymysql.Connection:
        try:
            return connect(address)
        except pymysql.OperationalError as error:
            if error.args[0] != ER.ACCESS_DENIED_ERROR:
                raise
            rotated = self._address(refresh=True)
            if rotated == address:
                raise
            return connect(rotated)

    def _rolled_back(self) -> bool:
        return self._connection is not None and self._connection.rolled_back()


def _is_in(numbers: range, text: str) -> bool:
    # The longest number of the range has 20 digits; int() of thousands would take long.
    return re.fullmatch("-?[0-9]{1,20}", text) is not None and int(text) in numbers


def _server_message(error: pymysql.MySQLError) -> str:
    return str(error.args[1]) if len(error.args) > 1 else type(error).__name__

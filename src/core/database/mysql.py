"""MySQL 8.0 and later, MariaDB 10.6 and later, through PyMySQL."""

import random
import re
import time
from collections.abc import Callable, Sequence
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
_LOCKED = frozenset((ER.LOCK_DEADLOCK, ER.LOCK_WAIT_TIMEOUT))
# A trigger's SIGNAL, and a CHECK that fails on MySQL and on MariaDB.
_REFUSED = frozenset((1644, 3819, 4025))


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
    in_due_order = "FORCE INDEX FOR ORDER BY (checkout_session_check_due)"
    # For hundreds of rows, the optimizer reads the whole of a table that it thinks is small.
    by_rowid = "FORCE INDEX (PRIMARY)"
    by_session = "FORCE INDEX (checkout_session_check_session)"
    lock_rows = "FOR UPDATE SKIP LOCKED"
    lock_rows_or_wait = "FOR UPDATE"
    insert_or_ignore = "INSERT IGNORE"

    def __init__(
        self,
        address: Addresses,
        *,
        clock: Callable[[], datetime] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.prepared = False
        self._address = address
        self._clock = clock
        self._sleep = sleep
        self._connection: MySQLConnection | None = None
        self._id_charset: str | None = None
        self._where = ""

    def prepare(self) -> bool:
        self._id_charset = mysql_schema.prepare(self)
        self.prepared = True
        return self.run(mysql_schema.has_status_index)

    @property
    def now_sql(self) -> str:
        if self._clock is None:
            return "UTC_TIMESTAMP(3)"
        return f"CAST('{self._clock():%Y-%m-%d %H:%M:%S.%f}' AS DATETIME(3))"

    def comparable(self, session_id: str) -> bool:
        if self._id_charset is None:  # a number; MySQL would take 'abc' for 0
            return re.fullmatch("-?[0-9]+", session_id) is not None
        # The server refuses to compare a text with a column whose character set lacks one of its
        # characters (1267, illegal mix of collations). No id there can be equal to it anyway.
        charset = self._id_charset
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

    def transaction[T](self, work: Callable[[Transaction], T]) -> T:
        def atomic(connection: MySQLConnection) -> T:
            connection.execute("BEGIN")
            result = work(connection)
            connection.execute("COMMIT")
            return result

        return self._run(atomic)

    def run[T](self, work: Callable[[Connection], T]) -> T:
        return self._run(work)

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _run[T](self, work: Callable[[MySQLConnection], T]) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            kept = self._connection is not None
            last = attempt == ATTEMPTS
            try:
                return work(self._connected())
            except pymysql.MySQLError as error:
                code = error.args[0] if error.args else None
                if code in _LOCKED and self._rolled_back() and not last:
                    # Both sides of a deadlock try again at different times.
                    self._sleep(random.uniform(0.01, 0.05) * attempt)  # noqa: S311 (no secret)
                    continue
                if _refuses_values(error, code) and self._rolled_back():
                    raise RefusedError(f"{_server_message(error)} ({code})") from error
                # The next connection may not have this problem: after a failover it leads to
                # another server.
                self.close()
                if kept and not last and (code in _STALE or code in _STANDBY):
                    continue
                if code in (ER.NO_SUCH_TABLE, ER.BAD_FIELD_ERROR):
                    self.prepared = False
                raise StoreError(
                    f"The database {self._where} cannot be used: {_server_message(error)} ({code})."
                ) from error
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
        return self._connection

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


def _refuses_values(error: pymysql.MySQLError, code: object) -> bool:
    return code in _REFUSED or isinstance(error, pymysql.IntegrityError | pymysql.DataError)


def _server_message(error: pymysql.MySQLError) -> str:
    return str(error.args[1]) if len(error.args) > 1 else type(error).__name__

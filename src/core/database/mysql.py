"""MySQL 8.0 and later, MariaDB 10.6 and later, through PyMySQL."""

import random
import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Protocol

import pymysql
from pymysql.charset import charset_by_name
from pymysql.connections import Connection
from pymysql.constants import CR, ER

from core.database.address import MySQLAddress
from core.database.mysql_connection import connect, where
from core.database.port import Row, Value
from core.errors import RefusedError, SettingsError, StoreError

ATTEMPTS = 5

# A connection that the server, a proxy or a firewall has ended since it was last used. 0 is
# PyMySQL's InterfaceError for a socket already closed; 4031 is MySQL's idle disconnect, 1927
# MariaDB's word for a connection that was killed.
_STALE = frozenset((0, CR.CR_SERVER_GONE_ERROR, CR.CR_SERVER_LOST, ER.SERVER_SHUTDOWN, 4031, 1927))
# A server that takes no writes, because another one does since a failover: read-only by option
# (1290), by transaction (1792), by mode (1836), or a Galera node that is out of its cluster (1047).
_STANDBY = frozenset((1290, 1792, 1836, 1047))
_LOCKED = frozenset((ER.LOCK_DEADLOCK, ER.LOCK_WAIT_TIMEOUT))
_MAY_NOT = frozenset((ER.TABLEACCESS_DENIED_ERROR, ER.DBACCESS_DENIED_ERROR))
# A column or a key that another worker has just added.
_DONE = frozenset((ER.DUP_FIELDNAME, ER.DUP_KEYNAME))
# A trigger's SIGNAL, and a CHECK's no on MySQL and on MariaDB.
_REFUSED = frozenset((1644, 3819, 4025))

_TEXT_ID_TYPES = ("char", "varchar")
_NUMBER_ID_TYPES = ("int", "bigint")

CHECK_TABLE = """\
CREATE TABLE IF NOT EXISTS checkout_session_check (
  rowid BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  session_id {id_type} NOT NULL,
  next_check_at DATETIME(3) NOT NULL,
  claimed_until DATETIME(3) NULL,
  first_seen_at DATETIME(3) NOT NULL,
  last_checked_at DATETIME(3) NULL,
  last_outcome VARCHAR(32) NULL,
  last_status_code SMALLINT NULL,
  attempts INT UNSIGNED NOT NULL DEFAULT 0,
  consecutive_failures INT UNSIGNED NOT NULL DEFAULT 0,
  failing_since DATETIME(3) NULL,
  UNIQUE KEY checkout_session_check_session (session_id),
  KEY checkout_session_check_due (next_check_at),
  KEY checkout_session_check_failing (consecutive_failures)
) ENGINE=InnoDB"""

RUN_TABLE = """\
CREATE TABLE IF NOT EXISTS checkout_session_run (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  reason VARCHAR(16) NOT NULL,
  tick DATETIME(3) NULL,
  started_at DATETIME(3) NOT NULL,
  finished_at DATETIME(3) NULL,
  duration_ms INT UNSIGNED NOT NULL,
  open_sessions INT UNSIGNED NOT NULL,
  checked INT UNSIGNED NOT NULL,
  errors INT UNSIGNED NOT NULL,
  status_changes INT UNSIGNED NOT NULL,
  outcomes VARCHAR(1000) NOT NULL,
  skipped VARCHAR(1000) NOT NULL,
  overdue_ms BIGINT UNSIGNED NOT NULL,
  latency_p50_ms DOUBLE NULL,
  latency_p95_ms DOUBLE NULL,
  latency_p99_ms DOUBLE NULL,
  latency_max_ms DOUBLE NULL,
  KEY checkout_session_run_finished (finished_at),
  KEY checkout_session_run_tick (tick)
) ENGINE=InnoDB"""


PAUSE_TABLE = """\
CREATE TABLE IF NOT EXISTS checkout_session_pause (
  id TINYINT UNSIGNED NOT NULL PRIMARY KEY,
  paused_until DATETIME(3) NOT NULL,
  pauses INT UNSIGNED NOT NULL,
  last_tick DATETIME(3) NULL,
  counts VARCHAR(2000) NULL,
  counted_at DATETIME(3) NULL,
  count_again_at DATETIME(3) NULL
) ENGINE=InnoDB"""

CHANGE_TABLE = """\
CREATE TABLE IF NOT EXISTS checkout_session_change (
  id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  session_id {id_type} NOT NULL,
  billing_checkout_id TEXT CHARACTER SET utf8mb4 NULL,
  new_status VARCHAR(16) NOT NULL,
  billing_status VARCHAR(255) CHARACTER SET utf8mb4 NOT NULL,
  changed_at DATETIME(3) NOT NULL,
  KEY checkout_session_change_changed (changed_at)
) ENGINE=InnoDB"""

# What a table of version 0.1.0 lacks, by the column that tells: its name, and if it is nullable.
UPGRADES = {
    ("checkout_session_check", ("rowid", "NO")): (
        "ALTER TABLE checkout_session_check DROP PRIMARY KEY,"
        " ADD COLUMN rowid BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY FIRST,"
        " ADD UNIQUE KEY checkout_session_check_session (session_id)"
    ),
    ("checkout_session_check", ("failing_since", "YES")): (
        "ALTER TABLE checkout_session_check ADD COLUMN failing_since DATETIME(3) NULL,"
        " ADD KEY checkout_session_check_failing (consecutive_failures)"
    ),
    ("checkout_session_run", ("finished_at", "YES")): (
        "ALTER TABLE checkout_session_run MODIFY finished_at DATETIME(3) NULL,"
        " ADD KEY checkout_session_run_tick (tick)"
    ),
    ("checkout_session_pause", ("last_tick", "YES")): (
        "ALTER TABLE checkout_session_pause ADD COLUMN last_tick DATETIME(3) NULL,"
        " ADD COLUMN counts VARCHAR(2000) NULL, ADD COLUMN counted_at DATETIME(3) NULL,"
        " ADD COLUMN count_again_at DATETIME(3) NULL"
    ),
}


class Addresses(Protocol):
    """Says where to connect; with `refresh`, as it is now and not as it was read before."""

    def __call__(self, *, refresh: bool) -> MySQLAddress: ...


class MySQLDatabase:
    """One connection, opened when first needed and replaced when it has gone stale.

    When the server denies access, the address is asked for once more, refreshed, because a password
    may have been rotated.
    """

    # Left to itself, the optimizer may sort the whole table instead, and then one pass locks every
    # row of it and the others find nothing to claim.
    in_due_order = "FORCE INDEX FOR ORDER BY (checkout_session_check_due)"
    # The optimizer reads the whole of a table that it thinks is small, where it is asked for
    # hundreds of rows.
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
        self._connection: Connection | None = None
        self._id_charset: str | None = None
        self._where = ""

    def prepare(self) -> bool:
        id_type = self.run(self._id_type)
        statements = [
            CHECK_TABLE.format(id_type=id_type),
            RUN_TABLE,
            PAUSE_TABLE,
            CHANGE_TABLE.format(id_type=id_type),
        ]
        refused = [s for s in statements if not self.run(partial(self._create, s))]
        refused += [
            statement
            for (table, column), statement in UPGRADES.items()
            if not self.run(partial(self._upgrade, table, column, statement))
        ]
        if refused:
            raise StoreError(
                "Tables of the monitor are missing or older than this version, and this user may "
                "not make or change them. Run: "
                + " ".join(f"{statement};" for statement in refused)
            )
        self.prepared = True
        return self.run(self._has_status_index)

    @property
    def now_sql(self) -> str:
        if self._clock is None:
            return "UTC_TIMESTAMP(3)"
        return f"CAST('{self._clock():%Y-%m-%d %H:%M:%S.%f}' AS DATETIME(3))"

    def now(self) -> datetime:
        if self._clock is not None:
            return self._clock()
        [(now,)] = self.query(f"SELECT {self.now_sql}")
        assert isinstance(now, datetime)  # noqa: S101 (for mypy)
        return now

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

    def transaction[T](self, work: Callable[[], T]) -> T:
        def atomic() -> T:
            self.execute("BEGIN")
            result = work()
            self.execute("COMMIT")
            return result

        return self.run(atomic)

    def run[T](self, work: Callable[[], T]) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            kept = self._connection is not None
            last = attempt == ATTEMPTS
            try:
                self._connect()
                return work()
            except pymysql.MySQLError as error:
                code = error.args[0] if error.args else None
                if code in _LOCKED and self._rolled_back() and not last:
                    # Both sides of a deadlock come back at different moments.
                    self._sleep(random.uniform(0.01, 0.05) * attempt)  # noqa: S311 (no secret)
                    continue
                if _refuses_values(error, code) and self._rolled_back():
                    raise RefusedError(f"{_said(error)} ({code})") from error
                # Whatever this connection has met, the next one may be without: after a failover it
                # leads to another server.
                self._drop()
                if kept and not last and (code in _STALE or code in _STANDBY):
                    continue
                if code in (ER.NO_SUCH_TABLE, ER.BAD_FIELD_ERROR):
                    self.prepared = False
                raise StoreError(self._explained(error)) from error
            except SettingsError as error:  # the address is in a secret that cannot be read
                raise StoreError(str(error)) from error
            except BaseException:
                self._drop()
                raise
        raise AssertionError("unreachable")

    def query(self, sql: str, parameters: Sequence[Value] = ()) -> Sequence[Row]:
        with self._open().cursor() as cursor:
            cursor.execute(sql, parameters or None)
            return cursor.fetchall()

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> int:
        with self._open().cursor() as cursor:
            return cursor.execute(sql, parameters or None)

    def close(self) -> None:
        self._drop()

    def _open(self) -> Connection:
        assert self._connection is not None, "outside run()"  # noqa: S101 (a bug of ours)
        return self._connection

    def _connect(self) -> None:
        if self._connection is not None:
            return
        address = self._address(refresh=False)
        self._where = where(address)
        try:
            self._connection = connect(address)
        except pymysql.OperationalError as error:
            if error.args[0] != ER.ACCESS_DENIED_ERROR:
                raise
            rotated = self._address(refresh=True)
            if rotated == address:
                raise
            self._connection = connect(rotated)

    def _rolled_back(self) -> bool:
        if self._connection is None:
            return False
        try:
            self._connection.rollback()
        except pymysql.MySQLError:
            return False
        return True

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and connection.open:
            connection.close()

    def _explained(self, error: pymysql.MySQLError) -> str:
        code = error.args[0] if error.args else None
        return f"The database {self._where} cannot be used: {_said(error)} ({code})."

    def _id_type(self) -> str:
        """The type of our `session_id`: exactly the shop's, or the two cannot be joined."""
        columns = {
            str(table): (str(data_type), str(column_type), charset, collation)
            for table, data_type, column_type, charset, collation in self.query(
                "SELECT table_name, data_type, column_type, character_set_name, collation_name"
                " FROM information_schema.columns WHERE table_schema = DATABASE() AND"
                " (table_name, column_name) IN"
                " (('checkout_session', 'id'), ('checkout_session_check', 'session_id'))"
            )
        }
        if "checkout_session" not in columns:
            raise StoreError(
                "The database has no table checkout_session with a column id, or this user may "
                "not read it; local/schema/mysql.sql makes one for a trial."
            )
        shops = columns["checkout_session"]
        data_type, column_type, charset, collation = shops
        if data_type not in _TEXT_ID_TYPES + _NUMBER_ID_TYPES:
            raise StoreError(
                f"checkout_session.id is of type {data_type}; it must be one of "
                f"{', '.join(_TEXT_ID_TYPES + _NUMBER_ID_TYPES)}."
            )
        if columns.get("checkout_session_check", shops) != shops:
            raise StoreError(
                "checkout_session_check.session_id has another type or collation than "
                "checkout_session.id. The monitor makes the table anew: "
                "DROP TABLE checkout_session_check;"
            )
        self._id_charset = None if charset is None else str(charset)
        if charset is None:
            return column_type
        return f"{column_type} CHARACTER SET {charset} COLLATE {collation}"

    def _create(self, statement: str) -> bool:
        """Whether the table is there, made just now if need be; no: this user may not make it."""
        [table] = re.findall(r"EXISTS (\w+)", statement)
        if self.query(
            "SELECT 1 FROM information_schema.tables"
            " WHERE table_schema = DATABASE() AND table_name = %s",
            (table,),
        ):
            return True
        try:
            self.execute(statement)
        except pymysql.OperationalError as error:
            if error.args[0] in _MAY_NOT:
                return False
            raise
        return True

    def _upgrade(self, table: str, column: tuple[str, str], statement: str) -> bool:
        """Whether the table is of this version, changed just now if need be."""
        columns = self.query(
            "SELECT column_name, is_nullable FROM information_schema.columns"
            " WHERE table_schema = DATABASE() AND table_name = %s",
            (table,),
        )
        if not columns or column in columns:  # the table is not there; or of this version
            return True
        try:
            self.execute(statement)
        except pymysql.OperationalError as error:
            if error.args[0] in _MAY_NOT:
                return False
            if error.args[0] not in _DONE:
                raise
        return True

    def _has_status_index(self) -> bool:
        return bool(
            self.query(
                "SELECT 1 FROM information_schema.statistics WHERE table_schema = DATABASE()"
                " AND table_name = 'checkout_session' AND column_name = 'status'"
                " AND seq_in_index = 1 LIMIT 1"
            )
        )


def _refuses_values(error: pymysql.MySQLError, code: object) -> bool:
    return code in _REFUSED or isinstance(error, pymysql.IntegrityError | pymysql.DataError)


def _said(error: pymysql.MySQLError) -> str:
    return str(error.args[1]) if len(error.args) > 1 else type(error).__name__

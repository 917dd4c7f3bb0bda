"""SQLite, the embedded database of a laptop and of the tests."""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from core.database.port import NO_STATUS_INDEX, Connection, Row, Transaction, Value
from core.domain.model import iso
from core.errors import RefusedError, StoreError

BUSY_SECONDS = 5

# Errors of the whole file, by their primary code; any other one is about the rows of a statement.
_UNUSABLE = frozenset(
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_NOTADB,
    )
)

TABLES = """\
CREATE TABLE IF NOT EXISTS checkout_session_batch (
  id INTEGER PRIMARY KEY,
  next_check_at DATETIME NOT NULL,
  due_at DATETIME NOT NULL,
  claimed_until DATETIME,
  checked_at DATETIME
);
CREATE INDEX IF NOT EXISTS checkout_session_batch_due
  ON checkout_session_batch (due_at, checked_at);
CREATE TABLE IF NOT EXISTS checkout_session_check (
  rowid INTEGER PRIMARY KEY AUTOINCREMENT, -- or a new session could get a closed one's number
  session_id TEXT NOT NULL UNIQUE,
  batch_id INTEGER,
  next_check_at DATETIME,
  claimed_until DATETIME,
  first_seen_at DATETIME NOT NULL,
  last_checked_at DATETIME,
  last_outcome TEXT,
  last_status_code INTEGER,
  consecutive_failures INTEGER NOT NULL DEFAULT 0,
  failing_since DATETIME
);
CREATE INDEX IF NOT EXISTS checkout_session_check_batch
  ON checkout_session_check (batch_id, next_check_at, claimed_until);
CREATE INDEX IF NOT EXISTS checkout_session_check_waiting
  ON checkout_session_check (failing_since, last_outcome);
CREATE TABLE IF NOT EXISTS checkout_session_run (
  id INTEGER PRIMARY KEY,
  reason TEXT NOT NULL,
  tick DATETIME,
  started_at DATETIME NOT NULL,
  finished_at DATETIME,
  duration_ms INTEGER NOT NULL,
  open_sessions INTEGER NOT NULL,
  checked INTEGER NOT NULL,
  errors INTEGER NOT NULL,
  status_changes INTEGER NOT NULL,
  outcomes TEXT NOT NULL,
  skipped TEXT NOT NULL,
  overdue_ms INTEGER NOT NULL,
  latency_p50_ms REAL,
  latency_p95_ms REAL,
  latency_p99_ms REAL,
  latency_max_ms REAL,
  settings TEXT,
  unknown_words TEXT
);
CREATE INDEX IF NOT EXISTS checkout_session_run_finished ON checkout_session_run (finished_at);
CREATE INDEX IF NOT EXISTS checkout_session_run_tick ON checkout_session_run (tick);
CREATE TABLE IF NOT EXISTS checkout_session_pause (
  id INTEGER PRIMARY KEY,
  paused_until DATETIME NOT NULL,
  pauses INTEGER NOT NULL,
  last_tick DATETIME,
  counts TEXT,
  counted_at DATETIME,
  count_again_at DATETIME,
  budget TEXT
);
CREATE TABLE IF NOT EXISTS checkout_session_change (
  id INTEGER PRIMARY KEY,
  session_id TEXT NOT NULL,
  billing_checkout_id TEXT,
  new_status TEXT NOT NULL,
  billing_status TEXT NOT NULL,
  changed_at DATETIME NOT NULL,
  late_check_at DATETIME,
  paid_late_at DATETIME
);
CREATE INDEX IF NOT EXISTS checkout_session_change_changed
  ON checkout_session_change (changed_at);
CREATE INDEX IF NOT EXISTS checkout_session_change_late
  ON checkout_session_change (late_check_at, changed_at);
CREATE INDEX IF NOT EXISTS checkout_session_change_paid_late
  ON checkout_session_change (paid_late_at)"""

# Tables of version 0.1.0 are dropped and made again: SQLite cannot change a column, and the next
# tick finds out again what they hold of a laptop's sessions.
OUTDATED = (
    "SELECT name FROM sqlite_master WHERE type = 'table' AND ("
    " (name = 'checkout_session_check' AND sql NOT LIKE '%failing_since%') OR"
    " (name = 'checkout_session_run' AND sql LIKE '%finished_at DATETIME NOT NULL%') OR"
    " (name = 'checkout_session_pause' AND sql NOT LIKE '%last_tick%'))"
)

# Columns that tables of version 0.2.0 lack.
ADDED_COLUMNS = (
    ("checkout_session_run", "settings", "TEXT"),
    ("checkout_session_run", "unknown_words", "TEXT"),
    ("checkout_session_pause", "budget", "TEXT"),
    ("checkout_session_change", "late_check_at", "DATETIME"),
    ("checkout_session_change", "paid_late_at", "DATETIME"),
)

# Times are kept as text that sorts by time, 2026-01-15T10:30:00.000Z. sqlite3 registers adapters
# and converters for the whole process, by type and by a column's declared type.
sqlite3.register_adapter(datetime, iso)
sqlite3.register_converter("DATETIME", lambda text: datetime.fromisoformat(text.decode()))


class SQLiteConnection:
    """Runs statements on a connection of sqlite3's; it is a `Transaction` after BEGIN."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], datetime]) -> None:
        self._connection = connection
        self._clock = clock

    def query(self, sql: str, parameters: Sequence[Value] = ()) -> Sequence[Row]:
        return self._execute(sql, parameters).fetchall()

    def execute(self, sql: str, parameters: Sequence[Value] = ()) -> int:
        return self._execute(sql, parameters).rowcount

    def now(self) -> datetime:
        return self._clock()

    def savepoint(self) -> None:
        self.execute("SAVEPOINT unwritten")

    def roll_back_to_savepoint(self) -> None:
        self.execute("ROLLBACK TO SAVEPOINT unwritten")

    def roll_back(self) -> None:
        """End a transaction without its changes; does nothing outside of one."""
        if self._connection.in_transaction:
            self._connection.rollback()

    def close(self) -> None:
        self._connection.close()

    def _execute(self, sql: str, parameters: Sequence[Value]) -> sqlite3.Cursor:
        return self._connection.execute(sql.replace("%s", "?"), parameters)


class SQLiteDatabase:
    """One connection to a file. Writers wait for each other; readers wait for nobody (WAL)."""

    in_due_order = by_rowid = by_session = by_batch = by_wait = by_status = ""
    join_in_order = "JOIN"
    has_index = (
        "SELECT 1 FROM pragma_index_list('checkout_session') AS list,"
        " pragma_index_info(list.name) AS info WHERE info.seqno = 0 AND info.name = %s"
    )
    is_transactional = True
    lock_rows = lock_rows_or_wait = ""  # a transaction holds the only write lock from its beginning
    skip_duplicates = "ON CONFLICT DO NOTHING"

    def __init__(self, path: Path, *, clock: Callable[[], datetime] | None = None) -> None:
        self.prepared = False
        self._path = path
        self._clock = clock or _wall_clock
        self._connection: SQLiteConnection | None = None

    def prepare(self) -> Sequence[str]:
        self.run(self._check_shop)
        if self.run(_is_older):
            self.transaction(_upgrade)
        warnings = self.run(_make_tables)
        self.prepared = True
        return warnings

    def now_sql(self, *, plus_seconds: int = 0) -> str:
        return f"'{iso(self._clock() + timedelta(seconds=plus_seconds))}'"

    def joined(self, expressions: Iterable[str]) -> str:
        return " || '|' || ".join(expressions)

    def comparable(self, session_id: str) -> bool:
        try:
            session_id.encode()
        except UnicodeEncodeError:
            return False
        return True

    def transaction[T](self, work: Callable[[Transaction], T], *, refusable: bool = False) -> T:
        def atomic(connection: SQLiteConnection) -> T:
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            connection.execute("COMMIT")
            return result

        return self._run(atomic, refusable=refusable)

    def run[T](self, work: Callable[[Connection], T]) -> T:
        return self._run(work)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _run[T](self, work: Callable[[SQLiteConnection], T], *, refusable: bool = False) -> T:
        try:
            if self._connection is None:
                self._connection = self._connect()
            return work(self._connection)
        except BaseException as error:
            if self._connection is not None:
                self._connection.roll_back()
            if isinstance(error, sqlite3.Error):
                if "no such" in str(error):  # table or column: SQLite has no code of its own for it
                    self.prepared = False
                if refusable and error.sqlite_errorcode & 0xFF not in _UNUSABLE:
                    raise RefusedError(str(error)) from error
                message = f"The database {self._path} cannot be used: {error}."
                raise StoreError(message) from error
            raise

    def _connect(self) -> SQLiteConnection:
        connection = sqlite3.connect(
            self._path,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            detect_types=sqlite3.PARSE_DECLTYPES,
        )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        return SQLiteConnection(connection, self._clock)

    def _check_shop(self, connection: Connection) -> None:
        if not connection.query("SELECT 1 FROM sqlite_master WHERE name = 'checkout_session'"):
            raise StoreError(f"The database {self._path} has no table checkout_session.")
        for (outdated,) in connection.query(OUTDATED):
            connection.execute(f"DROP TABLE {outdated!s}")


def _make_tables(connection: Connection) -> Sequence[str]:
    """Make what is missing; returns warnings about the shop's table."""
    for statement in TABLES.split(";"):
        connection.execute(statement)
    indexed = connection.query(SQLiteDatabase.has_index, ("status",))
    return [] if indexed else [NO_STATUS_INDEX]


def _is_older(connection: Connection) -> bool:
    """Whether the tables are of version 0.2.0."""
    columns = [("checkout_session_check", "batch_id"), *((t, c) for t, c, _ in ADDED_COLUMNS)]
    return any(_lacks(connection, table, column) for table, column in columns)


def _upgrade(transaction: Transaction) -> None:
    """Upgrade tables of version 0.2.0, unless another worker has just done it."""
    if _lacks(transaction, "checkout_session_check", "batch_id"):
        # SQLite cannot let a column be NULL that must not be; the table is copied.
        columns = (
            "rowid, session_id, next_check_at, claimed_until, first_seen_at, last_checked_at,"
            " last_outcome, last_status_code, consecutive_failures, failing_since"
        )
        [create] = [
            s for s in TABLES.split(";") if "TABLE IF NOT EXISTS checkout_session_check" in s
        ]
        transaction.execute(create.replace("checkout_session_check", "checkout_session_copy"))
        transaction.execute(
            f"INSERT INTO checkout_session_copy ({columns})"
            f" SELECT {columns} FROM checkout_session_check"
        )
        transaction.execute("DROP TABLE checkout_session_check")
        transaction.execute("ALTER TABLE checkout_session_copy RENAME TO checkout_session_check")
        transaction.execute("UPDATE checkout_session_pause SET count_again_at = NULL")
    for table, column, kind in ADDED_COLUMNS:
        if _lacks(transaction, table, column):
            transaction.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")


def _lacks(connection: Connection, table: str, column: str) -> bool:
    """Whether the table exists without the column."""
    columns = {
        name for (name,) in connection.query(f"SELECT name FROM pragma_table_info('{table}')")
    }
    return bool(columns) and column not in columns


def _wall_clock() -> datetime:
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)

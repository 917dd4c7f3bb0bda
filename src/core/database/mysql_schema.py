"""The monitor's tables on MySQL and MariaDB: what they are, how they are made and upgraded."""

import re
from functools import partial

import pymysql
from pymysql.constants import ER

from core.database.port import Connection, Database
from core.errors import StoreError

TEXT_ID_TYPES = ("char", "varchar")
NUMBER_ID_TYPES = ("int", "bigint")

_MAY_NOT = frozenset((ER.TABLEACCESS_DENIED_ERROR, ER.DBACCESS_DENIED_ERROR))
# A column or a key that another worker has just added.
_DONE = frozenset((ER.DUP_FIELDNAME, ER.DUP_KEYNAME))

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

# What upgrades a table of version 0.1.0, by the column it lacks (name, nullable).
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


def prepare(database: Database) -> str | None:
    """Make or upgrade the monitor's tables; returns the character set of the shop's ids.

    None: the ids are numbers.

    Raises:
        StoreError: the shop's table cannot be used, or this user may not make the tables.
    """
    id_type, id_charset = database.run(_id_type)
    statements = [
        CHECK_TABLE.format(id_type=id_type),
        RUN_TABLE,
        PAUSE_TABLE,
        CHANGE_TABLE.format(id_type=id_type),
    ]
    refused = [s for s in statements if not database.run(partial(_create, statement=s))]
    refused += [
        statement
        for (table, column), statement in UPGRADES.items()
        if not database.run(partial(_upgrade, table=table, column=column, statement=statement))
    ]
    if refused:
        raise StoreError(
            "Tables of the monitor are missing or older than this version, and this user may "
            "not make or change them. Run: " + " ".join(f"{statement};" for statement in refused)
        )
    return id_charset


def has_status_index(connection: Connection) -> bool:
    """Whether the shop's table has an index that begins with `status`."""
    return bool(
        connection.query(
            "SELECT 1 FROM information_schema.statistics WHERE table_schema = DATABASE()"
            " AND table_name = 'checkout_session' AND column_name = 'status'"
            " AND seq_in_index = 1 LIMIT 1"
        )
    )


def _id_type(connection: Connection) -> tuple[str, str | None]:
    """The type of our `session_id` (the shop's, or the two cannot be joined), and its charset."""
    columns = {
        str(table): (str(data_type), str(column_type), charset, collation)
        for table, data_type, column_type, charset, collation in connection.query(
            "SELECT table_name, data_type, column_type, character_set_name, collation_name"
            " FROM information_schema.columns WHERE table_schema = DATABASE() AND"
            " (table_name, column_name) IN"
            " (('checkout_session', 'id'), ('checkout_session_check', 'session_id'))"
        )
    }
    if "checkout_session" not in columns:
        raise StoreError(
            "The database has no table checkout_session with a column id, or this user may "
            "not read it."
        )
    shops = columns["checkout_session"]
    data_type, column_type, charset, collation = shops
    if data_type not in TEXT_ID_TYPES + NUMBER_ID_TYPES:
        raise StoreError(
            f"checkout_session.id is of type {data_type}; it must be one of "
            f"{', '.join(TEXT_ID_TYPES + NUMBER_ID_TYPES)}."
        )
    if columns.get("checkout_session_check", shops) != shops:
        raise StoreError(
            "checkout_session_check.session_id has another type or collation than "
            "checkout_session.id. Drop the table, and the monitor makes a new one: "
            "DROP TABLE checkout_session_check;"
        )
    if charset is None:
        return column_type, None
    return f"{column_type} CHARACTER SET {charset} COLLATE {collation}", str(charset)


def _create(connection: Connection, *, statement: str) -> bool:
    """Whether the table exists, made just now if need be; False: this user may not make it."""
    [table] = re.findall(r"EXISTS (\w+)", statement)
    if connection.query(
        "SELECT 1 FROM information_schema.tables"
        " WHERE table_schema = DATABASE() AND table_name = %s",
        (table,),
    ):
        return True
    try:
        connection.execute(statement)
    except pymysql.OperationalError as error:
        if error.args[0] in _MAY_NOT:
            return False
        raise
    return True


def _upgrade(
    connection: Connection, *, table: str, column: tuple[str, str], statement: str
) -> bool:
    """Whether the table is of this version, upgraded just now if need be."""
    columns = connection.query(
        "SELECT column_name, is_nullable FROM information_schema.columns"
        " WHERE table_schema = DATABASE() AND table_name = %s",
        (table,),
    )
    if not columns or column in columns:  # the table does not exist, or is of this version
        return True
    try:
        connection.execute(statement)
    except pymysql.OperationalError as error:
        if error.args[0] in _MAY_NOT:
            return False
        if error.args[0] not in _DONE:
            raise
    return True

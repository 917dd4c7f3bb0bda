"""The monitor's tables on MySQL and MariaDB: how they are made, upgraded, and follow the shop's."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import pymysql
from pymysql.constants import ER

from core.database.mysql_tables import (
    BATCH_TABLE,
    CHANGE_TABLE,
    CHECK_TABLE,
    HAS_BATCHES,
    MODIFY_ID,
    PAUSE_TABLE,
    RUN_TABLE,
    UPGRADES,
)
from core.database.port import NO_STATUS_INDEX, Connection, Value, as_int
from core.errors import StoreError

TEXT_ID_TYPES = ("char", "varchar")
NUMBER_ID_BITS = {"tinyint": 8, "smallint": 16, "mediumint": 24, "int": 32, "bigint": 64}
# Our columns that hold the shop's ids.
ID_COPIES = ("checkout_session_check", "checkout_session_change")

NO_ID_INDEX = (
    "checkout_session.id has no index, so each claim reads the whole table. Run: "
    "ALTER TABLE checkout_session ADD UNIQUE KEY (id);"
)
NO_UNIQUE_ID = (
    "checkout_session.id has no unique key, and where several open sessions have the same id, no "
    "status is changed. Run: ALTER TABLE checkout_session ADD UNIQUE KEY (id);"
)
NO_TRANSACTIONS = (
    "checkout_session uses the engine {engine}, which has no transactions: with an event bus, or "
    "on a server that enforces GTID consistency, no status is changed. Run: "
    "ALTER TABLE checkout_session ENGINE=InnoDB;"
)

_MAY_NOT = frozenset((ER.TABLEACCESS_DENIED_ERROR, ER.DBACCESS_DENIED_ERROR))
# A column or a key that another worker has just added.
_DONE = frozenset((ER.DUP_FIELDNAME, ER.DUP_KEYNAME))
# Rows of ours hold ids that the shop's column cannot hold any more, or takes for equal now: too
# long, out of range, of another character set, not a number, or twice the same.
_DOES_NOT_FIT = frozenset((1406, 1264, 1265, 1292, 1366, 1062))


class IdColumn(NamedTuple):
    """The type of the shop's id, or of our copy of it."""

    data_type: str  # e.g. varchar, bigint
    column_type: str  # e.g. varchar(64), bigint unsigned
    charset: str | None  # None: the ids are numbers
    collation: str | None

    @property
    def definition(self) -> str:
        """The type of our copies: exactly the shop's, or the tables cannot be joined."""
        if self.charset is None:
            return self.column_type
        return f"{self.column_type} CHARACTER SET {self.charset} COLLATE {self.collation}"

    @property
    def numbers(self) -> range:
        """The numbers that the column can hold."""
        bits = NUMBER_ID_BITS[self.data_type]
        if "unsigned" in self.column_type:
            return range(2**bits)
        return range(-(2 ** (bits - 1)), 2 ** (bits - 1))


class ShopTable(NamedTuple):
    """What `checkout_session` is like."""

    ids: IdColumn
    is_transactional: bool
    open_index: str | None  # the index that has the open sessions in the order of their ids
    warnings: Sequence[str]


class _Database(Protocol):
    def run[T](self, work: Callable[[Connection], T]) -> T: ...

    def alter(self, statement: str) -> None: ...


def prepare(database: _Database) -> ShopTable:
    """Make, upgrade and change the monitor's tables so that they fit the shop's.

    Raises:
        StoreError: the shop's table cannot be used, or this user may not make the tables.
    """
    shop, copies = database.run(_read_shop)
    definition = shop.ids.definition
    refused = [
        statement
        for statement in (
            BATCH_TABLE,
            CHECK_TABLE.format(id_type=definition),
            RUN_TABLE,
            PAUSE_TABLE,
            CHANGE_TABLE.format(id_type=definition),
        )
        if not _create(database, statement)
    ]
    refused += [
        statement
        for (table, column), statement in UPGRADES.items()
        if not _upgrade(database, table, column, statement)
    ]
    refused += [
        statement
        for table, ids in copies.items()
        if ids != shop.ids
        if not _follow(
            database, table, statement := MODIFY_ID.format(table=table, id_type=definition)
        )
    ]
    if refused:
        raise StoreError(
            "Tables of the monitor are missing, older than this version or different from the "
            "shop's, and this user may not make or change them. Run: "
            + " ".join(f"{statement};" for statement in refused)
        )
    return shop


def _read_shop(connection: Connection) -> tuple[ShopTable, dict[str, IdColumn]]:
    """The shop's table, and the columns of our tables that hold its ids."""
    columns = {
        str(table): _id_column(*values)
        for table, *values in connection.query(
            "SELECT table_name, column_type, character_set_name, collation_name, data_type"
            " FROM information_schema.columns WHERE table_schema = DATABASE() AND"
            " ((table_name = 'checkout_session' AND column_name = 'id') OR"
            f" (table_name IN {ID_COPIES} AND column_name = 'session_id'))"
        )
    }
    if "checkout_session" not in columns:
        raise StoreError(
            "The database has no table checkout_session with a column id, or this user may "
            "not read it."
        )
    ids = columns.pop("checkout_session")
    if ids.data_type not in (*TEXT_ID_TYPES, *NUMBER_ID_BITS):
        [(schema,)] = connection.query("SELECT DATABASE()")
        raise StoreError(_unsupported_id(ids, str(schema)))
    is_transactional, warnings = _look_at_shop(connection)
    return ShopTable(ids, is_transactional, _open_index(connection), warnings), columns


def _id_column(column_type: Value, charset: Value, collation: Value, data_type: Value) -> IdColumn:
    return IdColumn(
        str(data_type),
        str(column_type),
        None if charset is None else str(charset),
        None if collation is None else str(collation),
    )


def _unsupported_id(ids: IdColumn, schema: str) -> str:
    """The sentence for ids of another type, with statements for a text of each id."""
    allowed = ", ".join((*TEXT_ID_TYPES, *NUMBER_ID_BITS))
    match ids.data_type:
        case "binary" | "varbinary":
            digits = 2 * int(re.sub(r"\D", "", ids.column_type))
            text = f"VARCHAR({digits}) CHARACTER SET ascii AS (LOWER(HEX(id)))"
        case "uuid":
            text = "CHAR(36) CHARACTER SET ascii AS (CAST(id AS CHAR(36)))"
        case _:
            text = "VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin AS (id)"
    return (
        f"checkout_session.id is of type {ids.data_type}; it must be one of {allowed}. Add a text "
        "of each id, and give the monitor a database of its own with a view. Run: "
        f"ALTER TABLE {schema}.checkout_session ADD COLUMN id_text {text} STORED,"
        " ADD UNIQUE KEY (id_text); "
        "CREATE DATABASE checkout_monitor; "
        "CREATE VIEW checkout_monitor.checkout_session AS SELECT id_text AS id,"
        f" billing_checkout_id, billing_order_id, status FROM {schema}.checkout_session; "
        "Then make the grants of docs/deploy.md in checkout_monitor, and let DATABASE_URL name it."
    )


def _look_at_shop(connection: Connection) -> tuple[bool, Sequence[str]]:
    """Whether the shop's table has transactions, and warnings about it."""
    [(engine, transactions, options)] = connection.query(
        "SELECT t.engine, e.transactions, t.create_options FROM information_schema.tables t"
        " LEFT JOIN information_schema.engines e ON e.engine = t.engine"
        " WHERE t.table_schema = DATABASE() AND t.table_name = 'checkout_session'"
    )
    if engine is None:  # a view: its base table, of another name, cannot be looked at here
        return True, ()
    # Of the keys that begin with a column: 0 not unique, 1 unique with other columns, 2 unique.
    best_keys = {
        str(column).lower(): as_int(best)
        for column, best in connection.query(
            "SELECT column_name, MAX(CASE WHEN non_unique = 1 THEN 0 WHEN columns > 1 THEN 1 ELSE 2"
            " END) FROM (SELECT column_name,"
            " non_unique, seq_in_index, COUNT(*) OVER (PARTITION BY index_name) AS columns"
            " FROM information_schema.statistics WHERE table_schema = DATABASE()"
            " AND table_name = 'checkout_session') AS i WHERE seq_in_index = 1 GROUP BY column_name"
        )
    }
    warnings = []
    if "status" not in best_keys:
        warnings.append(NO_STATUS_INDEX)
    # All unique keys of a partitioned table must contain the column that it is partitioned by.
    unique = 1 if "partitioned" in str(options) else 2
    if "id" not in best_keys:
        warnings.append(NO_ID_INDEX)
    elif best_keys["id"] < unique:
        warnings.append(NO_UNIQUE_ID)
    is_transactional = transactions == "YES"
    if not is_transactional:
        warnings.append(NO_TRANSACTIONS.format(engine=engine))
    return is_transactional, warnings


def _open_index(connection: Connection) -> str | None:
    """The name of an index on status and id; the primary key is part of every other index."""
    [(version,)] = connection.query("SELECT VERSION()")
    is_usable = "ignored = 'NO'" if "MariaDB" in str(version) else "is_visible = 'YES'"
    columns = defaultdict[str, list[str]](list)
    for index, column in connection.query(
        "SELECT index_name, LOWER(column_name) FROM information_schema.statistics"
        " WHERE table_schema = DATABASE() AND table_name = 'checkout_session'"
        f" AND sub_part IS NULL AND {is_usable} ORDER BY index_name, seq_in_index"
    ):
        columns[str(index)].append(str(column))
    primary = columns["PRIMARY"]
    for index, of_index in columns.items():
        if [*of_index, *primary][:2] == ["status", "id"] and re.fullmatch(r"\w+", index):
            return index
    return None


def _create(database: _Database, statement: str) -> bool:
    """Whether the table exists, made just now if need be; False: this user may not make it."""
    [table] = re.findall(r"EXISTS (\w+)", statement)

    def create(connection: Connection) -> bool:
        exists = connection.query(
            "SELECT 1 FROM information_schema.tables"
            " WHERE table_schema = DATABASE() AND table_name = %s",
            (table,),
        )
        return bool(exists) or _allowed(lambda: connection.execute(statement))

    return database.run(create)


def _upgrade(database: _Database, table: str, column: tuple[str, str], statement: str) -> bool:
    """Whether the table is of this version, upgraded just now if need be."""
    columns = database.run(
        lambda connection: connection.query(
            "SELECT column_name, is_nullable FROM information_schema.columns"
            " WHERE table_schema = DATABASE() AND table_name = %s",
            (table,),
        )
    )
    if not columns or column in columns:  # the table does not exist, or is of this version
        return True
    if not _allowed(lambda: database.alter(statement)):
        return False
    if column == HAS_BATCHES:  # the leader's next walk forms them
        database.run(
            lambda connection: connection.execute(
                "UPDATE checkout_session_pause SET count_again_at = NULL"
            )
        )
    return True


def _follow(database: _Database, table: str, statement: str) -> bool:
    """Whether our copy of the shop's id got the type that the shop's has now."""
    try:
        return _allowed(lambda: database.alter(statement))
    except pymysql.MySQLError as error:
        if error.args[0] not in _DOES_NOT_FIT:
            raise
    # The queue is filled again by the next reconciliation; the change log is for the page only.
    database.run(lambda connection: connection.execute(f"DELETE FROM {table}"))
    return _allowed(lambda: database.alter(statement))


def _allowed(work: Callable[[], object]) -> bool:
    """Run `work`; returns whether this user may do that."""
    try:
        work()
    except pymysql.OperationalError as error:
        if error.args[0] in _MAY_NOT:
            return False
        if error.args[0] not in _DONE:
            raise
    return True

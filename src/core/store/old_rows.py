"""How rows that are kept for a while are deleted: some at a time.

Where the monitor was off for days, one statement for all of them would outlast the time that a
statement may take, and be rolled back; and so would the next one.
"""

from collections.abc import Sequence
from functools import partial
from itertools import batched

from core.database.port import STATEMENT_ROWS, Connection, Database, Value, as_int, number_list

ROWS_AT_ONCE = 2000


def delete_some(
    database: Database, table: str, condition: str, parameters: Sequence[Value]
) -> bool:
    """Delete up to ROWS_AT_ONCE rows of a table whose key is `id`; returns whether more are left.

    Raises StoreError.
    """
    select = f"SELECT id FROM {table} WHERE {condition} LIMIT {ROWS_AT_ONCE:d}"
    rows = database.run(lambda connection: connection.query(select, parameters))
    for ids in batched((as_int(row[0]) for row in rows), STATEMENT_ROWS, strict=False):
        database.run(partial(_delete, table=table, ids=ids))
    return len(rows) == ROWS_AT_ONCE


def _delete(connection: Connection, table: str, ids: Sequence[int]) -> None:
    connection.execute(f"DELETE FROM {table} WHERE id IN {number_list(ids)}")

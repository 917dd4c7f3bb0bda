"""A shop's database for one test after the other: to make one takes longer than most tests.

It has the monitor's tables too. A test of how those are made is marked `new_database`.
"""

import re
from contextlib import ExitStack

from pymysql.cursors import Cursor

from core.store.store import Store
from testkit.shops import MySQLShop, connect, mysql_shop
from tests.support import database_of


class KeptShop:
    """One database on a server. A new one is made when a test has changed the tables themselves."""

    def __init__(self, server: str) -> None:
        self.server = server
        self._database = ExitStack()  # drops it
        self._shop: MySQLShop | None = None
        self._tables: dict[str, str] = {}  # with their definitions

    def emptied(self) -> MySQLShop:
        """The database with empty tables. The test before must have ended."""
        if self._shop is None or not self._emptied(self._shop):
            self.drop()
            self._shop = self._new()
        return self._shop

    def drop(self) -> None:
        self._shop = None
        self._database.close()

    def _new(self) -> MySQLShop:
        shop = self._database.enter_context(mysql_shop(self.server))
        store = Store(database_of(shop))
        store.prepare()
        store.close()
        with connect(shop.server, shop.database) as connection, connection.cursor() as cursor:
            self._tables = tables(cursor)
        assert self._emptied(shop)
        return shop

    def _emptied(self, shop: MySQLShop) -> bool:
        """Delete all rows, and what a test has added; False: it has changed the tables."""
        with connect(shop.server, shop.database) as connection, connection.cursor() as cursor:
            cursor.execute("SHOW TRIGGERS")
            added = [f"TRIGGER {trigger}" for trigger, *_ in cursor.fetchall()]
            cursor.execute("SHOW PROCEDURE STATUS WHERE Db = DATABASE()")
            added += [f"PROCEDURE {name}" for _, name, *_ in cursor.fetchall()]
            found = tables(cursor)
            if {name: found.pop(name, "") for name in self._tables} != self._tables:
                return False
            added += [f"TABLE {name}" for name in found]
            for statement in (
                *(f"DROP {one}" for one in added),
                *(f"DELETE FROM {name}" for name in self._tables),
            ):
                cursor.execute(statement)
        return True


def tables(cursor: Cursor) -> dict[str, str]:
    """The definition of each table of the connection's database."""
    cursor.execute("SHOW TABLES")
    names = [name for (name,) in cursor.fetchall()]
    found = {}
    for name in names:
        cursor.execute(f"SHOW CREATE TABLE {name}")
        [(_, definition, *_)] = cursor.fetchall()
        found[name] = re.sub(r" AUTO_INCREMENT=\d+", "", definition)
    return found

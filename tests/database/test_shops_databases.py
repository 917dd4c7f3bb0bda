"""The databases that shops have: server settings, column types, engines, grants.

Each set-up has two open sessions, one of them paid. Either both are asked about and recorded, the
paid one is closed and its event published, or one sentence names the way out. The table of
docs/reliability.md sums them up.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import pymysql
import pytest
from pymysql.connections import Connection

from core.database import mysql, mysql_connection
from core.database.mysql import MySQLConnection
from core.database.mysql_schema import NO_ID_INDEX, NO_TRANSACTIONS, NO_UNIQUE_ID
from core.database.port import NO_STATUS_INDEX, Value
from core.domain.model import Reason, Skip
from core.domain.summary import Summary
from core.errors import StoreError
from core.passes.check_pass import (
    check_open_checkout_sessions,
    trigger_checkout_session_check,
)
from core.passes.running_pass import PassOptions
from core.store.store import Store
from local import mariadb as local_mariadb
from testkit.clock import FakeClock
from testkit.shops import MySQLShop, add_sessions, connect, mysql_shop, settings_for
from tests.conftest import MYSQL, PLACES, SERVERS, without_a_server
from tests.store.fake_bus import PAID, Bus
from tests.support import FakeBilling, database_of

MARIADB = ["mariadb"]


class Monitor:
    """A worker that stays warm between its ticks. Billing says `paid` for the checkouts given."""

    def __init__(self, shop: MySQLShop, paid: Iterable[str] = (), bus: Bus | None = None) -> None:
        self.shop = shop
        self.clock = FakeClock()
        self.billing = FakeBilling(dict.fromkeys(paid, PAID))
        self.bus = bus
        self.env: dict[str, str] = {}
        self.store = Store(database_of(shop, self.clock), bus)
        self.thread = ThreadPoolExecutor(1)

    async def tick(self, seconds: float = 5) -> Summary:
        self.clock.advance(seconds)
        return await check_open_checkout_sessions(
            self.store,
            self.billing,
            settings_for(self.shop, **self.env),
            PassOptions(Reason.TICK, self.clock.now),
            database_thread=self.thread,
            choose=lambda _low, high: high,
        )

    async def trigger(self, session_ids: Sequence[str]) -> Summary:
        return await trigger_checkout_session_check(
            self.store,
            self.billing,
            settings_for(self.shop),
            database_thread=self.thread,
            session_ids=session_ids,
        )

    def warnings(self) -> list[str]:
        return self.thread.submit(self.store.prepare).result()

    def recorded(self) -> dict[str, str]:
        """The last outcome of the queue's sessions."""
        rows = self.shop.run("SELECT session_id, last_outcome FROM checkout_session_check")
        return {str(session): outcome for session, outcome in rows}

    def close(self) -> None:
        self.thread.submit(self.store.close).result()
        self.thread.shutdown()


type MakeMonitor = Callable[..., Monitor]


@pytest.fixture
def monitor() -> Iterator[MakeMonitor]:
    made: list[Monitor] = []

    def make(shop: MySQLShop, paid: Iterable[str] = (), bus: Bus | None = None) -> Monitor:
        made.append(Monitor(shop, paid, bus))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, mariadb: str | None) -> str:
    url = mariadb if request.param == "mariadb" else MYSQL
    if url is None:
        without_a_server()
    return str(url)


def shop_table(
    *,
    id_type: str = "VARCHAR(64)",
    checkout_type: str = "VARCHAR(64)",
    order_type: str = "VARCHAR(64)",
    status: str = "VARCHAR(20)",
    more: str = "",
    keys: str = "PRIMARY KEY (id), KEY (status)",
    options: str = "",
) -> str:
    return (
        f"CREATE TABLE checkout_session (id {id_type} NOT NULL,"
        f" billing_checkout_id {checkout_type}, billing_order_id {order_type},"
        f" status {status}, {more} {keys}) {options}"
    )


async def works(monitor: Monitor, paid: str, other: str) -> None:
    """Two ticks ask about the other session twice; the first closes the paid one, with an event."""
    monitor.bus = monitor.bus or Bus()
    monitor.store.status_changes._publisher = monitor.bus
    first = await monitor.tick()
    assert (first.checked, first.errors, first.status_changes) == (2, 0, 1)
    second = await monitor.tick()
    assert (second.checked, second.errors, second.status_changes) == (1, 0, 0)
    assert monitor.recorded() == {other: "active"}
    statuses = monitor.shop.run("SELECT CONVERT(status USING ascii) FROM checkout_session")
    assert sorted(statuses) == [("open",), ("success",)]
    assert monitor.bus.session_ids == [paid]


# The server's defaults -----------------------------------------------------------------------

# Each of a group would be noticed alone; together they take one database.
SESSION_DEFAULTS = {
    "no sql_mode": "sql_mode = ''",
    "TRADITIONAL": "sql_mode = 'TRADITIONAL'",
    "other quotes": (
        "sql_mode = 'ANSI,ANSI_QUOTES,PIPES_AS_CONCAT,IGNORE_SPACE,NO_BACKSLASH_ESCAPES,"
        "PAD_CHAR_TO_FULL_LENGTH'"
    ),
    "transactions": "autocommit = 0, completion_type = 'CHAIN', {isolation} = 'SERIALIZABLE'",
    "completion_type RELEASE": "completion_type = 'RELEASE'",
    "limits": (
        "sql_select_limit = 1, sql_safe_updates = 1, max_join_size = 1, sql_auto_is_null = 1,"
        " {statement_time}"
    ),
    "a time zone and character sets": (
        "time_zone = '+13:00', character_set_client = binary, character_set_results = 'latin1'"
    ),
}
MARIADB_DEFAULTS = {
    "EMPTY_STRING_IS_NULL": "sql_mode = 'EMPTY_STRING_IS_NULL'",
    "ORACLE": "sql_mode = 'ORACLE'",
}
SERVER_DEFAULTS = [
    *((server, name) for name in SESSION_DEFAULTS for server in SERVERS),
    *(("mariadb", name) for name in MARIADB_DEFAULTS),
]


@pytest.fixture
def with_defaults(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Connections of the monitor begin with these settings, as those of a server's `SET GLOBAL`."""
    set_session = mysql_connection._set_session

    def begin(settings: str) -> None:
        def defaults_first(connection: Connection, *, time_limit: bool) -> None:
            names = (
                {
                    "isolation": "tx_isolation",
                    "statement_time": "max_statement_time = 0.0001",
                    "read_only": "tx_read_only",
                }
                if "MariaDB" in connection.server_version  # type: ignore[attr-defined]
                else {
                    "isolation": "transaction_isolation",
                    "statement_time": "max_execution_time = 1",
                    "read_only": "transaction_read_only",
                }
            )
            with connection.cursor() as cursor:
                cursor.execute(f"SET SESSION {settings.format(**names)}")
            set_session(connection, time_limit=time_limit)

        monkeypatch.setattr(mysql_connection, "_set_session", defaults_first)

    return begin


@pytest.mark.parametrize(("server", "name"), SERVER_DEFAULTS, indirect=["server"])
async def test_a_server_may_have_any_default(
    server: str, name: str, monitor: MakeMonitor, with_defaults: Callable[[str], None]
) -> None:
    with_defaults({**SESSION_DEFAULTS, **MARIADB_DEFAULTS}[name])
    schema = [shop_table(id_type="CHAR(20)", status="CHAR(12)", order_type="CHAR(12)")]
    with mysql_shop(server, schema) as shop:
        add_sessions(shop, {"a": "c-a", "b\\'": "c-b"})
        await works(monitor(shop, ["c-a"]), "a", "b\\'")


@pytest.mark.parametrize("setting", ["sql_auto_is_null = 1", "sql_mode = 'NO_AUTO_VALUE_ON_ZERO'"])
async def test_a_server_may_have_any_default_for_numbers(
    server: str, setting: str, monitor: MakeMonitor, with_defaults: Callable[[str], None]
) -> None:
    with_defaults(setting)
    with mysql_shop(server, [shop_table(id_type="BIGINT AUTO_INCREMENT")]) as shop:
        add_sessions(shop, {"1": "c-a", "2": "c-b"})
        one = monitor(shop, ["c-a"])
        await works(one, "1", "2")
        shop.run("DELETE FROM checkout_session WHERE id = 2")
        await one.tick()
        assert one.recorded() == {}


async def test_a_request_timeout_may_have_any_number_of_decimals(
    server_shop: MySQLShop, monitor: MakeMonitor
) -> None:
    add_sessions(server_shop, {"a": "c-a", "b": "c-b"})
    one = monitor(server_shop, ["c-a"])
    one.env["REQUEST_TIMEOUT_SECONDS"] = "3.3333"
    await works(one, "a", "b")


# The shop's columns --------------------------------------------------------------------------

UUIDS = ("0b9d9c1e-3f0c-4b6e-9d0f-0a1b2c3d4e5f", "1b9d9c1e-3f0c-4b6e-9d0f-0a1b2c3d4e5f")
ID_TYPES: dict[str, tuple[str, str]] = {
    "CHAR(36) CHARACTER SET ascii": UUIDS,
    "VARCHAR(100) CHARACTER SET latin1 COLLATE latin1_german2_ci": ("straße", "gasse"),
    "VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin": ("Ab-1", "aB-1"),
    "VARCHAR(100) CHARACTER SET utf8mb3 COLLATE utf8mb3_unicode_ci": ("日本", "中国"),
    "VARCHAR(190) CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci": ("😀x", "🚀y"),
    "VARCHAR(100) CHARACTER SET sjis": ("日本", "東京"),
    "VARCHAR(768) CHARACTER SET utf8mb4": ("x" * 700, "y"),
    "BIGINT UNSIGNED": ("18446744073709551615", "7"),
    "BIGINT": ("-9223372036854775808", "7"),
    "INT(10) UNSIGNED ZEROFILL": ("42", "1"),
    "MEDIUMINT UNSIGNED": ("16777215", "1"),
}


@pytest.mark.parametrize("id_type", ID_TYPES)
async def test_ids_may_be_texts_of_any_character_set_and_numbers(
    server: str, id_type: str, monitor: MakeMonitor
) -> None:
    paid, other = ID_TYPES[id_type]
    with mysql_shop(server, [shop_table(id_type=id_type)]) as shop:
        add_sessions(shop, {paid: "c-a", other: "c-b"})
        one = monitor(shop, ["c-a"])
        assert one.warnings() == []
        await works(one, paid, other)


CHECKOUT_TYPES = [
    *("VARBINARY(64)", "BLOB", "TEXT CHARACTER SET latin1", "VARCHAR(64) CHARACTER SET utf16"),
    *("INT", "DECIMAL(20, 0)", "ENUM('101', '102')"),
]


@pytest.mark.parametrize("checkout_type", CHECKOUT_TYPES)
async def test_billing_is_asked_for_the_shops_checkout_id_of_any_type(
    server: str, checkout_type: str, monitor: MakeMonitor
) -> None:
    with mysql_shop(server, [shop_table(checkout_type=checkout_type)]) as shop:
        add_sessions(shop, {"a": "101", "b": "102"})
        one = monitor(shop, ["101"])
        await works(one, "a", "b")
        assert one.billing.asked == {"101": 1, "102": 2}


ORDERS = {
    "VARBINARY(64)": "order-1",
    "INT": "17",
    "JSON": '{"n": 1}',
}


@pytest.mark.parametrize("order_type", ORDERS)
async def test_events_have_the_shops_order_id_of_any_type(
    server: str, order_type: str, monitor: MakeMonitor
) -> None:
    order = ORDERS[order_type]
    with mysql_shop(server, [shop_table(order_type=order_type)]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        shop.run("UPDATE checkout_session SET billing_order_id = %s", (order,))
        one = monitor(shop, ["c-a"], Bus())
        await works(one, "a", "b")
        assert one.bus
        assert [event.billing_order_id for event in one.bus.published] == [order]


async def test_a_checkout_id_of_bytes_that_are_no_text_is_that_sessions_outcome(
    server: str, monitor: MakeMonitor
) -> None:
    with mysql_shop(server, [shop_table(checkout_type="VARBINARY(16)")]) as shop:
        shop.run("INSERT INTO checkout_session VALUES ('a', x'FF00FE', NULL, 'open')")
        add_sessions(shop, {"b": "c-b"})
        one = monitor(shop)
        await one.tick()
        assert set(one.billing.asked) == {"\udcff\0\udcfe", "c-b"}
        assert set(one.recorded()) == {"a", "b"}


SCHEMAS = {
    "status ENUM": shop_table(status="ENUM('open', 'success', 'failure', 'timeout')"),
    "status of another collation": shop_table(status="VARCHAR(9) COLLATE utf8mb4_bin"),
    "status VARBINARY": shop_table(status="VARBINARY(16)"),
    "reserved words and more columns": shop_table(
        more="`order` INT NOT NULL DEFAULT 0, `group` TEXT, `key` JSON, `rowid` INT,"
        " session_id INT, claimed_until INT, updated TIMESTAMP NOT NULL DEFAULT NOW()"
        " ON UPDATE NOW(), total DECIMAL(9, 2) AS (1.5) STORED,"
    ),
    "names in capitals": shop_table()
    .replace(" status", " STATUS")
    .replace("(id ", "(ID ")
    .replace("(id)", "(ID)"),
    "partitions": shop_table(options="PARTITION BY KEY (id) PARTITIONS 4"),
    "partitions by another column": shop_table(
        more="day INT NOT NULL DEFAULT 1,",
        keys="PRIMARY KEY (id, day), KEY (status)",
        options="PARTITION BY RANGE (day) (PARTITION p0 VALUES LESS THAN (10))",
    ),
    "no primary key": shop_table(keys="UNIQUE KEY (id), KEY (status, billing_order_id)"),
    "a numeric primary key": shop_table(
        more="n INT NOT NULL AUTO_INCREMENT,", keys="PRIMARY KEY (n), UNIQUE KEY (id), KEY (status)"
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
async def test_the_shops_table_may_have_any_form(
    server: str, name: str, monitor: MakeMonitor
) -> None:
    with mysql_shop(server, [SCHEMAS[name]]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop, ["c-a"])
        assert one.warnings() == []
        await works(one, "a", "b")
        assert one.warnings() == []


async def test_the_shops_table_may_keep_its_history(
    mariadb_shop: MySQLShop, monitor: MakeMonitor
) -> None:
    """A system-versioned table of MariaDB."""
    mariadb_shop.run("DROP TABLE checkout_session")
    mariadb_shop.run(shop_table(options="WITH SYSTEM VERSIONING"))
    add_sessions(mariadb_shop, {"a": "c-a", "b": "c-b"})
    one = monitor(mariadb_shop, ["c-a"])
    assert one.warnings() == []
    await works(one, "a", "b")


@pytest.mark.parametrize("defaults", ["utf8mb3", "latin1", "utf8mb4 COLLATE utf8mb4_bin"])
async def test_a_database_may_have_any_default_character_set(
    server: str, defaults: str, monitor: MakeMonitor
) -> None:
    with mysql_shop(server, [f"ALTER DATABASE CHARACTER SET {defaults}", shop_table()]) as shop:
        add_sessions(shop, {"é": "c-é", "b": "c-b"})
        await works(monitor(shop, ["c-é"]), "é", "b")


async def test_the_shops_table_may_be_a_view_with_other_names(
    server: str, monitor: MakeMonitor
) -> None:
    payments = (
        "CREATE TABLE payments (token VARCHAR(64) PRIMARY KEY, ref TEXT, ord INT, st VARCHAR(20),"
        " KEY (st))"
    )
    view = (
        "CREATE VIEW checkout_session AS SELECT token AS id, ref AS billing_checkout_id,"
        " ord AS billing_order_id, st AS status FROM payments"
    )
    with mysql_shop(server, [payments, view]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop, ["c-a"])
        assert one.warnings() == []
        await works(one, "a", "b")
        assert sorted(shop.run("SELECT token, st FROM payments")) == [
            ("a", "success"),
            ("b", "open"),
        ]


# Tables that need something of their owner ---------------------------------------------------


@pytest.mark.parametrize("engine", ["MyISAM"])
async def test_without_transactions_and_with_a_bus_nothing_is_changed(
    server: str, engine: str, monitor: MakeMonitor
) -> None:
    with mysql_shop(server, [shop_table(options=f"ENGINE={engine}")]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop, ["c-a"], Bus())
        assert one.warnings() == [NO_TRANSACTIONS.format(engine=engine)]
        await one.tick()
        assert shop.run("SELECT DISTINCT status FROM checkout_session") == [("open",)]
        assert one.recorded() == {"a": "refused", "b": "active"}
        assert one.bus
        assert one.bus.published == []
        run_advice(shop, NO_TRANSACTIONS.format(engine=engine))
        one.clock.advance(60)
        one.store._database.prepare()
        await one.tick()
        assert one.bus.session_ids == ["a"]


async def test_without_transactions_and_without_a_bus_the_status_is_changed(
    server: str, monitor: MakeMonitor
) -> None:
    """Unless the server enforces GTID consistency."""
    with mysql_shop(server, [shop_table(options="ENGINE=MyISAM")]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop, ["c-a"])
        assert one.warnings() == [NO_TRANSACTIONS.format(engine="MyISAM")]
        await one.tick()
        gtids = shop.run("SHOW VARIABLES LIKE 'enforce_gtid_consistency'")
        if gtids == [("enforce_gtid_consistency", "ON")]:
            assert one.recorded() == {"a": "refused", "b": "active"}
        else:
            assert one.recorded() == {"b": "active"}
            assert shop.run("SELECT status FROM checkout_session WHERE id = 'a'") == [("success",)]


def run_advice(shop: MySQLShop, sentence: str) -> None:
    """Run the statements that a sentence recommends, exactly as they stand there."""
    for statement in re.findall(r"[A-Z][^;]+(?=;)", sentence.partition("Run: ")[2]):
        shop.run(statement)


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ("PRIMARY KEY (id)", NO_STATUS_INDEX),
        ("PRIMARY KEY (status, id)", NO_ID_INDEX),
        ("KEY (id), KEY (status)", NO_UNIQUE_ID),
        ("PRIMARY KEY (id, status), KEY (status)", NO_UNIQUE_ID),
    ],
)
async def test_a_missing_key_is_said_with_its_statement_and_all_is_checked(
    server: str, keys: str, warning: str, monitor: MakeMonitor
) -> None:
    with mysql_shop(server, [shop_table(keys=keys)]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop, ["c-a"])
        assert one.warnings() == [warning]
        await works(one, "a", "b")
        run_advice(shop, warning)
        assert monitor(shop).warnings() == []


async def test_an_id_given_twice_changes_nothing_and_stops_no_other(
    server: str, monitor: MakeMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    with mysql_shop(server, [shop_table(keys="KEY (id), KEY (status)")]) as shop:
        for checkout in ("c-1", "c-1", "c-2"):
            add_sessions(shop, {"twice": checkout})
        add_sessions(shop, {f"s{n}": f"c-s{n}" for n in range(5)})
        one = monitor(shop, ["c-1", "c-2", *(f"c-s{n}" for n in range(5))], Bus())
        for _ in range(3):
            await one.tick()
        assert one.bus
        assert sorted(one.bus.session_ids) == [f"s{n}" for n in range(5)]
        [outcome] = one.recorded().values()
        assert outcome in {"refused", "deferred"}
        assert "several open sessions have the same id" in caplog.text


async def test_an_id_that_is_null_stops_no_other(server: str, monitor: MakeMonitor) -> None:
    with mysql_shop(server, [shop_table(keys="UNIQUE KEY (id), KEY (status)")]) as shop:
        shop.run("ALTER TABLE checkout_session MODIFY id VARCHAR(64) NULL")
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        for _ in range(2):
            shop.run("INSERT INTO checkout_session (status) VALUES ('open')")
        one = monitor(shop, ["c-a"], Bus())
        summary = await one.tick()
        assert (summary.checked, summary.errors, summary.status_changes) == (2, 0, 1)
        assert one.recorded() == {"b": "active"}


async def test_of_two_rows_with_one_id_the_open_one_is_asked_about(
    server: str, monitor: MakeMonitor
) -> None:
    with mysql_shop(server, [shop_table(keys="KEY (id), KEY (status)")]) as shop:
        add_sessions(shop, {"a": "c-old"}, status="failure")
        add_sessions(shop, {"a": "c-new"})
        add_sessions(shop, {"a": "c-older"}, status="timeout")
        one = monitor(shop, ["c-new"], Bus())
        await one.tick()
        assert one.billing.asked == {"c-new": 1}
        assert sorted(shop.run("SELECT status FROM checkout_session")) == [
            ("failure",),
            ("success",),
            ("timeout",),
        ]


@pytest.mark.parametrize("status", ["ENUM('open', 'failure', 'expired')", "VARCHAR(6)"])
async def test_a_column_that_cannot_hold_the_word_refuses_that_change(
    server: str,
    status: str,
    monitor: MakeMonitor,
    with_defaults: Callable[[str], None],
) -> None:
    with_defaults("sql_mode = ''")
    with mysql_shop(server, [shop_table(status=status)]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop, ["c-a"], Bus())
        await one.tick()
        assert one.recorded() == {"a": "refused", "b": "active"}
        assert shop.run("SELECT DISTINCT status FROM checkout_session") == [("open",)]
        assert one.bus
        assert one.bus.published == []


# Ids that need a text, and ids that change ---------------------------------------------------

UNSUPPORTED_IDS = [
    *(
        (server, id_type, value)
        for server in SERVERS
        for id_type, value in (
            ("BINARY(16)", "UNHEX('0B9D9C1E3F0C4B6E9D0F0A1B2C3D4E5F')"),
            ("VARBINARY(40)", "'abc'"),
            ("TEXT", "'abc'"),
            ("DECIMAL(30, 0)", "123456789012345678901234567890"),
        )
    ),
    ("mariadb", "UUID", f"'{UUIDS[0]}'"),
]


@pytest.mark.parametrize(("server", "id_type", "value"), UNSUPPORTED_IDS, indirect=["server"])
async def test_the_recipe_for_ids_of_other_types_works_as_it_is_told(
    server: str, id_type: str, value: str, monitor: MakeMonitor
) -> None:
    """Its statements as they stand, and the user of docs/deploy.md in the new database."""
    key = "UNIQUE KEY (id(200))" if id_type == "TEXT" else "PRIMARY KEY (id)"
    with mysql_shop(server, [shop_table(id_type=id_type, keys=f"{key}, KEY (status)")]) as shop:
        shop.run(f"INSERT INTO checkout_session VALUES ({value}, 'c-a', 'order', 'open')")
        with pytest.raises(StoreError, match="it must be one of char, varchar") as refused:
            monitor(shop).warnings()
        recipe = str(refused.value)
        theirs = f"{shop.database}_m"
        try:
            run_advice(shop, recipe.replace("checkout_monitor", theirs))
            with documented_user(MySQLShop(server, theirs)) as view:
                one = monitor(view, ["c-a"], Bus())
                assert one.warnings() == []
                assert (await one.tick()).status_changes == 1
                assert one.bus
                [event] = one.bus.published
                assert event.billing_order_id == "order"
                assert re.fullmatch(r"[0-9a-f-]+", event.session_id)
            assert shop.run("SELECT status FROM checkout_session") == [("success",)]
        finally:
            shop.run(f"DROP DATABASE IF EXISTS {theirs}")


@contextmanager
def documented_user(shop: MySQLShop, *more: str) -> Iterator[MySQLShop]:
    """The shop as the user of docs/deploy.md sees it, with more rights or without."""
    user = f"d{shop.database[-14:]}"
    try:
        for place in PLACES:
            for statement in local_mariadb.user_statements(shop.database, user, "documented-pass"):
                shop.run(statement.replace("'%'", place))
            for right in more:
                shop.run(f"GRANT {right} TO {user}@{place}")
        address = urlsplit(shop.server)
        url = f"mysql://{user}:documented-pass@{address.hostname}:{address.port}/"
        yield MySQLShop(url, shop.database)
    finally:
        for place in PLACES:
            shop.run(f"DROP USER IF EXISTS {user}@{place}")


@pytest.mark.parametrize(
    "right", ["UPDATE (status) ON checkout_session", "INSERT ON checkout_session_change"]
)
async def test_a_missing_right_refuses_the_changes_and_names_the_grant(
    server: str, right: str, monitor: MakeMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    with mysql_shop(server, [shop_table()]) as shop, documented_user(shop) as user:
        for place in PLACES:
            shop.run(f"REVOKE {right} FROM {user_of(user)}@{place}")
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(user, ["c-a"], Bus())
        await one.tick()
        assert one.recorded() == {"a": "refused", "b": "active"}
        assert one.bus
        assert one.bus.published == []
        if "change" in right:
            assert "Grant this user what docs/deploy.md lists." in caplog.text
        else:
            [refused] = [r.message for r in caplog.records if "GRANT" in r.message]
            run_advice(shop, refused)
            one.clock.advance(60)
            assert (await one.tick()).status_changes == 1


def user_of(shop: MySQLShop) -> str:
    return str(urlsplit(shop.server).username)


CHANGES = {
    "wider": ("VARCHAR(20)", "VARCHAR(64)", "x" * 20, "y" * 40),
    "a larger number": ("INT", "BIGINT", "7", str(2**40)),
    "another collation": (
        "VARCHAR(64) COLLATE utf8mb4_general_ci",
        "VARCHAR(64) COLLATE utf8mb4_unicode_ci",
        "a",
        "b",
    ),
    "a binary collation": (
        "VARCHAR(64) COLLATE utf8mb4_general_ci",
        "VARCHAR(64) COLLATE utf8mb4_bin",
        "a",
        "A",
    ),
    "an equal id": (
        "VARCHAR(64) COLLATE utf8mb4_bin",
        "VARCHAR(64) COLLATE utf8mb4_general_ci",
        "a",
        "b",
    ),
    "another character set": ("VARCHAR(64) CHARACTER SET latin1", "VARCHAR(64)", "é", "日本"),
    "narrower": ("VARCHAR(64)", "VARCHAR(20)", "a", "b"),
    "numbers": ("VARCHAR(64)", "BIGINT", "7", "8"),
    "texts": ("BIGINT", "VARCHAR(64)", "7", "x-8"),
}


# A warm worker notices them when it compares the tables, once a minute; they raise no error.
QUIET_CHANGES = {
    "a binary collation",
    "an equal id",
    "another character set",
    "narrower",
    "numbers",
}


@pytest.mark.parametrize(
    ("change", "warm"),
    [*((change, True) for change in CHANGES), ("wider", False), ("an equal id", False)],
)
async def test_a_changed_id_is_followed_and_asked_about_at_the_next_tick(
    server: str, change: str, warm: bool, monitor: MakeMonitor
) -> None:
    before, after, old, new = CHANGES[change]
    with mysql_shop(server, [shop_table(id_type=before)]) as shop:
        one = monitor(shop, ["c-closed"])
        add_sessions(shop, {old: "c-old"})
        if "CHAR" in before and change != "wider":
            add_sessions(shop, {"A" if change == "an equal id" else "z" * 40: "c-closed"})
        await one.tick()
        shop.run("DELETE FROM checkout_session WHERE billing_checkout_id = 'c-closed'")
        shop.run(f"ALTER TABLE checkout_session MODIFY id {after} NOT NULL")
        add_sessions(shop, {new: "c-new"})
        if not warm:
            clock = one.clock
            one = monitor(shop)
            one.clock.now = clock.now
        elif change in QUIET_CHANGES:
            one.store._database.prepare()
        await one.tick()
        await one.tick()
        assert one.billing.asked["c-new"] == 2
        assert set(one.recorded()) == {old, new}
        columns = shop.run(
            "SELECT DISTINCT column_type, collation_name FROM information_schema.columns"
            " WHERE table_schema = DATABASE() AND ((table_name = 'checkout_session'"
            " AND column_name = 'id') OR column_name = 'session_id')"
        )
        assert len(columns) == 1


@pytest.mark.parametrize("may_alter", [True, False])
async def test_the_documented_user_follows_a_wider_id(
    server: str, may_alter: bool, monitor: MakeMonitor
) -> None:
    """A user of an older version may not alter the tables; then the sentence has the statements."""
    with (
        mysql_shop(server, [shop_table(id_type="VARCHAR(20)")]) as shop,
        documented_user(shop) as user,
    ):
        if not may_alter:
            for table in ("check", "change"):
                for place in PLACES:
                    shop.run(
                        f"REVOKE ALTER ON checkout_session_{table} FROM {user_of(user)}@{place}"
                    )
        add_sessions(shop, {"a": "c-a"})
        one = monitor(user, ["c-a"], Bus())
        assert one.warnings() == []
        assert (await one.tick()).status_changes == 1
        shop.run("ALTER TABLE checkout_session MODIFY id VARCHAR(64) NOT NULL")
        add_sessions(shop, {"x" * 40: "c-x"})
        if not may_alter:
            with pytest.raises(
                StoreError, match="different from the shop's, and this user may not"
            ) as refused:
                await one.tick()
            run_advice(shop, str(refused.value))
        await one.tick()
        assert one.billing.asked["c-x"] == 1


# Servers and other clients -------------------------------------------------------------------


async def test_tables_locked_by_another_client_hold_one_connection_a_worker(
    server: str, monitor: MakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the workers work again at once afterwards."""
    monkeypatch.setattr(mysql_connection, "LOCK_WAIT_SECONDS", 1)
    monkeypatch.setattr(mysql, "RETRY_SECONDS", 0.5)
    with mysql_shop(server, [shop_table()]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        workers = [monitor(shop) for _ in range(3)]
        for one in workers:
            assert (await one.tick()).errors == 0
        with connect(server, shop.database) as owner, owner.cursor() as cursor:
            cursor.execute("LOCK TABLES checkout_session WRITE")
            ticks = [asyncio.to_thread(asyncio.run, one.tick()) for one in workers]
            under_way = asyncio.gather(*ticks, return_exceptions=True)
            await asyncio.sleep(0.2)
            assert 1 <= connections(shop, "Waiting for table metadata lock") <= len(workers)
            failed = [r for r in await under_way if isinstance(r, BaseException)]
            assert failed  # the others found the batch locked, and nothing else to do
            for error in failed:
                assert isinstance(error, StoreError)
                assert "(1205)" in str(error)
            assert connections(shop, "Waiting for table metadata lock") == 0
            cursor.execute("UNLOCK TABLES")
        assert sum([(await one.tick()).checked for one in workers]) >= 2


def connections(shop: MySQLShop, state: str = "") -> int:
    """How many connections the monitor has to the shop, or how many of them are in that state."""
    [(count,)] = shop.run(
        "SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE()"
        " AND id <> CONNECTION_ID() AND (%s = '' OR state = %s) AND info NOT LIKE 'LOCK%%'",
        (state, state),
    )
    return int(count)


@pytest.mark.parametrize("verb", ["SELECT", "UPDATE"])
def test_a_statement_given_up_by_the_client_is_ended_in_the_server(
    server: str, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mysql_connection, "STATEMENT_SECONDS", 0.3)
    statement = {
        "SELECT": "SELECT SLEEP(60)",
        "UPDATE": "UPDATE checkout_session SET status = status WHERE SLEEP(60) = 0",
    }[verb]
    with mysql_shop(server, [shop_table()]) as shop:
        add_sessions(shop, {"a": "c-a"})
        database = database_of(shop)
        with pytest.raises(StoreError, match="timed out"):
            database.run(lambda connection: connection.query(statement))
        database.run(lambda connection: connection.query("SELECT 1"))
        wait_until(lambda: not connections_running(shop, "SLEEP"))
        database.close()


def connections_running(shop: MySQLShop, text: str) -> int:
    [(count,)] = shop.run(
        "SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE()"
        " AND id <> CONNECTION_ID() AND info LIKE CONCAT('%%', %s, '%%')",
        (text,),
    )
    return int(count)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 5 s")


async def test_an_idle_connection_that_the_server_ends_is_replaced(
    server: str, monitor: MakeMonitor, with_defaults: Callable[[str], None]
) -> None:
    with_defaults("wait_timeout = 1")
    with mysql_shop(server, [shop_table()]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop)
        await one.tick()
        wait_until(lambda: connections(shop) == 0)
        assert (await one.tick()).errors == 0
        assert one.recorded() == {"a": "active", "b": "active"}


async def test_an_open_snapshot_transaction_disturbs_no_pass(
    server: str, monitor: MakeMonitor
) -> None:
    with mysql_shop(server, [shop_table()]) as shop, connect(server, shop.database) as report:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop, ["c-a"])
        assert one.warnings() == []
        with report.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT")
            cursor.execute("SELECT COUNT(*) FROM checkout_session")
            cursor.execute("SELECT COUNT(*) FROM checkout_session_check")
            await works(one, "a", "b")


async def test_with_one_worker_the_tick_after_a_database_error_checks(
    server: str, monitor: MakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass that failed could not even record its end."""
    with mysql_shop(server, [shop_table()]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop)
        one.env |= {"MAX_WORKERS": "1", "CHECK_INTERVAL_SECONDS": "1"}
        await one.tick(1)
        execute, began = MySQLConnection.execute, False

        def fail(connection: MySQLConnection, sql: str, parameters: Sequence[Value] = ()) -> int:
            nonlocal began
            if began:
                raise pymysql.OperationalError(2013, "Lost connection to MySQL server")
            began = "INSERT INTO checkout_session_run" in sql
            return execute(connection, sql, parameters)

        with monkeypatch.context() as patch:
            patch.setattr(MySQLConnection, "execute", fail)
            with pytest.raises(StoreError, match="Lost connection"):
                await one.tick(1)
        assert (await one.tick(1)).checked == 2


async def test_sessions_that_are_read_only_are_one_sentence(
    server: str, monitor: MakeMonitor, with_defaults: Callable[[str], None]
) -> None:
    with_defaults("{read_only} = 1")
    with mysql_shop(server, [shop_table()]) as shop:
        with pytest.raises(StoreError, match=r"READ.ONLY transaction\.? \(1792\)") as refused:
            await monitor(shop).tick()
        assert str(refused.value).count("\n") == 0


async def test_ids_asked_for_in_other_spellings_are_the_same_sessions(
    server: str, monitor: MakeMonitor
) -> None:
    """A manual pass takes ids from people."""
    with mysql_shop(server, [shop_table()]) as shop:
        add_sessions(shop, {"abc": "c-a", "b": "c-b"})
        one = monitor(shop)
        assert (await one.trigger(["abc", "ABC", "gone"])).skipped == {Skip.NOT_OPEN: 1}
        assert one.billing.asked == {"c-a": 1}


@pytest.mark.parametrize("id_type", ["BIGINT UNSIGNED", "INT"])
async def test_an_id_of_forty_digits_is_not_open_and_others_are_checked(
    server: str, id_type: str, monitor: MakeMonitor
) -> None:
    with mysql_shop(server, [shop_table(id_type=id_type)]) as shop:
        add_sessions(shop, {"7": "c-7", "8": "c-8"})
        one = monitor(shop)
        ids = ["9" * 40, "7", "07", "abc", "-1", "7.0", "8"]
        assert (await one.trigger(ids)).skipped == {Skip.NOT_OPEN: 4}
        assert one.billing.asked == {"c-7": 1, "c-8": 1}


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MySQLShop]:
    """A MariaDB whose global settings a test may change."""
    if not local_mariadb.is_installed():
        without_a_server()
    options = (
        *(
            "--log-bin",
            "--server-id=1",
            "--binlog-format=STATEMENT",
            "--plugin-load-add=auth_ed25519",
        ),
        *("--character-set-server=latin1", "--skip-character-set-client-handshake"),
        *("--sql-mode=", "--autocommit=0", "--completion-type=CHAIN"),
        *("--lower-case-table-names=1", "--transaction-isolation=SERIALIZABLE"),
    )
    with local_mariadb.mariadb_server(tmp_path_factory.mktemp("own"), *options) as url:
        yield MySQLShop(url, "mysql")


async def test_binlog_format_statement_names_the_remedy(
    own_server: MySQLShop, monitor: MakeMonitor
) -> None:
    with mysql_shop(own_server.server, [shop_table()]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        own_server.run("SET GLOBAL binlog_format = STATEMENT")
        with pytest.raises(StoreError, match=r"set binlog_format to ROW or MIXED \(1665\)"):
            await monitor(shop).tick()
        own_server.run("SET GLOBAL binlog_format = MIXED")
        await works(monitor(shop, ["c-a"]), "a", "b")


async def test_a_read_only_server_is_one_sentence_until_it_takes_writes(
    own_server: MySQLShop, monitor: MakeMonitor
) -> None:
    own_server.run("SET GLOBAL binlog_format = MIXED")
    with mysql_shop(own_server.server, [shop_table()]) as shop, documented_user(shop) as user:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(user)
        await one.tick()
        own_server.run("SET GLOBAL read_only = 1")
        with pytest.raises(StoreError, match=r"--read-only option.*\(1290\)"):
            await one.tick()
        own_server.run("SET GLOBAL read_only = 0")
        assert (await one.tick()).checked == 2


async def test_a_backup_that_locks_all_tables_ends_a_pass_with_one_sentence(
    own_server: MySQLShop, monitor: MakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mysql_connection, "LOCK_WAIT_SECONDS", 1)
    monkeypatch.setattr(mysql, "RETRY_SECONDS", 0.5)
    own_server.run("SET GLOBAL binlog_format = MIXED")
    with mysql_shop(own_server.server, [shop_table()]) as shop:
        add_sessions(shop, {"a": "c-a", "b": "c-b"})
        one = monitor(shop)
        await one.tick()
        with connect(shop.server, shop.database) as backup, backup.cursor() as cursor:
            cursor.execute("FLUSH TABLES WITH READ LOCK")
            with pytest.raises(StoreError, match=r"Lock wait timeout exceeded.*\(1205\)"):
                await one.tick()
            cursor.execute("UNLOCK TABLES")
        assert (await one.tick()).checked == 2


async def test_an_ed25519_user_is_told_which_plugin_is_missing(
    own_server: MySQLShop, monitor: MakeMonitor
) -> None:
    own_server.run(
        "CREATE USER signer@localhost IDENTIFIED VIA ed25519 USING PASSWORD('secret-pass')"
    )
    url = own_server.server.replace("root@", "signer:secret-pass@")
    with pytest.raises(StoreError, match="ed25519") as refused:
        await monitor(MySQLShop(url, "mysql")).tick()
    assert "secret-pass" not in str(refused.value)

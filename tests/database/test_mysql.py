"""The MySQL adapter: lost connections, wrong passwords, deadlocks, TLS."""

import threading
from collections.abc import Callable, Iterator

import pymysql
import pytest

from core.database.address import MySQLAddress
from core.database.mysql import ATTEMPTS, MySQLDatabase
from core.database.port import Transaction
from core.errors import StoreError
from core.store.store import Store
from testkit.shops import MySQLShop, Shop, add_sessions, numbered, settings_for
from tests.support import database_of, reconcile


def address_of(shop: Shop) -> MySQLAddress:
    address = settings_for(shop).database
    assert isinstance(address, MySQLAddress)
    return address


@pytest.fixture
def store(mariadb_shop: Shop) -> Iterator[Store]:
    store = Store(database_of(mariadb_shop))
    store.prepare()
    yield store
    store.close()


def test_a_connection_killed_by_the_server_is_replaced(store: Store, mariadb_shop: Shop) -> None:
    store.now()
    for (number,) in mariadb_shop.run(
        "SELECT id FROM information_schema.processlist WHERE db = DATABASE()"
        " AND id <> CONNECTION_ID()"
    ):
        mariadb_shop.run(f"KILL {number}")
    assert reconcile(store, store.now()).open == 0


def test_an_unreachable_database_is_one_clear_error(
    mariadb_shop: MySQLShop,
) -> None:
    """The store works again as soon as the database does."""
    there = address_of(mariadb_shop)
    away = MySQLAddress("127.0.0.1", 1, there.user, "hidden-pass", there.database)
    current = [away]
    store = Store(MySQLDatabase(lambda *, refresh: current[0]))
    with pytest.raises(StoreError) as failed:
        store.prepare()
    assert str(failed.value) == (
        f"The database 127.0.0.1:1/{there.database} cannot be used: Can't connect to MySQL server "
        "on '127.0.0.1' ([Errno 111] Connection refused) (2003)."
    )
    current[0] = there
    assert store.prepare() == []
    store.close()


def test_a_wrong_password_is_read_again_once(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop]
) -> None:
    """If the new one is wrong as well, it is one clear error."""
    shop = limited(f"ALL ON {mariadb_shop.database}.*")
    right = address_of(shop)
    wrong = MySQLAddress(right.host, right.port, right.user, "hidden-pass", right.database)
    refreshes: list[bool] = []

    def read_address(*, refresh: bool) -> MySQLAddress:
        refreshes.append(refresh)
        return right if refresh else wrong

    store = Store(MySQLDatabase(read_address))
    store.prepare()
    assert refreshes == [False, True]
    store.close()
    with pytest.raises(StoreError, match="Access denied") as denied:
        Store(MySQLDatabase(lambda *, refresh: wrong)).prepare()
    assert "hidden-pass" not in str(denied.value)


@pytest.mark.parametrize(("locked_times", "works"), [(ATTEMPTS - 1, True), (ATTEMPTS, False)])
def test_a_deadlock_is_retried_a_bounded_number_of_times(
    mariadb_shop: MySQLShop, locked_times: int, works: bool
) -> None:
    slept: list[float] = []
    address = address_of(mariadb_shop)
    database = MySQLDatabase(lambda *, refresh: address, sleep=slept.append)
    tried = 0

    def work(_transaction: Transaction) -> str:
        nonlocal tried
        tried += 1
        if tried <= locked_times:
            raise pymysql.OperationalError(1213, "Deadlock found when trying to get lock")
        return "done"

    if works:
        assert database.transaction(work) == "done"
    else:
        with pytest.raises(StoreError, match="Deadlock"):
            database.transaction(work)
    assert tried == ATTEMPTS
    assert len(slept) == ATTEMPTS - 1
    database.close()


def test_both_sides_of_a_real_deadlock_finish_their_work(store: Store, mariadb_shop: Shop) -> None:
    add_sessions(mariadb_shop, numbered(2))
    reconcile(store, store.now())
    both_hold_one = threading.Barrier(2)

    def crossing(first: str, second: str) -> None:
        database = database_of(mariadb_shop)
        crossed = False

        def work(transaction: Transaction) -> None:
            nonlocal crossed
            sql = (
                "UPDATE checkout_session_check SET"
                " consecutive_failures = consecutive_failures + 1 WHERE session_id = %s"
            )
            transaction.execute(sql, (first,))
            if not crossed:
                crossed = True
                both_hold_one.wait(10)
            transaction.execute(sql, (second,))

        database.transaction(work)
        database.close()

    threads = [
        threading.Thread(target=crossing, args=order) for order in (("s0", "s1"), ("s1", "s0"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mariadb_shop.run("SELECT consecutive_failures FROM checkout_session_check") == [
        (2,),
        (2,),
    ]


def test_tls_is_used_and_verified_on_request(mariadb_shop: MySQLShop) -> None:
    address = address_of(mariadb_shop)
    strict = MySQLAddress(
        address.host, address.port, address.user, address.password, address.database, ssl=True
    )
    with pytest.raises(StoreError, match=r"(?i)ssl|certificate"):
        Store(MySQLDatabase(lambda *, refresh: strict)).prepare()

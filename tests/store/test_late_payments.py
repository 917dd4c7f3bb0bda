"""Expired sessions on each engine: who looks at them, and what is kept."""

from datetime import timedelta

import pytest

from core.domain.model import Answer, Outcome, SessionStatus
from core.store.late_payments import ExpiredSession, LatePayments
from core.store.store import Store
from testkit.clock import FakeClock
from testkit.shops import MySQLShop, Shop, connect
from tests.store.fake_bus import Bus, statuses
from tests.support import add_expired, database_of

PAID = Answer(Outcome.ACTIVE, 200, 0.1, status=SessionStatus.SUCCESS, billing_status="paid")
WEEK = timedelta(days=7)
KEPT = "SELECT session_id, late_check_at IS NULL, paid_late_at IS NULL FROM checkout_session_change"


def late_payments_of(store: Store) -> LatePayments:
    assert store.late_payments is not None
    return store.late_payments


def test_each_expired_session_is_claimed_by_one_worker(shop: Shop, clock: FakeClock) -> None:
    bus = Bus()
    stores = [Store(database_of(shop, clock), bus, late_payments_for=WEEK) for _ in range(2)]
    for store in stores:
        store.prepare()
    add_expired(shop, {f"s{n}": f"c{n}" for n in range(5)})
    shop.run("UPDATE checkout_session SET status = 'success' WHERE id = 's4'")
    shop.run("DELETE FROM checkout_session WHERE id = 's3'")
    first = late_payments_of(stores[0]).claim_due(2)
    second = late_payments_of(stores[1]).claim_due(9)
    assert late_payments_of(stores[0]).claim_due(9) == []
    claimed = sorted((one.session_id, one.billing_checkout_id) for one in [*first, *second])
    assert claimed == [("s0", "c0"), ("s1", "c1"), ("s2", "c2")]
    assert late_payments_of(stores[0]).record_paid(first[0], PAID) is SessionStatus.TIMEOUT
    assert len(bus.published) == 1
    kept = sorted(tuple(map(str, row)) for row in shop.run(KEPT))
    paid = first[0].session_id
    assert kept == [
        (f"s{n}", *(("1", "0") if f"s{n}" == paid else ("0", "1") if n < 3 else ("1", "1")))
        for n in range(5)
    ]
    clock.advance(86_401)
    stores[0].status_changes.forget_old()
    assert len(shop.run(KEPT)) == 2
    clock.advance(WEEK.total_seconds())
    stores[0].status_changes.forget_old()
    assert shop.run(KEPT) == []
    for store in stores:
        store.close()


def test_an_expired_session_whose_status_is_in_capitals_is_claimed(
    server_shop: Shop, clock: FakeClock
) -> None:
    """MySQL's usual collations take it as the same word, as all statements do."""
    store = Store(database_of(server_shop, clock), late_payments_for=WEEK)
    store.prepare()
    add_expired(server_shop, {"s": "c"})
    server_shop.run("UPDATE checkout_session SET status = 'TIMEOUT'")
    found = late_payments_of(store).claim_due(9)
    store.close()
    assert [session.session_id for session in found] == ["s"]


def test_a_worker_that_dies_costs_no_look(shop: Shop, clock: FakeClock) -> None:
    """Not even the last one."""
    store = Store(database_of(shop, clock), late_payments_for=WEEK)
    store.prepare()
    add_expired(shop, {"s": "c"})
    clock.advance((WEEK - timedelta(minutes=1)).total_seconds())
    first = late_payments_of(store).claim_due(9)
    assert late_payments_of(store).claim_due(9) == []
    clock.advance(20 * 60)
    again = late_payments_of(store).claim_due(9)
    late_payments_of(store).looked_at(again)
    clock.advance(20 * 60)
    assert late_payments_of(store).claim_due(9) == []
    store.close()
    assert [session.session_id for session in first] == ["s"] == [s.session_id for s in again]


def claimed(
    shop: Shop, clock: FakeClock, bus: Bus, *, late_status_updates: bool = True
) -> tuple[Store, ExpiredSession]:
    """A store, and the expired session `s` that it claimed."""
    store = Store(
        database_of(shop, clock),
        bus,
        late_payments_for=WEEK,
        late_status_updates=late_status_updates,
    )
    store.prepare()
    add_expired(shop, {"s": "c"})
    [session] = late_payments_of(store).claim_due(9)
    return store, session


@pytest.mark.parametrize("updates", [True, False])
@pytest.mark.parametrize("change", ["status = 'failure'", "billing_checkout_id = 'another'"])
def test_a_late_payment_changes_no_session_that_the_shop_has_changed(
    shop: Shop, clock: FakeClock, change: str, updates: bool
) -> None:
    """Nor is one published."""
    bus = Bus()
    store, session = claimed(shop, clock, bus, late_status_updates=updates)
    shop.run(f"UPDATE checkout_session SET {change}")
    before = statuses(shop)
    assert late_payments_of(store).record_paid(session, PAID) is None
    store.close()
    assert (statuses(shop), bus.published) == (before, [])
    assert [tuple(map(str, row)) for row in shop.run(KEPT)] == [("s", "1", "1")]


def test_a_late_payment_waits_for_a_row_that_the_shop_has_locked(
    mariadb_shop: MySQLShop, clock: FakeClock
) -> None:
    bus = Bus()
    store, session = claimed(mariadb_shop, clock, bus)
    with connect(mariadb_shop.server, mariadb_shop.database) as other, other.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT * FROM checkout_session FOR UPDATE")
        assert late_payments_of(store).record_paid(session, PAID) is None
        cursor.execute("COMMIT")
    assert (statuses(mariadb_shop), bus.published) == ({"s": "timeout"}, [])
    clock.advance(60)
    assert late_payments_of(store).claim_due(9) == [session]
    assert late_payments_of(store).record_paid(session, PAID) is SessionStatus.SUCCESS
    store.close()
    assert statuses(mariadb_shop) == {"s": "success"}


@pytest.mark.parametrize(
    "body", ["SELECT RAISE(ABORT, 'no')", "UPDATE checkout_session SET status = 'timeout'"]
)
def test_a_late_payment_whose_status_is_refused_is_published_as_timeout(
    sqlite_shop: Shop, clock: FakeClock, body: str
) -> None:
    bus = Bus()
    store, session = claimed(sqlite_shop, clock, bus)
    sqlite_shop.run(f"CREATE TRIGGER audit AFTER UPDATE ON checkout_session BEGIN {body}; END")
    assert late_payments_of(store).record_paid(session, PAID) is SessionStatus.TIMEOUT
    store.close()
    assert statuses(sqlite_shop) == {"s": "timeout"}
    assert [event.new_status for event in bus.published] == ["timeout"]

"""LATE_PAYMENTS_FOR, LATE_STATUS_UPDATES: a session that became `timeout` is looked at again."""

import asyncio
from contextlib import closing
from datetime import timedelta

import pytest

from core.database.thread import DatabaseThread
from core.domain.model import Answer, Outcome
from core.errors import StoreError
from core.passes.late_payments import Ask, in_turn, look_for_late_payments
from core.store.late_payments import LatePayments, next_look
from core.store.status_report import read_status
from core.store.store import Store
from testkit import virtual_time
from testkit.clock import NOON
from testkit.shops import Shop, SQLiteShop, add_sessions, numbered, settings_for
from tests.store.fake_bus import FAILED, OPEN, PAID, Bus, statuses
from tests.support import FakeBilling, Passes, add_expired, database_of

SHOP = {"STATUS_UPDATES": "true", "SESSION_EXPIRES_AFTER": "1h"}
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
CHECKOUT = "checkout_1"


async def expire(passes: Passes, billing: FakeBilling) -> Bus:
    """One session, `s`, becomes `timeout`."""
    bus = passes.publisher = Bus()
    add_sessions(passes.shop, {"s": CHECKOUT})
    billing.answers = {CHECKOUT: OPEN}
    await passes.run(None, **SHOP)
    passes.clock.advance(3600)
    await passes.run(None, **SHOP)
    assert statuses(passes.shop) == {"s": "timeout"}
    bus.published.clear()
    billing.asked.clear()
    return bus


async def later(passes: Passes, time: timedelta, **env: str) -> None:
    passes.clock.advance(time.total_seconds())
    await passes.run(None, **{**SHOP, **env})


def notes(passes: Passes) -> list[str]:
    settings = settings_for(passes.shop, **SHOP)
    database = database_of(passes.shop, passes.clock)
    verdict = read_status(database, settings)["verdict"]
    database.close()
    assert isinstance(verdict, dict)
    return [note for note in verdict["notes"] if "Paid" in note]


def look(
    shop: Shop, sessions: dict[str, str | None], ask: Ask, *, age: timedelta = 20 * MINUTE
) -> float:
    """Look at expired sessions for ten seconds of virtual time, with two requests a second.

    Returns how long that took.
    """
    assert isinstance(shop, SQLiteShop)
    loop = virtual_time.VirtualLoop()
    database = virtual_time.MeteredDatabase(
        shop.path, clock=lambda: NOON + age + timedelta(seconds=loop.now)
    )

    async def looks() -> float:
        store = Store(database, late_payments_for=7 * DAY)
        store.prepare()
        add_expired(shop, sessions)
        assert store.late_payments is not None
        thread = DatabaseThread(virtual_time.DatabaseThread(loop, database.meter))
        in_its_turn = in_turn(ask, store.state, thread, known_limit=2, until=10)
        try:
            await look_for_late_payments(
                store.late_payments, in_its_turn, thread, at_once=100, until=10
            )
            return loop.now
        finally:
            await asyncio.sleep(60)  # a look that went on would be made now

    with closing(database), asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(looks())


async def test_a_late_payment_is_published_once_and_shown_for_a_day(
    passes: Passes, billing: FakeBilling, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await expire(passes, billing)
    await later(passes, 19 * MINUTE)
    assert not billing.asked
    await later(passes, MINUTE)
    billing.answers = {CHECKOUT: PAID._replace(amount=5, currency="EUR")}
    await later(passes, 20 * MINUTE)
    for _ in range(3):
        await later(passes, DAY / 4)
    assert billing.asked == {CHECKOUT: 2}
    [event] = bus.published
    assert (event.session_id, event.amount, event.currency) == ("s", 5, "EUR")
    assert event.expired_at == NOON + HOUR
    assert event.changed_at == NOON + HOUR + 40 * MINUTE
    assert statuses(passes.shop) == {"s": "timeout"}
    assert notes(passes) == [
        "Paid within the last day after they had become timeout, and still timeout: s."
    ]
    assert (
        "💶 Checkout session s (checkout_1) was paid after it had become timeout; billing says paid"
    ) in caplog.messages
    await later(passes, DAY / 4 + MINUTE)
    assert notes(passes) == []
    assert passes.shop.run("SELECT COUNT(*) FROM checkout_session_change") == [(0,)]


@pytest.mark.parametrize("answer", [FAILED, Answer(Outcome.NOT_FOUND, 404)])
async def test_an_unpaid_session_is_looked_at_ever_less_often(
    passes: Passes, billing: FakeBilling, answer: Answer
) -> None:
    """And not at all when LATE_PAYMENTS_FOR is over."""
    bus = await expire(passes, billing)
    billing.answers = {CHECKOUT: answer}
    for _ in range(16):
        await later(passes, DAY / 2)
    assert billing.asked == {CHECKOUT: 8}
    assert not bus.published
    assert passes.shop.run("SELECT COUNT(*) FROM checkout_session_change") == [(0,)]


@pytest.mark.parametrize("answer", [Answer(Outcome.RATE_LIMITED, 429), Answer(Outcome.TIMEOUT)])
async def test_a_session_about_which_billing_says_nothing_is_looked_at_again_soon(
    passes: Passes, billing: FakeBilling, answer: Answer
) -> None:
    bus = await expire(passes, billing)
    billing.answers = {CHECKOUT: answer}
    await later(passes, 2 * DAY)
    billing.answers = {CHECKOUT: PAID}
    await later(passes, 19 * MINUTE)
    assert billing.asked == {CHECKOUT: 1}
    await later(passes, MINUTE)
    assert [event.session_id for event in bus.published] == ["s"]


async def test_a_last_look_that_fails_is_made_again_for_a_day(
    passes: Passes, billing: FakeBilling
) -> None:
    await expire(passes, billing)
    billing.answers = {CHECKOUT: Answer(Outcome.TIMEOUT)}
    await later(passes, 7 * DAY - MINUTE)
    await later(passes, 20 * MINUTE)
    await later(passes, 23 * HOUR)
    assert billing.asked == {CHECKOUT: 3}
    await later(passes, HOUR)
    assert billing.asked == {CHECKOUT: 3}


async def test_answers_that_cannot_be_used_are_logged_once(
    passes: Passes, billing: FakeBilling, caplog: pytest.LogCaptureFixture
) -> None:
    await expire(passes, billing)
    billing.answers = {CHECKOUT: Answer(Outcome.UNKNOWN_STATUS, 200, 0.1, detail="'settled'")}
    await later(passes, 20 * MINUTE)
    lines = [line for line in caplog.messages if "sessions that are timeout" in line]
    assert lines == [
        "⚠️ Answers about sessions that are timeout cannot be used, e.g. that about s: 'settled' (1)"
    ]


async def test_sessions_are_looked_at_after_a_time_without_status_updates(
    passes: Passes, billing: FakeBilling
) -> None:
    bus = await expire(passes, billing)
    passes.clock.advance((2 * DAY).total_seconds())
    await passes.run()
    billing.answers = {CHECKOUT: PAID}
    await later(passes, MINUTE)
    assert bus.session_ids == ["s"]


async def test_a_late_payment_that_the_shop_has_handled_is_shown_no_more(
    passes: Passes, billing: FakeBilling
) -> None:
    await expire(passes, billing)
    add_expired(passes.shop, numbered(11))
    billing.answers = {CHECKOUT: PAID, **{f"checkout_active_{n}": PAID for n in range(11)}}
    await later(passes, 20 * MINUTE)
    assert notes(passes)
    passes.shop.run("UPDATE checkout_session SET status = 'success' WHERE id <> 's'")
    [note] = notes(passes)
    assert note.endswith("and still timeout: s.")
    passes.shop.run("UPDATE checkout_session SET status = 'success'")
    assert notes(passes) == []


@pytest.mark.parametrize(
    "change", ["status = 'success'", "billing_checkout_id = 'another'", "status = 'open'"]
)
async def test_a_session_that_the_shop_has_changed_is_not_looked_at(
    passes: Passes, billing: FakeBilling, change: str
) -> None:
    await expire(passes, billing)
    billing.answers = {CHECKOUT: PAID}
    passes.shop.run(f"UPDATE checkout_session SET {change}")
    late = "SELECT late_check_at FROM checkout_session_change ORDER BY id"
    passes.clock.advance(1200)
    await passes.run()  # without status updates
    assert passes.shop.run(late) != [(None,)]
    await later(passes, MINUTE)
    assert passes.shop.run(late)[0] == (None,)
    assert billing.asked[CHECKOUT] == (1 if "open" in change else 0)  # as an open one


async def test_a_late_payment_changes_the_status_where_that_is_asked_for(
    passes: Passes, billing: FakeBilling, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await expire(passes, billing)
    billing.answers = {CHECKOUT: PAID}
    bus.rejects = {"s"}
    await later(passes, 20 * MINUTE, LATE_STATUS_UPDATES="true")
    assert statuses(passes.shop) == {"s": "timeout"}
    bus.rejects = set()
    await later(passes, MINUTE, LATE_STATUS_UPDATES="true")
    await later(passes, HOUR, LATE_STATUS_UPDATES="true")
    assert statuses(passes.shop) == {"s": "success"}
    [event] = bus.published
    assert (event.new_status, event.expired_at) == ("success", NOON + HOUR)
    assert notes(passes) == []
    log = "SELECT session_id, new_status, billing_status FROM checkout_session_change ORDER BY id"
    assert passes.shop.run(log) == [("s", "timeout", "pending"), ("s", "success", "paid")]
    assert any("had become timeout and is success now" in line for line in caplog.messages)


async def test_an_event_that_is_refused_is_tried_again_in_a_minute(
    passes: Passes, billing: FakeBilling
) -> None:
    bus = await expire(passes, billing)
    billing.answers = {CHECKOUT: PAID}
    bus.rejects = {"s"}
    for wait in (20 * MINUTE, MINUTE):
        passes.clock.advance(wait.total_seconds())
        summary = await passes.run(None, **SHOP)
        assert summary.unpublished == 1  # which raises an alarm
    assert not bus.published
    assert not notes(passes)
    bus.rejects = set()
    await later(passes, MINUTE)
    assert bus.session_ids == ["s"]


async def test_what_billing_closed_or_nobody_watches_is_not_looked_at(
    passes: Passes, billing: FakeBilling
) -> None:
    await expire(passes, billing)
    add_sessions(passes.shop, {"failed": "checkout_2"})
    billing.answers = {"checkout_2": FAILED, CHECKOUT: PAID}
    await later(passes, MINUTE)
    await later(passes, DAY, LATE_PAYMENTS_FOR="0")
    assert billing.asked == {"checkout_2": 1}


def test_looks_that_wait_for_the_budget_end_in_time(sqlite_shop: Shop) -> None:
    asked: list[float] = []

    async def ask(_checkout_id: str | None) -> Answer:
        asked.append(asyncio.get_running_loop().time())
        return OPEN

    assert look(sqlite_shop, numbered(40), ask) < 10.1
    assert 15 <= len(asked) <= 20
    assert max(asked) < 10


def test_a_session_whose_turn_does_not_come_in_time_is_looked_at_again_soon(
    sqlite_shop: Shop,
) -> None:
    """Also if this look would have been its last."""
    asked = set[str | None]()

    async def ask(checkout_id: str | None) -> Answer:
        asked.add(checkout_id)
        return OPEN

    look(sqlite_shop, numbered(40), ask, age=6.5 * DAY)
    soon = (NOON + 6.5 * DAY + 21 * MINUTE).replace(tzinfo=None)
    again = sqlite_shop.run(
        "SELECT billing_checkout_id FROM checkout_session_change WHERE late_check_at <= %s", (soon,)
    )
    assert len(again) >= 20
    assert {checkout_id for (checkout_id,) in again} == {*numbered(40).values()} - asked


def test_a_late_payment_is_recorded_while_other_answers_are_awaited(sqlite_shop: Shop) -> None:
    recorded = list[tuple[str]]()

    async def ask(checkout_id: str | None) -> Answer:
        if checkout_id == "c1":
            await asyncio.sleep(5)
            recorded.extend(
                sqlite_shop.run(
                    "SELECT session_id FROM checkout_session_change WHERE paid_late_at IS NOT NULL"
                )
            )
        return PAID

    look(sqlite_shop, {"s0": "c0", "s1": "c1"}, ask)
    assert recorded == [("s0",)]


def test_no_look_goes_on_when_the_database_cannot_be_used(
    sqlite_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    billing = FakeBilling({f"checkout_active_{n}": PAID for n in range(40)})

    def fail(*_: object) -> None:
        raise StoreError("gone")

    monkeypatch.setattr(LatePayments, "record_paid", fail)
    with pytest.raises(StoreError):
        look(sqlite_shop, numbered(40), billing.check)
    assert billing.asked.total() == 1


@pytest.mark.parametrize(
    ("age", "distance"),
    [
        (-HOUR, 20 * MINUTE),
        (20 * MINUTE, 20 * MINUTE),
        (HOUR, 2 * HOUR),
        (7 * HOUR, 8 * HOUR),
        (2 * DAY, DAY),
        (6 * DAY, DAY),
        (6 * DAY + HOUR, 23 * HOUR),
        (7 * DAY - MINUTE, MINUTE),
        (7 * DAY, None),
        (9 * DAY, None),
    ],
)
def test_the_distance_of_looks_grows_with_the_age(
    age: timedelta, distance: timedelta | None
) -> None:
    now = NOON + age
    found = next_look(NOON, now, 7 * DAY)
    assert found == (None if distance is None else now + distance)

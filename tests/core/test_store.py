"""The store's contract, on every engine: what a pass relies on."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial

import pytest

from core.domain.model import Answer, Claim, Count, Outcome, Reason, Result, Skip, Summary
from core.errors import StoreError
from core.store.store import NO_STATUS_INDEX, Store, View
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, add_sessions, numbered
from tests.support import census, database_of

LEASE = timedelta(seconds=20)


@pytest.fixture
def store(shop: Shop, clock: FakeClock) -> Iterator[Store]:
    store = Store(database_of(shop, clock))
    store.prepare()
    yield store
    store.close()


def claim_all(store: Store, tick: datetime, limit: int = 10_000) -> list[Claim]:
    return store.queue.claim_due(store.now(), tick=tick, lease=LEASE, limit=limit)


def results(claims: Sequence[Claim], next_check_at: datetime, outcome: Outcome) -> list[Result]:
    return [Result(claim, Answer(outcome, 200), next_check_at) for claim in claims]


def view(store: Store, tick: datetime | None = None) -> View:
    return store.view(tick, interval_seconds=5, may_lead=True)


def ids(claims: Sequence[Claim]) -> list[str]:
    return sorted(claim.session_id for claim in claims)


def test_the_monitors_tables_are_made_once_and_used_again(shop: Shop, clock: FakeClock) -> None:
    for _ in range(2):
        store = Store(database_of(shop, clock))
        assert store.prepare() == []
        assert store.prepare() == []
        store.close()
    assert shop.run("SELECT reason FROM checkout_session_run") == [("start",)]


def test_a_monitor_just_installed_has_a_heartbeat_from_then(store: Store) -> None:
    assert store.runs.last_sign_of_life() == NOON


def test_a_shop_without_an_index_on_status_is_told_the_statement(
    shop: Shop, clock: FakeClock
) -> None:
    shop.run("ALTER TABLE checkout_session RENAME TO old_session")
    shop.run(
        "CREATE TABLE checkout_session (id VARCHAR(40) PRIMARY KEY,"
        " billing_checkout_id VARCHAR(40), status VARCHAR(10))"
    )
    store = Store(database_of(shop, clock))
    assert store.prepare() == [NO_STATUS_INDEX]
    assert store.prepare() == []
    statement = NO_STATUS_INDEX.partition("Run: ")[2]
    shop.run(statement.rstrip(";").replace("_status ON", "_by_status ON"))
    again = Store(database_of(shop, clock))
    assert again.prepare() == []
    store.close()
    again.close()


def test_a_database_without_the_shops_table_gets_one_clear_error(
    shop: Shop, clock: FakeClock
) -> None:
    shop.run("DROP TABLE checkout_session")
    store = Store(database_of(shop, clock))
    with pytest.raises(StoreError, match=r"no table checkout_session.*local/schema/\w+\.sql"):
        store.prepare()
    store.close()


def test_tables_that_vanish_are_made_again_by_the_next_pass(store: Store, shop: Shop) -> None:
    shop.run("DROP TABLE checkout_session_check")
    with pytest.raises(StoreError, match="checkout_session_check"):
        census(store, NOON)
    store.prepare()
    assert census(store, NOON) == Count()


def test_new_open_sessions_are_adopted_and_due_at_once(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(3))
    add_sessions(shop, {"done": "checkout_done"}, status="success")
    assert census(store, NOON) == Count(3, 0, 0, outcomes={"": 3}, ages={"10m": 3})
    claims = claim_all(store, NOON)
    assert ids(claims) == ["s0", "s1", "s2"]
    assert {c.billing_checkout_id for c in claims} == {f"checkout_active_{n}" for n in range(3)}
    assert {c.first_seen_at for c in claims} == {NOON}
    assert {c.claimed_until for c in claims} == {NOON + LEASE}


def test_a_thousand_new_sessions_are_adopted_in_one_go(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(1201))
    assert census(store, NOON).open == 1201
    assert len(claim_all(store, NOON)) == 1201


def test_sessions_no_longer_open_are_forgotten(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(3))
    census(store, NOON)
    shop.run("UPDATE checkout_session SET status = 'success' WHERE id = 's1'")
    shop.run("DELETE FROM checkout_session WHERE id = 's2'")
    assert census(store, NOON).open == 1
    assert shop.run("SELECT session_id FROM checkout_session_check") == [("s0",)]


def test_a_session_closed_between_count_and_claim_is_not_checked(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(2))
    census(store, NOON)
    shop.run("UPDATE checkout_session SET status = 'failure' WHERE id = 's0'")
    assert ids(claim_all(store, NOON)) == ["s1"]
    assert shop.run("SELECT session_id FROM checkout_session_check") == [("s1",)]


def test_a_session_that_another_store_closes_and_forgets_is_not_brought_back_by_its_result(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(1))
    census(store, NOON)
    claims = claim_all(store, NOON)
    shop.run("UPDATE checkout_session SET status = 'success'")
    census(store, NOON)
    store.record(results(claims, NOON, Outcome.ACTIVE), store.now())
    assert shop.run("SELECT session_id FROM checkout_session_check") == []


def checked_all(store: Store, due_after: Mapping[str, int]) -> None:
    """Check every session, after which each is due so many seconds after NOON."""
    for claim in claim_all(store, NOON):
        due = NOON + timedelta(seconds=due_after[claim.session_id])
        store.record(results([claim], due, Outcome.ACTIVE), store.now())


@pytest.mark.parametrize("reason", [Reason.TICK, Reason.MANUAL])
def test_claims_go_to_the_least_recently_due_first(
    store: Store, shop: Shop, clock: FakeClock, reason: Reason
) -> None:
    add_sessions(shop, numbered(3))
    census(store, NOON)
    checked_all(store, {"s0": 15, "s1": 5, "s2": 10})
    clock.advance(20)
    claim = partial(store.queue.claim_due, clock.now, tick=clock.now)
    if reason is Reason.MANUAL:
        claim = partial(store.queue.claim_unchecked, clock.now, since=clock.now)
    order = [claim(lease=LEASE, limit=1)[0].session_id for _ in range(3)]
    assert order == ["s1", "s2", "s0"]


def test_sessions_closed_since_the_count_do_not_hide_what_is_due_behind_them(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(3))
    census(store, NOON)
    checked_all(store, {"s0": 5, "s1": 10, "s2": 15})
    shop.run("UPDATE checkout_session SET status = 'success' WHERE id <> 's2'")
    clock.advance(20)
    assert [claim.session_id for claim in claim_all(store, clock.now, limit=1)] == ["s2"]


def test_a_claimed_session_is_not_claimed_again_before_its_lease_is_over(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(1))
    census(store, NOON)
    assert len(claim_all(store, NOON)) == 1
    clock.advance(LEASE.total_seconds() - 0.001)
    assert claim_all(store, clock.now) == []
    assert store.queue.claim_unchecked(store.now(), since=clock.now, lease=LEASE, limit=10) == []
    assert census(store, clock.now).in_flight == 1
    clock.advance(0.001)
    assert ids(claim_all(store, clock.now)) == ["s0"]


def test_what_is_recorded_frees_the_claim_and_sets_when_the_session_is_due(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(2))
    census(store, NOON)
    store.record(
        results(claim_all(store, NOON), NOON + timedelta(seconds=5), Outcome.ACTIVE), store.now()
    )
    assert (
        shop.run(
            "SELECT last_outcome, last_status_code, attempts, consecutive_failures, claimed_until"
            " FROM checkout_session_check"
        )
        == [("active", 200, 1, 0, None)] * 2
    )
    assert census(store, NOON).not_due == 2
    assert claim_all(store, NOON) == []
    clock.advance(5)
    assert len(claim_all(store, clock.now)) == 2


def test_what_is_due_at_the_tick_is_claimed_though_the_databases_clock_is_behind(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(1))
    census(store, NOON)
    tick = NOON + timedelta(seconds=5)
    store.record(results(claim_all(store, NOON), tick, Outcome.ACTIVE), store.now())
    clock.advance(4.9)
    assert census(store, tick).not_due == 0
    assert ids(claim_all(store, tick)) == ["s0"]


def test_failures_in_a_row_are_counted_and_a_success_resets_them(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(1))
    census(store, NOON)
    for outcome, failures in (
        (Outcome.TIMEOUT, 1),
        (Outcome.NETWORK_ERROR, 2),
        (Outcome.NOT_FOUND, 0),
        (Outcome.TIMEOUT, 1),
    ):
        store.record(results(claim_all(store, NOON), NOON, outcome), store.now())
        assert shop.run(
            "SELECT consecutive_failures, last_outcome FROM checkout_session_check"
        ) == [(failures, outcome.value)]
    assert claim_all(store, NOON)[0].consecutive_failures == 1


def test_what_is_given_back_is_as_due_as_it_was(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(3))
    census(store, NOON)
    before = claim_all(store, NOON)
    store.queue.release(before[:2])
    assert ids(claim_all(store, NOON)) == ids(before[:2])
    assert shop.run("SELECT SUM(attempts) FROM checkout_session_check") == [(0,)]


def test_a_result_that_comes_after_the_lease_leaves_the_new_claim_alone(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(1))
    census(store, NOON)
    late = claim_all(store, NOON)
    clock.advance(LEASE.total_seconds())
    [current] = claim_all(store, clock.now)
    store.record(results(late, NOON, Outcome.TIMEOUT), store.now())
    store.queue.release(late)
    assert claim_all(store, clock.now) == []
    store.record(results([current], clock.now, Outcome.ACTIVE), store.now())
    assert shop.run("SELECT attempts, last_outcome FROM checkout_session_check") == [(1, "active")]


def test_a_manual_pass_claims_what_is_not_due_but_nothing_twice(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(3))
    census(store, NOON)
    store.record(
        results(claim_all(store, NOON), NOON + timedelta(hours=1), Outcome.ACTIVE), store.now()
    )
    clock.advance(1)
    since = clock.now
    claims = store.queue.claim_unchecked(store.now(), since=since, lease=LEASE, limit=10)
    assert len(claims) == 3
    store.record(results(claims, NOON + timedelta(hours=1), Outcome.ACTIVE), store.now())
    assert store.queue.claim_unchecked(store.now(), since=since, lease=LEASE, limit=10) == []


def test_a_manual_pass_over_ids_claims_and_counts_only_those(store: Store, shop: Shop) -> None:
    add_sessions(shop, {"a": "1", "b": "2", "\u65e5\u672c": "3"})
    add_sessions(shop, {"done": "4"}, status="success")
    asked = ["a", "\u65e5\u672c", "done", "nobody", "\U0001f600", "\ud800", "x' OR '1'='1"]
    assert census(store, NOON, asked).open == 2
    claims = store.queue.claim_unchecked(
        store.now(), since=NOON, lease=LEASE, limit=10, session_ids=asked
    )
    assert ids(claims) == ["a", "\u65e5\u672c"]
    assert (
        store.queue.claim_unchecked(
            store.now(), since=NOON, lease=LEASE, limit=10, session_ids=["\ud800"]
        )
        == []
    )


def test_the_most_overdue_session_tells_how_late_the_monitor_is(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    add_sessions(shop, numbered(3))
    census(store, NOON)
    checked_all(store, {"s0": 15, "s1": 5, "s2": 10})
    clock.advance(17.25)
    assert view(store).overdue_seconds == 12.25
    claim_all(store, clock.now)
    assert view(store).overdue_seconds == 0.0


def test_a_run_is_one_row_and_is_kept_for_a_day(store: Store, shop: Shop, clock: FakeClock) -> None:
    summary = Summary(
        Reason.TICK,
        NOON,
        NOON,
        open=3,
        outcomes=Counter({Outcome.ACTIVE: 1, Outcome.TIMEOUT: 1}),
        skipped=Counter({Skip.IN_FLIGHT: 1}),
        overdue_seconds=1.5,
        latencies=[0.1, 0.2],
        duration_seconds=0.25,
    )
    store.runs.end(store.runs.begin(summary), summary)
    columns = (
        "reason, duration_ms, open_sessions, checked, errors, outcomes, skipped, overdue_ms,"
        " latency_p50_ms, latency_max_ms"
    )
    newest = f"SELECT {columns} FROM checkout_session_run ORDER BY id DESC LIMIT 1"
    assert shop.run(newest) == [
        ("tick", 250, 3, 2, 1, '{"active": 1, "timeout": 1}', '{"in_flight": 1}', 1500, 100, 200)
    ]
    assert store.runs.last_sign_of_life() == NOON
    store.runs.begin(Summary(Reason.TICK, NOON))  # a pass that was killed
    clock.advance(timedelta(days=1, seconds=1).total_seconds())
    store.runs.forget_old()
    assert shop.run("SELECT COUNT(*) FROM checkout_session_run") == [(0,)]


def test_the_shops_table_is_left_as_it_was(store: Store, shop: Shop, clock: FakeClock) -> None:
    add_sessions(shop, numbered(5))
    before = shop.run("SELECT * FROM checkout_session ORDER BY id")
    census(store, NOON)
    claims = claim_all(store, NOON)
    store.record(results(claims[:3], NOON, Outcome.NOT_FOUND), store.now())
    store.queue.release(claims[3:])
    assert shop.run("SELECT * FROM checkout_session ORDER BY id") == before

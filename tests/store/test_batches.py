"""Batches on every engine: what a check writes, and what becomes of a batch."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from core.database.port import as_datetime
from core.domain.model import Claim, Outcome
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.queue import LAST_CHECK, OF_SESSIONS, due_times
from testkit.shops import MySQLShop, Shop, add_sessions, numbered
from tests.store.claims import LEASE, claim_all, claim_unchecked, give_back, ids, rechecks, record
from tests.support import reconcile

INTERVAL = timedelta(seconds=5)


def check(store: Store, claims: Sequence[Claim], due: datetime, failing: str = "") -> None:
    """Check claimed sessions; the failing one is due a minute later."""
    healthy = [claim for claim in claims if claim.session_id != failing]
    failed = [claim for claim in claims if claim.session_id == failing]
    later = due + timedelta(minutes=1)
    record(
        store,
        [*rechecks(healthy, due, Outcome.ACTIVE), *rechecks(failed, later, Outcome.TIMEOUT)],
    )


def batches(shop: Shop) -> list[tuple[Any, ...]]:
    """How many sessions each batch has, the largest first."""
    return shop.run(
        "SELECT COUNT(c.rowid) AS n FROM checkout_session_batch b"
        " LEFT JOIN checkout_session_check c ON c.batch_id = b.id GROUP BY b.id ORDER BY n DESC"
    )


@pytest.fixture
def queued(store: Store, shop: Shop, clock: FakeClock) -> Store:
    """Three sessions in one batch, checked once and due in the next slot."""
    add_sessions(shop, numbered(3))
    reconcile(store, NOON)
    check(store, claim_all(store, NOON), NOON + INTERVAL)
    clock.advance(5)
    return store


def test_a_check_that_finds_nothing_new_writes_no_row(
    queued: Store, shop: Shop, clock: FakeClock
) -> None:
    before = shop.run("SELECT * FROM checkout_session_check ORDER BY rowid")
    for _ in range(3):
        check(queued, claim_all(queued, clock.now), clock.now + INTERVAL)
        clock.advance(5)
    assert shop.run("SELECT * FROM checkout_session_check ORDER BY rowid") == before
    assert len(claim_all(queued, clock.now)) == 3


def test_new_sessions_come_in_batches_of_fifty_at_the_most(store: Store, shop: Shop) -> None:
    add_sessions(shop, numbered(120))
    reconcile(store, NOON)
    assert batches(shop) == [(50,), (50,), (20,)]


def test_small_batches_that_are_due_together_become_one(
    store: Store, shop: Shop, clock: FakeClock
) -> None:
    for number in range(6):
        add_sessions(shop, {f"s{number}": "c"})
        reconcile(store, clock.now)
    assert len(batches(shop)) == 6
    check(store, claim_all(store, clock.now), clock.now + INTERVAL)
    assert batches(shop) == [(6,)]
    clock.advance(5)
    assert len(claim_all(store, clock.now)) == 6


def test_a_batch_without_sessions_is_deleted(queued: Store, shop: Shop, clock: FakeClock) -> None:
    shop.run("UPDATE checkout_session SET status = 'success'")
    assert claim_all(queued, clock.now) == []
    for table in ("batch", "check"):
        assert shop.run(f"SELECT * FROM checkout_session_{table}") == []


def test_a_failing_session_backs_off_alone_and_comes_back(
    queued: Store, shop: Shop, clock: FakeClock
) -> None:
    check(queued, claim_all(queued, clock.now), clock.now + INTERVAL, failing="s1")
    for _ in range(12):
        clock.advance(5)
        claims = claim_all(queued, clock.now)
        assert ids(claims) == ["s0", "s2"]
        check(queued, claims, clock.now + INTERVAL)
    clock.advance(5)
    claims = claim_all(queued, clock.now)
    assert ids(claims) == ["s0", "s1", "s2"]
    check(queued, claims, clock.now + INTERVAL)
    rows = "SELECT next_check_at, consecutive_failures FROM checkout_session_check"
    assert shop.run(rows) == [(None, 0)] * 3


def test_a_failing_session_does_not_bring_its_batch_forward(
    queued: Store, clock: FakeClock
) -> None:
    check(queued, claim_all(queued, clock.now), clock.now + timedelta(minutes=5), failing="s1")
    clock.advance(360)
    assert ids(claim_all(queued, clock.now)) == ["s0", "s1", "s2"]


def test_a_session_that_waits_for_its_answer_delays_no_other(
    queued: Store, shop: Shop, clock: FakeClock
) -> None:
    claims = {claim.session_id: claim for claim in claim_all(queued, clock.now)}
    clock.advance(4.5)
    check(queued, [claims["s0"], claims["s2"]], NOON + 2 * INTERVAL)
    clock.advance(0.5)
    others = claim_all(queued, clock.now)
    assert ids(others) == ["s0", "s2"]
    assert reconcile(queued, clock.now).in_flight == 3
    check(queued, others, clock.now + INTERVAL)
    check(queued, [claims["s1"]], clock.now + INTERVAL)
    assert len(set(due_times(shop).values())) == 1
    clock.advance(5)
    assert ids(claim_all(queued, clock.now)) == ["s0", "s1", "s2"]


def test_what_waits_in_a_killed_pass_is_due_after_its_lease(
    queued: Store, clock: FakeClock
) -> None:
    claimed_at = clock.now
    claims = claim_all(queued, clock.now)
    clock.advance(4.5)
    check(queued, claims[:2], NOON + 2 * INTERVAL)
    clock.now = claimed_at + LEASE - timedelta(milliseconds=1)
    others = claim_all(queued, clock.now)
    assert ids(others) == ids(claims[:2])
    check(queued, others, clock.now + INTERVAL)
    clock.advance(0.001)
    assert ids(claim_all(queued, clock.now)) == ids(claims[2:])


def test_a_session_that_leaves_its_batch_keeps_the_time_of_its_last_check(
    queued: Store, shop: Shop, clock: FakeClock
) -> None:
    """Its row is older: the checks with its batch did not write it."""
    check(queued, claim_all(queued, clock.now), clock.now + INTERVAL)
    checked_at = clock.now + timedelta(milliseconds=1)
    clock.advance(5)
    claims = claim_all(queued, clock.now)
    record(queued, rechecks(claims[:2], clock.now + INTERVAL, Outcome.ACTIVE))
    give_back(queued, claims[2:])
    [(last,)] = shop.run(f"SELECT {LAST_CHECK} {OF_SESSIONS} WHERE c.next_check_at IS NOT NULL")
    assert as_datetime(last).replace(tzinfo=UTC) == checked_at


@pytest.mark.parametrize("asked", [1, 2])
def test_what_was_not_asked_stays_due(queued: Store, clock: FakeClock, asked: int) -> None:
    claims = claim_all(queued, clock.now)
    record(queued, rechecks(claims[:asked], clock.now + INTERVAL, Outcome.ACTIVE))
    give_back(queued, claims[asked:])
    again = claim_all(queued, clock.now)
    assert ids(again) == ids(claims[asked:])
    check(queued, again, clock.now + INTERVAL)
    clock.advance(5)
    assert len(claim_all(queued, clock.now)) == 3


def test_a_manual_pass_by_id_leaves_the_rest_of_a_batch(queued: Store, clock: FakeClock) -> None:
    [one] = claim_unchecked(queued, clock.now, ["s1"])
    assert claim_unchecked(queued, clock.now, ["s1"]) == []
    others = claim_all(queued, clock.now)
    assert ids(others) == ["s0", "s2"]
    check(queued, [one], clock.now + INTERVAL)
    check(queued, others, clock.now + INTERVAL)
    clock.advance(5)
    assert ids(claim_all(queued, clock.now)) == ["s0", "s1", "s2"]


def test_a_manual_pass_asks_those_that_back_off_and_no_other_twice(
    queued: Store, clock: FakeClock
) -> None:
    check(queued, claim_all(queued, clock.now), clock.now + INTERVAL, failing="s1")
    clock.advance(1)
    since = clock.now
    clock.advance(4)
    check(queued, claim_all(queued, clock.now), clock.now + INTERVAL)
    assert ids(claim_unchecked(queued, since)) == ["s1"]


def test_rows_whose_batch_is_missing_get_a_new_one(
    queued: Store, shop: Shop, clock: FakeClock
) -> None:
    """Somebody emptied the table."""
    shop.run("DELETE FROM checkout_session_batch")
    assert claim_all(queued, clock.now) == []
    assert reconcile(queued, clock.now).open == 3
    assert len(claim_all(queued, clock.now)) == 3


# Some tables of version 0.2.0, of which one session is claimed and one is due later.
ROWS = (
    ("s0", NOON, None),
    ("s1", NOON, NOON + timedelta(seconds=12)),
    ("s2", NOON + timedelta(seconds=30), None),
)


def test_rows_of_version_0_2_are_put_into_batches(
    server_store: Store, server_shop: MySQLShop, clock: FakeClock
) -> None:
    """What a worker of that version is checking is not claimed until its lease is over."""
    server_store.close()
    store = Store(server_store._database)
    server_shop.run("DROP TABLE checkout_session_batch")
    server_shop.run(
        "ALTER TABLE checkout_session_check DROP KEY checkout_session_check_batch,"
        " DROP KEY checkout_session_check_waiting,"
        " DROP COLUMN batch_id, ADD COLUMN attempts INT UNSIGNED NOT NULL DEFAULT 0,"
        " MODIFY next_check_at DATETIME(3) NOT NULL,"
        " ADD KEY checkout_session_check_due (next_check_at)"
    )
    add_sessions(server_shop, numbered(3))
    for session_id, due, until in ROWS:
        server_shop.run(
            "INSERT INTO checkout_session_check"
            " (session_id, next_check_at, claimed_until, first_seen_at) VALUES (%s, %s, %s, %s)",
            (session_id, _naive(due), until and _naive(until), _naive(NOON)),
        )
    store.prepare()
    at = store._database._clock = FakeClock(NOON)  # type: ignore[attr-defined]
    assert reconcile(store, NOON).open == 3
    claims = claim_all(store, NOON)
    assert ids(claims) == ["s0"]
    check(store, claims, NOON + INTERVAL)
    at.advance(12)
    claims = claim_all(store, at.now)
    assert ids(claims) == ["s0", "s1"]
    check(store, claims, at.now + INTERVAL)
    at.advance(18)
    assert ids(claim_all(store, at.now)) == ["s0", "s1", "s2"]
    # A worker of that version that is still running adopts and records in its own way.
    server_shop.run("UPDATE checkout_session_check SET attempts = attempts + 1")
    add_sessions(server_shop, {"new": "c"})
    server_shop.run(
        "INSERT INTO checkout_session_check (session_id, next_check_at, first_seen_at)"
        " VALUES ('new', %s, %s)",
        (_naive(NOON), _naive(NOON)),
    )
    reconcile(store, at.now)
    assert ids(claim_all(store, at.now)) == ["new"]
    store.close()


def _naive(time: datetime) -> datetime:
    return time.replace(tzinfo=None)

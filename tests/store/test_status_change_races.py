"""A session's status leaves `open` once, whoever else changes it meanwhile."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.aws.event_bus import event_id
from core.domain.model import (
    Answer,
    Claim,
    Outcome,
    Recheck,
    SessionStatus,
    StatusChange,
    StatusChangedEvent,
)
from core.domain.summary import Summary
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.queue import claimed
from testkit.shops import MySQLShop, Shop, add_sessions, connect, numbered
from tests.store.claims import LEASE, claim_all, record
from tests.store.fake_bus import FAILED, OPEN, PAID, Bus, publishing_passes, statuses
from tests.support import FakeBilling, Passes, database_of, reconcile, until


async def pass_while(
    passes: Passes, billing: FakeBilling, happens: Callable[[], object]
) -> Summary:
    """A pass over one session; `happens` is called before billing answers."""
    held = billing.held["checkout_active_0"] = asyncio.Event()
    running = asyncio.create_task(passes.run(CHECK_CADENCE="5m", STATUS_UPDATES="true"))
    await until(lambda: billing.asked["checkout_active_0"] == 1)
    happens()
    held.set()
    return await running


@pytest.mark.parametrize("checkout", ["'checkout_active_9'", "NULL", "''"])
async def test_an_answer_about_a_replaced_checkout_changes_nothing(
    shop: Shop, clock: FakeClock, billing: FakeBilling, bus: Bus, checkout: str
) -> None:
    """The session has a new checkout id, which is due at once."""
    add_sessions(shop, numbered(1))
    billing.answers = {"checkout_active_0": FAILED}
    retry = f"UPDATE checkout_session SET billing_checkout_id = {checkout}"
    passes = publishing_passes(shop, clock, billing, bus)
    summary = await pass_while(passes, billing, lambda: shop.run(retry))
    assert statuses(shop) == {"s0": "open"}
    assert (bus.session_ids, summary.status_changes) == ([], 0)
    assert summary.outcomes[Outcome.DEFERRED] == 1
    store = Store(database_of(shop, clock))
    [claim] = claim_all(store, NOON)
    store.close()
    assert claim.billing_checkout_id != "checkout_active_0"


async def test_an_answer_about_a_recreated_session_changes_nothing(
    shop: Shop, clock: FakeClock, billing: FakeBilling, bus: Bus
) -> None:
    """The shop deleted the session and inserted it again with a new checkout."""
    add_sessions(shop, numbered(1))
    billing.answers = {"checkout_active_0": FAILED}

    def recreate() -> None:
        shop.run("DELETE FROM checkout_session")
        add_sessions(shop, {"s0": "checkout_active_1"})

    await pass_while(publishing_passes(shop, clock, billing, bus), billing, recreate)
    assert statuses(shop) == {"s0": "open"}
    assert bus.session_ids == []


def test_a_lapsed_claim_changes_nothing(shop: Shop, clock: FakeClock, bus: Bus) -> None:
    """Another worker has claimed the session meanwhile; its result counts."""
    add_sessions(shop, numbered(1))
    late, current = (Store(database_of(shop, clock), bus) for _ in range(2))
    late.prepare()
    reconcile(late, NOON)
    [lapsed] = claim_all(late, NOON)
    clock.advance(20)
    [valid] = claim_all(current, clock.now)
    change = StatusChange(lapsed, FAILED, SessionStatus.FAILURE, clock.now, clock.now)
    recorded = record(late, changes=[change])
    assert (statuses(shop), bus.session_ids, recorded.changed) == ({"s0": "open"}, [], [])
    assert claimed(shop) == 1
    change = StatusChange(valid, PAID, SessionStatus.SUCCESS, clock.now, clock.now)
    assert record(current, changes=[change]).changed == [change]
    assert (statuses(shop), bus.session_ids) == ({"s0": "success"}, ["s0"])
    late.close()
    current.close()


def test_a_session_that_is_being_changed_is_not_claimed(
    server_shop: Shop, clock: FakeClock
) -> None:
    """Even if its lease ends while its event is published."""

    class SlowBus(Bus):
        def publish(self, changes: Sequence[StatusChangedEvent]) -> Collection[str]:
            clock.advance(LEASE.total_seconds())
            claims.extend(claim_all(other, clock.now))
            return super().publish(changes)

    add_sessions(server_shop, numbered(1))
    bus, claims = SlowBus(), list[Claim]()
    slow, other = (Store(database_of(server_shop, clock), bus) for _ in range(2))
    slow.prepare()
    reconcile(slow, NOON)
    [claim] = claim_all(slow, NOON)
    change = StatusChange(claim, PAID, SessionStatus.SUCCESS, NOON, NOON)
    assert record(slow, changes=[change]).changed == [change]
    assert (claims, bus.session_ids) == ([], ["s0"])
    slow.close()
    other.close()


async def test_a_faster_webhook_wins_and_no_event_is_published(
    mariadb_passes: Passes, bus: Bus, billing: FakeBilling
) -> None:
    shop = mariadb_passes.shop
    add_sessions(shop, numbered(2))
    billing.answers = dict.fromkeys(("checkout_active_0", "checkout_active_1"), PAID)
    held = billing.held["checkout_active_0"] = asyncio.Event()

    running = asyncio.create_task(mariadb_passes.run())
    await until(lambda: billing.in_flight == 1)
    shop.run("UPDATE checkout_session SET status = 'failure' WHERE id = 's0'")
    held.set()
    summary = await running
    assert (summary.status_changes, summary.unpublished) == (1, 0)
    assert statuses(shop) == {"s0": "failure", "s1": "success"}
    assert [change.session_id for change in bus.published] == ["s1"]


async def test_an_open_webhook_transaction_is_not_waited_for_or_overruled(
    mariadb_passes: Passes, bus: Bus, billing: FakeBilling
) -> None:
    shop = mariadb_passes.shop
    assert isinstance(shop, MySQLShop)
    add_sessions(shop, numbered(2))
    billing.answers = dict.fromkeys(("checkout_active_0", "checkout_active_1"), PAID)
    with connect(shop.server, shop.database) as webhook, webhook.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("UPDATE checkout_session SET status = 'failure' WHERE id = 's0'")
        summary = await mariadb_passes.run()
        cursor.execute("COMMIT")
    assert summary.status_changes == 1
    assert statuses(shop) == {"s0": "failure", "s1": "success"}
    mariadb_passes.clock.advance(5)
    await mariadb_passes.run()
    assert [change.session_id for change in bus.published] == ["s1"]
    assert shop.run("SELECT * FROM checkout_session_check") == []


class DeadlyBus:
    """Writes an event's id to a file, and kills its process before it answers."""

    def __init__(self, ids_file: Path) -> None:
        self._ids_file = ids_file

    def publish(self, changes: Sequence[StatusChangedEvent]) -> Collection[str]:
        self._ids_file.write_text("\n".join(event_id(change) for change in changes))
        os.kill(os.getpid(), signal.SIGKILL)
        return ()


def _publish_and_die(shop: Shop, ids_file: Path) -> None:
    passes = Passes(shop, FakeClock(), FakeBilling({"checkout_active_0": PAID}))
    passes.publisher = DeadlyBus(ids_file)
    asyncio.run(passes.run())


async def test_killed_before_commit_the_same_event_is_published_again(
    mariadb_passes: Passes, bus: Bus, billing: FakeBilling, tmp_path: Path
) -> None:
    """The event has the same id, so that consumers can recognise it."""
    shop, ids_file = mariadb_passes.shop, tmp_path / "ids_file"
    add_sessions(shop, numbered(1))
    killed = multiprocessing.get_context("spawn").Process(
        target=_publish_and_die, args=(shop, ids_file)
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert statuses(shop) == {"s0": "open"}
    billing.answers = {"checkout_active_0": PAID}
    mariadb_passes.clock.advance(25)  # the claim of the killed process lapses
    await mariadb_passes.run()
    assert statuses(shop) == {"s0": "success"}
    assert [event_id(change) for change in bus.published] == ids_file.read_text().split()


INTERLEAVINGS = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.sampled_from("AB")),
        st.tuples(st.just("record"), st.sampled_from("AB"), st.sampled_from([PAID, FAILED, OPEN])),
        st.tuples(st.just("record inside"), st.sampled_from("AB"), st.sampled_from([PAID, FAILED])),
        st.tuples(st.just("webhook"), st.integers(0, 2)),
        st.tuples(st.just("bus rejects"), st.sets(st.sampled_from(["s0", "s1", "s2"]))),
        st.tuples(st.just("wait"), st.sampled_from([1, 5, 25])),
    ),
    max_size=14,
)


@pytest.fixture
def workers(mariadb_shop: MySQLShop, clock: FakeClock) -> Iterator["Workers"]:
    workers = Workers(mariadb_shop, clock)
    yield workers
    workers.close()


class Workers:
    """Two workers and a webhook on three sessions, and who changed which."""

    def __init__(self, shop: MySQLShop, clock: FakeClock) -> None:
        self.shop, self.clock, self.bus = shop, clock, Bus()
        self.stores = {n: Store(database_of(shop, clock), self.bus) for n in "AB"}
        self.stores["A"].prepare()
        self.claims: dict[str, list[Any]] = {}
        self.webhooks: set[str] = set()
        self.changed: list[tuple[str, str]] = []
        self.history: dict[str, list[str]] = {}

    def begin(self) -> None:
        self.bus.published.clear()
        self.bus.rejects = set()
        self.claims = {"A": [], "B": []}
        self.webhooks.clear()
        self.changed.clear()
        self.history = {f"s{n}": ["open"] for n in range(3)}
        for table in ("_batch", "_check", ""):
            self.shop.run(f"DELETE FROM checkout_session{table}")
        add_sessions(self.shop, numbered(3))
        self.note_statuses()

    def do(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("claim", worker):
                store = self.stores[worker]
                reconcile(store, self.clock.now)
                self.claims[worker] += claim_all(store, self.clock.now)
            case ("record", worker, answer):
                self.record(worker, answer)
            case ("record inside", worker, answer):
                other = "B" if worker == "A" else "A"
                self.bus.meanwhile = lambda: self.record_inside(other, answer)
                self.record(worker, answer)
                self.bus.meanwhile = lambda: None
            case ("webhook", number):
                self.webhook(f"s{number}")
            case ("bus rejects", sessions):
                self.bus.rejects = set(sessions)
            case ("wait", seconds):
                self.clock.advance(seconds)
        self.note_statuses()

    def record_inside(self, worker: str, answer: Answer) -> None:
        self.bus.meanwhile = lambda: None
        self.record(worker, answer)

    def record(self, worker: str, answer: Answer) -> None:
        claims, self.claims[worker] = self.claims[worker], []
        store, rechecks, changes = self.stores[worker], list[Recheck](), list[StatusChange]()
        if answer.status is None or answer.status is SessionStatus.OPEN:
            rechecks = [Recheck(claim, answer, NOON) for claim in claims]
        else:
            changes = [StatusChange(claim, answer, answer.status, NOON, NOON) for claim in claims]
        for change in record(store, rechecks, changes).changed:
            self.changed.append((change.claim.session_id, change.new_status.value))

    def webhook(self, session_id: str) -> None:
        before = statuses(self.shop)[session_id]
        if before == "open":
            self.webhooks.add(session_id)
            self.shop.run(
                "UPDATE checkout_session SET status = 'failure' WHERE id = %s", (session_id,)
            )

    def note_statuses(self) -> None:
        for session_id, status in statuses(self.shop).items():
            if self.history[session_id][-1] != status:
                self.history[session_id].append(status)

    def close(self) -> None:
        for store in self.stores.values():
            store.close()


@given(INTERLEAVINGS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_order_of_events_closes_or_publishes_a_session_twice(
    workers: Workers, steps: list[tuple[Any, ...]]
) -> None:
    """Whoever changed the status publishes it, and nobody else."""
    workers.begin()
    for step in steps:
        workers.do(step)
    assert all(len(states) <= 2 for states in workers.history.values()), workers.history
    published = [(c.session_id, c.new_status.value) for c in workers.bus.published]
    assert sorted(published) == sorted(workers.changed)
    assert len(dict(published)) == len(published)
    closed = {i for i, states in workers.history.items() if len(states) == 2}
    assert closed == {*dict(published)} | workers.webhooks
    assert not {*dict(published)} & workers.webhooks

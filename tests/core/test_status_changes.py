"""A session's status leaves `open` once, by the monitor or by a webhook."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.aws.event_bus import event_id
from core.domain.model import Answer, Outcome, Result, SessionStatus, StatusChange, Summary
from core.store.store import Store
from core.worker import Worker
from local.billing import running_billing
from testkit.clock import NOON, FakeClock
from testkit.shops import MySQLShop, Shop, add_sessions, connect, numbered, settings_for
from tests.support import FakeBilling, Passes, census, database_of, until

PAID = Answer(Outcome.ACTIVE, 200, 0.01, status=SessionStatus.SUCCESS, billing_status="paid")
FAILED = Answer(Outcome.ACTIVE, 200, 0.01, status=SessionStatus.FAILURE, billing_status="failed")
OPEN = Answer(Outcome.ACTIVE, 200, 0.01, status=SessionStatus.OPEN, billing_status="pending")


class Bus:
    """Takes every event, but those of the sessions in `refuses`."""

    def __init__(self) -> None:
        self.published: list[StatusChange] = []
        self.refuses: set[str] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    def publish(self, changes: Sequence[StatusChange]) -> Collection[str]:
        assert 1 <= len(changes) <= 10
        self.meanwhile()
        taken = [change for change in changes if change.session_id not in self.refuses]
        self.published += taken
        return [change.session_id for change in taken]


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
def on_mariadb(mariadb_shop: Shop, clock: FakeClock, billing: FakeBilling, bus: Bus) -> Passes:
    passes = Passes(mariadb_shop, clock, billing)
    passes.publisher = bus
    return passes


async def expiring(passes: Passes) -> Summary:
    return await passes.run(STATUS_UPDATES="true", SESSION_EXPIRES_AFTER="1h")


def statuses(shop: Shop) -> dict[str, str]:
    return dict(shop.run("SELECT id, status FROM checkout_session"))


def test_sessions_end_as_billing_says_and_the_others_stay_open(
    shop: Shop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = {w: f"checkout_{w}_30_1" for w in ("paid", "failed", "expired", "active", "text")}
    add_sessions(shop, sessions)
    with running_billing(clock=lambda: clock().timestamp()) as simulated:
        env = {"BILLING_API_URL": simulated.url, "STATUS_UPDATES": "true"}
        worker = Worker(settings_for(shop, **env), clock=clock)
        summaries = []
        for _ in range(8):
            summaries.append(worker.check_open_checkout_sessions())
            clock.advance(5)
        worker.close()
    assert statuses(shop) == {
        "paid": "success",
        "failed": "failure",
        "expired": "timeout",
        "active": "open",
        "text": "open",
    }
    assert [summary.status_changes for summary in summaries] == [0, 0, 0, 0, 0, 0, 3, 0]
    assert summaries[6].outcomes[Outcome.CLOSED] == 3
    assert "🏁 Checkout session paid (checkout_paid_30_1) is now success; billing says paid" in (
        caplog.messages
    )
    assert next(m for m in caplog.messages if "that BILLING_STATUS_MAP knows" in m).endswith(
        "1 answers say nothing that BILLING_STATUS_MAP knows, and their sessions stay open: "
        "a body that is no JSON (1)"
    )


def test_without_status_updates_no_status_is_ever_written(shop: Shop, clock: FakeClock) -> None:
    add_sessions(shop, numbered(3, "paid"))
    answers = httpx.MockTransport(lambda _request: httpx.Response(200, json={"status": "paid"}))
    worker = Worker(settings_for(shop), transport=answers, clock=clock)
    summary = worker.check_open_checkout_sessions()
    worker.close()
    assert summary.outcomes == {Outcome.ACTIVE: 3}
    assert set(statuses(shop).values()) == {"open"}


async def test_a_change_is_published_once_and_its_session_forgotten(
    on_mariadb: Passes, bus: Bus, billing: FakeBilling
) -> None:
    shop = on_mariadb.shop
    add_sessions(shop, numbered(25))
    shop.run("UPDATE checkout_session SET billing_order_id = CONCAT('order-', id)")
    billing.answers = {f"checkout_active_{n}": PAID for n in range(23)}
    for _ in range(3):
        await on_mariadb.run()
        on_mariadb.clock.advance(5)
    assert list(statuses(shop).values()).count("success") == 23
    assert sorted(change.session_id for change in bus.published) == sorted(
        f"s{n}" for n in range(23)
    )
    assert {change.billing_order_id for change in bus.published} >= {"order-s0"}
    assert shop.run("SELECT COUNT(*) FROM checkout_session_check") == [(2,)]


async def test_a_webhook_that_was_faster_wins_and_no_event_is_sent(
    on_mariadb: Passes, bus: Bus, billing: FakeBilling
) -> None:
    shop = on_mariadb.shop
    add_sessions(shop, numbered(2))
    billing.answers = dict.fromkeys(("checkout_active_0", "checkout_active_1"), PAID)
    held = billing.held["checkout_active_0"] = asyncio.Event()

    running = asyncio.create_task(on_mariadb.run())
    await until(lambda: billing.in_flight == 1)
    shop.run("UPDATE checkout_session SET status = 'failure' WHERE id = 's0'")
    held.set()
    summary = await running
    assert (summary.status_changes, summary.unpublished) == (1, 0)
    assert statuses(shop) == {"s0": "failure", "s1": "success"}
    assert [change.session_id for change in bus.published] == ["s1"]


async def test_a_webhook_in_the_middle_of_its_transaction_is_neither_waited_for_nor_overruled(
    on_mariadb: Passes, bus: Bus, billing: FakeBilling
) -> None:
    shop = on_mariadb.shop
    assert isinstance(shop, MySQLShop)
    add_sessions(shop, numbered(2))
    billing.answers = dict.fromkeys(("checkout_active_0", "checkout_active_1"), PAID)
    with connect(shop.server, shop.database) as webhook, webhook.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("UPDATE checkout_session SET status = 'failure' WHERE id = 's0'")
        summary = await on_mariadb.run()
        cursor.execute("COMMIT")
    assert summary.status_changes == 1
    assert statuses(shop) == {"s0": "failure", "s1": "success"}
    on_mariadb.clock.advance(5)
    await on_mariadb.run()
    assert [change.session_id for change in bus.published] == ["s1"]
    assert shop.run("SELECT * FROM checkout_session_check") == []


async def test_an_event_that_is_not_taken_leaves_its_session_open_until_the_next_tick(
    on_mariadb: Passes, bus: Bus, billing: FakeBilling
) -> None:
    shop = on_mariadb.shop
    add_sessions(shop, numbered(10))
    billing.answers = dict.fromkeys(numbered(10).values(), PAID)  # type: ignore[arg-type]
    bus.refuses = {"s4"}
    summary = await on_mariadb.run()
    assert (summary.status_changes, summary.unpublished) == (9, 1)
    assert [i for i, status in statuses(shop).items() if status == "open"] == ["s4"]
    bus.refuses = set()
    on_mariadb.clock.advance(5)
    assert (await on_mariadb.run()).status_changes == 1
    assert set(statuses(shop).values()) == {"success"}


class DeadlyBus:
    """Notes an event, and is killed before it can say so."""

    def __init__(self, noted: Path) -> None:
        self._noted = noted

    def publish(self, changes: Sequence[StatusChange]) -> Collection[str]:
        self._noted.write_text("\n".join(event_id(change) for change in changes))
        os.kill(os.getpid(), signal.SIGKILL)
        return ()


def _publish_and_die(shop: Shop, noted: Path) -> None:
    passes = Passes(shop, FakeClock(), FakeBilling({"checkout_active_0": PAID}))
    passes.publisher = DeadlyBus(noted)
    asyncio.run(passes.run())


async def test_a_process_killed_between_publish_and_commit_gives_the_same_event_again(
    on_mariadb: Passes, bus: Bus, billing: FakeBilling, tmp_path: Path
) -> None:
    shop, noted = on_mariadb.shop, tmp_path / "noted"
    add_sessions(shop, numbered(1))
    killed = multiprocessing.get_context("spawn").Process(
        target=_publish_and_die, args=(shop, noted)
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert statuses(shop) == {"s0": "open"}
    billing.answers = {"checkout_active_0": PAID}
    on_mariadb.clock.advance(25)  # the dead one's claim lapses
    await on_mariadb.run()
    assert statuses(shop) == {"s0": "success"}
    assert [event_id(change) for change in bus.published] == noted.read_text().split()


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (OPEN, "timeout"),
        (PAID, "success"),
        (FAILED, "failure"),
        (Answer(Outcome.NOT_FOUND, 404, 0.01), "open"),
        (Answer(Outcome.UNKNOWN_STATUS, 200, 0.01, "'refunded'"), "open"),
        (Answer(Outcome.UNEXPECTED_STATUS, 500, 0.01), "open"),
        (Answer(Outcome.TIMEOUT, None, 10.0), "open"),
        (Answer(Outcome.NETWORK_ERROR, None, 0.01), "open"),
        (Answer(Outcome.ACTIVE, 200, 0.01), "open"),
    ],
)
async def test_an_old_session_expires_only_when_billing_has_just_said_that_it_is_open(
    passes: Passes, bus: Bus, billing: FakeBilling, answer: Answer, status: str
) -> None:
    passes.publisher = bus
    add_sessions(passes.shop, numbered(1))
    await expiring(passes)
    billing.answers = {"checkout_active_0": answer}
    passes.clock.advance(3600)
    await expiring(passes)
    assert statuses(passes.shop) == {"s0": status}
    assert [change.billing_status for change in bus.published] == (
        [answer.billing_status] if status != "open" else []
    )


async def test_a_session_younger_than_the_expiry_stays_open(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    await expiring(passes)
    billing.answers = {"checkout_active_0": OPEN}
    passes.clock.advance(3595)
    assert (await expiring(passes)).outcomes == {Outcome.ACTIVE: 1}
    assert statuses(passes.shop) == {"s0": "open"}


@pytest.mark.parametrize("right", ["UPDATE", "UPDATE (status)"])
async def test_updating_the_status_column_is_the_only_right_that_status_updates_add(
    mariadb_shop: MySQLShop, limited: Callable[..., MySQLShop], right: str, clock: FakeClock
) -> None:
    database = mariadb_shop.database
    shop = limited(
        f"SELECT ON {database}.checkout_session",
        f"{right} ON {database}.checkout_session",
        *(
            f"CREATE, SELECT, INSERT, UPDATE, DELETE ON {database}.checkout_session_{table}"
            for table in ("check", "run", "pause", "change")
        ),
    )
    add_sessions(mariadb_shop, numbered(1))
    passes = Passes(shop, clock, FakeBilling({"checkout_active_0": PAID}))
    assert (await passes.run()).status_changes == 1


INTERLEAVINGS = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.sampled_from("AB")),
        st.tuples(st.just("record"), st.sampled_from("AB"), st.sampled_from([PAID, FAILED, OPEN])),
        st.tuples(st.just("record inside"), st.sampled_from("AB"), st.sampled_from([PAID, FAILED])),
        st.tuples(st.just("webhook"), st.integers(0, 2)),
        st.tuples(st.just("bus refuses"), st.sets(st.sampled_from(["s0", "s1", "s2"]))),
        st.tuples(st.just("wait"), st.sampled_from([1, 5, 25])),
    ),
    max_size=14,
)


@pytest.fixture
def crowd(mariadb_shop: MySQLShop, clock: FakeClock) -> Iterator["Crowd"]:
    crowd = Crowd(mariadb_shop, clock)
    yield crowd
    crowd.close()


class Crowd:
    """Two workers and a webhook at one shop of three sessions, and a log of who closed what."""

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
        self.bus.refuses = set()
        self.claims = {"A": [], "B": []}
        self.webhooks.clear()
        self.changed.clear()
        self.history = {f"s{n}": ["open"] for n in range(3)}
        self.shop.run("DELETE FROM checkout_session_check")
        self.shop.run("DELETE FROM checkout_session")
        add_sessions(self.shop, numbered(3))
        self.look()

    def do(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("claim", worker):
                store = self.stores[worker]
                census(store, self.clock.now)
                self.claims[worker] += store.queue.claim_due(
                    store.now(), tick=self.clock.now, lease=timedelta(seconds=20), limit=3
                )
            case ("record", worker, answer):
                self.record(worker, answer)
            case ("record inside", worker, answer):
                other = "B" if worker == "A" else "A"
                self.bus.meanwhile = lambda: self.inside(other, answer)
                self.record(worker, answer)
                self.bus.meanwhile = lambda: None
            case ("webhook", number):
                self.webhook(f"s{number}")
            case ("bus refuses", sessions):
                self.bus.refuses = set(sessions)
            case ("wait", seconds):
                self.clock.advance(seconds)
        self.look()

    def inside(self, worker: str, answer: Answer) -> None:
        self.bus.meanwhile = lambda: None
        self.record(worker, answer)

    def record(self, worker: str, answer: Answer) -> None:
        claims, self.claims[worker] = self.claims[worker], []
        status = None if answer.status is SessionStatus.OPEN else answer.status
        results = [Result(claim, answer, NOON, status, try_again_at=NOON) for claim in claims]
        for result in self.stores[worker].record(results, self.stores[worker].now()).changed:
            assert result.new_status is not None
            self.changed.append((result.claim.session_id, result.new_status.value))

    def webhook(self, session_id: str) -> None:
        before = statuses(self.shop)[session_id]
        if before == "open":
            self.webhooks.add(session_id)
            self.shop.run(
                "UPDATE checkout_session SET status = 'failure' WHERE id = %s", (session_id,)
            )

    def look(self) -> None:
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
def test_whatever_two_workers_and_a_webhook_do_a_session_is_closed_once_and_told_by_who_closed_it(
    crowd: Crowd, steps: list[tuple[Any, ...]]
) -> None:
    crowd.begin()
    for step in steps:
        crowd.do(step)
    assert all(len(states) <= 2 for states in crowd.history.values()), crowd.history
    published = [(c.session_id, c.new_status.value) for c in crowd.bus.published]
    assert sorted(published) == sorted(crowd.changed)
    assert len(dict(published)) == len(published)
    closed = {i for i, states in crowd.history.items() if len(states) == 2}
    assert closed == {*dict(published)} | crowd.webhooks
    assert not {*dict(published)} & crowd.webhooks

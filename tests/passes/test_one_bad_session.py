"""Whatever goes wrong about one session is its outcome; every other session goes on.

Asking, reading, deciding, logging, writing and publishing may each fail for one session of 26.
Every other one is recorded in the same pass, and events are published for what was committed.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.aws.event_bus import EventBus
from core.billing.client import BillingClient
from core.billing.status_words import StatusReader
from core.domain.decision import decide
from core.domain.model import Answer, Claim, Decision, Outcome, Reason, StatusChangedEvent
from core.log import PassLog
from core.passes.running_pass import PassOptions
from testkit.clock import FakeClock
from testkit.queue import claimed
from testkit.shops import MySQLShop, Shop, add_sessions, numbered
from tests.store.fake_bus import PAID, Bus, publishing_passes, statuses
from tests.support import FakeBilling, Passes, until

SESSIONS = 26
BAD, BAD_CHECKOUT = "s7", "checkout_active_7"
CHECKOUTS = [f"checkout_active_{n}" for n in range(SESSIONS)]
FAILING = "SELECT session_id, last_outcome, consecutive_failures FROM checkout_session_check"


def all_paid() -> FakeBilling:
    return FakeBilling(dict.fromkeys(CHECKOUTS, PAID))


def assert_published_and_logged(shop: Shop, bus: Bus, closed: Collection[str]) -> None:
    """What is closed was published and logged once, and nothing else was."""
    assert {i for i, status in statuses(shop).items() if status == "success"} == {*closed}
    assert sorted(bus.session_ids) == sorted(closed)
    logged = shop.run("SELECT session_id FROM checkout_session_change")
    assert sorted(i for (i,) in logged) == sorted(closed)


class ClientOfAnswers(FakeBilling):
    """The real client, for answers from a function of the URL's path."""

    def __init__(self, answer: Callable[[str], httpx.Response], path: str = "status") -> None:
        super().__init__()
        self._client = BillingClient(
            api_url="http://billing.test",
            credentials={"APIKEY": "test-key"},
            timeout_seconds=5,
            status_reader=StatusReader(path),
            transport=httpx.MockTransport(lambda request: answer(request.url.path.strip("/"))),
        )

    async def check(self, billing_checkout_id: str | None) -> Answer:
        self.asked[billing_checkout_id] += 1
        return await self._client.check(billing_checkout_id)


POSITIVE = "payments[?amount > `0`] | [0].state"
NOT_READ = "answers had a status that is not in BILLING_STATUS_MAP"
# What is special about one answer, and the path that reads the status.
UNREADABLE = [
    pytest.param(POSITIVE, b'{"payments": [{"amount": "12.00", "state": "paid"}]}', id="TypeError"),
    pytest.param("to_string(floor(amount))", b'{"amount": 1e999}', id="OverflowError"),
    pytest.param("status", b"[" * 60_000, id="deep"),
    pytest.param("status", b'"' + b"9" * 60_000 + b'"', id="text"),
    pytest.param("status", b"9" * 60_000, id="number"),
    pytest.param("status", b'{"status": "paid\\ud800"}', id="surrogate"),
    pytest.param("status", b'{"status": {"status": NaN}}', id="NaN"),
    pytest.param("status", b'{"status": "paid" ', id="cut"),
    pytest.param("status", b"\xff\xfe\x00", id="not UTF-8"),
]


@pytest.mark.parametrize(("path", "body"), UNREADABLE)
async def test_an_answer_that_cannot_be_read_is_its_sessions_outcome(
    sqlite_shop: Shop,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    path: str,
    body: bytes,
) -> None:
    bus = Bus()
    add_sessions(sqlite_shop, numbered(SESSIONS))
    good = {"payments": [{"amount": 12, "state": "paid"}], "status": "paid", "amount": 1}
    read = path if path != "to_string(floor(amount))" else f"[{path}, status][1]"

    def answer(checkout: str) -> httpx.Response:
        content = body if checkout == BAD_CHECKOUT else json.dumps(good).encode()
        return httpx.Response(200, content=content)

    passes = publishing_passes(sqlite_shop, clock, ClientOfAnswers(answer, read), bus)
    summary = await passes.run()
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS - 1, Outcome.UNKNOWN_STATUS: 1}
    assert_published_and_logged(sqlite_shop, bus, {*numbered(SESSIONS)} - {BAD})
    assert sqlite_shop.run(FAILING) == [(BAD, "unknown_status", 1)]
    [line] = [m for m in caplog.messages if NOT_READ in m]
    assert line.startswith("⚠️ 1 answers")


async def test_a_checkout_id_that_is_not_utf8_is_its_sessions_outcome(
    server_shop: MySQLShop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    bus = Bus()
    server_shop.run("ALTER TABLE checkout_session MODIFY billing_checkout_id VARBINARY(64)")
    add_sessions(server_shop, numbered(SESSIONS))
    # Not UTF-8 at all, and one half of a surrogate pair.
    for session, raw in (("s7", "FF61"), ("s8", "EDA080")):
        server_shop.run(
            f"UPDATE checkout_session SET billing_checkout_id = 0x{raw} WHERE id = '{session}'"
        )
    paid = ClientOfAnswers(lambda _checkout: httpx.Response(200, json={"status": "paid"}))
    summary = await publishing_passes(server_shop, clock, paid, bus).run()
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS - 2, Outcome.INVALID_SESSION: 2}
    assert_published_and_logged(server_shop, bus, {*numbered(SESSIONS)} - {"s7", "s8"})
    assert {*server_shop.run(FAILING)} == {
        ("s7", "invalid_session", 1),
        ("s8", "invalid_session", 1),
    }
    lines = [m for m in caplog.messages if "its billing_checkout_id cannot be part of a URL" in m]
    assert sorted(line.split()[4] for line in lines) == ["s7", "s8"]


def raising_for(number: int, error: BaseException) -> Callable[[str | None], None]:
    def raise_for(checkout: str | None) -> None:
        if checkout == f"checkout_active_{number}":
            raise error

    return raise_for


class FaultyBilling(FakeBilling):
    fault: Callable[[str | None], None] = staticmethod(lambda _checkout: None)

    async def check(self, billing_checkout_id: str | None) -> Answer:
        answer = await super().check(billing_checkout_id)
        self.fault(billing_checkout_id)
        return answer


ERRORS = [
    ZeroDivisionError("by zero"),
    RecursionError("too deep"),
    MemoryError("no memory"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    ExceptionGroup("several", [ValueError("one")]),
    OSError(24, "Too many open files"),
    TimeoutError("late"),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["ask", "decide"])
async def test_an_error_in_asking_or_deciding_is_its_sessions_outcome(  # noqa: PLR0917 (fixtures)
    sqlite_shop: Shop,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: Exception,
) -> None:
    bus = Bus()
    add_sessions(sqlite_shop, numbered(SESSIONS))
    billing = FaultyBilling(dict.fromkeys(CHECKOUTS, PAID))
    fail(step, raising_for(7, error), billing, monkeypatch)
    passes = publishing_passes(sqlite_shop, clock, billing, bus)
    summary = await passes.run()
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS - 1, Outcome.INTERNAL_ERROR: 1}
    assert_published_and_logged(sqlite_shop, bus, {*numbered(SESSIONS)} - {BAD})
    assert sqlite_shop.run(FAILING) == [(BAD, "internal_error", 1)]
    [line] = [m for m in caplog.messages if BAD_CHECKOUT in m]
    start = f"❌ Error checking session {BAD} ({BAD_CHECKOUT}): {type(error).__name__}: "
    assert line.startswith(start)
    clock.advance(5)
    await passes.run()
    assert billing.asked[BAD_CHECKOUT] == 1  # it backs off


def fail(
    step: str,
    raise_for: Callable[[str | None], None],
    billing: FaultyBilling,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Let a step of a check raise for some checkout ids."""

    def faulty_decide(claim: Claim, answer: Answer, **rest: Any) -> Decision:  # noqa: ANN401 (what decide takes)
        raise_for(claim.billing_checkout_id)
        return decide(claim, answer, **rest)

    log_check = PassLog.check

    def faulty_log(log: PassLog, claim: Claim, answer: Answer) -> None:
        raise_for(claim.billing_checkout_id)
        log_check(log, claim, answer)

    match step:
        case "ask":
            billing.fault = raise_for
        case "decide":
            monkeypatch.setattr("core.passes.checks.decide", faulty_decide)
        case "log":
            monkeypatch.setattr(PassLog, "check", faulty_log)


class FaultyBus(Bus):
    """Raises if one of the events is of a session in `raises_for`, before anything is published."""

    def __init__(self, raises_for: Collection[str]) -> None:
        super().__init__()
        self.raises_for = raises_for
        self.calls = 0

    def publish(self, changes: Sequence[StatusChangedEvent]) -> Collection[str]:
        self.calls += 1
        if any(change.session_id in self.raises_for for change in changes):
            raise ConnectionResetError("by peer")
        return super().publish(changes)


async def test_an_event_for_which_the_bus_raises_delays_no_other(
    shop: Shop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    bus = FaultyBus({BAD})
    add_sessions(shop, numbered(SESSIONS))
    passes = publishing_passes(shop, clock, all_paid(), bus)
    summary = await passes.run()
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS - 1, Outcome.DEFERRED: 1}
    assert summary.unpublished == 1
    assert_published_and_logged(shop, bus, {*numbered(SESSIONS)} - {BAD})
    assert shop.run(FAILING) == [(BAD, "deferred", 1)]
    line = "❌ The event for session 's7' cannot be published: ConnectionResetError: by peer"
    assert caplog.messages.count(line) == 1
    bus.raises_for = ()
    clock.advance(5)
    assert (await passes.run()).status_changes == 1
    assert_published_and_logged(shop, bus, numbered(SESSIONS))


async def test_a_bus_that_always_raises_leaves_all_open_and_recorded(
    shop: Shop, clock: FakeClock
) -> None:
    bus = FaultyBus({*numbered(SESSIONS)})
    add_sessions(shop, numbered(SESSIONS))
    passes = publishing_passes(shop, clock, all_paid(), bus)
    summary = await passes.run()
    assert (summary.outcomes, summary.unpublished) == ({Outcome.DEFERRED: SESSIONS}, SESSIONS)
    assert_published_and_logged(shop, bus, ())
    assert {row[1:] for row in shop.run(FAILING)} == {("deferred", 1)}


async def test_events_that_the_bus_rejects_delay_no_other(shop: Shop, clock: FakeClock) -> None:
    bus = Bus()
    bus.rejects = {"s0", BAD, "s25"}
    add_sessions(shop, numbered(SESSIONS))
    passes = publishing_passes(shop, clock, all_paid(), bus)
    summary = await passes.run()
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS - 3, Outcome.DEFERRED: 3}
    assert_published_and_logged(shop, bus, {*numbered(SESSIONS)} - bus.rejects)
    assert {row[1:] for row in shop.run(FAILING)} == {("deferred", 1)}


@dataclass
class Events:
    """EventBridge's client; it accepts everything that can be encoded."""

    sessions: list[str] = field(default_factory=list)

    def put_events(self, *, Entries: Sequence[dict[str, Any]]) -> dict[str, Any]:  # noqa: N803
        for entry in Entries:
            entry["Detail"].encode()
            self.sessions.append(json.loads(entry["Detail"])["session_id"])
        return {"Entries": [{"EventId": "1"} for _ in Entries]}


async def test_an_event_that_cannot_be_encoded_delays_no_other(
    server_shop: MySQLShop, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Its order id is not UTF-8."""
    server_shop.run("ALTER TABLE checkout_session MODIFY billing_order_id VARBINARY(64)")
    add_sessions(server_shop, numbered(SESSIONS))
    server_shop.run(f"UPDATE checkout_session SET billing_order_id = 0xFF WHERE id = '{BAD}'")
    events, bus = Events(), EventBus("shop")
    bus._client = events  # type: ignore[assignment]
    passes = publishing_passes(server_shop, clock, all_paid(), bus)
    summary = await passes.run()
    assert summary.outcomes == {Outcome.CLOSED: SESSIONS - 1, Outcome.DEFERRED: 1}
    assert sorted(events.sessions) == sorted({*numbered(SESSIONS)} - {BAD})
    [line] = [m for m in caplog.messages if "rejected the event" in m]
    assert line.startswith("❌ shop rejected the event for session 's7': UnicodeEncodeError: ")


CLOSINGS = 2000


@pytest.mark.slow
async def test_a_slow_bus_makes_no_session_asked_twice(
    server_shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call takes 0.2 s of the database's clock; another worker looks for work all the while."""
    monkeypatch.setattr("core.passes.writer.PROGRESS_EVERY_SECONDS", 0.0)
    add_sessions(server_shop, numbered(CLOSINGS))
    bus, progress = Bus(), list[int]()

    def slowly() -> None:
        clock.advance(0.2)
        [(checked,)] = server_shop.run("SELECT MAX(checked) FROM checkout_session_run")
        progress.append(checked)

    bus.meanwhile = slowly
    billing = FakeBilling({f"checkout_active_{n}": PAID for n in range(CLOSINGS)})
    passes = publishing_passes(server_shop, clock, billing, bus)
    first = asyncio.create_task(passes.run())
    await until(lambda: bool(progress))
    helps = PassOptions(Reason.TICK, clock.now, helps=True)
    summaries = [await passes.run(helps), await first, await passes.run(helps)]
    assert sum(summary.status_changes for summary in summaries) == CLOSINGS
    assert set(billing.asked.values()) == {1}
    assert_published_and_logged(server_shop, bus, numbered(CLOSINGS))
    assert progress == sorted(progress)
    assert len(set(progress)) > CLOSINGS / 50 / 2  # seen at most of the calls


async def test_a_pass_with_a_slow_bus_ends_in_time_and_gives_back_the_rest(
    server_shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.passes.writer.FINISH_CHANGES_SECONDS", 0.0)
    closings = 500
    add_sessions(server_shop, numbered(closings))
    bus, seconds = Bus(), 1.5

    def slowly() -> None:
        """The call after the first lasts until the pass has to end, which began before it."""
        if bus.published:
            time.sleep(seconds)

    bus.meanwhile = slowly
    billing = FakeBilling({f"checkout_active_{n}": PAID for n in range(closings)})
    passes = publishing_passes(server_shop, clock, billing, bus)
    summary = await passes.run(PassOptions(Reason.TICK, clock.now, total_seconds=seconds))
    closed = {i for i, status in statuses(server_shop).items() if status == "success"}
    assert 0 < len(closed) == summary.status_changes < closings
    assert_published_and_logged(server_shop, bus, closed)
    queue = "SELECT COUNT(*), COUNT(last_checked_at) FROM checkout_session_check"
    assert server_shop.run(queue) == [(closings - len(closed), 0)]
    assert claimed(server_shop) == 0
    bus.meanwhile = lambda: None
    assert (await passes.run()).status_changes == closings - len(closed)
    assert_published_and_logged(server_shop, bus, numbered(closings))


async def test_no_check_begins_while_too_many_changes_wait(
    server_shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their claims would lapse before a slow bus has taken their events."""
    monkeypatch.setattr("core.passes.writer.MAX_WAITING_CHANGES", 100)
    monkeypatch.setattr("core.passes.running_pass.FIRST_CLAIMS_PER_REQUEST", 50)
    add_sessions(server_shop, numbered(500))
    billing = FakeBilling({f"checkout_active_{n}": PAID for n in range(500)})
    asked: list[int] = []
    bus = Bus()

    def until_no_check_begins() -> None:
        for _ in range(5000):
            if asked or (billing.asked.total() >= 100 and billing.in_flight == 0):
                break
            time.sleep(0.002)
        asked.append(billing.asked.total())

    bus.meanwhile = until_no_check_begins
    passes = publishing_passes(server_shop, clock, billing, bus)
    summary = await passes.run(MAX_CONCURRENCY="10")
    assert summary.outcomes == {Outcome.CLOSED: 500}
    assert 100 <= asked[0] <= 100 + 10
    assert set(billing.asked.values()) == {1}


# Errors that a trigger raises for one row; the last ones are those of a whole server.
ERRNOS = (1644, 30001, 1146, 1054, 1406, 1142, 1449, 1205, 1213, 1020, 3101, 1290, 1053, 2006, 4031)
FAULTS = st.one_of(
    st.tuples(st.sampled_from(["ask", "decide"]), st.sampled_from(ERRORS)),
    st.tuples(st.just("trigger"), st.sampled_from(ERRNOS)),
    st.tuples(st.just("encode"), st.none()),
    st.tuples(st.sampled_from(["bus rejects", "bus raises"]), st.none()),
    st.tuples(st.just("nothing"), st.none()),
)


class OneFault:
    """A shop whose trigger raises the errors in the table `fault`, and passes over it."""

    def __init__(self, shop: Shop, clock: FakeClock) -> None:
        self.shop, self.clock = shop, clock
        self.passes = Passes(shop, clock, None)
        shop.run("CREATE TABLE fault (session_id VARCHAR(10) PRIMARY KEY, errno INT NOT NULL)")
        shop.run(
            "CREATE TRIGGER audit BEFORE UPDATE ON checkout_session FOR EACH ROW BEGIN"
            " DECLARE e INT DEFAULT (SELECT errno FROM fault WHERE session_id = OLD.id);"
            " IF e IS NOT NULL THEN SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = e; END IF; END"
        )

    def begin(self) -> None:
        for table in (
            "fault",
            "checkout_session",
            "checkout_session_batch",
            "checkout_session_check",
        ):
            self.shop.run(f"DELETE FROM {table}")
        self.shop.run("DELETE FROM checkout_session_change")
        self.clock.advance(3600)
        add_sessions(self.shop, numbered(SESSIONS))

    async def pass_over(
        self, billing: FakeBilling, bus: Bus | None, late: set[int]
    ) -> Mapping[Outcome, int]:
        """A pass in which some answers come after the first of the others has been written."""
        self.passes.billing, self.passes.publisher = billing, bus
        answered = asyncio.Event()
        billing.held = {f"checkout_active_{n}": answered for n in late}
        running = asyncio.create_task(self.passes.run(MAX_CONCURRENCY=str(SESSIONS)))
        if len(late) < SESSIONS:
            await until(self.first_is_written)
        answered.set()
        return (await running).outcomes

    def first_is_written(self) -> bool:
        [(recorded,)] = self.shop.run(
            "SELECT (SELECT COUNT(*) FROM checkout_session WHERE status <> 'open')"
            " + (SELECT COUNT(last_outcome) FROM checkout_session_check)"
        )
        return bool(recorded)


@pytest.fixture
def one_fault(server_shop: Shop, clock: FakeClock) -> OneFault:
    return OneFault(server_shop, clock)


@given(
    bad=st.integers(0, SESSIONS - 1),
    fault=FAULTS,
    publishes=st.booleans(),
    late=st.sets(st.integers(0, SESSIONS - 1)),
    paid=st.sets(st.integers(0, SESSIONS - 1)),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.usefixtures("recorded_at_once")
def test_whatever_fails_for_one_session_delays_no_other(  # noqa: PLR0917 (what is drawn)
    one_fault: OneFault,
    bad: int,
    fault: tuple[str, Any],
    publishes: bool,
    late: set[int],
    paid: set[int],
) -> None:
    step, error = fault
    shop, session = one_fault.shop, f"s{bad}"
    one_fault.begin()
    paid |= {bad}
    billing = FaultyBilling({f"checkout_active_{n}": PAID for n in paid})
    bus = FaultyBus({session} if step == "bus raises" else ())
    if step == "bus rejects":
        bus.rejects = {session}
    if step == "trigger":
        shop.run("INSERT INTO fault VALUES (%s, %s)", (session, error))
    if step == "encode":
        word = PAID._replace(billing_status="paid\ud800")
        billing.answers[f"checkout_active_{bad}"] = word
    of_bus = step.startswith("bus")
    expected = {
        "ask": "internal_error",
        "decide": "internal_error",
        "trigger": "refused",
        "encode": "refused",
        "bus rejects": "deferred" if publishes else None,
        "bus raises": "deferred" if publishes else None,
        "nothing": None,
    }[step]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("core.database.mysql.random.uniform", lambda *_: 0.0)
        if not of_bus and isinstance(error, Exception):
            fail(step, raising_for(bad, error), billing, monkeypatch)
        outcomes = asyncio.run(one_fault.pass_over(billing, bus if publishes else None, late))
    closed = {f"s{n}" for n in paid} - ({session} if expected else set())
    counts = Counter({"closed": len(closed), "active": SESSIONS - len(paid), expected: 1})
    counts[None] = 0
    assert {outcome.value: n for outcome, n in outcomes.items()} == dict(+counts)
    if publishes:
        assert_published_and_logged(shop, bus, closed)
    assert {i for i, status in statuses(shop).items() if status == "success"} == closed
    queue = shop.run(
        "SELECT session_id, last_outcome, consecutive_failures FROM checkout_session_check"
    )
    assert sorted(queue) == sorted(
        [(f"s{n}", "active", 0) for n in range(SESSIONS) if n not in paid]
        + ([(session, expected, 1)] if expected else [])
    )
    assert claimed(shop) == 0
    assert set(billing.asked.values()) == {1}

"""What is wrong with one event is that event's; what is slow about the bus is not the caller's."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)

from core.aws import event_bus
from core.aws.event_bus import CALLS_AT_ONCE, MAX_BYTES, RETRY_AFTER_SECONDS, EventBus
from core.domain.model import SessionStatus, StatusChangedEvent
from testkit.clock import NOON

type Entry = dict[str, Any]
type Fault = Callable[[Sequence[Entry]], None]  # raises, for a call with these entries


def events(count: int, first: int = 0) -> list[StatusChangedEvent]:
    return [
        StatusChangedEvent(
            f"s{n}", f"checkout_{n}", None, SessionStatus.SUCCESS, "paid", NOON, NOON
        )
        for n in range(first, first + count)
    ]


def ids(events: Sequence[StatusChangedEvent]) -> set[str]:
    return {event.session_id for event in events}


def refusal(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "no"}}, "PutEvents")


class Client:
    """EventBridge's client: each call is kept, and may fail for what it holds."""

    def __init__(self) -> None:
        self.calls: list[Sequence[Entry]] = []
        self.fault: Fault = lambda _entries: None
        self.rejects: Callable[[Entry], bool] = lambda _entry: False
        self._lock = threading.Lock()

    def put_events(self, *, Entries: Sequence[Entry]) -> dict[str, Any]:  # noqa: N803 (boto3's name)
        with self._lock:
            self.calls.append(Entries)
        self.fault(Entries)
        assert len(Entries) <= 10
        sizes = [
            14 + sum(len(entry[key].encode()) for key in ("Source", "DetailType", "Detail"))
            for entry in Entries
        ]
        assert sum(sizes) < 256 * 1024
        return {
            "Entries": [
                {"ErrorCode": "InternalFailure", "ErrorMessage": "try again"}
                if self.rejects(entry)
                else {"EventId": "1"}
                for entry in Entries
            ]
        }

    @property
    def sizes(self) -> list[int]:
        return sorted(len(call) for call in self.calls)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr(event_bus, "_client", lambda: client)
    return client


def failing(session: str, error: Exception) -> Fault:
    """Raise that if the session's event is in the call."""

    def fault(entries: Sequence[Entry]) -> None:
        if any(f'"{session}"' in entry["Detail"] for entry in entries):
            raise error

    return fault


LONE = "\ud800"
TOO_LONG = "x" * 300_000
UNSENDABLE = [
    {"session_id": f"bad{LONE}"},
    {"billing_checkout_id": LONE},
    {"billing_order_id": f"{LONE}\udfff"},
    {"billing_status": LONE},
    {"session_id": TOO_LONG},
    {"billing_order_id": TOO_LONG},
    {"billing_status": "🛒" * 70_000},
    {"billing_order_id": object()},
    {"changed_at": None},
    {"first_seen_at": "yesterday"},
]


@pytest.mark.parametrize("changes", UNSENDABLE, ids=lambda changes: next(iter(changes)))
@pytest.mark.parametrize("place", [0, 7, 24])
def test_an_event_that_cannot_be_sent_delays_no_other(
    changes: dict[str, Any], place: int, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    given = events(25)
    given[place] = given[place]._replace(**changes)
    assert set(EventBus("shop").publish(given)) == ids(given) - {given[place].session_id}
    [said] = caplog.messages
    assert f"rejected the event for session {given[place].session_id!r}: " in said
    said.encode()
    assert client.sizes == [4, 10, 10]


OF_ONE = [
    TypeError("not JSON"),
    ValueError("year is out of range"),
    UnicodeEncodeError("utf-8", LONE, 0, 1, "surrogates not allowed"),
    KeyError("Entries"),
    RecursionError("deep"),
    OverflowError("date"),
    ParamValidationError(report="Invalid type"),
    refusal("ValidationException"),
    refusal("SerializationException"),
]


@pytest.mark.parametrize("error", OF_ONE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("count", [1, 10, 23])
def test_a_call_that_fails_for_one_event_is_made_again_without_it(
    error: Exception, count: int, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.fault = failing("s0", error)
    bus = EventBus("shop")
    assert set(bus.publish(events(count))) == ids(events(count)) - {"s0"}
    assert [line for line in caplog.messages if "session 's0'" in line] == caplog.messages
    assert len(caplog.messages) == 1
    assert set(bus.publish(events(1, first=50))) == {"s50"}


def test_two_bad_events_are_named_each_and_stop_nobody(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(entries: Sequence[Entry]) -> None:
        failing("s0", TypeError("no"))(entries)
        failing("s1", ValueError("neither"))(entries)

    client.fault = fault
    bus = EventBus("shop")
    assert not bus.publish(events(2))
    assert len(caplog.messages) == 2
    assert set(bus.publish(events(3, first=1))) == {"s2", "s3"}


@pytest.mark.parametrize("wrong", [{}, {"Entries": []}, {"Entries": [None]}, None])
def test_an_answer_of_another_form_accepts_nothing(
    wrong: object, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "put_events", lambda **_: wrong)
    assert not EventBus("shop").publish(events(3))


OF_ALL = [
    EndpointConnectionError(endpoint_url="https://events"),
    ReadTimeoutError(endpoint_url="https://events"),
    NoCredentialsError(),
    refusal("ThrottlingException"),
    refusal("AccessDeniedException"),
    refusal("InternalException"),
    refusal("ResourceNotFoundException"),
]


@pytest.mark.parametrize("error", OF_ALL, ids=lambda error: type(error).__name__)
def test_a_bus_that_cannot_be_used_gets_no_more_calls_for_a_while(
    error: Exception, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(_entries: Sequence[Entry]) -> None:
        raise error

    now = 100.0
    client.fault = fault
    bus = EventBus("shop", monotonic=lambda: now)
    assert not bus.publish(events(200))
    assert len(client.calls) <= CALLS_AT_ONCE
    [said] = caplog.messages
    assert said.startswith("❌ No event can be published to shop: ")
    client.fault = lambda _entries: None
    now += RETRY_AFTER_SECONDS - 0.1
    assert not bus.publish(events(200))
    now += 0.1
    assert len(bus.publish(events(200))) == 200


def test_what_was_accepted_before_the_bus_failed_is_published(client: Client) -> None:
    client.fault = failing("s33", refusal("ThrottlingException"))
    published = set(EventBus("shop").publish(events(200)))
    sent = {
        event.session_id
        for event in events(200)
        for call in client.calls
        if any(f'"{event.session_id}"' in entry["Detail"] for entry in call)
    }
    assert published == sent - ids(events(10, first=30))


def test_what_the_bus_rejects_leaves_only_its_session(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.rejects = lambda entry: '"s14"' in entry["Detail"]
    assert set(EventBus("shop").publish(events(25))) == ids(events(25)) - {"s14"}
    assert caplog.messages == [
        "❌ shop rejected the event for session 's14': InternalFailure: try again"
    ]


def test_a_call_takes_ten_events_and_less_than_256_kb(client: Client) -> None:
    given = [event._replace(billing_order_id="x" * 60_000) for event in events(20)]
    assert set(EventBus("shop").publish(given)) == ids(given)
    assert client.sizes == [4] * 5


def test_an_event_of_just_the_size_that_is_allowed_is_sent(client: Client) -> None:
    [event] = events(1)
    bus = EventBus("shop")
    entry = bus._entry(event._replace(billing_order_id=""))
    rest = 14 + sum(len(entry[key]) for key in ("Source", "DetailType", "Detail"))
    largest = event._replace(billing_order_id="x" * (MAX_BYTES - rest))
    assert bus.publish([largest])
    assert not bus.publish([largest._replace(billing_order_id="x" * (MAX_BYTES - rest + 1))])


def test_a_slow_bus_gets_five_calls_at_once(client: Client) -> None:
    together = threading.Barrier(CALLS_AT_ONCE)
    in_flight, most, lock = 0, 0, threading.Lock()

    def fault(_entries: Sequence[Entry]) -> None:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        together.wait(10)  # each call waits for four others
        with lock:
            in_flight -= 1

    client.fault = fault
    threads = threading.active_count()
    assert len(EventBus("shop").publish(events(400))) == 400
    assert most == CALLS_AT_ONCE
    assert threading.active_count() == threads


@pytest.mark.slow
def test_four_hundred_events_at_a_bus_of_two_tenths_take_two_seconds(client: Client) -> None:
    client.fault = lambda _entries: time.sleep(0.2)
    began = time.monotonic()
    assert len(EventBus("shop").publish(events(400))) == 400
    assert time.monotonic() - began < 3  # 8 s one after the other


def test_without_a_thread_the_calls_are_made_one_by_one(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert len(EventBus("shop").publish(events(30))) == 30


def test_no_events_are_no_call(client: Client) -> None:
    assert not EventBus("shop").publish([])
    assert not client.calls

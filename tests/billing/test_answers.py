"""Nothing that an answer holds raises: it is the outcome of that one check."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.billing.client import BillingClient
from core.billing.limits import MAX_RETRY_AFTER_SECONDS
from core.billing.status_words import StatusReader
from core.domain.model import Answer, Outcome

API = "http://billing.example/api"
LONG = 20.0

PATHS_AND_BODIES = [
    # A number is compared with a text, which is not an error of JMESPath.
    ("payments[?amount > `0`] | [0].state", {"payments": [{"amount": "12.00", "state": "paid"}]}),
    ("payments[?amount > `0`] | [0].state", {"payments": [{"amount": None}]}),
    ("payments[?amount > `0`] | [0].state", {"payments": [{"amount": [1]}]}),
    ("payments[?amount > `0`] | [0].state", {"payments": [{"amount": {}}]}),
    ("payments[?a < b].state", {"payments": [{"a": 1, "b": "2"}]}),
    ("payments[?a >= b].state", {"payments": [{"a": "1", "b": 2}]}),
    ("ceil(amount)", {"amount": float("inf")}),
    ("floor(amount)", {"amount": float("-inf")}),
    ("ceil(amount)", {"amount": float("nan")}),
    ("to_number(amount)", {"amount": "9" * 5000}),
    ("to_number(amount)", {"amount": "1e999"}),
    ("avg(amounts)", {"amounts": []}),
    ("avg(amounts)", {"amounts": [10**400, 1]}),
    ("sum(amounts)", {"amounts": [1e308, 1e308]}),
    ("sum(amounts)", {"amounts": [10**400, 0.5]}),
    ("abs(status)", {"status": "paid"}),
    ("sort(words)", {"words": [1, "a"]}),
    ("sort_by(payments, &at)", {"payments": [{"at": 1}, {"at": "2"}]}),
    ("max_by(payments, &at)", {"payments": [{"at": 1}, {}]}),
    ("max_by(payments, &at)", {"payments": [{"at": None}]}),
    ("max(amounts)", {"amounts": [1, "2"]}),
    ("join(',', words)", {"words": [1]}),
    ("merge(a, b)", {"a": {}, "b": [1]}),
    ("map(&length(@), words)", {"words": [1]}),
    ("&status", {"status": "paid"}),
    ("[&status]", {"status": "paid"}),
    ("to_string(@)", {"a": float("nan")}),
    ("reverse(status)", {"status": None}),
    ("length(status)", {"status": 10**4000}),
    ("status", {"status": 10**4000}),
    ("status", {"status": float("nan")}),
    ("status", {"status": float("inf")}),
    ("status", {"status": "\ud800"}),
    ("status", {"status": "paid\ud800"}),
    ("status", {"\ud800": 1}),
    ("status", {"status": {"\udfff": "\ud800"}}),
    ("status", {"status": "\0" * 10}),
    ("status", {"status": [[[[]]]]}),
]


@pytest.mark.parametrize(("path", "body"), PATHS_AND_BODIES)
def test_a_body_that_a_path_cannot_be_applied_to_has_no_status(path: str, body: object) -> None:
    reading = StatusReader(path).read(json.dumps(body).encode(), "checkout_1")
    assert reading.status is None
    assert reading.seen.isprintable()


@pytest.mark.parametrize("depth", [500, 900, 2000, 30_000])
@pytest.mark.parametrize("path", ["status", "to_string(@)", "status[] | [0]", "status.**"[:6]])
def test_a_body_however_deep_has_no_status(depth: int, path: str) -> None:
    body = b'{"status": ' + b"[" * depth + b"]" * depth + b"}"
    assert StatusReader(path).read(body, "checkout_1").status is None


def test_a_path_of_any_kind_of_error_is_not_an_error_of_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for error in (TypeError, OverflowError, RecursionError, KeyError, MemoryError, ValueError):

        class Search:
            def search(self, _value: object, error: type[Exception] = error) -> object:
                raise error

        reader = StatusReader()
        object.__setattr__(reader, "_compiled", {reader.path: Search()})
        assert reader.read(b"{}", "checkout_1").seen == "nothing that 'status' can be applied to"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.sampled_from(["paid", "PAID", "open", "İ", "\ud800"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["status", "a", "b"]), inner),
)
PATHS = [
    *sorted({path for path, _ in PATHS_AND_BODIES}),
    "status || a",
    "a[?b > `0`] | [0].status",
    "sort_by(a, &b)[0].status",
    "*.status | [0]",
]


@pytest.mark.slow
@settings(deadline=None)
@given(st.sampled_from(PATHS), JSON.map(json.dumps).map(str.encode) | st.binary())
def test_whatever_a_body_holds_reading_it_gives_a_reading(path: str, body: bytes) -> None:
    reading = StatusReader(path).read(body, "checkout_1")
    assert reading.seen.encode()
    assert reading.status is not None or len(reading.seen) < 1000


TEXTS = st.binary(max_size=60).filter(lambda text: b"\r" not in text and b"\n" not in text)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(100, 999) | st.sampled_from([200, 401, 403, 404, 429, 503]),
    TEXTS | st.text(max_size=20).map(lambda text: text.encode()),
    st.binary() | JSON.map(json.dumps).map(str.encode),
)
@example(429, b"9" * 5000, b"")
@example(429, b"-9" * 500, b"")
@example(429, b"Mon, 01 Jan 99999999999 00:00:00 GMT", b"")
@example(429, b"Mon, 01 Jan 0001 00:00:00 +2359", b"")
@example(429, b"Fri, 31 Dec 9999 23:59:59 -2359", b"")
@example(503, "３０".encode(), b"")
@example(503, b"\xff\xfe", b"")
@example(503, b"\xb2", b"")
async def test_whatever_an_answer_holds_a_check_gives_an_answer(
    status: int, retry_after: bytes, body: bytes
) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        headers = [(b"retry-after", retry_after), (b"x-shop", retry_after)]
        return httpx.Response(status, headers=headers, content=body)

    client = BillingClient(
        api_url=API,
        credentials={"APIKEY": "key"},
        timeout_seconds=LONG,
        status_reader=StatusReader("a[?b > `0`] | [0].status"),
        read_credentials_again=lambda: None,
        transport=httpx.MockTransport(answer),
    )
    answered = await client.check("checkout_1")
    assert answered.status_code == status
    assert answered.retry_after is None or 0 <= answered.retry_after <= MAX_RETRY_AFTER_SECONDS


@asynccontextmanager
async def saying(text: bytes) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api"
    finally:
        server.close()
        server.abort_clients()
        await server.wait_closed()


def http(status: bytes, headers: bytes = b"", body: bytes = b"{}") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 " + status + b"\r\n" + headers + length + b"\r\n" + body


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (http(b"200 OK", b"X: \xff\xfe\r\n", b'{"status": "open"}'), Outcome.ACTIVE),
        (http(b"200 OK", b"Content-Type: \xff\r\n"), Outcome.UNKNOWN_STATUS),
        (http(b"200 OK", b"Content-Encoding: \xff\r\n"), Outcome.UNKNOWN_STATUS),
        (http(b"200 \xff\xff"), Outcome.UNKNOWN_STATUS),
        (http(b"200 OK", body=b'{"status": ' + b"9" * 5000 + b"}"), Outcome.UNKNOWN_STATUS),
        (http(b"200 OK", body=b'{"status": "\\ud800"}'), Outcome.UNKNOWN_STATUS),
        (http(b"200 OK", body=b'{"status": NaN}'), Outcome.UNKNOWN_STATUS),
        (http(b"200 OK", body=b"\xff\xfe\x00"), Outcome.UNKNOWN_STATUS),
        (http(b"429 X", b"Retry-After: \xff\r\n"), Outcome.RATE_LIMITED),
        (http(b"429 X", b"Retry-After: 1\r\nRetry-After: \xff\r\n"), Outcome.RATE_LIMITED),
        (http(b"429 X", b"Retry-After: " + b"9" * 5000 + b"\r\n"), Outcome.RATE_LIMITED),
        (http(b"503 X", b"Retry-After: \xb2\r\n"), Outcome.UNEXPECTED_STATUS),
        (http(b"503 X", b"Retry-After:\r\n"), Outcome.UNEXPECTED_STATUS),
        (http(b"999 X"), Outcome.UNEXPECTED_STATUS),
        (http(b"401 X", b"WWW-Authenticate: \xff\r\n"), Outcome.UNAUTHORIZED),
        (http(b"302 X", b"Location: http://[\xff\r\n"), Outcome.UNEXPECTED_STATUS),
        (b"HTTP/1.1 1000 X\r\n\r\n", Outcome.NETWORK_ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n", Outcome.NETWORK_ERROR),
        (b"HTTP/1.1 200 OK\r\n\xff: y\r\n\r\n", Outcome.NETWORK_ERROR),
        (b"\xff" * 100 + b"\r\n\r\n", Outcome.NETWORK_ERROR),
    ],
)
async def test_what_comes_over_a_socket_is_an_outcome(said: bytes, outcome: Outcome) -> None:
    async with saying(said) as url, asyncio.timeout(LONG):
        client = BillingClient(
            api_url=url,
            credentials={"APIKEY": "key"},
            timeout_seconds=LONG,
            status_reader=StatusReader(),
        )
        answer: Answer = await client.check("checkout_1")
        await client.aclose()
    assert answer.outcome is outcome


@pytest.mark.parametrize("length", [1_000, 20_000, 70_000, 1_000_000])
async def test_an_id_of_any_length_is_an_outcome(length: int) -> None:
    async with saying(http(b"414 URI Too Long")) as url, asyncio.timeout(LONG):
        client = BillingClient(api_url=url, credentials={"APIKEY": "key"}, timeout_seconds=LONG)
        answer = await client.check("x" * length)
        await client.aclose()
    assert answer.outcome in (
        Outcome.UNEXPECTED_STATUS,
        Outcome.NETWORK_ERROR,
        Outcome.INVALID_SESSION,
    )

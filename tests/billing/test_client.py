"""The billing client: what it sends, and what each answer means."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

import httpx
import pytest
import respx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from core.billing.client import MAX_BODY_BYTES, BillingClient, path_segment
from core.billing.limits import MAX_RETRY_AFTER_SECONDS, parse_retry_after
from core.billing.request_headers import KEY_READ_AGAIN_SECONDS
from core.domain.model import Answer, Outcome
from local.billing import SimulatedBilling
from testkit.clock import NOON
from tests.billing.servers import KEY, LONG, SHORT, billing_client, check_once, responding, serving

API = "http://billing.example/api"


BEHAVIOURS = "[2-5][0-9]{2}|ratelimited|hang|drip|reset|garbage|redirect"
PIECES = ("a", ".", "..", "/", "\\", "?", "#", "%", "%2e", "%2F", ";", "@", ":", " ", "\n", "\0")


@pytest.mark.slow
@settings(deadline=None)
@given(
    st.text(st.characters(), max_size=255)
    | st.lists(st.sampled_from(PIECES), max_size=85).map("".join)
)
@example("")
@example(".")
@example("..")
@example("../..")
@example("%2e%2e")
@example("?")
@example("#")
@example("half a pair: \ud83d")
@example("🛒" * 255)
async def test_an_id_is_one_path_segment_or_is_not_requested(
    simulated: SimulatedBilling, checkout_id: str
) -> None:
    """Whatever an id contains, the service sees exactly that id, or no request."""
    # The simulated service does to these ids what their names say.
    assume(not re.match(f"(checkout_)?({BEHAVIOURS})(_|$)", checkout_id))
    simulated.requests.clear()
    answer = await check_once(simulated.url, checkout_id)
    if checkout_id == "" or path_segment(checkout_id) is None:
        assert (answer.outcome, answer.seconds) == (Outcome.INVALID_SESSION, None)
        assert not simulated.requests
    else:
        assert answer.outcome is Outcome.ACTIVE
        assert simulated.requests == {checkout_id: 1}


@settings(deadline=None)
@given(st.text(st.characters()))
def test_only_dots_and_lone_surrogates_are_refused_as_segments(checkout_id: str) -> None:
    sendable = checkout_id not in (".", "..") and not re.search("[\ud800-\udfff]", checkout_id)
    assert (path_segment(checkout_id) is not None) is sendable


@pytest.mark.parametrize(
    ("checkout_id", "detail"),
    [
        (None, "it has no billing_checkout_id"),
        ("", "it has no billing_checkout_id"),
        ("..", "its billing_checkout_id cannot be part of a URL"),
    ],
)
async def test_an_id_that_cannot_be_requested_is_invalid_with_the_reason(
    checkout_id: str | None, detail: str
) -> None:
    assert await check_once(API, checkout_id) == Answer(Outcome.INVALID_SESSION, detail=detail)


def transport_of(router: respx.MockRouter) -> httpx.MockTransport:
    return httpx.MockTransport(router.async_handler)


@pytest.mark.parametrize(
    ("status", "headers", "outcome"),
    [
        (200, {}, Outcome.ACTIVE),
        (404, {}, Outcome.NOT_FOUND),
        (410, {}, Outcome.NOT_FOUND),
        (500, {}, Outcome.UNEXPECTED_STATUS),
        (503, {}, Outcome.UNEXPECTED_STATUS),
        (503, {"Retry-After": "30"}, Outcome.RATE_LIMITED),
        (429, {}, Outcome.RATE_LIMITED),
        (429, {"Retry-After": "30"}, Outcome.RATE_LIMITED),
        (401, {}, Outcome.UNAUTHORIZED),
        (403, {}, Outcome.UNAUTHORIZED),
        (201, {}, Outcome.UNEXPECTED_STATUS),
        (204, {}, Outcome.UNEXPECTED_STATUS),
        (302, {"Location": f"{API}/elsewhere"}, Outcome.UNEXPECTED_STATUS),
        (400, {}, Outcome.UNEXPECTED_STATUS),
        (599, {}, Outcome.UNEXPECTED_STATUS),
    ],
)
async def test_one_request_is_sent_and_its_status_decides_the_outcome(
    status: int, headers: dict[str, str], outcome: Outcome
) -> None:
    router = respx.MockRouter()
    router.get(f"{API}/checkout%201").respond(status, headers=headers)
    async with billing_client(API, transport=transport_of(router)) as client:
        answer = await client.check("checkout 1")
    assert (answer.outcome, answer.status_code) == (outcome, status)
    [call] = router.calls
    assert call.request.headers["x-api-key"] == KEY
    assert call.request.headers["host"] == "billing.example"


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (b"", Outcome.ACTIVE),
        (b"OK", Outcome.ACTIVE),
        (b'{"page": "<html>"}', Outcome.ACTIVE),
        (b"<session status='open'/>", Outcome.ACTIVE),
        (b"<html><title>Maintenance</title>", Outcome.UNKNOWN_STATUS),
        (b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html>", Outcome.UNKNOWN_STATUS),
        (b"<html>" + b" " * MAX_BODY_BYTES, Outcome.UNKNOWN_STATUS),
    ],
)
async def test_a_page_for_people_is_no_success(body: bytes, outcome: Outcome) -> None:
    """Also where the body is not read for a status; any other body may be a success."""
    router = respx.MockRouter()
    router.get(f"{API}/c").respond(200, content=body)
    async with billing_client(API, transport=transport_of(router)) as client:
        assert (await client.check("c")).outcome is outcome


@pytest.mark.parametrize("word", ["hang", "drip"])
async def test_an_answer_that_never_ends_is_a_timeout(
    simulated: SimulatedBilling, word: str
) -> None:
    """Also one that drips: the timeout covers the whole answer, not the silence between bytes."""
    answer = await check_once(simulated.url, word, timeout_seconds=SHORT)
    assert (answer.outcome, answer.status_code) == (Outcome.TIMEOUT, None)


async def test_latency_is_measured_with_the_injected_clock() -> None:
    ticks = iter((100.0, 100.25))

    async def scenario() -> Answer:
        transport = httpx.MockTransport(lambda _: httpx.Response(200))
        async with billing_client(
            API, transport=transport, monotonic=lambda: next(ticks)
        ) as client:
            return await client.check("checkout_1")

    assert (await scenario()).seconds == 0.25


class Body(httpx.AsyncByteStream):
    """A body that records whether it has been closed."""

    def __init__(self, pieces: Callable[[], AsyncIterator[bytes]]) -> None:
        self._pieces = pieces
        self.closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces()

    async def aclose(self) -> None:
        self.closed = True


async def whole() -> AsyncIterator[bytes]:
    yield b"{}"


async def oversized() -> AsyncIterator[bytes]:
    yield b" " * (MAX_BODY_BYTES + 1)


async def interrupted() -> AsyncIterator[bytes]:
    yield b"{"
    raise httpx.ReadError("Connection reset by peer")


@pytest.mark.parametrize(
    ("pieces", "outcome"),
    [
        (whole, Outcome.ACTIVE),
        (oversized, Outcome.ACTIVE),
        (interrupted, Outcome.NETWORK_ERROR),
    ],
)
async def test_a_body_is_closed_however_reading_it_ends(
    pieces: Callable[[], AsyncIterator[bytes]], outcome: Outcome
) -> None:
    """Whether it is whole, larger than the limit, or interrupted."""

    async def scenario() -> Answer:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=body))
        async with (
            billing_client(API, timeout_seconds=SHORT, transport=transport) as client,
            asyncio.timeout(LONG),
        ):
            return await client.check("checkout_1")

    body = Body(pieces)
    assert ((await scenario()).outcome, body.closed) == (outcome, True)


async def test_the_key_is_not_sent_along_a_redirect() -> None:
    connected: list[object] = []

    async def note(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer)

    async def scenario() -> Answer:
        async with serving(note) as there:
            found = f"HTTP/1.1 302 Found\r\nLocation: {there}\r\nContent-Length: 0\r\n\r\n"
            async with serving(responding(found.encode())) as here:
                return await check_once(here)

    assert (await scenario()).status_code == 302
    assert not connected


class Rotated:
    """A billing service that accepts one key, and a secret that may hold another one."""

    def __init__(self, accepted: str, held: str, refusal: int = 401) -> None:
        self.accepted = accepted
        self.held = held
        self.refusal = refusal
        self.reads = 0
        self.now = 1000.0
        self.router = respx.MockRouter()
        self.router.get(url__startswith=API).mock(side_effect=self._answer)

    def client(self) -> BillingClient:
        return BillingClient(
            api_url=API,
            credentials={"APIKEY": "old"},
            timeout_seconds=LONG,
            read_credentials_again=self._read,
            transport=transport_of(self.router),
            monotonic=lambda: self.now,
        )

    @property
    def sent(self) -> list[str]:
        return [call.request.headers["x-api-key"] for call in self.router.calls]

    def _answer(self, request: httpx.Request) -> httpx.Response:
        right = request.headers["x-api-key"] == self.accepted
        return httpx.Response(200 if right else self.refusal)

    def _read(self) -> dict[str, str]:
        self.reads += 1
        return {"APIKEY": self.held}


@pytest.mark.parametrize("refusal", [401, 403])
async def test_a_refused_key_is_read_again_and_the_new_one_is_kept(refusal: int) -> None:
    async def scenario() -> list[Outcome]:
        client = secret.client()
        return [(await client.check(f"checkout_{n}")).outcome for n in range(3)]

    secret = Rotated(accepted="new", held="new", refusal=refusal)
    assert await scenario() == [Outcome.ACTIVE] * 3
    assert secret.sent == ["old", "new", "new", "new"]
    assert secret.reads == 1


async def test_many_refusals_at_once_read_the_secret_once() -> None:
    secret = Rotated(accepted="new", held="new")
    client = secret.client()
    answers = await asyncio.gather(*(client.check(f"checkout_{n}") for n in range(50)))
    assert {answer.outcome for answer in answers} == {Outcome.ACTIVE}
    assert secret.reads == 1


async def test_an_unchanged_key_is_read_again_after_thirty_seconds() -> None:
    assert KEY_READ_AGAIN_SECONDS == 30
    secret = Rotated(accepted="another", held="old")
    client = secret.client()
    for later, reads in ((0, 1), (0, 1), (29, 1), (1, 2), (29, 2), (1, 3)):
        secret.now += later
        assert (await client.check("checkout_1")).outcome is Outcome.UNAUTHORIZED
        assert secret.reads == reads
    assert secret.sent == ["old"] * 6


async def test_a_new_key_that_is_also_refused_is_tried_once() -> None:
    secret = Rotated(accepted="another", held="new")
    answer = await secret.client().check("checkout_1")
    assert (answer.outcome, answer.status_code) == (Outcome.UNAUTHORIZED, 401)
    assert secret.sent == ["old", "new"]


async def test_reading_the_key_again_counts_towards_the_timeout() -> None:
    """A secret that does not answer makes the check a timeout."""

    def read() -> dict[str, str]:
        ended.wait(LONG)
        return {"APIKEY": "new"}

    ended = threading.Event()
    router = respx.MockRouter()
    router.get(url__startswith=API).respond(401)
    client = BillingClient(
        api_url=API,
        credentials={"APIKEY": "old"},
        timeout_seconds=SHORT,
        read_credentials_again=read,
        transport=transport_of(router),
    )
    async with asyncio.timeout(LONG / 2):
        answer = await client.check("checkout_1")
    ended.set()
    assert answer.outcome is Outcome.TIMEOUT


@pytest.mark.parametrize("header", ["X-Shop", "Retry-After"])
async def test_a_header_that_is_not_ascii_is_accepted(header: str) -> None:
    async def scenario() -> Answer:
        response = f"HTTP/1.1 200 OK\r\n{header}: caf\xe9\r\nContent-Length: 0\r\n\r\n"
        async with serving(responding(response.encode("latin-1"))) as url:
            return await check_once(url)

    assert (await scenario()).outcome is Outcome.ACTIVE


@pytest.mark.parametrize(
    ("status", "headers", "outcome", "seconds"),
    [
        (429, {"Retry-After": "30"}, Outcome.RATE_LIMITED, 30),
        (503, {"Retry-After": "Thu, 15 Jan 2026 12:00:20 GMT"}, Outcome.RATE_LIMITED, 20),
        (429, {"Retry-After": "soon"}, Outcome.RATE_LIMITED, None),
        (429, {}, Outcome.RATE_LIMITED, None),
        (429, {"Retry-After": "30", "X-RateLimit-Reset": "5"}, Outcome.RATE_LIMITED, 30),
        (429, {"RateLimit-Reset": "5"}, Outcome.RATE_LIMITED, 5),
        (503, {"RateLimit-Reset": "5"}, Outcome.UNEXPECTED_STATUS, None),
        (503, {"Retry-After": "soon"}, Outcome.UNEXPECTED_STATUS, None),
        (200, {"Retry-After": "30"}, Outcome.ACTIVE, None),
    ],
)
async def test_an_answer_carries_the_pause_that_billing_asks_for(
    status: int, headers: dict[str, str], outcome: Outcome, seconds: float | None
) -> None:
    client = BillingClient(
        api_url="http://billing/api",
        credentials={"APIKEY": "key"},
        timeout_seconds=10,
        transport=httpx.MockTransport(lambda _: httpx.Response(status, headers=headers)),
        now=lambda: NOON,
    )
    answer = await client.check("checkout_1")
    assert (answer.outcome, answer.retry_after) == (outcome, seconds)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30),
        (" 0 ", 0),
        ("9" * 400, MAX_RETRY_AFTER_SECONDS),
        ("Thu, 15 Jan 2026 12:00:20 GMT", 20),
        ("Thu, 15 Jan 2026 11:00:00 GMT", 0),
        ("Fri, 16 Jan 2026 12:00:00 GMT", MAX_RETRY_AFTER_SECONDS),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", 1.5),
        ("30, 20.0", 30),  # from the service, and from a proxy
        ("30, soon", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_capped(text: str, seconds: float | None) -> None:
    """At most five minutes; anything else is ignored."""
    assert parse_retry_after(text, NOON) == seconds


@settings(max_examples=300, deadline=None)
@given(
    st.text()
    | st.integers().map(str)
    | st.builds("Mon, 01 Jan {} {}:00:00 {}".format, st.integers(), st.integers(), st.integers())
)
@example("Mon, 01 Jan 99999999999 00:00:00 GMT")
@example("Mon, 01 Jan 2026 00:00:00 +99999999999999")
@example("9" * 5000)
def test_any_retry_after_gives_a_bounded_pause(text: str) -> None:
    seconds = parse_retry_after(text, datetime.now(UTC))
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER_SECONDS

"""The billing client: every answer and every failure, over real sockets wherever those matter."""

import asyncio
import ipaddress
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import respx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from core.billing.client import (
    KEY_READ_AGAIN_SECONDS,
    MAX_BODY_BYTES,
    MAX_RETRY_AFTER_SECONDS,
    BillingClient,
    parse_retry_after,
    path_segment,
)
from core.billing.transport import ReqwestTransport
from core.domain.model import Answer, Outcome
from local.billing import SimulatedBilling, running_billing
from tests.support import until

KEY = "the-key"
API = "http://billing.example/api"
SHORT = 0.2  # seconds, where the time-out is what happens
LONG = 20.0  # where it must not

type Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def client_of(
    url: str,
    *,
    timeout_seconds: float = LONG,
    transport: httpx.AsyncBaseTransport | None = None,
    monotonic: Callable[[], float] = time.perf_counter,
) -> AsyncIterator[BillingClient]:
    client = BillingClient(
        api_url=url,
        api_key=KEY,
        timeout_seconds=timeout_seconds,
        transport=transport,
        monotonic=monotonic,
    )
    try:
        yield client
    finally:
        await client.aclose()


async def ask(
    url: str, checkout_id: str | None = "checkout_1", *, timeout_seconds: float = LONG
) -> Answer:
    async with client_of(url, timeout_seconds=timeout_seconds) as client, asyncio.timeout(2 * LONG):
        return await client.check(checkout_id)


@asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Do what the handler says with each connection; yields the base URL."""

    async def handled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await handler(reader, writer)
        writer.close()

    server = await asyncio.start_server(handled, "127.0.0.1", 0, ssl=tls)
    try:
        port = server.sockets[0].getsockname()[1]
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}/api"
    finally:
        server.close()
        server.abort_clients()
        await server.wait_closed()


def saying(answer: bytes) -> Handler:
    """Say this to whoever asks, and hang up."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    return handler


@pytest.fixture(scope="module")
def simulated() -> Iterator[SimulatedBilling]:
    with running_billing(pause_seconds=0.01) as billing:
        yield billing


PIECES = ("a", ".", "..", "/", "\\", "?", "#", "%", "%2e", "%2F", ";", "@", ":", " ", "\n", "\0")


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
async def test_an_id_is_one_segment_of_the_path_or_is_not_asked_for(
    simulated: SimulatedBilling, checkout_id: str
) -> None:
    # The simulated service answers these with the status that they name.
    assume(not re.match("(checkout_)?[2-5][0-9]{2}(_|$)", checkout_id))
    simulated.requests.clear()
    answer = await ask(simulated.url, checkout_id)
    if checkout_id == "" or path_segment(checkout_id) is None:
        assert (answer.outcome, answer.seconds) == (Outcome.INVALID_SESSION, None)
        assert not simulated.requests
    else:
        assert answer.outcome is Outcome.ACTIVE
        assert simulated.requests == {checkout_id: 1}


@settings(deadline=None)
@given(st.text(st.characters()))
def test_only_dots_and_halves_of_pairs_are_no_segment(checkout_id: str) -> None:
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
async def test_a_session_that_cannot_be_asked_for_says_why(
    checkout_id: str | None, detail: str
) -> None:
    assert await ask(API, checkout_id) == Answer(Outcome.INVALID_SESSION, detail=detail)


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
async def test_one_request_is_sent_and_its_status_is_the_outcome(
    status: int, headers: dict[str, str], outcome: Outcome
) -> None:
    router = respx.MockRouter()
    router.get(f"{API}/checkout%201").respond(status, headers=headers)
    async with client_of(API, transport=transport_of(router)) as client:
        answer = await client.check("checkout 1")
    assert (answer.outcome, answer.status_code) == (outcome, status)
    [call] = router.calls
    assert call.request.headers["x-api-key"] == KEY
    assert call.request.headers["host"] == "billing.example"


@pytest.mark.parametrize("word", ["hang", "drip"])
async def test_an_answer_that_does_not_end_is_a_timeout(
    simulated: SimulatedBilling, word: str
) -> None:
    """A drip is never silent for long: the time-out is for the whole of an answer."""
    answer = await ask(simulated.url, word, timeout_seconds=SHORT)
    assert (answer.outcome, answer.status_code) == (Outcome.TIMEOUT, None)


async def test_a_time_is_told_by_the_clock_that_was_given() -> None:
    ticks = iter((100.0, 100.25))

    async def scenario() -> Answer:
        transport = httpx.MockTransport(lambda _: httpx.Response(200))
        async with client_of(API, transport=transport, monotonic=lambda: next(ticks)) as client:
            return await client.check("checkout_1")

    assert (await scenario()).seconds == 0.25


@pytest.mark.parametrize(
    ("said", "detail"),
    [
        (b"", "connection closed before message completed"),
        (b"This is not HTTP.\r\n\r\n", "invalid HTTP version parsed"),
        (b"HTTP/1.1 99 Low\r\n\r\n", "invalid HTTP status-code parsed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "end of file before message length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "invalid content-length parsed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "Invalid chunk size line"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n", "message head is too large"),
    ],
)
async def test_what_is_no_whole_http_answer_is_a_network_error(said: bytes, detail: str) -> None:
    async with serving(saying(said)) as url:
        answer = await ask(url)
    assert (answer.outcome, answer.status_code) == (Outcome.NETWORK_ERROR, None)
    assert answer.detail.startswith(detail)


async def test_a_reset_connection_is_a_network_error(simulated: SimulatedBilling) -> None:
    answer = await ask(simulated.url, "reset")
    assert answer.outcome is Outcome.NETWORK_ERROR
    assert answer.detail == "Connection reset by peer"


async def test_a_refused_connection_is_a_network_error() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        answer = await ask(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert answer.outcome is Outcome.NETWORK_ERROR
    assert answer.detail == "Connection refused"


async def test_an_unknown_host_is_a_network_error() -> None:
    answer = await ask("http://nowhere.invalid/api")
    assert answer.outcome is Outcome.NETWORK_ERROR
    assert answer.detail.startswith("failed to lookup address information: ")


def self_signed(directory: Path) -> ssl.SSLContext:
    """A TLS server's side, with a certificate for 127.0.0.1 that nobody has vouched for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "billing")])
    address = x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = directory / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


async def test_an_unknown_certificate_is_a_network_error_and_gets_no_request(
    tmp_path: Path,
) -> None:
    requests: list[bytes] = []

    async def noting(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.read(1))

    async with serving(noting, self_signed(tmp_path)) as url:
        answer = await ask(url)
    assert answer.outcome is Outcome.NETWORK_ERROR
    assert answer.detail == "invalid peer certificate: UnknownIssuer"
    assert not any(requests)


def pouring(closed: asyncio.Event) -> Handler:
    """Send a body that has no end, until the other side has gone."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(b" " * 65_536)
                await writer.drain()
        finally:
            closed.set()

    return handler


async def test_a_body_without_an_end_is_not_read_on_and_its_connection_is_closed() -> None:
    async def scenario() -> Answer:
        async with serving(pouring(closed)) as url, client_of(url) as client:
            answer = await client.check("checkout_1")
            async with asyncio.timeout(LONG):
                await closed.wait()
            return answer

    closed = asyncio.Event()
    assert (await scenario()).outcome is Outcome.ACTIVE


async def test_a_response_that_is_closed_brings_nothing_more_though_it_is_still_held() -> None:
    closed = asyncio.Event()
    transport = ReqwestTransport(LONG)
    async with serving(pouring(closed)) as url:
        response = await transport.handle_async_request(httpx.Request("GET", url))
        await response.aclose()
        async with asyncio.timeout(LONG / 2):
            await closed.wait()
        assert response.status_code == 200
    await transport.aclose()


class Body(httpx.AsyncByteStream):
    """A body that knows whether it has been closed."""

    def __init__(self, pieces: Callable[[], AsyncIterator[bytes]]) -> None:
        self._pieces = pieces
        self.closed = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces()

    async def aclose(self) -> None:
        self.closed = True


async def whole() -> AsyncIterator[bytes]:
    yield b"{}"


async def too_long() -> AsyncIterator[bytes]:
    yield b" " * (MAX_BODY_BYTES + 1)


async def broken_off() -> AsyncIterator[bytes]:
    yield b"{"
    raise httpx.ReadError("Connection reset by peer")


@pytest.mark.parametrize(
    ("pieces", "outcome"),
    [
        (whole, Outcome.ACTIVE),
        (too_long, Outcome.ACTIVE),
        (broken_off, Outcome.NETWORK_ERROR),
    ],
)
async def test_a_body_is_closed_however_the_reading_of_it_ends(
    pieces: Callable[[], AsyncIterator[bytes]], outcome: Outcome
) -> None:
    async def scenario() -> Answer:
        transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=body))
        async with (
            client_of(API, timeout_seconds=SHORT, transport=transport) as client,
            asyncio.timeout(LONG),
        ):
            return await client.check("checkout_1")

    body = Body(pieces)
    assert ((await scenario()).outcome, body.closed) == (outcome, True)


async def test_the_key_does_not_travel_along_with_a_redirect() -> None:
    connected: list[object] = []

    async def noting(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer)

    async def scenario() -> Answer:
        async with serving(noting) as there:
            found = f"HTTP/1.1 302 Found\r\nLocation: {there}\r\nContent-Length: 0\r\n\r\n"
            async with serving(saying(found.encode())) as here:
                return await ask(here)

    assert (await scenario()).status_code == 302
    assert not connected


async def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        targets.append(request.split(b" ")[1])
        writer.write(b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n")

    async def scenario() -> Answer:
        async with serving(proxy) as url:
            monkeypatch.setenv("HTTP_PROXY", url.removesuffix("/api"))
            return await ask("http://nowhere.invalid/api")

    assert (await scenario()).status_code == 410
    assert targets == [b"http://nowhere.invalid/api/checkout_1"]


async def test_one_connection_serves_check_after_check_whatever_the_answers() -> None:
    async with SimulatedBilling() as billing, client_of(billing.url) as client:
        for word in ("active", "404", "500", "429", "401", "text", "redirect", "204"):
            await client.check(word)
        assert billing.requests.total() == 8
        assert billing.connections == 1


async def test_a_check_that_fails_does_no_harm_to_the_next_one(simulated: SimulatedBilling) -> None:
    async with client_of(simulated.url, timeout_seconds=SHORT) as client:
        words = ("reset", "active", "garbage", "active", "hang", "active", "huge", "active")
        outcomes = [(await client.check(word)).outcome for word in words]
    assert outcomes[1::2] == [Outcome.ACTIVE] * 4


class Rotated:
    """A billing service that accepts one key, and a secret that holds one."""

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
            api_key="old",
            timeout_seconds=LONG,
            read_key_again=self._read,
            transport=transport_of(self.router),
            monotonic=lambda: self.now,
        )

    @property
    def sent(self) -> list[str]:
        return [call.request.headers["x-api-key"] for call in self.router.calls]

    def _answer(self, request: httpx.Request) -> httpx.Response:
        right = request.headers["x-api-key"] == self.accepted
        return httpx.Response(200 if right else self.refusal)

    def _read(self) -> str:
        self.reads += 1
        return self.held


@pytest.mark.parametrize("refusal", [401, 403])
async def test_a_refused_key_is_read_again_and_a_new_one_is_used_from_then_on(refusal: int) -> None:
    async def scenario() -> list[Outcome]:
        client = secret.client()
        return [(await client.check(f"checkout_{n}")).outcome for n in range(3)]

    secret = Rotated(accepted="new", held="new", refusal=refusal)
    assert await scenario() == [Outcome.ACTIVE] * 3
    assert secret.sent == ["old", "new", "new", "new"]
    assert secret.reads == 1


async def test_many_refused_at_once_are_one_read_of_the_secret() -> None:
    secret = Rotated(accepted="new", held="new")
    client = secret.client()
    answers = await asyncio.gather(*(client.check(f"checkout_{n}") for n in range(50)))
    assert {answer.outcome for answer in answers} == {Outcome.ACTIVE}
    assert secret.reads == 1


async def test_a_key_that_stays_the_same_is_read_again_no_sooner_than_after_thirty_seconds() -> (
    None
):
    assert KEY_READ_AGAIN_SECONDS == 30
    secret = Rotated(accepted="another", held="old")
    client = secret.client()
    for later, reads in ((0, 1), (0, 1), (29, 1), (1, 2), (29, 2), (1, 3)):
        secret.now += later
        assert (await client.check("checkout_1")).outcome is Outcome.UNAUTHORIZED
        assert secret.reads == reads
    assert secret.sent == ["old"] * 6


async def test_a_new_key_that_is_refused_too_is_tried_once() -> None:
    secret = Rotated(accepted="another", held="new")
    answer = await secret.client().check("checkout_1")
    assert (answer.outcome, answer.status_code) == (Outcome.UNAUTHORIZED, 401)
    assert secret.sent == ["old", "new"]


async def test_a_key_is_read_again_within_the_time_of_the_check() -> None:
    def read() -> str:
        ended.wait(LONG)
        return "new"

    ended = threading.Event()
    router = respx.MockRouter()
    router.get(url__startswith=API).respond(401)
    client = BillingClient(
        api_url=API,
        api_key="old",
        timeout_seconds=SHORT,
        read_key_again=read,
        transport=transport_of(router),
    )
    async with asyncio.timeout(LONG / 2):
        answer = await client.check("checkout_1")
    ended.set()
    assert answer.outcome is Outcome.TIMEOUT


@pytest.mark.parametrize("word", ["hang", "drip"])
async def test_after_a_timeout_billing_sees_the_connection_closed(word: str) -> None:
    async with (
        SimulatedBilling(pause_seconds=0.01) as billing,
        client_of(billing.url, timeout_seconds=SHORT) as client,
    ):
        answers = await asyncio.gather(*(client.check(word) for _ in range(5)))
        assert {answer.outcome for answer in answers} == {Outcome.TIMEOUT}
        await until(lambda: billing.in_flight == 0)
        assert billing.connections == 5


async def test_a_request_that_is_sent_again_has_what_is_left_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connections = 0

    async def answer_once_then_close_then_be_silent(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        if connections == 1:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")

    async with (
        serving(answer_once_then_close_then_be_silent) as url,
        client_of(url, timeout_seconds=LONG) as client,
    ):
        assert (await client.check("checkout_1")).outcome is Outcome.ACTIVE
        times = iter((0.0, LONG - SHORT))
        clock = SimpleNamespace(monotonic=lambda: next(times))
        monkeypatch.setattr("core.billing.transport.time", clock)
        async with asyncio.timeout(LONG / 2):
            assert (await client.check("checkout_2")).outcome is Outcome.TIMEOUT
    assert connections == 2


@pytest.mark.parametrize("header", ["X-Shop", "Retry-After"])
async def test_a_header_that_is_not_ascii_does_no_harm(header: str) -> None:
    async def scenario() -> Answer:
        said = f"HTTP/1.1 200 OK\r\n{header}: caf\xe9\r\nContent-Length: 0\r\n\r\n"
        async with serving(saying(said.encode("latin-1"))) as url:
            return await ask(url)

    assert (await scenario()).outcome is Outcome.ACTIVE


@settings(max_examples=300, deadline=None)
@given(
    st.text()
    | st.integers().map(str)
    | st.builds("Mon, 01 Jan {} {}:00:00 {}".format, st.integers(), st.integers(), st.integers())
)
@example("Mon, 01 Jan 99999999999 00:00:00 GMT")
@example("Mon, 01 Jan 2026 00:00:00 +99999999999999")
@example("9" * 5000)
def test_whatever_retry_after_says_the_pause_is_bounded(text: str) -> None:
    seconds = parse_retry_after(text, datetime.now(UTC))
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER_SECONDS


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as the network does to one that it has forgotten (RST)."""
    peer = writer.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@pytest.mark.parametrize("heard", [True, False], ids=["heard of", "not heard of"])
async def test_connections_that_were_reset_while_the_environment_was_frozen_cost_no_check(
    heard: bool,
) -> None:
    """A reset that was not heard of comes for the next request, on each kept connection alike."""
    kept: set[asyncio.StreamWriter] = set()
    forgotten: set[asyncio.StreamWriter] = set()

    async def keeping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept.add(writer)
        while True:
            await reader.readuntil(b"\r\n\r\n")
            if writer in forgotten:
                reset(writer)
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    outcomes: Counter[Outcome] = Counter()
    async with serving(keeping) as url, client_of(url) as client:
        for count in (100, 30, 30, 100):
            answers = await asyncio.gather(*(client.check("checkout_1") for _ in range(count)))
            outcomes.update(answer.outcome for answer in answers)
            forgotten |= kept
            if heard:
                for writer in kept:
                    if not writer.is_closing():  # the retries' are
                        reset(writer)
            kept.clear()
    assert outcomes == {Outcome.ACTIVE: 260}


async def test_what_met_the_end_of_a_kept_connection_is_asked_on_a_fresh_one_not_a_kept() -> None:
    connections = 0

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        await reader.readuntil(b"\r\n\r\n")
        connections += 1
        if connections == 5:
            all_connected.set()
        await all_connected.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        reset(writer)

    async def scenario() -> Outcome:
        async with serving(once) as url, client_of(url) as client:
            await asyncio.gather(*(client.check("checkout_1") for _ in range(5)))
            return (await client.check("checkout_1")).outcome

    all_connected = asyncio.Event()
    assert await scenario() is Outcome.ACTIVE
    assert connections == 6


async def test_a_service_that_resets_every_request_is_asked_twice_and_no_more() -> None:
    requests = 0

    async def resetting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await reader.readuntil(b"\r\n\r\n")
        requests += 1
        reset(writer)

    async with serving(resetting) as url:
        answer = await ask(url)
    assert (answer.outcome, answer.detail) == (Outcome.NETWORK_ERROR, "Connection reset by peer")
    assert requests == 2


async def test_a_kept_connection_that_billing_closes_just_then_is_not_an_error() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")  # the next request crosses the end of the connection

    async def scenario() -> list[Outcome]:
        async with serving(once) as url, client_of(url) as client:
            return [(await client.check("checkout_1")).outcome for _ in range(4)]

    assert await scenario() == [Outcome.ACTIVE] * 4

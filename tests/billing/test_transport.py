"""Connections to billing, over real sockets: failures, reuse, retries, TLS, a proxy."""

import asyncio
import ipaddress
import socket
import ssl
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from core.billing.client import BillingClient
from core.billing.headers import BEARER_TOKEN
from core.billing.transport import CHUNK_BYTES, ReqwestTransport
from core.domain.model import Answer, Outcome
from local.billing import SimulatedBilling
from tests.billing.servers import (
    LONG,
    SHORT,
    Handler,
    billing_client,
    check_once,
    reset,
    responding,
    serving,
)
from tests.support import until


@pytest.mark.parametrize(
    ("response", "detail"),
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
async def test_an_invalid_or_incomplete_http_answer_is_a_network_error(
    response: bytes, detail: str
) -> None:
    async with serving(responding(response)) as url:
        answer = await check_once(url)
    assert (answer.outcome, answer.status_code) == (Outcome.NETWORK_ERROR, None)
    assert answer.detail.startswith(detail)


async def test_a_reset_connection_is_a_network_error(simulated: SimulatedBilling) -> None:
    answer = await check_once(simulated.url, "reset")
    assert answer.outcome is Outcome.NETWORK_ERROR
    assert answer.detail == "Connection reset by peer"


async def test_a_refused_connection_is_a_network_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        answer = await check_once(f"http://127.0.0.1:{unused.getsockname()[1]}")
    assert answer.outcome is Outcome.NETWORK_ERROR
    assert answer.detail == "Connection refused"


async def test_an_unknown_host_is_a_network_error() -> None:
    answer = await check_once("http://nowhere.invalid/api")
    assert answer.outcome is Outcome.NETWORK_ERROR
    assert answer.detail.startswith("failed to lookup address information: ")


def self_signed(directory: Path) -> ssl.SSLContext:
    """A TLS server's side, with a self-signed certificate for 127.0.0.1."""
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


async def test_an_untrusted_certificate_is_a_network_error(
    tmp_path: Path,
) -> None:
    """No byte of a request is sent."""
    requests: list[bytes] = []

    async def note(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.read(1))

    async with serving(note, self_signed(tmp_path)) as url:
        answer = await check_once(url)
    assert answer.outcome is Outcome.NETWORK_ERROR
    assert answer.detail == "invalid peer certificate: UnknownIssuer"
    assert not any(requests)


def endless_body(closed: asyncio.Event) -> Handler:
    """Send an endless body until the client closes the connection."""

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


async def test_an_endless_body_is_cut_off_and_its_connection_closed() -> None:
    """The status alone decides the outcome."""

    async def scenario() -> Answer:
        async with serving(endless_body(closed)) as url, billing_client(url) as client:
            answer = await client.check("checkout_1")
            async with asyncio.timeout(LONG):
                await closed.wait()
            return answer

    closed = asyncio.Event()
    assert (await scenario()).outcome is Outcome.ACTIVE


async def test_a_longer_body_is_not_read_and_its_connection_is_closed() -> None:
    """Also while a caller still refers to the response."""
    closed = asyncio.Event()
    transport = ReqwestTransport(LONG)
    async with serving(endless_body(closed)) as url:
        response = await transport.handle_async_request(httpx.Request("GET", url))
        async with asyncio.timeout(LONG / 2):
            await closed.wait()
        assert len(response.content) == CHUNK_BYTES
    await transport.aclose()


async def test_a_proxy_from_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        targets.append(request.split(b" ")[1])
        writer.write(b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n")

    async def scenario() -> Answer:
        async with serving(proxy) as url:
            monkeypatch.setenv("HTTP_PROXY", url.removesuffix("/api"))
            return await check_once("http://nowhere.invalid/api")

    assert (await scenario()).status_code == 410
    assert targets == [b"http://nowhere.invalid/api/checkout_1"]


async def test_no_proxy_gets_what_is_for_this_machine(
    simulated: SimulatedBilling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://nowhere.invalid")
    assert (await check_once(simulated.url)).outcome is Outcome.ACTIVE


@pytest.mark.parametrize("is_token_local", [True, False])
async def test_a_proxy_is_used_for_each_url_by_its_own_host(
    monkeypatch: pytest.MonkeyPatch, is_token_local: bool
) -> None:
    """The proxy and this machine answer with a token, and with 410 to everything else."""
    targets: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        targets.append(request.split(b" ")[1])
        if request.startswith(b"POST"):
            body = b'{"access_token": "t"}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            writer.write(b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n")

    async with serving(answer) as url:
        here, elsewhere = url.removesuffix("/api"), "http://nowhere.invalid"
        monkeypatch.setenv("HTTP_PROXY", here)
        api, token = (elsewhere, here) if is_token_local else (here, elsewhere)
        client = BillingClient(
            api_url=f"{api}/api",
            credentials={"BILLING_CLIENT_ID": "i", "BILLING_CLIENT_SECRET": "s"},
            timeout_seconds=5,
            headers=BEARER_TOKEN,
            token_url=f"{token}/token",
        )
        assert (await client.check("c")).status_code == 410
        await client.aclose()
    # A proxy is given the whole URL.
    whole, path = b"http://nowhere.invalid", b""
    of_token, of_api = (path, whole) if is_token_local else (whole, path)
    assert targets == [of_token + b"/token", of_api + b"/api/c"]


async def test_one_connection_is_kept_for_every_kind_of_answer() -> None:
    async with SimulatedBilling() as billing, billing_client(billing.url) as client:
        for word in ("active", "404", "500", "429", "401", "text", "redirect", "204"):
            await client.check(word)
        assert billing.requests.total() == 8
        assert billing.connections == 1


async def test_a_failed_check_does_not_affect_the_next_one(simulated: SimulatedBilling) -> None:
    async with billing_client(simulated.url, timeout_seconds=SHORT) as client:
        words = ("reset", "active", "garbage", "active", "hang", "active", "huge", "active")
        outcomes = [(await client.check(word)).outcome for word in words]
    assert outcomes[1::2] == [Outcome.ACTIVE] * 4


@pytest.mark.parametrize("word", ["hang", "drip"])
async def test_a_timeout_closes_the_connection(word: str) -> None:
    async with (
        SimulatedBilling(pause_seconds=0.01) as billing,
        billing_client(billing.url, timeout_seconds=SHORT) as client,
    ):
        answers = await asyncio.gather(*(client.check(word) for _ in range(5)))
        assert {answer.outcome for answer in answers} == {Outcome.TIMEOUT}
        await until(lambda: billing.in_flight == 0)
        assert billing.connections == 5


async def test_a_retried_request_has_only_the_rest_of_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connections = 0

    async def answer_once_then_stay_silent(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        if connections == 1:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")

    async with (
        serving(answer_once_then_stay_silent) as url,
        billing_client(url, timeout_seconds=LONG) as client,
    ):
        assert (await client.check("checkout_1")).outcome is Outcome.ACTIVE
        times = iter((0.0, LONG - SHORT))
        clock = SimpleNamespace(monotonic=lambda: next(times))
        monkeypatch.setattr("core.billing.transport.time", clock)
        async with asyncio.timeout(LONG / 2):
            assert (await client.check("checkout_2")).outcome is Outcome.TIMEOUT
    assert connections == 2


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
async def test_connections_reset_during_a_freeze_fail_no_check(
    noticed: bool,
) -> None:
    """An unnoticed reset arrives with the next request, on every keepalive connection."""
    open_: set[asyncio.StreamWriter] = set()
    forgotten: set[asyncio.StreamWriter] = set()

    async def keep_alive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_.add(writer)
        while True:
            await reader.readuntil(b"\r\n\r\n")
            if writer in forgotten:
                reset(writer)
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    outcomes: Counter[Outcome] = Counter()
    async with serving(keep_alive) as url, billing_client(url) as client:
        for count in (100, 30, 30, 100):
            answers = await asyncio.gather(*(client.check("checkout_1") for _ in range(count)))
            outcomes.update(answer.outcome for answer in answers)
            forgotten |= open_
            if noticed:
                for writer in open_:
                    if not writer.is_closing():  # those of the retries are
                        reset(writer)
            open_.clear()
    assert outcomes == {Outcome.ACTIVE: 260}


async def test_dead_keepalive_connection_is_retried_on_a_fresh_one() -> None:
    """Not on another keepalive connection, which is probably dead too."""
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
        async with serving(once) as url, billing_client(url) as client:
            await asyncio.gather(*(client.check("checkout_1") for _ in range(5)))
            return (await client.check("checkout_1")).outcome

    all_connected = asyncio.Event()
    assert await scenario() is Outcome.ACTIVE
    assert connections == 6


async def test_a_service_that_resets_every_request_gets_two() -> None:
    requests = 0

    async def resetting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await reader.readuntil(b"\r\n\r\n")
        requests += 1
        reset(writer)

    async with serving(resetting) as url:
        answer = await check_once(url)
    assert (answer.outcome, answer.detail) == (Outcome.NETWORK_ERROR, "Connection reset by peer")
    assert requests == 2


async def test_a_keepalive_connection_closed_by_billing_is_no_error() -> None:
    """The request that arrives as the connection closes is sent again."""

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")  # the next request arrives as the connection closes

    async def scenario() -> list[Outcome]:
        async with serving(once) as url, billing_client(url) as client:
            return [(await client.check("checkout_1")).outcome for _ in range(4)]

    assert await scenario() == [Outcome.ACTIVE] * 4

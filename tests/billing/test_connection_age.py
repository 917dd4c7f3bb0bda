"""Connections have a greatest age, and HTTP/2's pings end no healthy one."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import override

import pytest
import trustme
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import PingReceived, RequestReceived
from hypothesis import given
from hypothesis import strategies as st

from core.billing import transport
from core.billing.client import BillingClient
from core.billing.transport import (
    MAX_AGE_SECONDS,
    MIN_AGE_SECONDS,
    ReqwestTransport,
    ping_and_pong_seconds,
)
from core.domain.model import Outcome
from tests.support import until

LONG = 20.0


class Service:
    """Answers by HTTP/1.1 or HTTP/2; ids that begin with `hang` never, before `release` is set."""

    def __init__(self, *, latency: float = 0.0, round_trip: float = 0.0) -> None:
        self.latency = latency
        self.round_trip = round_trip
        self.max_pings: int | None = None  # without an answer in between
        self.open: set[asyncio.BaseTransport] = set()
        self.connections = 0
        self.requests = 0
        self.pings = 0
        self.release = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def answer_later(self, path: str, answer: Callable[[], None]) -> None:
        async def later() -> None:
            if path.rpartition("/")[2].startswith("hang"):
                await self.release.wait()
            await asyncio.sleep(self.latency)
            answer()

        self.requests += 1
        task = asyncio.create_task(later())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()


class Connection(asyncio.Protocol):
    """One connection; what it receives and sends is half a round trip late each."""

    def __init__(self, service: Service) -> None:
        self.service = service

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.service.open.add(transport)
        self.service.connections += 1

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.service.open.discard(self.transport)

    @override
    def data_received(self, data: bytes) -> None:
        self._late(self.received, data)

    def write(self, data: bytes) -> None:
        self._late(self.transport.write, data)

    def received(self, data: bytes) -> None:
        raise NotImplementedError

    def _late(self, then: Callable[[bytes], object], data: bytes) -> None:
        asyncio.get_running_loop().call_later(self.service.round_trip / 2, then, data)


class Http1(Connection):
    @override
    def received(self, data: bytes) -> None:
        path = data.split(b" ")[1].decode()
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        self.service.answer_later(path, lambda: self.write(answer))


class Http2(Connection):
    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self._http2 = H2Connection(H2Configuration(client_side=False))
        self._pings = 0

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._http2.initiate_connection()
        self.write(self._http2.data_to_send())

    @override
    def received(self, data: bytes) -> None:
        for event in self._http2.receive_data(data):
            if isinstance(event, RequestReceived):
                assert event.stream_id is not None
                assert event.headers is not None
                path = dict(event.headers)[b":path"].decode()
                self.service.answer_later(path, partial(self._answer, event.stream_id))
            if isinstance(event, PingReceived):
                self.service.pings += 1
                self._pings += 1
                if self.service.max_pings is not None and self._pings > self.service.max_pings:
                    self._http2.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
        self.write(self._http2.data_to_send())

    def _answer(self, stream: int) -> None:
        self._pings = 0
        self._http2.send_headers(stream, [(":status", "200"), ("content-length", "2")])
        self._http2.send_data(stream, b"{}", end_stream=True)
        self.write(self._http2.data_to_send())


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    context.set_alpn_protocols(["h2"])
    return context


@asynccontextmanager
async def serving(
    service: Service, tls: ssl.SSLContext | None, port: int = 0
) -> AsyncIterator[str]:
    """Run it, by HTTP/2 if there is a context; yields the base URL."""
    server = await asyncio.get_running_loop().create_server(
        lambda: Http2(service) if tls else Http1(service), "127.0.0.1", port, ssl=tls, backlog=500
    )
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"{'https' if tls else 'http'}://localhost:{port}/api"
    finally:
        service.stop()
        server.close()
        server.abort_clients()
        await server.wait_closed()


@asynccontextmanager
async def client_of(
    url: str, clock: Clock | None = None, *, timeout_seconds: float = LONG
) -> AsyncIterator[BillingClient]:
    client = BillingClient(
        api_url=url,
        credentials={"APIKEY": "k" * 32},
        timeout_seconds=timeout_seconds,
        transport=ReqwestTransport(timeout_seconds, monotonic=clock),
    )
    try:
        await client.check("first")  # by which it learns of the version
        yield client
    finally:
        await client.aclose()


async def outcomes(client: BillingClient, count: int) -> set[Outcome]:
    answers = await asyncio.gather(*(client.check(f"cs_{n}") for n in range(count)))
    return {answer.outcome for answer in answers}


BOTH = pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])


@BOTH
async def test_connections_that_are_never_idle_are_replaced_within_a_minute(
    http2: bool, tls: ssl.SSLContext
) -> None:
    service, clock = Service(), Clock()
    async with serving(service, tls if http2 else None) as url, client_of(url, clock) as client:
        assert await outcomes(client, 1) == {Outcome.ACTIVE}
        before, old = service.connections, set(service.open)
        for clock.now in range(int(MIN_AGE_SECONDS)):
            assert await outcomes(client, 1) == {Outcome.ACTIVE}
        assert service.connections == before
        clock.now = MAX_AGE_SECONDS
        assert await outcomes(client, 1) == {Outcome.ACTIVE}
        assert service.connections == before + 1
        # The client that learned of HTTP/2 is not asked any more, so its connection becomes idle.
        await until(lambda: len(service.open & old) == (1 if http2 else 0))


@BOTH
async def test_a_request_on_an_old_client_ends_and_then_it_is_closed(
    http2: bool, tls: ssl.SSLContext
) -> None:
    service, clock = Service(), Clock()
    async with serving(service, tls if http2 else None) as url, client_of(url, clock) as client:
        hanging = asyncio.create_task(client.check("hang"))
        assert await outcomes(client, 10) == {Outcome.ACTIVE}
        await until(lambda: service.requests == 12)
        old = set(service.open)
        clock.now = MAX_AGE_SECONDS
        assert await outcomes(client, 10) == {Outcome.ACTIVE}
        assert service.open >= old
        assert not hanging.done()
        service.release.set()
        assert (await hanging).outcome is Outcome.ACTIVE
        del hanging
        # The client that learned of HTTP/2 is not asked any more, so its connection becomes idle.
        await until(lambda: len(service.open & old) <= (1 if http2 else 0))


@pytest.mark.slow
@BOTH
async def test_a_hanging_request_on_an_old_client_still_times_out(
    http2: bool, tls: ssl.SSLContext
) -> None:
    service, clock = Service(), Clock()
    async with (
        serving(service, tls if http2 else None) as url,
        client_of(url, clock, timeout_seconds=0.5) as client,
    ):
        hanging = asyncio.create_task(client.check("hang"))
        await until(lambda: service.requests == 2)
        clock.now = MAX_AGE_SECONDS
        assert await outcomes(client, 1) == {Outcome.ACTIVE}
        async with asyncio.timeout(LONG / 2):
            assert (await hanging).outcome is Outcome.TIMEOUT


@pytest.mark.slow
@BOTH
async def test_a_client_closed_with_an_old_request_in_flight_leaves_none(
    http2: bool, tls: ssl.SSLContext
) -> None:
    """Rust ends the request at its time-out; a cancellation does not reach it."""
    service, clock = Service(), Clock()
    async with serving(service, tls if http2 else None) as url:
        async with client_of(url, clock, timeout_seconds=0.5) as client:
            hanging = asyncio.create_task(client.check("hang"))
            await until(lambda: service.requests == 2)
            clock.now = MAX_AGE_SECONDS
            assert await outcomes(client, 1) == {Outcome.ACTIVE}
        async with asyncio.timeout(LONG / 2):
            assert (await hanging).outcome is Outcome.NETWORK_ERROR
        del hanging, client
        await until(lambda: not service.open)


async def test_a_moved_service_is_asked_at_its_new_address_in_a_minute() -> None:
    """The old one takes no new connections, but keeps answering on those that it has."""
    old, new, clock = Service(), Service(), Clock()
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(lambda: Http1(old), "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with client_of(f"http://127.0.0.1:{port}/api", clock) as client:
        listening.close()
        async with serving(new, None, port):
            assert await outcomes(client, 1) == {Outcome.ACTIVE}
            assert new.requests == 0
            clock.now = MAX_AGE_SECONDS
            assert await outcomes(client, 1) == {Outcome.ACTIVE}
            assert new.requests == 1
    await until(lambda: not old.open)


@pytest.mark.slow
async def test_clients_that_were_made_together_do_not_age_together() -> None:
    service, clock = Service(), Clock()
    async with serving(service, None) as url, client_of(url, clock) as client:
        service.latency = 0.05
        assert await outcomes(client, 400) == {Outcome.ACTIVE}
        made: list[int] = []
        for second in range(int(MIN_AGE_SECONDS) - 1, int(MAX_AGE_SECONDS) + 1):
            before = service.connections
            clock.now = second
            assert await outcomes(client, 400) == {Outcome.ACTIVE}
            made.append(service.connections - before)
        assert 350 <= sum(made) <= 450
        assert max(made) <= 150  # one client's at a time


async def test_where_no_client_can_be_built_the_old_one_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_self: object, *_: object, **_kwargs: object) -> None:
        raise OSError("Too many open files")

    service, clock = Service(), Clock()
    async with serving(service, None) as url, client_of(url, clock) as client:
        before = service.connections
        with monkeypatch.context() as patch:
            patch.setattr(transport._Client, "__init__", fail)
            clock.now = MAX_AGE_SECONDS
            assert await outcomes(client, 1) == {Outcome.ACTIVE}
            assert service.connections == before
            assert isinstance(client._transport, ReqwestTransport)
            client._transport._either._clients.clear()
            answer = await client.check("cs_1")
            assert answer.outcome is Outcome.NETWORK_ERROR
            assert answer.detail == "no client can be built: Too many open files"
        clock.now += transport.BUILD_AGAIN_SECONDS
        assert await outcomes(client, 1) == {Outcome.ACTIVE}
        assert service.connections == before + 1


@pytest.mark.slow
async def test_however_many_requests_hang_there_are_descriptors_left() -> None:
    service, clock = Service(), Clock()
    async with serving(service, None) as url, client_of(url, clock) as client:
        checks = [asyncio.create_task(client.check(f"hang_{n}")) for n in range(500)]
        await until(lambda: service.requests == 501)
        clock.now = MAX_AGE_SECONDS
        checks += [asyncio.create_task(client.check(f"hang_{n}")) for n in range(500, 1000)]
        await until(lambda: service.requests >= 901)
        assert len(service.open) <= transport.MAX_CONNECTIONS
        service.release.set()
        assert {(await check).outcome for check in checks} == {Outcome.ACTIVE}
        assert len(service.open) <= transport.MAX_CONNECTIONS


@given(st.floats(0.1, 30))
def test_pings_are_few_and_leave_time_for_a_second_attempt(timeout_seconds: float) -> None:
    ping, pong = ping_and_pong_seconds(timeout_seconds)
    assert 1 <= pong <= ping  # longer than a round trip, and a packet that is sent twice
    assert timeout_seconds / ping <= 2.5 + 1e-9  # at most two while a request waits
    if timeout_seconds >= 2.5:
        assert ping + pong <= 0.8 * timeout_seconds + 1e-9


@pytest.mark.slow
async def test_slow_answers_over_a_slow_network_are_answers(tls: ssl.SSLContext) -> None:
    service = Service(latency=0.3, round_trip=0.25)
    service.max_pings = 2
    async with serving(service, tls) as url, client_of(url, timeout_seconds=1) as client:
        for _ in range(2):
            assert await outcomes(client, 100) == {Outcome.ACTIVE}
    assert service.pings == 0


@pytest.mark.slow
@pytest.mark.parametrize("timeout_seconds", [1.0, 3.0])
async def test_a_service_that_counts_pings_has_no_reason_to_hang_up(
    timeout_seconds: float, tls: ssl.SSLContext
) -> None:
    service = Service()
    service.max_pings = 2
    async with (
        serving(service, tls) as url,
        client_of(url, timeout_seconds=timeout_seconds) as client,
    ):
        assert await outcomes(client, 1) == {Outcome.ACTIVE}
        before = service.connections
        service.latency = 0.9 * timeout_seconds
        assert await outcomes(client, 20) == {Outcome.ACTIVE}
        assert service.connections == before
        assert service.pings <= 2

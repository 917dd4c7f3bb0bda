"""HTTP/2, if the service offers it: fewer bytes, and no check is lost with a connection."""

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from core.billing.client import BillingClient
from core.billing.transport import MAX_STREAMS
from core.domain.model import Outcome
from testkit import tls_billing

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 5  # a connection is pinged after a fifth of it


class Proxy:
    """Stands between the client and the service."""

    def __init__(self, service: tls_billing.Service) -> None:
        self.service = service
        self.silent = 0  # how many of the first connections carry no more data
        self._connections: list[asyncio.StreamWriter] = []

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return self.service.url.replace(f":{self.service.port}/", f":{port}/")

    @property
    def connections(self) -> int:
        return len(self._connections)

    def fall_silent(self) -> None:
        self.silent = self.connections

    def reset(self) -> None:
        """End every connection with a reset."""
        for writer in self._connections:
            connection: socket.socket = writer.get_extra_info("socket")
            if connection.fileno() >= 0:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = self.connections
        self._connections.append(writer)
        try:
            there, to_service = await asyncio.open_connection("127.0.0.1", self.service.port)
        except OSError:
            writer.close()
            return

        async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65_536):
                    if number >= self.silent:
                        sink.write(data)
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(carry(reader, to_service), carry(there, writer))

    async def stop(self) -> None:
        self._server.close()
        self.reset()
        await asyncio.sleep(0.05)


@pytest.fixture
def http2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tls_billing.Service]:
    with tls_billing.service(tmp_path, 0.05, http2=True, max_requests=200) as service:
        monkeypatch.setenv("SSL_CERT_FILE", str(service.authority))
        yield service


@asynccontextmanager
async def client(url: str) -> AsyncIterator[BillingClient]:
    client = BillingClient(
        api_url=url, credentials={"APIKEY": "k" * 32}, timeout_seconds=TIMEOUT_SECONDS
    )
    try:
        await client.check("cs_first")  # negotiates the version
        yield client
    finally:
        await client.aclose()


async def checks(client: BillingClient, count: int, in_flight: int = 40) -> Counter[Outcome]:
    permits = asyncio.Semaphore(in_flight)

    async def check(number: int) -> Outcome:
        async with permits:
            return (await client.check(f"cs_{number:024d}")).outcome

    return Counter(await asyncio.gather(*(check(number) for number in range(count))))


@asynccontextmanager
async def through_a_proxy(
    service: tls_billing.Service,
) -> AsyncIterator[tuple[Proxy, BillingClient]]:
    proxy = Proxy(service)
    url = await proxy.start()
    try:
        async with client(url) as billing:
            yield proxy, billing
    finally:
        await proxy.stop()


async def test_http2_sends_less_than_half_the_bytes(http2: tls_billing.Service) -> None:
    async with client(http2.url) as billing:
        before = http2.counts()
        assert await checks(billing, 180) == {Outcome.ACTIVE: 180}
        await asyncio.sleep(0.1)  # the last acknowledgements are delayed
        counts = http2.counts() - before
    handshake = 1_500  # at most, for the one connection that is opened
    assert counts.connections == 1
    assert counts.bytes_in < 180 * (191 / 2) + handshake  # 191 by HTTP/1.1: test_bytes_sent.py


async def test_a_connection_that_is_ended_is_replaced_by_one(
    http2: tls_billing.Service,
) -> None:
    """The service ends a connection after 200 requests; no check is lost."""
    async with client(http2.url) as billing:
        before = http2.counts()
        assert await checks(billing, 1_000) == {Outcome.ACTIVE: 1_000}
        assert 5 <= (http2.counts() - before).connections <= 10


async def test_more_requests_than_one_connection_takes_open_more(
    http2: tls_billing.Service,
) -> None:
    async with client(http2.url) as billing:
        before = http2.counts()
        assert await checks(billing, 250, in_flight=250) == {Outcome.ACTIVE: 250}
        assert (http2.counts() - before).connections == -(-250 // MAX_STREAMS)


async def test_a_dead_connection_fails_no_check(http2: tls_billing.Service) -> None:
    async with through_a_proxy(http2) as (proxy, billing):
        await checks(billing, 40)
        proxy.fall_silent()
        before = proxy.connections
        assert await checks(billing, 40) == {Outcome.ACTIVE: 40}
        assert proxy.connections == before + 1


@pytest.mark.parametrize("seconds", [0, 0.03], ids=["idle", "in flight"])
async def test_a_reset_connection_fails_no_check(
    http2: tls_billing.Service, seconds: float
) -> None:
    async with through_a_proxy(http2) as (proxy, billing):
        await checks(billing, 40)
        asyncio.get_running_loop().call_later(seconds, proxy.reset)
        await asyncio.sleep(0 if seconds else 0.05)
        assert await checks(billing, 80) == {Outcome.ACTIVE: 80}


async def test_a_service_that_drops_http2_is_asked_over_http1(
    http2: tls_billing.Service, tmp_path: Path
) -> None:
    async with through_a_proxy(http2) as (proxy, billing):
        await checks(billing, 40)
        with tls_billing.service(tmp_path, 0.05) as old:
            proxy.service = old
            proxy.reset()
            assert await checks(billing, 80) == {Outcome.ACTIVE: 80}
            assert old.counts().requests >= 80  # HTTP/2's preface counts as some


async def test_a_service_that_comes_back_is_used_again(
    http2: tls_billing.Service,
) -> None:
    async with through_a_proxy(http2) as (proxy, billing):
        await checks(billing, 40)
        port, http2.port = http2.port, 1
        proxy.reset()
        assert await checks(billing, 10) == {Outcome.NETWORK_ERROR: 10}
        http2.port = port
        assert await checks(billing, 10) == {Outcome.ACTIVE: 10}

"""Billing services on real sockets, and a client that asks them."""

import asyncio
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import httpx

from core.billing.client import BillingClient
from core.domain.model import Answer

KEY = "the-key"
SHORT = 0.2  # seconds, for a test of the timeout
LONG = 20.0  # for a test that must not time out

type Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def billing_client(
    url: str,
    *,
    timeout_seconds: float = LONG,
    transport: httpx.AsyncBaseTransport | None = None,
    monotonic: Callable[[], float] = time.perf_counter,
) -> AsyncIterator[BillingClient]:
    client = BillingClient(
        api_url=url,
        credentials={"APIKEY": KEY},
        timeout_seconds=timeout_seconds,
        transport=transport,
        monotonic=monotonic,
    )
    try:
        yield client
    finally:
        await client.aclose()


async def check_once(
    url: str, checkout_id: str | None = "checkout_1", *, timeout_seconds: float = LONG
) -> Answer:
    """One check by a client of its own."""
    async with (
        billing_client(url, timeout_seconds=timeout_seconds) as client,
        asyncio.timeout(2 * LONG),
    ):
        return await client.check(checkout_id)


@asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Pass each connection to the handler; yields the base URL."""

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


def responding(response: bytes) -> Handler:
    """Answer one request with these bytes and close the connection."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(response)
        await writer.drain()

    return handler


def reset(writer: asyncio.StreamWriter) -> None:
    """Reset the connection (RST), as a network does that has forgotten it."""
    peer = writer.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

"""httpx's transport over pyreqwest (Rust's reqwest): requests leave, bytes or errors come back."""

from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta

import httpx
from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import (
    ConnectError,
    DecodeError,
    DetailedPyreqwestError,
    PyreqwestError,
    RequestTimeoutError,
)
from pyreqwest.http import HeaderMap
from pyreqwest.request import StreamRequest
from pyreqwest.response import ResponseBodyReader

# Read at once: more than any session's state takes, so that one read brings a whole body.
CHUNK_BYTES = 64 * 1024 + 1

# What becomes of a request on a kept connection that the service, or something between, has ended
# since: a service closes idle connections, and one that was frozen with us may be gone. Asking once
# more is safe: a GET changes nothing.
_ENDED_UNDER_US = frozenset(
    ("connection closed before message completed", "Connection reset by peer", "Broken pipe")
)
# Lambda gives a process 1,024 descriptors. A request that was given up holds one until its socket
# is closed, in another thread, and where all time out at once as many begin anew; these then wait.
MOST_CONNECTIONS = 960
# Kept connections are not trusted for longer: load balancers forget an idle one after 60 s (AWS's
# default), and a request on it would be answered by nobody.
KEEP_IDLE = timedelta(seconds=30)


class Get(httpx.Request):
    """A GET with headers that many requests share, whose URL is parsed only if someone looks at it.

    What httpx does to make a request (parse the URL, copy the headers, encode no body) takes as
    long as to send it and to read the answer.
    """

    def __init__(self, address: str, headers: httpx.Headers) -> None:
        self.method = "GET"
        self.address = address
        self.headers = headers
        self.stream = _NO_BODY
        self.extensions = {}

    def __getattr__(self, name: str) -> httpx.URL:
        if name != "url":
            raise AttributeError(name)
        self.url = httpx.URL(self.address)
        return self.url


_NO_BODY = httpx.ByteStream(b"")


class ReqwestTransport(httpx.AsyncBaseTransport):
    """httpx over pyreqwest (Rust's reqwest), because httpx's own pool slows down with concurrency.

    Redirects are not followed, because the API key would travel with them. TLS certificates are
    verified. `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` are respected.

    Cancelling does not reach a request that is on its way in Rust: it, and its connection, would
    live until billing answers. `timeout_seconds` ends it there.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._client = _client(timeout_seconds).pool_idle_timeout(KEEP_IDLE).build()
        self._unkept = _client(timeout_seconds).pool_max_idle_per_host(0).build()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._send(self._client, request)
        except httpx.NetworkError as error:
            if str(error) not in _ENDED_UNDER_US:
                raise
        # Not on another kept one: where one has been ended, all of them may have been.
        return await self._send(self._unkept, request)

    async def _send(self, client: Client, request: httpx.Request) -> httpx.Response:
        address = request.address if isinstance(request, Get) else str(request.url)
        sending = (
            client.request(request.method, address)
            .headers(request.headers.multi_items())
            .build_streamed()
        )
        try:
            response = await sending.__aenter__()
        except PyreqwestError as error:
            raise _translated(error, request) from error
        return httpx.Response(
            response.status,
            headers=_readable(response.headers),
            stream=_Body(sending, response.body_reader, request),
        )

    async def aclose(self) -> None:
        await self._client.close()
        await self._unkept.close()


def _client(timeout_seconds: float) -> ClientBuilder:
    return (
        ClientBuilder()
        .timeout(timedelta(seconds=timeout_seconds))
        .max_connections(MOST_CONNECTIONS)
        .follow_redirects(enable=False)
        .gzip(enable=False)
        .brotli(enable=False)
        .zstd(enable=False)
        .deflate(enable=False)
    )


class _Body(httpx.AsyncByteStream):
    def __init__(
        self, sending: StreamRequest, reader: ResponseBodyReader, request: httpx.Request
    ) -> None:
        self._sending = sending
        self._reader = reader
        self._request = request
        self._ended = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._ended:
            raise StopAsyncIteration
        try:
            chunk = await self._reader.read(CHUNK_BYTES)
        except PyreqwestError as error:
            raise _translated(error, self._request) from error
        if chunk is None:
            raise StopAsyncIteration
        self._ended = len(chunk) < CHUNK_BYTES  # `read` comes back with less only at the end
        return bytes(chunk)

    async def aclose(self) -> None:
        await self._sending.__aexit__(None, None, None)


def _readable(headers: HeaderMap) -> list[tuple[str, str]]:
    """The headers as text, without those whose values are not ASCII: none of them is needed."""
    try:
        return list(headers.items())
    except ValueError:
        readable = []
        for name in set(headers):
            with suppress(ValueError):
                readable += [(name, value) for value in headers.getall(name)]
        return readable


def _translated(error: PyreqwestError, request: httpx.Request) -> httpx.TransportError:
    """The same error in httpx's terms, with its innermost cause for a message."""
    causes = error.details["causes"] if isinstance(error, DetailedPyreqwestError) else None
    message = str(causes[-1]["message"]) if causes else type(error).__name__
    # "Connection refused (os error 111)": the number says no more than the words.
    message = message.partition(" (os error ")[0]
    match error:
        case RequestTimeoutError():
            return httpx.ReadTimeout(message, request=request)
        case ConnectError():
            return httpx.ConnectError(message, request=request)
        case DecodeError():
            return httpx.RemoteProtocolError(message, request=request)
        case _:
            return httpx.NetworkError(message, request=request)

"""httpx's transport over pyreqwest (Rust's reqwest): requests leave, bytes or errors come back."""

import time
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

# Read at once: more than any session's answer needs, so that one read returns a whole body.
CHUNK_BYTES = 64 * 1024 + 1

# The errors of a request on a kept connection that the service, or a device in between, has closed
# meanwhile: services close idle connections, and a frozen Lambda environment does not notice.
# Sending the request once more is safe: a GET changes nothing.
_CLOSED_MEANWHILE = frozenset(
    ("connection closed before message completed", "Connection reset by peer", "Broken pipe")
)
# Lambda gives a process 1,024 file descriptors. A request that was given up holds one until another
# thread closes its socket. If all requests time out at once, as many new ones begin and wait.
MAX_CONNECTIONS = 960
# Idle connections are not kept for longer: load balancers forget an idle one after 60 s (AWS's
# default), and a request on it would never be answered.
KEEP_IDLE = timedelta(seconds=30)

# Requests at once on one HTTP/2 connection: services allow about as many (RFC 9113, section 6.5.2,
# recommends at least 100), and further requests would wait.
MAX_STREAMS = 100
# An HTTP/2 connection that has been silent for this long, with requests on it, is pinged. It has as
# long again to answer. Twice this is well within the default time of a request.
PING_AFTER_SECONDS = 2.0
_KEEP_ALIVE_TIMED_OUT = "keep-alive timed out"


class Get(httpx.Request):
    """A GET with headers that many requests share; its URL is parsed only when it is read.

    httpx parses the URL and copies the headers of a request, which takes as long as sending it and
    reading the answer.
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

    HTTP/2 is used if the service offers it: a check then sends less than half of the bytes.

    A request takes at most `timeout_seconds`, from the call until its body is read, including all
    waits and a second attempt. Rust measures that time, because a cancellation does not reach Rust:
    without it the request, and its connection, would live until billing answers.
    """

    def __init__(self, timeout_seconds: float) -> None:
        # It offers both versions in each TLS handshake, and uses HTTP/1.1 without TLS.
        self._either = _Client(
            _client(timeout_seconds).http2(enable=True).pool_idle_timeout(KEEP_IDLE)
        )
        self._unkept = _Client(_client(timeout_seconds).pool_max_idle_per_host(0))
        self._timeout_seconds = timeout_seconds
        self._headers: httpx.Headers | None = None  # of the last request
        self._items: list[tuple[str, str]] = []
        # When a connection of `_either` ends, each waiting request opens another one: a hundred
        # handshakes instead of one. Clients that know the version in advance open one.
        self._http2: list[_Client] = []
        self._speaks_http2 = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        began, sent_before = time.monotonic(), None
        if self._speaks_http2:
            for _ in range(2):  # a closed connection does not mean that the service is down
                with suppress(httpx.NetworkError):
                    return await self._send(self._http2_client(), request, sent_before)
                sent_before = began
            self._speaks_http2 = False
        try:
            return await self._send(self._either, request, sent_before)
        except httpx.NetworkError as error:
            if str(error) not in _CLOSED_MEANWHILE:
                raise
        # Not on another kept one: if one was closed, all of them may have been.
        return await self._send(self._unkept, request, began)

    def _http2_client(self) -> "_Client":
        for client in self._http2:
            if client.requests < MAX_STREAMS:
                return client
        ping = timedelta(seconds=min(PING_AFTER_SECONDS, self._timeout_seconds / 5))
        self._http2.append(
            _Client(
                _client(self._timeout_seconds)
                .http2_prior_knowledge()
                .http2_keep_alive_interval(ping)
                .http2_keep_alive_timeout(ping)
                .pool_idle_timeout(KEEP_IDLE)
            )
        )
        return self._http2[-1]

    async def _send(
        self, client: "_Client", request: httpx.Request, sent_before: float | None = None
    ) -> httpx.Response:
        """Send it by that client; a second attempt gets the rest of the first one's time."""
        address = request.address if isinstance(request, Get) else str(request.url)
        builder = client.client.request(request.method, address).headers(
            self._items_of(request.headers)
        )
        if sent_before is not None:
            left = sent_before + self._timeout_seconds - time.monotonic()
            builder = builder.timeout(timedelta(seconds=max(0, left)))
        sending = builder.build_streamed()
        client.requests += 1
        try:
            response = await sending.__aenter__()
        except BaseException as error:
            client.requests -= 1
            if isinstance(error, PyreqwestError):
                raise _translated(error, request) from error
            raise
        if response.version == "HTTP/2.0":
            self._speaks_http2 = True
        body = _Body(client, sending, response.body_reader, request)
        return _Received(response.status, response.headers, body)

    def _items_of(self, headers: httpx.Headers) -> list[tuple[str, str]]:
        if headers is not self._headers:  # many requests share them
            # HTTP/2 has its own form of it, and services refuse both; reqwest makes either.
            self._items = [item for item in headers.multi_items() if item[0] != "host"]
            self._headers = headers
        return self._items

    async def aclose(self) -> None:
        for client in (self._either, self._unkept, *self._http2):
            await client.client.close()


class _Client:
    """A pyreqwest client with its own connections, and the number of requests on them."""

    def __init__(self, builder: ClientBuilder) -> None:
        self.client: Client = builder.build()
        self.requests = 0


def _client(timeout_seconds: float) -> ClientBuilder:
    return (
        ClientBuilder()
        .timeout(timedelta(seconds=timeout_seconds))
        .max_connections(MAX_CONNECTIONS)
        .follow_redirects(enable=False)
        .gzip(enable=False)
        .brotli(enable=False)
        .zstd(enable=False)
        .deflate(enable=False)
    )


class _Received(httpx.Response):
    """A response whose headers are copied only when they are read.

    httpx.Response copies and normalises them, which takes longer than the rest of an answer.
    """

    def __init__(self, status: int, headers: HeaderMap, body: "_Body") -> None:
        self.status_code = status
        self.stream = self._body = body
        self._header_map = headers

    def __getattr__(self, name: str) -> httpx.Headers:
        if name != "headers":
            raise AttributeError(name)
        self.headers = httpx.Headers(_readable(self._header_map))
        return self.headers

    async def aclose(self) -> None:
        await self._body.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(
        self,
        client: _Client,
        sending: StreamRequest,
        reader: ResponseBodyReader,
        request: httpx.Request,
    ) -> None:
        self._client = client
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
        self._ended = len(chunk) < CHUNK_BYTES  # `read` returns less only at the end
        return bytes(chunk)

    async def aclose(self) -> None:
        self._client.requests -= 1
        await self._sending.__aexit__(None, None, None)


def _readable(headers: HeaderMap) -> list[tuple[str, str]]:
    """The headers as text, without those whose values are not ASCII: none of those is needed."""
    try:
        return list(headers.items())
    except ValueError:
        readable = []
        for name in set(headers):
            with suppress(ValueError):
                readable += [(name, value) for value in headers.getall(name)]
        return readable


def _translated(error: PyreqwestError, request: httpx.Request) -> httpx.TransportError:
    """The same error as httpx raises it, with its innermost cause as the message."""
    causes = error.details["causes"] if isinstance(error, DetailedPyreqwestError) else None
    message = str(causes[-1]["message"]) if causes else type(error).__name__
    # "Connection refused (os error 111)": the number adds nothing.
    message = message.partition(" (os error ")[0]
    if causes and any(cause["message"] == _KEEP_ALIVE_TIMED_OUT for cause in causes):
        return httpx.NetworkError(_KEEP_ALIVE_TIMED_OUT, request=request)
    match error:
        case RequestTimeoutError():
            return httpx.ReadTimeout(message, request=request)
        case ConnectError():
            return httpx.ConnectError(message, request=request)
        case DecodeError():
            return httpx.RemoteProtocolError(message, request=request)
        case _:
            return httpx.NetworkError(message, request=request)

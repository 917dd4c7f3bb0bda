"""httpx's transport over pyreqwest (Rust's reqwest): requests leave, bytes or errors come back."""

import time
from collections.abc import Callable
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
from pyreqwest.response import Response

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

# Requests at once on one client, which is one connection with HTTP/2: services allow about as many
# (RFC 9113, section 6.5.2, recommends at least 100), and further requests would wait.
MAX_STREAMS = 100
# A name is resolved for new connections only, and a connection that is never idle is never
# replaced. So a client is used for this long at most, and then a new one with new connections. The
# ages of clients differ: they do not all connect again at the same time.
MAX_AGE_SECONDS = 55.0
MIN_AGE_SECONDS = 35.0
BUILD_AGAIN_SECONDS = 5.0  # after no new client could be built, e.g. for want of a descriptor
_GOLDEN_RATIO = 0.618034  # its multiples, modulo 1, are spread evenly however many there are

# An HTTP/2 connection that has been silent for this part of a request's time-out, with requests on
# it, is pinged. A request that waits for a slow answer causes at most two pings: services that
# count them tolerate two between two answers (gRPC's servers; others tolerate more).
PING_FRACTION = 0.4
# However short the time-out is: a ping is not sent where a slow answer is all there is.
MIN_PING_SECONDS = 1.0
# The answer to a ping may take as long as the silence before it, but not longer than this. A second
# is more than a round trip and a packet sent twice, so a healthy connection is not ended. A request
# on a dead one has at least a fifth of its time left for a second attempt. With a time-out of less
# than 2.5 s it times out; those that begin two seconds later get a new connection.
MAX_PONG_SECONDS = 2.0
_KEEP_ALIVE_TIMED_OUT = "keep-alive timed out"


class Get(httpx.Request):
    """A GET with headers that many requests share; its URL is parsed only when it is read.

    httpx parses the URL and copies the headers of a request, which takes as long as sending it and
    reading the answer.
    """

    method = "GET"
    stream = httpx.ByteStream(b"")

    def __init__(self, address: str, headers: httpx.Headers) -> None:
        self.address = address
        self.headers = headers
        self.extensions = {}

    def __getattr__(self, name: str) -> httpx.URL:
        if name != "url":
            raise AttributeError(name)
        self.url = httpx.URL(self.address)
        return self.url


class ReqwestTransport(httpx.AsyncBaseTransport):
    """httpx over pyreqwest (Rust's reqwest), because httpx's own pool slows down with concurrency.

    Redirects are not followed, because the API key would travel with them. TLS certificates are
    verified. `HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` are respected if it `uses_proxy`.

    HTTP/2 is used if the service offers it: a check then sends less than half of the bytes.

    A request takes at most `timeout_seconds`, from the call until its body is read, including all
    waits and a second attempt. Rust measures that time, because a cancellation does not reach Rust:
    without it the request, and its connection, would live until billing answers.
    """

    def __init__(
        self,
        timeout_seconds: float,
        *,
        uses_proxy: bool = True,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._uses_proxy = uses_proxy
        self._monotonic = monotonic or _monotonic
        # They offer both versions in each TLS handshake, and use HTTP/1.1 without TLS.
        self._either = _Clients(self._either_builder, MAX_CONNECTIONS // MAX_STREAMS)
        # When a connection of `_either` ends, each waiting request opens another one: a hundred
        # handshakes instead of one. Clients that know the version in advance open one.
        self._http2 = _Clients(self._http2_builder, MAX_CONNECTIONS)
        self._unkept = _Client(self._builder(MAX_CONNECTIONS).pool_max_idle_per_host(0))
        self._headers: httpx.Headers | None = None  # of the last request
        self._header_map = HeaderMap()  # the same
        self._speaks_http2 = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        began, sent_before = self._monotonic(), None
        if self._speaks_http2:
            for _ in range(2):  # a closed connection does not mean that the service is down
                with suppress(httpx.NetworkError):
                    return await self._send(self._http2.at(began), request, sent_before)
                sent_before = began
            self._speaks_http2 = False
        try:
            return await self._send(self._either.at(began), request, sent_before)
        except httpx.NetworkError as error:
            if str(error) not in _CLOSED_MEANWHILE:
                raise
        # Not on another kept one: if one was closed, all of them may have been.
        return await self._send(self._unkept, request, began)

    def _either_builder(self) -> ClientBuilder:
        return self._builder().http2(enable=True).pool_idle_timeout(KEEP_IDLE)

    def _http2_builder(self) -> ClientBuilder:
        ping, pong = ping_and_pong_seconds(self._timeout_seconds)
        return (
            self._builder()
            .http2_prior_knowledge()
            .http2_keep_alive_interval(timedelta(seconds=ping))
            .http2_keep_alive_timeout(timedelta(seconds=pong))
            .pool_idle_timeout(KEEP_IDLE)
        )

    def _builder(self, max_connections: int = MAX_STREAMS) -> ClientBuilder:
        builder = (
            ClientBuilder()
            .timeout(timedelta(seconds=self._timeout_seconds))
            .max_connections(max_connections)
            .follow_redirects(enable=False)
            .gzip(enable=False)
            .brotli(enable=False)
            .zstd(enable=False)
            .deflate(enable=False)
        )
        return builder if self._uses_proxy else builder.no_proxy()

    async def _send(
        self, client: "_Client", request: httpx.Request, sent_before: float | None = None
    ) -> httpx.Response:
        """Send it by that client; a second attempt gets the rest of the first one's time."""
        address = request.address if isinstance(request, Get) else str(request.url)
        headers = self._header_map_of(request.headers)
        builder = client.client.request(request.method, address).headers(headers)
        if request.method == "POST":
            builder = builder.body_bytes(request.content)
        if sent_before is not None:
            left = sent_before + self._timeout_seconds - self._monotonic()
            builder = builder.timeout(timedelta(seconds=max(0, left)))
        sending = builder.build_streamed()
        client.requests += 1
        is_complete = False
        try:
            response = await sending.__aenter__()
            try:
                body = await response.body_reader.read(CHUNK_BYTES)
                # Less than CHUNK_BYTES is the whole body, and leaves nothing to close.
                is_complete = body is None or len(body) < CHUNK_BYTES
            finally:
                if not is_complete:
                    await sending.__aexit__(None, None, None)
        except PyreqwestError as error:
            raise _translated(error, request) from error
        finally:
            client.request_ended()
        if response.version == "HTTP/2.0":
            self._speaks_http2 = True
        return _Received(response, b"" if body is None else bytes(body))

    def _header_map_of(self, headers: httpx.Headers) -> HeaderMap:
        if headers is not self._headers:  # many requests share them
            # HTTP/2 has its own form of it, and services refuse both; reqwest makes either.
            items = [item for item in headers.multi_items() if item[0] != "host"]
            self._header_map, self._headers = HeaderMap(items), headers
        return self._header_map

    async def aclose(self) -> None:
        await self._either.aclose()
        await self._http2.aclose()
        await self._unkept.client.close()


class _Client:
    """A pyreqwest client with its own connections, and the number of requests on them.

    Its connections are closed when nothing refers to it any longer. To call its `close` would end
    its requests, and leave its idle connections open.
    """

    def __init__(
        self,
        builder: ClientBuilder,
        *,
        until: float = float("inf"),
        on_idle: "Callable[[_Client], None] | None" = None,
    ) -> None:
        self.client: Client = builder.build()
        self.requests = 0
        self.until = until  # no request begins on it from then on
        self.leaving = False
        self._on_idle = on_idle

    def request_ended(self) -> None:
        self.requests -= 1
        if self.leaving and not self.requests and self._on_idle is not None:
            self._on_idle(self)


class _Clients:
    """Clients of one kind: a request gets one that is not too old and has room for it.

    A client that is too old gets no further request, and is let go when it has none. To build one
    takes 3 ms, which happens once in MIN_AGE_SECONDS for each MAX_STREAMS in flight.
    """

    def __init__(self, builder: Callable[[], ClientBuilder], max_clients: int) -> None:
        self._builder = builder
        self._max_clients = max_clients
        self._built = 0
        self._clients: list[_Client] = []
        self._leaving: set[_Client] = set()
        self._closed = False

    async def aclose(self) -> None:
        """End all requests and close all connections."""
        self._closed = True
        clients = [*self._clients, *self._leaving]
        self._clients.clear()
        self._leaving.clear()
        for client in clients:
            await client.client.close()

    def at(self, now: float) -> _Client:
        """The client for a request that begins now."""
        for client in self._clients:
            if client.requests < MAX_STREAMS and now < client.until:
                return client
        return self._another(now)

    def _another(self, now: float) -> _Client:
        if self._closed:  # a request that has just been ended for that would be sent again
            raise httpx.NetworkError("the client is closed")
        aged = self._retire(now)
        # A client that is left keeps its idle connections until its last request has ended. With
        # nearly MAX_CONNECTIONS requests in flight there may be no room for another one beside it:
        # requests then wait for each other.
        if self._clients and len(self._clients) + len(self._leaving) >= self._max_clients:
            return min(self._clients, key=lambda client: client.requests)
        spread = (self._built * _GOLDEN_RATIO) % 1.0
        age = MAX_AGE_SECONDS - spread * (MAX_AGE_SECONDS - MIN_AGE_SECONDS)
        try:
            client = _Client(self._builder(), until=now + age, on_idle=self._leaving.discard)
        except Exception as error:  # noqa: BLE001 (no descriptor to read certificates with, …)
            return self._instead(aged, now, error)
        self._built += 1
        self._clients.append(client)
        return client

    def _retire(self, now: float) -> list[_Client]:
        aged = [client for client in self._clients if now >= client.until]
        for client in aged:
            self._clients.remove(client)
            client.leaving = True
            if client.requests:
                self._leaving.add(client)
        return aged

    def _instead(self, aged: list[_Client], now: float, error: Exception) -> _Client:
        """A client that is too old, or has no room, where no other can be built for now."""
        for client in aged:
            client.until = now + BUILD_AGAIN_SECONDS
            client.leaving = False
            self._leaving.discard(client)
            self._clients.append(client)
        if not self._clients:
            raise httpx.ConnectError(f"no client can be built: {error}") from error
        return min(self._clients, key=lambda client: client.requests)


def ping_and_pong_seconds(timeout_seconds: float) -> tuple[float, float]:
    """After how long a silence HTTP/2 pings, and how long it waits for the answer."""
    ping = max(MIN_PING_SECONDS, PING_FRACTION * timeout_seconds)
    return ping, min(ping, MAX_PONG_SECONDS)


def _monotonic() -> float:
    return time.monotonic()


class _Received(httpx.Response):
    """A response whose body has been read, and whose headers are copied only when they are read.

    httpx.Response copies and normalises them, which takes longer than the rest of an answer.
    """

    is_closed = True

    def __init__(self, response: Response, body: bytes) -> None:
        self.status_code = response.status
        self._content = body
        self._response = response

    def __getattr__(self, name: str) -> httpx.Headers:
        if name != "headers":
            raise AttributeError(name)
        self.headers = httpx.Headers(_readable(self._response.headers))
        return self.headers


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

"""A simulated billing service: a real server on a real port that fails on request.

`GET /billing/api/v1/paysession/{checkout id, percent-encoded}` with any `x-api-key` answers JSON
such as `{"id": "checkout_active_1", "status": "open"}`. The first word of the id selects another
behaviour, so a request for `checkout_hang_1` hangs. Words are separated by `_`; `checkout_` before
them is optional.

| word in the id              | what the service does                                        |
|-----------------------------|--------------------------------------------------------------|
| `active`, any other word    | 200, status `open`                                           |
| `200` to `599`              | that status; `429` and `503` come with `Retry-After: 30`     |
| `ratelimited`               | 429 without `Retry-After`                                    |
| `shared`                    | 200 for one request a second, 429 for any more               |
| `pending`                   | 200, status `processing`: a payment is in progress           |
| `paid`, `failed`, `expired` | 200, status `open`; that status from 60 seconds after the first request for the id, or after the seconds in the next word: `checkout_paid_20_1` |
| `slow`                      | 200 after a second                                           |
| `hang`                      | never answers                                                |
| `drip`                      | 200, then one byte of body per second, endlessly             |
| `reset`                     | resets the connection (TCP RST)                              |
| `garbage`                   | sends something that is not HTTP and closes the connection   |
| `huge`                      | 200 with a body of 1 MiB                                     |
| `text`                      | 200 with a body that is not JSON                             |
| `redirect`                  | 302 to another path, which answers 200                       |

A missing or wrong key gets 401, another path 404, another method 405, and invalid HTTP 400.

`POST /simulate` sets one behaviour for every id, until the next such request:
`curl -d failing http://localhost:4000/simulate`. The modes are `by id` (as above), `healthy`,
`slow` (200 after a second), `failing` (500), `rate-limiting` (one request a second, any more get 429),
`paying` (status `paid` at once) and `down` (connections are reset). `GET /simulate` returns the
mode. `/simulate` refuses requests from other sites with 403.

With a service of `local/services.toml`, such as `stripe`, the URL, the headers that it needs, the
answers and the limit are that service's.
"""  # noqa: E501 - a row of a table is one line

import argparse
import asyncio
import contextlib
import errno
import json
import re
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import NamedTuple, Self, cast
from urllib.parse import unquote

from local.other_sites import refusal
from local.services import Service, read_services

HOST = "127.0.0.1"
PORT, MAX_PORT = 4000, 65_535
_SESSIONS = "/billing/api/v1/paysession/"
_SIMULATE = "/simulate"
_REDIRECTED = "/billing/api/v1/redirected"

BY_ID = "by id"
# The word that each mode puts in place of every checkout id.
MODES: Mapping[str, str] = {
    "healthy": "active",
    "slow": "slow",
    "failing": "500",
    "rate-limiting": "shared",
    "paying": "paid_0",
    "down": "reset",
}

_MAX_REQUEST_BYTES = 64 * 1024
_HUGE_BYTES = 1024 * 1024
_CHANGES_AFTER = 60  # seconds
# Less than the sample sessions need.
LIMIT_PER_SECOND, LIMIT_BURST = 1.0, 3.0
# A pass opens all its connections at once. Those beyond the backlog (100 by default in asyncio) are
# delayed by a second, until the kernel retries.
_BACKLOG = 4096

_BEGINNING = re.compile(rb"[!-~]+(?: |\Z)")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~\w-]+):([^\r\n]*)\r\n", re.ASCII)
_HEAD = re.compile(
    r"([!-~]+) (/(?:[!-$&-~]|%[0-9A-Fa-f]{2})*) HTTP/1\.([01])\r\n"
    rf"((?:{_FIELD.pattern.replace('(', '(?:')})*)\r\n",
    re.ASCII,
)
_STATUS_CODE = re.compile("[2-5][0-9]{2}")
_NUMBER = re.compile("[0-9]{1,9}")


class _Request(NamedTuple):
    method: str
    path: str
    checkout_id: str  # decoded; empty if the path is not a session's
    headers: Mapping[str, str]  # by their names in lower case
    keep_alive: bool
    body: str
    host: str
    origin: str | None
    target: str  # the path and the query


class _Answer(NamedTuple):
    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[str, ...] = ()


class Bucket:
    """Allows `per_second` requests a second, and up to `burst` at once. Times are in seconds."""

    def __init__(self, per_second: float, burst: float) -> None:
        self.per_second = per_second
        self.burst = burst
        self._tokens = burst
        self._filled_at: float | None = None

    def take(self, at: float) -> bool:
        """Whether a request at this time is allowed."""
        since = 0.0 if self._filled_at is None else max(0.0, at - self._filled_at)
        self._tokens = min(self.burst, self._tokens + since * self.per_second)
        self._filled_at = at
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class SimulatedBilling:
    """The service and its counters.

    `requests` counts requests by decoded checkout id, including those refused for their key.
    `redirects_followed` counts requests to the target of `redirect`. `in_flight` counts requests
    without an answer; immediate answers never add more than one.

    `clock` (seconds) decides when `paid`, `failed` and `expired` start. `pause_seconds` is real
    time: the delay of `slow`, and of `drip` between two bytes. Without `api_key`, any key is valid.
    `service` is a service to be instead of the one above.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        api_key: str | None = None,
        pause_seconds: float = 1.0,
        service: Service | None = None,
    ) -> None:
        self.service = service
        self.requests: Counter[str] = Counter()
        self.connections = 0
        self.in_flight = 0
        self.max_in_flight = 0
        self.redirects_followed = 0
        self.pause_seconds = pause_seconds
        self.mode = BY_ID
        self._clock = clock
        self._api_key = api_key
        self._first_asked: dict[str, float] = {}
        self._bucket = Bucket(LIMIT_PER_SECOND, LIMIT_BURST)
        per_second = None if service is None else service.per_second
        self._limit = None if per_second is None else Bucket(per_second, per_second)
        self._server: asyncio.Server | None = None
        self._host = HOST
        self._port: int | None = None

    @property
    def url(self) -> str:
        """The value for `BILLING_API_URL`; it remains valid after `stop`."""
        if self.service is not None:
            return self.service.settings_at(self.origin, {})["BILLING_API_URL"]
        return f"{self.origin}{_SESSIONS.removesuffix('/')}"

    @property
    def origin(self) -> str:
        if self._port is None:
            raise RuntimeError("the simulated billing service has not been started")
        return f"http://{HOST}:{self._port}"

    async def start(self, host: str = HOST, port: int = PORT) -> None:
        """Listen; port 0 asks for a free one.

        Raises:
            OSError: the port is in use or not permitted.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), host, port, family=socket.AF_INET, backlog=_BACKLOG
        )
        self._host = host
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is None:
            return
        server, self._server = self._server, None
        # A connection that was just accepted has no transport yet, and asyncio leaks it if the
        # server closes now. So stop accepting, and let it get its transport first.
        for listening in server.sockets:
            asyncio.get_running_loop().remove_reader(listening)
        await asyncio.sleep(0)
        server.close()
        server.abort_clients()
        await server.wait_closed()

    async def __aenter__(self) -> Self:
        """Start on any free port, unless already started."""
        if self._server is None:
            await self.start(port=0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    def simulate(self, mode: str) -> None:
        """Treat every id as the mode says.

        Raises:
            ValueError: the mode is unknown.
        """
        if mode != BY_ID and mode not in MODES:
            raise ValueError(f"Unknown mode {mode!r}; use one of {', '.join((BY_ID, *MODES))}.")
        self.mode = mode

    def words(self, checkout_id: str) -> list[str]:
        """The words of an id; the first one selects the behaviour."""
        return MODES.get(self.mode, checkout_id.removeprefix("checkout_")).split("_")

    def count(self, request: _Request, address: str) -> _Answer | None:
        """Count a request; returns its answer unless the checkout id decides it.

        `address` is this machine's address at which the request arrived.
        """
        if request.path == _SIMULATE:
            return self._control(request, address)
        if request.path == _REDIRECTED:
            self.redirects_followed += 1
            return self.session("redirected")
        if not request.checkout_id:
            return self._token(request) or _error(404)
        if request.method != "GET":
            return _error(405, "Allow: GET")
        self.requests[request.checkout_id] += 1
        if not self._accepts(request.headers):
            return _error(401)
        within = self._limit is None or self._limit.take(self._clock())
        return None if within else _error(429)

    def session(self, checkout_id: str, state: str = "open") -> _Answer:
        """The answer about a session in a state."""
        if self.service is not None:
            return _Answer(200, self.service.body_of(checkout_id, state))
        status = "processing" if state == "pending" else state
        return _Answer(200, json.dumps({"id": checkout_id, "status": status}).encode())

    def answer(self, checkout_id: str) -> _Answer:
        """The answer for an id whose behaviour is an answer, not a fault of the connection."""
        answer = self.session(checkout_id)
        match self.words(checkout_id):
            case ["pending", *_]:
                answer = self.session(checkout_id, "pending")
            case ["huge", *_]:  # trailing spaces are valid JSON
                answer = answer._replace(body=answer.body.ljust(_HUGE_BYTES))
            case ["text", *_]:
                answer = _Answer(200, b"this is not JSON", "text/plain")
            case ["redirect", *_]:
                answer = _error(302, f"Location: {_REDIRECTED}")
            case ["ratelimited" | "shared" as word, *_] if word == "ratelimited" or not (
                self._bucket.take(self._clock())
            ):
                answer = _error(429)
            case ["429" | "503" as code, *_]:
                answer = _error(int(code), "Retry-After: 30")
            case ["paid" | "failed" | "expired" as state, *more]:
                after = int(more[0]) if more and _NUMBER.fullmatch(more[0]) else _CHANGES_AFTER
                now = self._clock()
                if now >= self._first_asked.setdefault(checkout_id, now) + after:
                    answer = self.session(checkout_id, state)
            case [code, *_] if _STATUS_CODE.fullmatch(code) and code != "200":
                answer = _error(self._unknown if code == "404" else int(code))
        return answer

    @property
    def _unknown(self) -> int:
        return 404 if self.service is None else self.service.unknown

    def _accepts(self, headers: Mapping[str, str]) -> bool:
        if self.service is not None:
            return self.service.accepts(headers)
        key = headers.get("x-api-key", "")
        return bool(key) and self._api_key in (None, key)

    def _token(self, request: _Request) -> _Answer | None:
        if self.service is None or self.service.token_url is None:
            return None
        body = self.service.token_answer(request.target, request.headers, request.body)
        return None if body is None else _Answer(200, body)

    def _control(self, request: _Request, address: str) -> _Answer:
        names = (self._host.lower(), address)
        why = refusal(request.method, request.host, request.origin, other_hosts=names)
        if why is not None:
            return _Answer(403, json.dumps({"error": why}).encode())
        if request.method not in ("GET", "POST"):
            return _error(405, "Allow: GET, POST")
        try:
            if request.method == "POST":
                self.simulate(request.body.strip())
        except ValueError as error:
            return _Answer(400, json.dumps({"error": str(error)}).encode())
        return _Answer(200, json.dumps({"mode": self.mode, "modes": [BY_ID, *MODES]}).encode())


class _Connection(asyncio.Protocol):
    """A client's connection: handles its requests one at a time."""

    def __init__(self, billing: SimulatedBilling) -> None:
        self._billing = billing
        self._received = bytearray()
        self._request: _Request | None = None  # the one in flight
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        sockname = transport.get_extra_info("sockname")  # None if the client has left already
        self._address = sockname[0] if sockname else ""
        self._billing.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's name
        if self._timer is not None:
            self._timer.cancel()
        self._end_request()

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._take_requests()
        if len(self._received) > _MAX_REQUEST_BYTES:
            self._transport.abort()

    def _take_requests(self) -> None:
        while self._received and self._request is None and not self._transport.is_closing():
            try:
                self._request = _parse(self._received)
            except ValueError:
                self._send(_error(400))
                return
            if self._request is None:
                return
            if (service := self._billing.service) is not None:
                asked = service.checkout_id(self._request.target)
                self._request = self._request._replace(checkout_id=asked)
            self._billing.in_flight += 1
            self._billing.max_in_flight = max(self._billing.max_in_flight, self._billing.in_flight)
            answer = self._billing.count(self._request, self._address)
            if answer is None:
                self._behave(self._request.checkout_id)
            else:
                self._send(answer)

    def _end_request(self) -> None:
        if self._request is not None:
            self._request = None
            self._billing.in_flight -= 1

    def _behave(self, checkout_id: str) -> None:
        match self._billing.words(checkout_id)[0]:
            case "hang":
                pass  # in flight until the client gives up
            case "slow":
                self._later(lambda: self._send_late(checkout_id))
            case "drip":  # the body has no length, so it ends with the connection
                self._transport.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                self._drip()
            case "reset":
                linger = struct.pack("ii", 1, 0)  # closing discards what is unsent and sends RST
                connected = self._transport.get_extra_info("socket")
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self._transport.abort()
            case "garbage":
                self._transport.write(b"This is not HTTP.\r\n\r\n")
                self._transport.close()
            case _:
                self._send(self._billing.answer(checkout_id))

    def _later(self, action: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._billing.pause_seconds, action)

    def _drip(self) -> None:
        self._transport.write(b" ")
        self._later(self._drip)

    def _send_late(self, checkout_id: str) -> None:
        self._send(self._billing.session(checkout_id))
        self._take_requests()  # those that arrived meanwhile

    def _send(self, answer: _Answer) -> None:
        """Answer the request in flight, or a malformed one, and then close the connection."""
        request = self._request
        head = [f"HTTP/1.1 {answer.status} {_phrase(answer.status)}", *answer.headers]
        body = answer.body
        if answer.status in (204, 304):
            body = b""  # these have no body and no Content-Length
        else:
            head += [f"Content-Type: {answer.content_type}", f"Content-Length: {len(body)}"]
        if request is not None and request.method == "HEAD":
            body = b""
        closing = request is None or not request.keep_alive
        if closing:
            head.append("Connection: close")
        self._transport.write("\r\n".join([*head, "", ""]).encode() + body)
        if closing:
            self._transport.close()
        self._end_request()


def _parse(received: bytearray) -> _Request | None:
    """Remove one complete request from the front; returns None until it is complete.

    Raises:
        ValueError: the request is malformed.
    """
    blank = received.find(b"\r\n\r\n")
    if blank < 0:
        if not _BEGINNING.match(received):  # a TLS client, for example, would wait for an answer
            raise ValueError
        return None
    end = blank + 4
    head = _HEAD.fullmatch(received[:end].decode("latin-1"))
    if head is None:
        raise ValueError
    method, target, minor, fields = head.groups()
    headers = {name.lower(): value.strip() for name, value in _FIELD.findall(fields)}
    length = headers.get("content-length", "0")
    if not _NUMBER.fullmatch(length) or "transfer-encoding" in headers or "host" not in headers:
        raise ValueError
    if len(received) < end + int(length):
        return None
    body = received[end : end + int(length)].decode(errors="replace")
    del received[: end + int(length)]
    path = target.partition("?")[0]
    before, sessions, segment = path.partition(_SESSIONS)
    is_session = sessions and not before and "/" not in segment
    return _Request(
        method,
        path,
        unquote(segment, errors="strict") if is_session else "",
        headers,
        minor == "1" and "close" not in headers.get("connection", "").lower(),
        body,
        headers["host"],
        headers.get("origin"),
        target,
    )


def _error(status: int, *headers: str) -> _Answer:
    return _Answer(status, json.dumps({"error": _phrase(status)}).encode(), headers=headers)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unassigned"


@contextlib.contextmanager
def running_billing(
    *,
    host: str = HOST,
    port: int = 0,
    clock: Callable[[], float] = time.monotonic,
    api_key: str | None = None,
    pause_seconds: float = 1.0,
    service: Service | None = None,
) -> Iterator[SimulatedBilling]:
    """Run the service in its own thread, for callers without an event loop.

    Raises:
        OSError: the port is in use or not permitted.
    """
    billing = SimulatedBilling(
        clock=clock, api_key=api_key, pause_seconds=pause_seconds, service=service
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="simulated-billing")
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(billing.start(host, port), loop).result()
        try:
            yield billing
        finally:
            asyncio.run_coroutine_threadsafe(billing.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _listen(host: str, port: int, service: Service | None) -> None:
    billing = SimulatedBilling(service=service)
    await billing.start(host, port)
    async with billing:
        print(f"Simulated billing service: {billing.url}", flush=True)
        await asyncio.Event().wait()


def port(text: str) -> int:
    """A port's number in an argument; 0 is any free one."""
    number = int(text)
    if not 0 <= number <= MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text} is not a port from 0 to {MAX_PORT}")
    return number


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser("make billing", description="Simulated billing.")
    parser.add_argument("--port", type=port, default=PORT, help="default: %(default)s")
    parser.add_argument(
        "--host", default=HOST, help="0.0.0.0 for containers (default: %(default)s)"
    )
    services = read_services()
    parser.add_argument("--service", choices=services, help="simulate that service")
    parsed = parser.parse_args(arguments)
    try:
        asyncio.run(_listen(parsed.host, parsed.port, services.get(parsed.service)))
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"Port {parsed.port} is in use by another program. Stop it, or use --port."
        else:
            message = f"Cannot listen on port {parsed.port}: {error}"
        print(message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

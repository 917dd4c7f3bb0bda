"""A billing service on raw sockets that answers each request with a fault of the test's choice.

`GET …/{fault}-{n}`: the checkout id names the fault. An id without a fault, or any id once the
service is `healed`, gets a correct answer: its status in `statuses`, or else `open`.
"""

import gzip
import json
import socket
import ssl
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self
from urllib.parse import unquote

from tests.chaos.sockets import Connections, send_reset_on_close

# Seconds that a fault keeps a connection open without an answer. No client here waits longer.
FAULT_SECONDS = 5.0
# Seconds until the service notices that a client has closed its connection.
NOTICE_SECONDS = 0.3
CHUNK = b" " * 65_536


@dataclass
class Peer:
    """The client of one request."""

    sock: socket.socket
    service: "FaultyBilling"

    def send(self, text: bytes | str) -> None:
        self.sock.sendall(text.encode() if isinstance(text, str) else text)

    def answer(self, status: str, body: bytes | str = b"", *headers: str) -> None:
        content = body.encode() if isinstance(body, str) else body
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers, "", ""]
        self.send("\r\n".join(head).encode("utf-8") + content)

    def reset(self) -> None:
        """End the connection with a TCP RST."""
        send_reset_on_close(self.sock)
        raise ConnectionAbortedError

    def close(self) -> None:
        raise ConnectionAbortedError

    def stay_silent(self) -> None:
        """Send nothing more until the client closes the connection."""
        self.sock.settimeout(FAULT_SECONDS)
        with suppress(OSError):
            self.sock.recv(1)
        raise ConnectionAbortedError

    def repeat(self, chunk: bytes, *, every: float = 0.0) -> None:
        """Send the chunk again and again until the client closes the connection."""
        began = time.monotonic()
        while time.monotonic() < began + FAULT_SECONDS:
            self.send(chunk)
            if every:
                time.sleep(every)
        raise ConnectionAbortedError


type Fault = Callable[[Peer], None]


def _then(*steps: Fault) -> Fault:
    def fault(peer: Peer) -> None:
        for step in steps:
            step(peer)

    return fault


def _send(text: bytes | str) -> Fault:
    return lambda peer: peer.send(text)


def _repeat(chunk: bytes, *, every: float = 0.0) -> Fault:
    return lambda peer: peer.repeat(chunk, every=every)


def _answer(status: str, body: bytes | str = b"", *headers: str) -> Fault:
    return lambda peer: peer.answer(status, body, *headers)


def _body(body: bytes | str) -> Fault:
    return _answer("200 OK", body, "Content-Type: application/json")


def _retry_after(value: str, status: str = "429 Too Many Requests") -> Fault:
    return _answer(status, "", f"Retry-After: {value}")


def _redirect(status: str) -> Fault:
    return lambda peer: peer.answer(status, "", f"Location: {peer.service.other_host}/moved")


_reset: Fault = Peer.reset
_close: Fault = Peer.close
_stay_silent: Fault = Peer.stay_silent
_OK = "HTTP/1.1 200 OK\r\n"
_GIGABYTE = _OK + "Content-Length: 1000000000\r\n\r\n"
_NINE_BYTES = _OK + "Content-Length: 9\r\n\r\n"

FAULTS: Mapping[str, Fault] = {
    # connections
    "reset before the answer": _reset,
    "reset within the headers": _then(_send("HTTP/1.1 200 O"), _reset),
    "reset within the body": _then(_send(_NINE_BYTES + "{"), _reset),
    "closed before the answer": _close,
    "closed within the headers": _then(_send("HTTP/1.1 200 O"), _close),
    "closed within the body": _then(_send(_NINE_BYTES + "{"), _close),
    "closed after each answer": _then(_body('{"status": "open"}'), _close),
    "reset after each answer": _then(_body('{"status": "open"}'), _reset),
    # silent or endless answers
    "silent": _stay_silent,
    "silent after the headers": _then(_send(_NINE_BYTES), _stay_silent),
    "drips the headers": _then(_send(_OK), _repeat(b"X", every=0.02)),
    "drips the body": _then(_send(_GIGABYTE), _repeat(b" ", every=0.02)),
    "endless headers": _then(_send(_OK), _repeat(b"X-Y: z\r\n" * 5000)),
    "an endless header": _then(_send(_OK + "X: "), _repeat(CHUNK)),
    "a body of 1 GB": _then(_send(_GIGABYTE), _repeat(CHUNK)),
    "an endless body": _then(_send(_OK + "\r\n"), _repeat(CHUNK)),
    "an endless chunked body": _then(
        _send(_OK + "Transfer-Encoding: chunked\r\n\r\n"), _repeat(b"10000\r\n" + CHUNK + b"\r\n")
    ),
    "endless 100 Continue": _repeat(b"HTTP/1.1 100 Continue\r\n\r\n", every=0.001),
    # bodies
    "a gzip bomb": _answer(
        "200 OK", gzip.compress(b" " * 50_000_000, mtime=0), "Content-Encoding: gzip"
    ),
    "invalid UTF-8": _body(b'{"status": "\xff\xfe\xfa"}'),
    "JSON 100,000 deep": _body('{"status":' * 20_000 + "[" * 80_000),
    "valid JSON 30,000 deep": _body("[" * 30_000 + "]" * 30_000),
    "NaN": _body('{"status": NaN}'),
    "a number of 10,000 digits": _body('{"status": ' + "9" * 10_000 + "}"),
    "half a surrogate pair": _body('{"status": "\\ud800"}'),
    "a NUL": _body('{"status": "\\u0000"}'),
    "not JSON": _body("<html>Sorry</html>"),
    "an empty body": _body(""),
    "null": _body("null"),
    "a list": _body('["open"]'),
    "an unknown status": _body('{"status": "paid\\u001b[31m\\r\\n2026 forged"}'),
    "a status of 60,000 characters": _body('{"status": "' + "x" * 60_000 + '"}'),
    # statuses
    "100, then 200": _then(_send("HTTP/1.1 100 Continue\r\n\r\n"), _body('{"status": "open"}')),
    "103, then 200": _then(
        _send("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"), _body('{"status": "open"}')
    ),
    "101": _then(_send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), _stay_silent),
    "204": _send("HTTP/1.1 204 No Content\r\n\r\n"),
    "301 to another host": _redirect("301 Moved Permanently"),
    "302 to another host": _redirect("302 Found"),
    "307 to another host": _redirect("307 Temporary Redirect"),
    "308 to another host": _redirect("308 Permanent Redirect"),
    "300 to nowhere": _answer("300 Multiple Choices", "", "Location: http://[::"),
    "400": _answer("400 Bad Request"),
    "401": _answer("401 Unauthorized", "", "WWW-Authenticate: Basic"),
    "403": _answer("403 Forbidden"),
    "404": _answer("404 Not Found"),
    "410": _answer("410 Gone"),
    "418": _answer("418 I'm a teapot"),
    "500": _answer("500 Internal Server Error", '{"status": "paid"}'),
    "502": _answer("502 Bad Gateway", "<html>"),
    "503": _answer("503 Service Unavailable"),
    "504": _answer("504 Gateway Timeout"),
    "599": _answer("599 What"),
    "999": _answer("999 What"),
    # framing
    "Content-Length too long": _then(_send(_OK + "Content-Length: 90\r\n\r\n{}"), _stay_silent),
    "Content-Length too short": _send(_OK + 'Content-Length: 2\r\n\r\n{"status": "paid"}'),
    "Content-Length negative": _send(_OK + "Content-Length: -1\r\n\r\n"),
    "two Content-Lengths": _send(_OK + "Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}"),
    "Content-Length beyond 64 bits": _send(_OK + "Content-Length: 99999999999999999999\r\n\r\n"),
    "an invalid chunk size": _send(_OK + "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "a chunk size beyond 64 bits": _send(
        _OK + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n"
    ),
    "Content-Length and chunks": _send(
        _OK + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    ),
    "two answers at once": _send((_OK + "Content-Length: 2\r\n\r\n{}") * 2),
    "not HTTP": _then(_send("220 smtp.example ESMTP\r\n"), _close),
    "HTTP/2": _then(_send(b"\0\0\0\4\0\0\0\0\0"), _close),
    "an invalid status line": _then(_send("HTTP/1.1 OK 200\r\n\r\n"), _close),
    "non-ASCII headers": _answer("200 OK", '{"status": "open"}', "X-Shop: caf\u00e9"),
}

# Rate limits: each of these answers pauses every worker.
LIMITS: Mapping[str, Fault] = {
    "429": _answer("429 Too Many Requests"),
    "429 for 2 s": _retry_after("2"),
    "429 for 0 s": _retry_after("0"),
    "429 for a year": _retry_after("31536000"),
    "429 for 5,000 digits": _retry_after("9" * 5000),
    "429 until a date": _retry_after("Fri, 15 Jan 2027 12:00:00 GMT"),
    "429 until the year 99999999999": _retry_after("Fri, 15 Jan 99999999999 12:00:00 GMT"),
    "429 until yesterday": _retry_after("Wed, 14 Jan 2026 12:00:00 GMT"),
    "429 for -1": _retry_after("-1"),
    "429 for 1.5": _retry_after("1.5"),
    "429 for soon": _retry_after("soon"),
    "429 for an empty value": _retry_after(""),
    "429 with two values": _answer("429 Too Many Requests", "", "Retry-After: 2", "Retry-After: 4"),
    "503 for 2 s": _retry_after("2", "503 Service Unavailable"),
}


@dataclass
class CheckoutLog:
    """The requests that the service has received for one checkout."""

    requested_at: list[datetime] = field(default_factory=list)  # by the service's clock
    in_flight: int = 0
    max_in_flight: int = 0
    answered: int = 0
    api_keys: Counter[str | None] = field(default_factory=Counter)
    statuses: set[str] = field(default_factory=set)  # in correct answers


class FaultyBilling:
    """The service, in its own threads. `with FaultyBilling(clock) as billing: billing.url`."""

    def __init__(
        self,
        clock: Callable[[], datetime],
        *,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
        handshake_seconds: float = 0.0,
    ) -> None:
        self.statuses: dict[str, str] = {}
        self.healed = False
        self.log: defaultdict[str, CheckoutLog] = defaultdict(CheckoutLog)
        self.other_host = ""  # where redirects point
        self.redirected: list[str] = []  # the headers that `other_host` has received
        self.draw_fault: Callable[[str], Fault | None] | None = None  # instead of the id's fault
        self.before_answer: Callable[[str], None] = lambda _checkout: None
        self._clock = clock
        self._tls = tls
        self._port = port
        self._handshake_seconds = handshake_seconds
        self._lock = threading.Lock()
        self._connections = Connections()

    def __enter__(self) -> Self:
        self._port = self._connections.listen(self._serve, self._port)
        scheme = "https" if self._tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._port}/billing"
        self.other_host = f"http://localhost:{self._connections.listen(self._serve_other_host)}"
        return self

    def __exit__(self, *_: object) -> None:
        self._connections.close()

    @property
    def requests(self) -> int:
        return sum(len(log.requested_at) for log in self.log.values())

    def end_connections(self, *, reset: bool = False) -> None:
        self._connections.end_all(reset=reset)

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(FAULT_SECONDS * 4)
        if self._tls is not None:
            time.sleep(self._handshake_seconds)
            sock = self._tls.wrap_socket(sock, server_side=True)
        with sock, self._connections.track(sock):
            reader = sock.makefile("rb")
            while (head := _head(reader)) is not None:
                self._answer(sock, head)

    def _answer(self, sock: socket.socket, head: list[str]) -> None:
        checkout = unquote(head[0].split(" ")[1].rpartition("/")[2])
        fault_name = checkout.rpartition("-")[0]
        fault = None
        if not self.healed:
            fault = (
                self.draw_fault(checkout)
                if self.draw_fault
                else FAULTS.get(fault_name) or LIMITS.get(fault_name)
            )
        key = next((h[11:] for h in head if h.lower().startswith("x-api-key: ")), None)
        with self._lock:
            log = self.log[checkout]
        # A request that its client has given up counts as in flight until the service notices.
        began = time.monotonic()
        while log.in_flight and time.monotonic() < began + NOTICE_SECONDS:
            time.sleep(0.005)
        with self._lock:
            log.requested_at.append(self._clock())
            log.api_keys[key] += 1
            log.in_flight += 1
            log.max_in_flight = max(log.max_in_flight, log.in_flight)
        try:
            self.before_answer(checkout)
            with self._lock:
                log.answered += 1  # before its client has it, or a test may count one too few
            peer = Peer(sock, self)
            if fault is None:
                status = self.statuses.get(checkout, "open")
                log.statuses.add(status)
                peer.answer("200 OK", json.dumps({"status": status}))
            else:
                fault(peer)
        finally:
            with self._lock:
                log.in_flight -= 1

    def _serve_other_host(self, sock: socket.socket) -> None:
        """Record a client that has followed a redirect."""
        self.redirected += _head(sock.makefile("rb")) or []
        Peer(sock, self).answer("200 OK", '{"status": "paid"}')


def _head(reader: Iterator[bytes]) -> list[str] | None:
    head: list[str] = []
    for line in reader:
        if not line.strip():
            return head
        head.append(line.decode("latin-1").strip())
    return None

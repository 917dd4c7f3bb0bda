"""A billing service that does on raw sockets what a real one does in its worst hour.

`GET …/{fault}-{n}`: the checkout id says what its request gets. An id that names no fault, or any
id once the service is `healed`, gets an honest answer: its status by `words`, else `open`.
"""

import gzip
import json
import socket
import ssl
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self
from urllib.parse import unquote

from tests.chaos.threads import Threads

# How long a fault keeps a connection that it neither answers nor closes: longer than any client
# here waits.
FOR_EVER = 5.0
NOTICED_WITHIN = 0.3
PIECE = b" " * 65_536


@dataclass
class Peer:
    """One request, and the connection it came on."""

    sock: socket.socket
    service: "Misbehaving"

    def say(self, text: bytes | str) -> None:
        self.sock.sendall(text.encode() if isinstance(text, str) else text)

    def answer(self, status: str, body: bytes | str = b"", *headers: str) -> None:
        content = body.encode() if isinstance(body, str) else body
        head = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *headers, "", ""]
        self.say("\r\n".join(head).encode("utf-8") + content)

    def reset(self) -> None:
        """End the connection with a TCP RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionAbortedError

    def close(self) -> None:
        raise ConnectionAbortedError

    def hold(self) -> None:
        """Say nothing more until the other side has gone."""
        self.sock.settimeout(FOR_EVER)
        with suppress(OSError):
            self.sock.recv(1)
        raise ConnectionAbortedError

    def pour(self, piece: bytes, *, every: float = 0.0) -> None:
        """Send that again and again until the other side has gone."""
        began = time.monotonic()
        while time.monotonic() < began + FOR_EVER:
            self.say(piece)
            if every:
                time.sleep(every)
        raise ConnectionAbortedError


type Fault = Callable[[Peer], None]


def _then(*steps: Fault) -> Fault:
    def fault(peer: Peer) -> None:
        for step in steps:
            step(peer)

    return fault


def _say(text: bytes | str) -> Fault:
    return lambda peer: peer.say(text)


def _pour(piece: bytes, *, every: float = 0.0) -> Fault:
    return lambda peer: peer.pour(piece, every=every)


def _answer(status: str, body: bytes | str = b"", *headers: str) -> Fault:
    return lambda peer: peer.answer(status, body, *headers)


def _body(body: bytes | str) -> Fault:
    return _answer("200 OK", body, "Content-Type: application/json")


def _retry_after(value: str, status: str = "429 Too Many Requests") -> Fault:
    return _answer(status, "", f"Retry-After: {value}")


def _elsewhere(status: str) -> Fault:
    return lambda peer: peer.answer(status, "", f"Location: {peer.service.elsewhere}/moved")


_reset: Fault = Peer.reset
_close: Fault = Peer.close
_hold: Fault = Peer.hold
_OK = "HTTP/1.1 200 OK\r\n"
_GIGABYTE = _OK + "Content-Length: 1000000000\r\n\r\n"
_NINE = _OK + "Content-Length: 9\r\n\r\n"

FAULTS: Mapping[str, Fault] = {
    # connections
    "reset before the answer": _reset,
    "reset within the headers": _then(_say("HTTP/1.1 200 O"), _reset),
    "reset within the body": _then(_say(_NINE + "{"), _reset),
    "closed before the answer": _close,
    "closed within the headers": _then(_say("HTTP/1.1 200 O"), _close),
    "closed within the body": _then(_say(_NINE + "{"), _close),
    "closed after each answer": _then(_body('{"status": "open"}'), _close),
    "reset after each answer": _then(_body('{"status": "open"}'), _reset),
    # silence, and no end
    "silent": _hold,
    "silent after the headers": _then(_say(_NINE), _hold),
    "drips the headers": _then(_say(_OK), _pour(b"X", every=0.02)),
    "drips the body": _then(_say(_GIGABYTE), _pour(b" ", every=0.02)),
    "headers for ever": _then(_say(_OK), _pour(b"X-Y: z\r\n" * 5000)),
    "one endless header": _then(_say(_OK + "X: "), _pour(PIECE)),
    "a body of 1 GB": _then(_say(_GIGABYTE), _pour(PIECE)),
    "a body without an end": _then(_say(_OK + "\r\n"), _pour(PIECE)),
    "an endless chunked body": _then(
        _say(_OK + "Transfer-Encoding: chunked\r\n\r\n"), _pour(b"10000\r\n" + PIECE + b"\r\n")
    ),
    "100 Continue for ever": _pour(b"HTTP/1.1 100 Continue\r\n\r\n", every=0.001),
    # bodies
    "a gzip bomb": _answer(
        "200 OK", gzip.compress(b" " * 50_000_000, mtime=0), "Content-Encoding: gzip"
    ),
    "invalid UTF-8": _body(b'{"status": "\xff\xfe\xfa"}'),
    "JSON 100,000 deep": _body('{"status":' * 20_000 + "[" * 80_000),
    "deep JSON that is whole": _body("[" * 30_000 + "]" * 30_000),
    "NaN": _body('{"status": NaN}'),
    "a number of 10,000 digits": _body('{"status": ' + "9" * 10_000 + "}"),
    "half a surrogate pair": _body('{"status": "\\ud800"}'),
    "a NUL": _body('{"status": "\\u0000"}'),
    "no JSON": _body("<html>Sorry</html>"),
    "an empty body": _body(""),
    "null": _body("null"),
    "a list": _body('["open"]'),
    "an unknown word": _body('{"status": "paid\\u001b[31m\\r\\n2026 forged"}'),
    "a word of 60,000 characters": _body('{"status": "' + "x" * 60_000 + '"}'),
    # statuses
    "100, then 200": _then(_say("HTTP/1.1 100 Continue\r\n\r\n"), _body('{"status": "open"}')),
    "103, then 200": _then(
        _say("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"), _body('{"status": "open"}')
    ),
    "101": _then(_say("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), _hold),
    "204": _say("HTTP/1.1 204 No Content\r\n\r\n"),
    "301 to another host": _elsewhere("301 Moved Permanently"),
    "302 to another host": _elsewhere("302 Found"),
    "307 to another host": _elsewhere("307 Temporary Redirect"),
    "308 to another host": _elsewhere("308 Permanent Redirect"),
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
    "Content-Length too long": _then(_say(_OK + "Content-Length: 90\r\n\r\n{}"), _hold),
    "Content-Length too short": _say(_OK + 'Content-Length: 2\r\n\r\n{"status": "paid"}'),
    "Content-Length negative": _say(_OK + "Content-Length: -1\r\n\r\n"),
    "two Content-Lengths": _say(_OK + "Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}"),
    "Content-Length beyond 64 bits": _say(_OK + "Content-Length: 99999999999999999999\r\n\r\n"),
    "a chunk that is none": _say(_OK + "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"),
    "a chunk beyond 64 bits": _say(
        _OK + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n"
    ),
    "length and chunks": _say(
        _OK + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    ),
    "two answers at once": _say((_OK + "Content-Length: 2\r\n\r\n{}") * 2),
    "no HTTP": _then(_say("220 smtp.example ESMTP\r\n"), _close),
    "HTTP/2": _then(_say(b"\0\0\0\4\0\0\0\0\0"), _close),
    "a status that is none": _then(_say("HTTP/1.1 OK 200\r\n\r\n"), _close),
    "headers that are not ASCII": _answer("200 OK", '{"status": "open"}', "X-Shop: caf\u00e9"),
}

# Billing says when it wants to be asked again; every one of these pauses the whole sweep.
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
    "429 for nothing": _retry_after(""),
    "429 twice": _answer("429 Too Many Requests", "", "Retry-After: 2", "Retry-After: 4"),
    "503 for 2 s": _retry_after("2", "503 Service Unavailable"),
}


@dataclass
class Asked:
    """What the service has seen of one checkout."""

    at: list[datetime] = field(default_factory=list)  # by `clock`
    in_flight: int = 0
    most_in_flight: int = 0
    answered: int = 0
    keys: Counter[str | None] = field(default_factory=Counter)
    said: set[str] = field(default_factory=set)  # the words of honest answers


class Misbehaving:
    """The service, in threads of its own. `with Misbehaving(clock) as billing: billing.url`."""

    def __init__(
        self,
        clock: Callable[[], datetime],
        *,
        tls: ssl.SSLContext | None = None,
        port: int = 0,
        handshake_seconds: float = 0.0,
    ) -> None:
        self.words: dict[str, str] = {}
        self.healed = False
        self.asked: defaultdict[str, Asked] = defaultdict(Asked)
        self.elsewhere = ""
        self.strangers: list[str] = []  # what came to `elsewhere`
        self.draw: Callable[[str], Fault | None] | None = None  # a fault for each request, or none
        self.before: Callable[[str], None] = lambda _checkout: None  # called before an answer
        self.connections = 0
        self._clock = clock
        self._tls = tls
        self._port = port
        self._handshake_seconds = handshake_seconds
        self._lock = threading.Lock()
        self._threads = Threads()
        self._open: set[socket.socket] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._port = self._listen(self._port, self._serve)
        scheme = "https" if self._tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._port}/billing"
        self.elsewhere = f"http://localhost:{self._listen(0, self._note)}"
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.end_connections()
        self._threads.join()

    @property
    def requests(self) -> int:
        return sum(len(asked.at) for asked in self.asked.values())

    def end_connections(self, *, reset: bool = False) -> None:
        """End every connection there is, as a restart does; or as a firewall does."""
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    if reset:
                        sock.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                        sock.close()
                    else:
                        sock.shutdown(socket.SHUT_RDWR)

    def _listen(self, port: int, serve: Callable[[socket.socket], None]) -> int:
        listening = socket.create_server(("127.0.0.1", port), backlog=1024)

        def stop() -> None:
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()

        self._stack.callback(stop)
        self._threads.start(self._accept, listening, serve)
        bound: int = listening.getsockname()[1]
        return bound

    def _accept(self, listening: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with suppress(OSError):
            while True:
                sock, _ = listening.accept()
                with self._lock:
                    self._open.add(sock)
                    self.connections += 1
                self._threads.start(self._until_it_ends, sock, serve)

    def _until_it_ends(self, sock: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        try:
            with suppress(OSError, ValueError):  # a case may end it before its thread has begun
                sock.settimeout(FOR_EVER * 4)
                serve(sock)
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()

    def _serve(self, sock: socket.socket) -> None:
        if self._tls is not None:
            time.sleep(self._handshake_seconds)
            with self._lock:
                self._open.discard(sock)
            sock = self._tls.wrap_socket(sock, server_side=True)
            with self._lock:
                self._open.add(sock)
        with suppress(OSError), sock:
            reader = sock.makefile("rb")
            while (head := _head(reader)) is not None:
                self._one(sock, head)

    def _one(self, sock: socket.socket, head: list[str]) -> None:
        checkout = unquote(head[0].split(" ")[1].rpartition("/")[2])
        name = checkout.rpartition("-")[0]
        fault = None
        if not self.healed:
            fault = self.draw(checkout) if self.draw else FAULTS.get(name) or LIMITS.get(name)
        key = next((h[11:] for h in head if h.lower().startswith("x-api-key: ")), None)
        with self._lock:
            asked = self.asked[checkout]
        # That a client has gone is noticed a moment later.
        began = time.monotonic()
        while asked.in_flight and time.monotonic() < began + NOTICED_WITHIN:
            time.sleep(0.005)
        with self._lock:
            asked.at.append(self._clock())
            asked.keys[key] += 1
            asked.in_flight += 1
            asked.most_in_flight = max(asked.most_in_flight, asked.in_flight)
        try:
            self.before(checkout)
            peer = Peer(sock, self)
            if fault is None:
                word = self.words.get(checkout, "open")
                asked.said.add(word)
                peer.answer("200 OK", json.dumps({"status": word}))
            else:
                fault(peer)
        finally:
            with self._lock:
                asked.in_flight -= 1
                asked.answered += 1

    def _note(self, sock: socket.socket) -> None:
        """Another host: whoever comes here was sent."""
        head = _head(sock.makefile("rb"))
        self.strangers += head or []
        Peer(sock, self).answer("200 OK", '{"status": "paid"}')


def _head(reader: Iterator[bytes]) -> list[str] | None:
    head: list[str] = []
    for line in reader:
        if not line.strip():
            return head
        head.append(line.decode("latin-1").strip())
    return None


@contextmanager
def misbehaving(clock: Callable[[], datetime]) -> Iterator[Misbehaving]:
    with Misbehaving(clock) as billing:
        yield billing

"""A proxy for a MySQL server that counts statements and runs an action at the n-th.

It knows only the necessary part of the protocol. A packet is three bytes of length, a number and a
payload. A statement is a packet that begins with COM_QUERY; `_read_answer` finds the end of its
answer. The proxy hides TLS from the client so that it can read the statements.
"""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

from tests.chaos.sockets import Connections

COM_QUERY = 3
CLIENT_SSL = 0x0800
OK, MORE_DATA, EOF, ERROR = 0x00, 0x01, 0xFE, 0xFF
FAST_AUTH_SUCCEEDED = 3


class Cut(Exception):  # noqa: N818 (a command, not an error)
    """An action raises it to end the connection."""


class Statement:
    """The n-th statement that clients have sent since the counter was reset."""

    def __init__(self, number: int, sql: str, proxy: "Proxy") -> None:
        self.number = number
        self.sql = sql
        self.proxy = proxy
        self.error: tuple[int, str] | None = None


type Action = Callable[[Statement], None]


def cut(_statement: Statement) -> None:
    """End the connection without an answer, before or after the server runs the statement."""
    raise Cut


def refuse(code: int, message: str = "refused by the test") -> Action:
    """Answer with this error and do not forward the statement."""

    def action(statement: Statement) -> None:
        statement.error = (code, message)

    return action


class Proxy:
    """`with Proxy(server_url) as proxy: proxy.url(database)`."""

    def __init__(self, server: str) -> None:
        url = urlsplit(server)
        self._server = (url.hostname or "", url.port or 3306)
        self._login = url.netloc.rpartition("@")[0]
        self._lock = threading.Lock()
        self._connections = Connections()
        self.count = 0
        self.refuses_connections = False
        self.before: dict[int, Action] = {}
        self.after: dict[int, Action] = {}
        self.log: list[str] = []

    def __enter__(self) -> Self:
        self._port = self._connections.listen(self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        self._connections.close()

    def url(self, database: str) -> str:
        return f"mysql://{self._login}@127.0.0.1:{self._port}/{database}"

    def connect_to(self, server: str) -> None:
        """Connect new clients to that server, as after a failover; open connections stay."""
        url = urlsplit(server)
        self._server = (url.hostname or "", url.port or 3306)

    def reset(self) -> None:
        self.count = 0
        self.before.clear()
        self.after.clear()
        self.log.clear()
        self.refuses_connections = False

    def cut_all(self) -> None:
        self._connections.end_all()

    def _serve(self, client: socket.socket) -> None:
        if self.refuses_connections:
            return
        with (
            socket.create_connection(self._server) as server,
            self._connections.track(server),
            suppress(EOFError, Cut),
        ):
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wires = _Wire(client), _Wire(server)
            self._log_in(*wires)
            while True:
                self._forward(*wires)

    def _log_in(self, client: "_Wire", server: "_Wire") -> None:
        client.send(_without_tls(server.read()))
        server.send(client.read())
        while True:
            packet = server.read()
            client.send(packet)
            kind = packet[4]
            if kind == OK:
                return
            if kind == ERROR:
                raise EOFError
            if not (kind == MORE_DATA and packet[5] == FAST_AUTH_SUCCEEDED):
                server.send(client.read())

    def _forward(self, client: "_Wire", server: "_Wire") -> None:
        packet = client.read()
        if packet[4] != COM_QUERY:
            server.send(packet)
            return  # COM_QUIT, which has no answer; the monitor sends no other command
        with self._lock:
            self.count += 1
            statement = Statement(self.count, packet[5:].decode(errors="replace"), self)
            self.log.append(statement.sql)
        if action := self.before.get(statement.number):
            action(statement)
        if statement.error is not None:
            code, message = statement.error
            payload = struct.pack("<BH", ERROR, code) + b"#HY000" + message.encode()
            client.send(struct.pack("<I", len(payload))[:3] + b"\1" + payload)
            return
        server.send(packet)
        answer = _read_answer(server)
        if action := self.after.get(statement.number):
            action(statement)
        client.send(answer)


class _Wire:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = b""  # and not read yet

    def read(self) -> bytes:
        head = self._exactly(4)
        return head + self._exactly(int.from_bytes(head[:3], "little"))

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def _exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            more = self._sock.recv(65_536)
            if not more:
                raise EOFError
            self._received += more
        data, self._received = self._received[:size], self._received[size:]
        return data


def _without_tls(greeting: bytes) -> bytes:
    """The server's first packet without the capability flag for TLS."""
    version_ends = greeting.index(b"\0", 5)
    at = version_ends + 1 + 4 + 8 + 1  # connection id, salt, filler
    (flags,) = struct.unpack_from("<H", greeting, at)
    return greeting[:at] + struct.pack("<H", flags & ~CLIENT_SSL) + greeting[at + 2 :]


def _read_answer(server: _Wire) -> bytes:
    """Read all packets of an answer: OK, an error, or columns and rows."""
    packets = packet = server.read()
    if packet[4] in (OK, ERROR):
        return packets
    ends = 0
    while ends < 2:  # the end of the columns and the end of the rows
        packet = server.read()
        packets += packet
        if packet[4] == ERROR:
            return packets
        ends += packet[4] == EOF and len(packet) < 13
    return packets

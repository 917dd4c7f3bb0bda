"""A proxy before a MySQL server that counts statements, and cuts, refuses, or waits at one of them.

It speaks the protocol as far as it must: a packet is three bytes of length, a number, a payload; a
statement is a packet that begins with COM_QUERY, and its answer ends where `_answer` says. TLS is
hidden from the client, because statements are to be seen.
"""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit

from tests.chaos.threads import Threads

COM_QUERY = 3
CLIENT_SSL = 0x0800
OK, MORE_DATA, EOF, ERROR = 0x00, 0x01, 0xFE, 0xFF
FAST_AUTH_SUCCEEDED = 3


class Cut(Exception):  # noqa: N818 (what happens, not what is wrong)
    """End this connection here."""


class Statement:
    """One statement that a client sends, the n-th since the counter was last set to 0."""

    def __init__(self, number: int, sql: str, proxy: "Proxy") -> None:
        self.number = number
        self.sql = sql
        self.proxy = proxy
        self.forwarded = False
        self.error: tuple[int, str] | None = None


type Action = Callable[[Statement], None]


def cut(_statement: Statement) -> None:
    """Before the server has seen it, or after it has done it: the client is told nothing."""
    raise Cut


def refuse(code: int, message: str = "as told to") -> Action:
    """Answer with this error, and tell the server nothing."""

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
        self._sockets: set[socket.socket] = set()
        self._threads = Threads()
        self.count = 0
        self.connects = 0
        self.refusing = False  # new connections
        self.before: dict[int, Action] = {}
        self.after: dict[int, Action] = {}
        self.log: list[str] = []

    def __enter__(self) -> Self:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._threads.start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut_all()
        self._threads.join()

    def url(self, database: str) -> str:
        return f"mysql://{self._login}@127.0.0.1:{self._listening.getsockname()[1]}/{database}"

    def lead_to(self, server: str) -> None:
        """New connections go there, as after a failover; those that stand stay."""
        url = urlsplit(server)
        self._server = (url.hostname or "", url.port or 3306)

    def reset(self) -> None:
        self.count = 0
        self.before.clear()
        self.after.clear()
        self.log.clear()
        self.refusing = False

    def cut_all(self) -> None:
        with self._lock:
            for sock in self._sockets:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self.connects += 1
                if self.refusing:
                    client.close()
                else:
                    self._threads.start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._server)
        except OSError:
            client.close()
            return
        with self._lock:
            self._sockets |= {client, server}
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with suppress(OSError, EOFError, Cut):
                self._log_in(_Wire(client), _Wire(server))
                while True:
                    self._command(_Wire(client), _Wire(server))
        finally:
            with self._lock:
                self._sockets -= {client, server}
            client.close()
            server.close()

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

    def _command(self, client: "_Wire", server: "_Wire") -> None:
        packet = client.read()
        if packet[4] != COM_QUERY:
            server.send(packet)
            return  # COM_QUIT, which has no answer; the monitor sends no other
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
        answer = _answer(server)
        statement.forwarded = True
        if action := self.after.get(statement.number):
            action(statement)
        client.send(answer)


class _Wire:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def read(self) -> bytes:
        head = self._exactly(4)
        return head + self._exactly(int.from_bytes(head[:3], "little"))

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


def _without_tls(greeting: bytes) -> bytes:
    """The server's first packet, with the flag for TLS taken out of its capabilities."""
    version_ends = greeting.index(b"\0", 5)
    at = version_ends + 1 + 4 + 8 + 1  # the connection's number, the salt, a filler
    (flags,) = struct.unpack_from("<H", greeting, at)
    return greeting[:at] + struct.pack("<H", flags & ~CLIENT_SSL) + greeting[at + 2 :]


def _answer(server: _Wire) -> bytes:
    """All packets of the answer to a statement: OK, an error, or columns and rows."""
    whole = packet = server.read()
    if packet[4] in (OK, ERROR):
        return whole
    ends = 0
    while ends < 2:  # the columns' end, and the rows'
        packet = server.read()
        whole += packet
        if packet[4] == ERROR:
            return whole
        ends += packet[4] == EOF and len(packet) < 13
    return whole

"""A billing service over TLS, in its own process, that counts what it receives and sends.

It answers every request after a delay, with HTTP/1.1 or HTTP/2. AWS bills IP packets, so it reads
the kernel's counts for its connections: segments with headers, TLS records, acknowledgements.
"""

import asyncio
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import override

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived
from h2.exceptions import ProtocolError
from hyperframe.frame import GoAwayFrame

# IPv4's and TCP's headers of a segment, with the timestamps that Linux adds.
SEGMENT_HEADERS = 20 + 20 + 12
# The offsets of tcpi_bytes_acked, tcpi_bytes_received (64 bits), tcpi_segs_out and tcpi_segs_in (32
# bits) in Linux's `struct tcp_info`: include/uapi/linux/tcp.h.
TCP_INFO = struct.Struct("120x 2Q 2I")

MAX_STREAMS = 128  # of an HTTP/2 connection, nginx's default
BODY = b'{"status":"active"}'
HEADERS = [
    (":status", "200"),
    ("date", "Thu, 15 Jan 2026 12:00:00 GMT"),
    ("content-type", "application/json"),
    ("content-length", str(len(BODY))),
]
ANSWER = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 15 Jan 2026 12:00:00 GMT\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: keep-alive\r\n\r\n" % len(BODY)
) + BODY


@dataclass(frozen=True, slots=True)
class Counts:
    """What all connections have carried, including those that have ended."""

    connections: int
    requests: int
    bytes_in: int  # TLS records; `in` is from the client
    segments_in: int
    bytes_out: int
    segments_out: int

    def __sub__(self, before: "Counts") -> "Counts":
        return Counts(*(getattr(self, n) - getattr(before, n) for n in Counts.__slots__))

    @property
    def sent(self) -> int:
        """Bytes of IP packets that the client sent, which AWS bills as data out."""
        return self.bytes_in + SEGMENT_HEADERS * self.segments_in

    @property
    def received(self) -> int:
        return self.bytes_out + SEGMENT_HEADERS * self.segments_out


class Service:
    """The running service: its address, and its counts so far."""

    def __init__(self, process: subprocess.Popen[str], port: int, authority: Path) -> None:
        self._process = process
        self.port = port
        self.url = f"https://localhost:{port}/billing/api/v1/paysession"
        self.authority = authority

    def counts(self) -> Counts:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print("counts", file=self._process.stdin, flush=True)
        return Counts(**json.loads(self._process.stdout.readline()))


@contextmanager
def service(
    directory: Path, latency_seconds: float, *, http2: bool = False, max_requests: int = 1_000
) -> Iterator[Service]:
    """Run the service with a self-signed certificate for localhost, kept in the directory.

    It closes an HTTP/2 connection after `max_requests`, as nginx does.
    """
    certificate, key = directory / "server.pem", directory / "server.key"
    if not certificate.exists():
        new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        new += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        new += ["-addext", "basicConstraints=critical,CA:FALSE"]
        new += ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run(new, check=True, capture_output=True)
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "testkit.tls_billing", certificate, key, str(latency_seconds)),
            *("h2" if http2 else "http/1.1", str(max_requests)),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield Service(process, int(process.stdout.readline()), certificate)
        finally:
            process.terminate()


class _Connection(asyncio.Protocol):
    requests = 0
    all: list[socket.socket]  # of the class: duplicates, which outlive the connections

    def __init__(self, latency_seconds: float) -> None:
        self._latency_seconds = latency_seconds
        self._received = b""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        _Connection.all.append(transport.get_extra_info("socket").dup())

    @override
    def data_received(self, data: bytes) -> None:
        *requests, self._received = (self._received + data).split(b"\r\n\r\n")
        for _ in requests:
            self._answer_later(self._transport.write, ANSWER)

    def _answer_later[*T](self, answer: Callable[[*T], object], *given: *T) -> None:
        _Connection.requests += 1
        asyncio.get_running_loop().call_later(self._latency_seconds, answer, *given)


class _Http2Connection(_Connection):
    def __init__(self, latency_seconds: float, max_requests: int) -> None:
        super().__init__(latency_seconds)
        self._left = max_requests
        self._streams = 0
        self._http2 = H2Connection(H2Configuration(client_side=False))

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._http2.local_settings.max_concurrent_streams = MAX_STREAMS
        self._http2.initiate_connection()
        self._flush()

    @override
    def data_received(self, data: bytes) -> None:
        for event in self._http2.receive_data(data):
            # The client sends requests after the last one again, on another connection.
            if isinstance(event, RequestReceived) and self._left:
                assert event.stream_id is not None
                self._streams += 1
                self._left -= 1
                self._answer_later(self._answer, event.stream_id)
                if not self._left:  # h2's own method would also end open streams
                    goodbye = GoAwayFrame(last_stream_id=event.stream_id)
                    self._transport.write(goodbye.serialize())
        self._flush()

    def _answer(self, stream: int) -> None:
        with suppress(ProtocolError):  # the client gave up
            self._http2.send_headers(stream, HEADERS)
            self._http2.send_data(stream, BODY, end_stream=True)
        self._flush()
        self._streams -= 1
        if not self._left and not self._streams:
            self._transport.close()

    def _flush(self) -> None:
        self._transport.write(self._http2.data_to_send())


def _counts() -> Counts:
    totals = [0, 0, 0, 0]
    for connection in _Connection.all:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
        totals = [sum(pair) for pair in zip(totals, TCP_INFO.unpack(info), strict=True)]
    bytes_out, bytes_in, segments_out, segments_in = totals
    return Counts(
        len(_Connection.all), _Connection.requests, bytes_in, segments_in, bytes_out, segments_out
    )


async def _serve(certificate: str, key: str, latency: str, version: str, max_requests: str) -> None:
    _Connection.all = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols([version])

    def connection() -> _Connection:
        if version == "h2":
            return _Http2Connection(float(latency), int(max_requests))
        return _Connection(float(latency))

    loop = asyncio.get_running_loop()
    server = await loop.create_server(connection, "127.0.0.1", 0, ssl=context, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()

    def asked() -> None:
        if not sys.stdin.readline():
            ended.set()
            return
        counts = _counts()
        print(json.dumps({n: getattr(counts, n) for n in Counts.__slots__}), flush=True)

    loop.add_reader(sys.stdin, asked)
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))

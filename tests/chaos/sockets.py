"""A base for simulated servers: one thread for each connection, and a way to end them all."""

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


def send_reset_on_close(sock: socket.socket) -> None:
    """Make `close` send a TCP RST instead of a FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Threads:
    """Threads to join at the end. Finished ones are dropped, because a soak starts thousands."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._alive: list[threading.Thread] = []

    def start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        thread.start()
        with self._lock:
            self._alive = [thread, *(t for t in self._alive if t.is_alive())]

    def join(self) -> None:
        for thread in self._alive:
            thread.join()


class Connections:
    """Listens on ports of 127.0.0.1 and serves each connection in a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = Threads()
        self._listening: list[socket.socket] = []
        self._open: set[socket.socket] = set()

    def listen(self, serve: Callable[[socket.socket], None], port: int = 0) -> int:
        """Call `serve` with each connection; returns the port (0 asks for a free one)."""
        listening = socket.create_server(("127.0.0.1", port), backlog=1024)
        self._listening.append(listening)
        self._threads.start(self._accept, listening, serve)
        bound: int = listening.getsockname()[1]
        return bound

    @contextmanager
    def track(self, *socks: socket.socket) -> Iterator[None]:
        """Let `end_all` end these sockets until the block ends."""
        with self._lock:
            self._open |= set(socks)
        try:
            yield
        finally:
            with self._lock:
                self._open -= set(socks)

    def end_all(self, *, reset: bool = False) -> None:
        """End every open connection: as a restart does, or with a RST as a firewall does."""
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    if reset:
                        send_reset_on_close(sock)
                        sock.close()
                    else:
                        sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for listening in self._listening:
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
        self.end_all()
        self._threads.join()

    def _accept(self, listening: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with suppress(OSError):
            while True:
                sock, _ = listening.accept()
                with self._lock:  # here, so that `end_all` misses no accepted connection
                    self._open.add(sock)
                self._threads.start(self._serve, sock, serve)

    def _serve(self, sock: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with sock, self.track(sock), suppress(OSError, ValueError):  # `end_all` may have closed it
            serve(sock)

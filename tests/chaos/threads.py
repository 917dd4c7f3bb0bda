"""The threads of a simulated service, which makes one for each connection."""

import threading
from collections.abc import Callable


class Threads:
    """Those that are still at work; the others are forgotten, because a soak makes thousands."""

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

"""A worker process that runs as Lambda runs it: one tick each interval, until SIGTERM.

`python -m tests.chaos.soak.worker`, with the function's environment. It also ends with its parent.
"""

import asyncio
import os
import signal
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, cast

from core.domain.model import iso
from core.errors import StoreError
from core.log import logger
from core.settings import Settings
from handlers import check

PASS_SECONDS = 25.0


class Context:
    """The part of Lambda's context that the handler uses: the remaining time."""

    def get_remaining_time_in_millis(self) -> int:
        return int(PASS_SECONDS * 1000)


def main() -> None:
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        check.worker().stop()

    signal.signal(signal.SIGTERM, stop)
    interval = Settings.from_env(os.environ).interval_seconds
    parent = os.getppid()
    while not stopping.is_set() and os.getppid() == parent:
        slot = (time.time() // interval + 1) * interval
        while time.time() < slot and not stopping.is_set():
            time.sleep(0.02)
        if stopping.is_set():
            break
        tick = {"tick": iso(datetime.fromtimestamp(slot, UTC))}
        try:
            with suppress(StoreError, asyncio.CancelledError):
                check.handler(tick, cast("Any", Context()))
        except Exception:  # noqa: BLE001 (the soak searches the log for tracebacks)
            logger.exception("❌ Unexpected error in a pass")
    check.worker().close()


if __name__ == "__main__":
    main()

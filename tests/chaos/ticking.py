"""One worker in a process of its own, as Lambda runs it: a tick each interval, until SIGTERM.

`python -m tests.chaos.ticking`, with the environment of the function. It ends with its parent, too.
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
    """What the handler needs of Lambda's: how much of its time is left."""

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
        except Exception:  # noqa: BLE001 (a bug, which the log is searched for)
            logger.exception("❌ A pass met a bug")
    check.worker().close()


if __name__ == "__main__":
    main()

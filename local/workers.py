"""What Lambda does, on this machine: workers in threads, kept warm and used again."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from core.domain.model import JsonObject
from core.domain.summary import Summary
from core.errors import StartWorkerError, StoreError
from core.log import logger
from core.settings import Settings
from core.worker import Health, Worker

# The maximum time of a pass; on Lambda it is the function's timeout.
PASS_SECONDS = 25.0


class Workers:
    """Up to `max_workers` workers, each with its own thread and connections.

    It implements `handlers.api.Monitor`: each call runs on a free worker.
    """

    def __init__(self, settings: Settings, max_workers: int) -> None:
        self._settings = settings
        self._max_workers = max_workers
        self._pool = ThreadPoolExecutor(max_workers, thread_name_prefix="worker")
        self._free = threading.Semaphore(max_workers)
        self._thread_local = threading.local()
        self._workers: list[Worker] = []

    def start_check(self, tick: datetime) -> None:
        """Start the tick's pass and return at once; skip the tick if no worker is free."""
        try:
            self._start_another(tick)
        except StartWorkerError as error:
            logger.error(f"❌ Tick skipped: {error}")

    def health(self) -> Health:
        return self._pool.submit(lambda: self._worker().health()).result()

    def status(self) -> JsonObject:
        return self._pool.submit(lambda: self._worker().status()).result()

    def trigger_checkout_session_check(self, session_ids: Sequence[str] | None = None) -> Summary:
        try:
            return self._pool.submit(
                lambda: self._worker().trigger_checkout_session_check(session_ids)
            ).result()
        except asyncio.CancelledError:
            raise StoreError("The monitor is stopping.") from None

    def close(self) -> None:
        """Stop the running passes, which release their claims, and close every connection."""
        for worker in self._workers:
            worker.stop()
        self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _start_another(self, tick: datetime) -> None:
        if not self._free.acquire(blocking=False):
            raise StartWorkerError(f"all {self._max_workers} workers are busy")
        self._pool.submit(self._check, tick)

    def _check(self, tick: datetime) -> None:
        try:
            self._worker().check_open_checkout_sessions(tick, seconds=PASS_SECONDS)
        except StoreError as error:
            logger.error(f"❌ {error}")
        except asyncio.CancelledError:
            pass  # close() has stopped it
        except Exception:  # noqa: BLE001 (nobody sees a thread's exception; the loop goes on)
            logger.exception("❌ Unexpected error in a pass")
        finally:
            self._free.release()

    def _worker(self) -> Worker:
        worker: Worker | None = getattr(self._thread_local, "worker", None)
        if worker is None:
            worker = self._thread_local.worker = Worker(
                self._settings, start_worker=self._start_another
            )
            self._workers.append(worker)
        return worker

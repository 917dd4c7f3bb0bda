"""Lambda's side of the work on this machine: workers in threads, kept warm and used again."""

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

# A pass may take this long; on Lambda it is the function's timeout.
PASS_SECONDS = 25.0


class Workers:
    """Up to `most` workers, each in a thread, each with its own connections.

    It is a `handlers.api.Monitor`: what it is asked runs on a worker that is free.
    """

    def __init__(self, settings: Settings, most: int) -> None:
        self._settings = settings
        self._most = most
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="worker")
        self._free = threading.Semaphore(most)
        self._of_thread = threading.local()
        self._workers: list[Worker] = []

    def start_check(self, tick: datetime) -> None:
        """Start the tick's pass and come back at once; without a free worker it is skipped."""
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
        """End what runs, which gives its claims back, and close every connection."""
        for worker in self._workers:
            worker.stop()
        self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _start_another(self, tick: datetime) -> None:
        if not self._free.acquire(blocking=False):
            raise StartWorkerError(f"all {self._most} workers are busy")
        self._pool.submit(self._check, tick)

    def _check(self, tick: datetime) -> None:
        try:
            self._worker().check_open_checkout_sessions(tick, seconds=PASS_SECONDS)
        except StoreError as error:
            logger.error(f"❌ {error}")
        except asyncio.CancelledError:
            pass  # close() asked for it
        except Exception:  # noqa: BLE001 (what a thread raises is never seen; the loop goes on)
            logger.exception("❌ A pass met a bug")
        finally:
            self._free.release()

    def _worker(self) -> Worker:
        worker: Worker | None = getattr(self._of_thread, "worker", None)
        if worker is None:
            worker = self._of_thread.worker = Worker(
                self._settings, start_worker=self._start_another
            )
            self._workers.append(worker)
        return worker

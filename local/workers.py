"""What Lambda does, on this machine: workers in threads, kept warm and used again."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import datetime
from typing import Any

from core.domain.model import JsonObject
from core.domain.summary import Summary
from core.errors import StartWorkerError, StoreError
from core.log import logger
from core.settings import Settings
from core.store.health import Health
from core.worker import Worker

# The maximum time of a pass; on Lambda it is the function's timeout.
PASS_SECONDS = 25.0
# A pass that was about to begin when the monitor stopped is stopped this much later.
STOP_AGAIN_SECONDS = 0.1


class Workers:
    """Up to `max_workers` workers, each with its own thread and connections.

    It implements `handlers.routes.Monitor`: each call runs on a free worker. `name` is what other
    monitors on the same tables call this one.
    """

    def __init__(self, settings: Settings, max_workers: int, name: str = "make run") -> None:
        self._settings = settings
        self._name = name
        self._max_workers = max_workers
        self._pool = ThreadPoolExecutor(max_workers, thread_name_prefix="worker")
        self._free = threading.Semaphore(max_workers)
        self._thread_local = threading.local()
        self._workers: list[Worker] = []
        self._lock = threading.Lock()  # of the next two
        self._unfinished: set[Future[Any]] = set()
        self._stopping = Future[None]()  # has a result when the monitor stops

    def start_check(self, tick: datetime) -> None:
        """Start the tick's pass and return at once; skip the tick if no worker is free."""
        try:
            self._start_pass(tick, helps=False)
        except StartWorkerError as error:
            logger.error(f"❌ Tick skipped: {error}")

    def health(self) -> Health:
        return self._result_of(lambda: self._worker().health())

    def status(self) -> JsonObject:
        return self._result_of(lambda: self._worker().status())

    def find_sessions(self, text: str) -> JsonObject:
        return self._result_of(lambda: self._worker().find_sessions(text))

    def sessions_of(self, outcome: str, after: int) -> JsonObject:
        return self._result_of(lambda: self._worker().sessions_of(outcome, after))

    def trigger_checkout_session_check(self, session_ids: Sequence[str] | None = None) -> Summary:
        return self._result_of(lambda: self._worker().trigger_checkout_session_check(session_ids))

    def stop(self) -> None:
        """Make the passes under way release their claims and end, and start no other.

        Calls that wait for a result raise StoreError at once.
        """
        with self._lock:
            if not self._stopping.done():
                self._stopping.set_result(None)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._stop_passes()

    def close(self) -> None:
        """Stop, wait until the passes have ended, and close every connection."""
        self.stop()
        while wait(self._jobs(), timeout=STOP_AGAIN_SECONDS).not_done:
            self._stop_passes()
        self._pool.shutdown()
        for worker in self._workers:
            worker.close()

    def _start_helper(self, tick: datetime) -> None:
        self._start_pass(tick, helps=True)

    def _start_pass(self, tick: datetime, *, helps: bool) -> None:
        if not self._free.acquire(blocking=False):
            raise StartWorkerError(f"all {self._max_workers} workers are busy")
        self._submit(lambda: self._check(tick, helps=helps))

    def _check(self, tick: datetime, *, helps: bool) -> None:
        try:
            self._worker().check_open_checkout_sessions(tick, helps=helps, seconds=PASS_SECONDS)
        except StoreError as error:
            logger.error(f"❌ {error}")
        except asyncio.CancelledError:
            pass  # it was stopped
        except Exception:  # noqa: BLE001 (nobody sees a thread's exception; the loop goes on)
            logger.exception("❌ Unexpected error in a pass")
        finally:
            self._free.release()

    def _result_of[T](self, work: Callable[[], T]) -> T:
        """What `work` returns on a free worker.

        Raises:
            StoreError: the monitor is stopping.
        """
        job = self._submit(work)
        if job is not None:
            either: tuple[Future[Any], ...] = (job, self._stopping)
            wait(either, return_when=FIRST_COMPLETED)
        if job is None or self._stopping.done():
            raise StoreError("The monitor is stopping.")
        return job.result()

    def _submit[T](self, work: Callable[[], T]) -> Future[T] | None:
        """Run `work` on a free worker; None if the monitor is stopping."""
        with self._lock:
            if self._stopping.done():
                return None
            job = self._pool.submit(work)
            self._unfinished.add(job)
        job.add_done_callback(self._forget)
        return job

    def _forget(self, job: Future[Any]) -> None:
        with self._lock:
            self._unfinished.discard(job)

    def _jobs(self) -> set[Future[Any]]:
        with self._lock:
            return self._unfinished.copy()

    def _stop_passes(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _worker(self) -> Worker:
        worker: Worker | None = getattr(self._thread_local, "worker", None)
        if worker is None:
            worker = self._thread_local.worker = Worker(
                self._settings, start_worker=self._start_helper, name=self._name
            )
            self._workers.append(worker)
        return worker

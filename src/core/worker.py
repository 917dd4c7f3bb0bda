"""The wiring: settings become a store, a billing client and the event loop they run on."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import uvloop

from core.billing.client import BillingClient
from core.database.address import DatabaseSecret, IamDatabase, MySQLAddress
from core.database.mysql import MySQLDatabase
from core.database.port import Database
from core.domain.model import JsonObject, Reason
from core.domain.summary import Summary
from core.errors import StoreError
from core.log import logger
from core.passes import check_pass
from core.passes.running_pass import PassOptions
from core.passes.scaling import StartWorker
from core.settings import Settings
from core.store.other_monitors import monitor_of
from core.store.status_changes import Publisher
from core.store.store import Store

if TYPE_CHECKING:
    from core.store.health import Health

# Kept free at the end of a Lambda's time, to record what is in flight and to write the pass's row.
FINISH_SECONDS = 5.0
# Reading for the API takes no longer. The page says after ten seconds that no answer has come.
READ_SECONDS = 7.0


class Worker:
    """What one Lambda execution environment keeps between passes, above all connections.

    It does one thing at a time and belongs to the thread that uses it first; only `stop` may be
    called from another one. `name` tells monitors on the same tables apart, for people; they are
    also told `on_lambda`, whether Lambda starts the passes.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], datetime] | None = None,
        start_worker: StartWorker | None = None,
        name: str = "a monitor without a name",
        on_lambda: bool = False,
    ) -> None:
        self._settings = settings
        self._start_worker = start_worker
        self._on_lambda = on_lambda
        self._database = open_database(settings, clock=clock)
        monitor = monitor_of(settings, name)
        self._store = Store(
            self._database,
            _publisher(settings),
            monitor=monitor,
            late_payments_for=settings.late_payments_for,
            late_status_updates=settings.late_status_updates,
            batch_size=settings.max_concurrency,
        )
        self._billing = _billing(settings, transport)
        # asyncio's own loop makes two system calls for each answer that comes from Rust's threads.
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._database_thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._running: asyncio.Task[Summary] | None = None

    def check_open_checkout_sessions(
        self, tick: datetime | None = None, *, helps: bool = False, seconds: float = 60.0
    ) -> Summary:
        """Make a pass for a tick, within `seconds`. Raises what the pass raises.

        `helps`: the tick's leader started this worker, so it does not lead.
        """
        total = max(1.0, seconds - FINISH_SECONDS)
        options = PassOptions(
            Reason.TICK,
            tick=tick,
            helps=helps,
            start_seconds=max(1.0, total - self._settings.request_timeout_seconds),
            total_seconds=total,
        )
        return self._run(
            check_pass.check_open_checkout_sessions(
                self._store,
                self._billing,
                self._settings,
                options,
                database_thread=self._database_thread,
                start_worker=self._start_worker,
            )
        )

    def trigger_checkout_session_check(self, session_ids: Sequence[str] | None = None) -> Summary:
        """Make a manual pass. Raises what the pass raises."""
        return self._run(
            check_pass.trigger_checkout_session_check(
                self._store,
                self._billing,
                self._settings,
                session_ids=session_ids,
                database_thread=self._database_thread,
            )
        )

    def health(self) -> "Health":
        """The answer of `GET /api/health`. A failure of the database is logged."""
        # Not for a cold worker.
        from core.store.health import read_health, without_database  # noqa: PLC0415

        has_api_key = self._billing is not None
        try:
            return self._read(
                lambda: read_health(self._store, self._settings, has_api_key=has_api_key)
            )
        except StoreError as error:
            logger.error(f"❌ {error}")
            return without_database(has_api_key=has_api_key)

    def status(self) -> JsonObject:
        """The answer of `GET /api/status`. Raises StoreError."""
        from core.store.status_report import read_status  # noqa: PLC0415 (not for a cold worker)

        return self._read(
            lambda: read_status(self._database, self._settings, on_lambda=self._on_lambda)
        )

    def find_sessions(self, text: str) -> JsonObject:
        """The answer of `GET /api/status?session=…`. Raises StoreError."""
        from core.store.session_search import find_sessions  # noqa: PLC0415 (as above)

        return self._read(lambda: find_sessions(self._database, text))

    def sessions_of(self, outcome: str, after: int) -> JsonObject:
        """The answer of `GET /api/sessions`. Raises StoreError."""
        from core.store.session_search import sessions_of  # noqa: PLC0415 (as above)

        return self._read(lambda: sessions_of(self._database, outcome, after))

    def stop(self) -> None:
        """Make a pass under way, from any thread, give back its claims and end (CancelledError)."""
        if (task := self._running) is not None:
            task.get_loop().call_soon_threadsafe(task.cancel)

    def close(self) -> None:
        if self._billing is not None:
            self._runner.run(self._billing.aclose())
        self._runner.close()
        self._database_thread.submit(self._store.close).result()
        self._database_thread.shutdown()

    def _run(self, coroutine: Coroutine[None, None, Summary]) -> Summary:
        async def cancellable() -> Summary:
            self._running = asyncio.current_task()
            try:
                return await coroutine
            finally:
                self._running = None

        return self._runner.run(cancellable())

    def _read[T](self, read: Callable[[], T]) -> T:
        """What `read` returns in the database's thread, with the tables prepared before.

        Raises StoreError after READ_SECONDS too. Then `read` goes on until the database's own time
        limits end it, and later ones wait.
        """

        def prepared() -> T:
            for warning in self._store.prepare():
                logger.warning(f"⚠️ {warning}")
            return read()

        reading = self._database_thread.submit(prepared)
        try:
            return reading.result(READ_SECONDS)
        except TimeoutError:
            reading.cancel()  # if it has not begun
            raise StoreError(
                f"The database has not answered within {READ_SECONDS:.0f} s."
            ) from None


def open_database(settings: Settings, *, clock: Callable[[], datetime] | None = None) -> Database:
    """The engine that the settings name; it connects when it is first used."""
    match settings.database:
        case MySQLAddress() as address:
            return MySQLDatabase(lambda *, refresh: address, clock=clock)  # noqa: ARG005
        case Path() as path:
            from core.database.sqlite import SQLiteDatabase  # noqa: PLC0415 (not for a cold worker)

            return SQLiteDatabase(path, clock=clock)
        case DatabaseSecret() as secret:
            from core.aws import secrets_manager  # noqa: PLC0415 (only if set)

            return MySQLDatabase(partial(secrets_manager.read_database, secret), clock=clock)
        case IamDatabase() as database:
            from core.aws import rds_token  # noqa: PLC0415 (only if set)

            return MySQLDatabase(partial(rds_token.sign_in, database), clock=clock)


def _publisher(settings: Settings) -> Publisher | None:
    if settings.event_bus_name is None:
        return None
    from core.aws.event_bus import EventBus  # noqa: PLC0415 (not for a cold worker)

    return EventBus(settings.event_bus_name)


def _billing(
    settings: Settings, transport: httpx.AsyncBaseTransport | None
) -> BillingClient | None:
    """The client, or None without an API key. Raises SettingsError for a secret that lacks one."""
    credentials, arn = settings.credentials, settings.api_key_secret_arn
    read_again = None
    if credentials is None and arn is not None:
        from core.aws import secrets_manager  # noqa: PLC0415 (only if set)

        names = settings.credential_names
        credentials = secrets_manager.read_credentials(arn, names)
        read_again = partial(secrets_manager.read_credentials_again, arn, names)
    if credentials is None:
        return None
    return BillingClient(
        api_url=settings.billing_api_url,
        credentials=credentials,
        timeout_seconds=settings.request_timeout_seconds,
        headers=settings.billing_headers,
        token_url=settings.billing_token_url,
        status_codes=settings.billing_status_codes,
        status_reader=settings.status_reader,
        read_credentials_again=read_again,
        transport=transport,
    )

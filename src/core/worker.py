"""The wiring: settings become a store, a billing client and the event loop they run on."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

import httpx
import uvloop

from core.aws import rds_token, secrets_manager
from core.billing.client import BillingClient
from core.database.address import DatabaseSecret, IamDatabase, MySQLAddress, SQLitePath
from core.database.mysql import MySQLDatabase
from core.database.port import Database
from core.domain.model import JsonObject, Reason, iso
from core.domain.summary import Summary
from core.domain.verdict import FRESH_INTERVALS, starts_late_by
from core.errors import SettingsError, StoreError
from core.log import logger
from core.passes import check_pass
from core.passes.running_pass import PassOptions
from core.passes.scaling import StartWorker
from core.settings import Settings
from core.store.other_monitors import monitor_of
from core.store.status_changes import Publisher
from core.store.store import Store

# Kept free at the end of a Lambda's time, to record what is in flight and to write the pass's row.
FINISH_SECONDS = 5.0
# Reading for the API takes no longer. The page says after ten seconds that no answer has come.
READ_SECONDS = 7.0


class Health(NamedTuple):
    """The monitor's checks of itself, by name; no detail that would help an attacker."""

    checks: dict[str, bool]
    at: datetime
    last_pass_at: datetime | None

    @property
    def ok(self) -> bool:
        return all(self.checks.values())

    def as_dict(self) -> JsonObject:
        return {
            "status": "ok" if self.ok else "degraded",
            "timestamp": iso(self.at),
            "checks": {name: "ok" if ok else "failed" for name, ok in self.checks.items()},
            "last_pass_at": iso(self.last_pass_at) if self.last_pass_at else None,
        }


class _Heartbeat(NamedTuple):
    """What health is judged by, as the database has it."""

    now: datetime
    last_pass_at: datetime | None
    starts_on_time: bool
    answers: bool  # billing says something usable, about some of the open sessions
    is_alone: bool  # no monitor with other settings works against this one


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

    def health(self) -> Health:
        """Check the database, the passes, the key, billing's answers and other monitors.

        A failure of the database is logged.
        """
        checks = {
            "database": False,
            "last_pass": False,
            "starts_on_time": True,
            "api_key": self._billing is not None,
            "answers": True,
            "other_monitors": True,
        }
        last_pass_at = None
        try:
            beat = self._read(self._heartbeat)
        except StoreError as error:
            logger.error(f"❌ {error}")
            now = datetime.now(UTC)
        else:
            last_pass_at, now = beat.last_pass_at, beat.now
            checks["database"] = True
            checks["starts_on_time"] = beat.starts_on_time
            checks["answers"] = beat.answers
            checks["other_monitors"] = beat.is_alone
            age = (now - last_pass_at).total_seconds() if last_pass_at else float("inf")
            checks["last_pass"] = age <= FRESH_INTERVALS * self._settings.interval_seconds
        return Health(checks, now, last_pass_at)

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

    def _heartbeat(self) -> _Heartbeat:
        store = self._store
        counts = store.state.last_counts()
        waiting = store.read_waiting(self._settings.check_rules(), counts)
        return _Heartbeat(
            now=waiting.now,
            last_pass_at=store.history.last_start(),
            starts_on_time=starts_late_by(store.history.start_delays()) is None,
            answers=not waiting.is_blind(counts.open),
            is_alone=not store.others.find(),
        )


def open_database(settings: Settings, *, clock: Callable[[], datetime] | None = None) -> Database:
    """The engine that the settings name; it connects when it is first used."""
    match settings.database:
        case MySQLAddress() as address:
            return MySQLDatabase(lambda *, refresh: address, clock=clock)  # noqa: ARG005
        case SQLitePath(path):
            from core.database.sqlite import SQLiteDatabase  # noqa: PLC0415 (not for a cold worker)

            return SQLiteDatabase(path, clock=clock)
        case DatabaseSecret() as secret:
            return MySQLDatabase(partial(secrets_manager.read_database, secret), clock=clock)
        case IamDatabase() as database:
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
        names = settings.credential_names
        credentials = secrets_manager.read_credentials(arn, names)
        read_again = partial(_read_credentials_again, arn, names)
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


def _read_credentials_again(arn: str, names: Collection[str]) -> Mapping[str, str] | None:
    """The secret's credentials; None, with the reason in the log, where they cannot be read."""
    try:
        return secrets_manager.read_credentials(arn, names, refresh=True)
    except SettingsError as error:
        logger.error(f"❌ {error}")
        return None

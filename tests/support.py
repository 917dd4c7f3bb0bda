"""What several test modules need: events, a billing service made of a table, passes over a shop."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from core.database.mysql import MySQLConnection
from core.database.port import Database, Value
from core.database.sqlite import SQLiteConnection
from core.domain.model import Answer, OpenCounts, Outcome, Reason
from core.domain.summary import Summary
from core.passes.check_pass import (
    check_open_checkout_sessions,
    trigger_checkout_session_check,
)
from core.passes.running_pass import PassOptions
from core.settings import Settings
from core.store.store import Store
from core.worker import open_database
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop, SQLiteShop, add_sessions, settings_for

if TYPE_CHECKING:
    from core.passes.scaling import StartWorker
    from core.store.status_changes import Publisher

ROOT = Path(__file__).parents[1]
EVENTS = ROOT / "events"


def event(name: str) -> dict[str, Any]:
    """An event as users invoke the functions with it."""
    loaded: dict[str, Any] = json.loads((EVENTS / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


RULES = Settings.from_env({"DATABASE_URL": "sqlite:///unused"}).check_rules()


def database_of(shop: Shop, clock: FakeClock | None = None) -> Database:
    return open_database(settings_for(shop), clock=clock)


def add_expired(shop: Shop, sessions: dict[str, str | None]) -> None:
    """Sessions that became `timeout` at NOON, and are looked at from then on."""
    add_sessions(shop, sessions, "timeout")
    shop.run(
        "INSERT INTO checkout_session_change (session_id, billing_checkout_id, new_status,"
        " billing_status, changed_at, late_check_at)"
        " SELECT id, billing_checkout_id, 'timeout', 'open', %s, %s FROM checkout_session",
        (NOON.replace(tzinfo=None), NOON.replace(tzinfo=None)),
    )


def reconcile(store: Store, tick: datetime, session_ids: Sequence[str] | None = None) -> OpenCounts:
    """Adopt the new sessions, drop the closed ones, and count all, or those named."""
    reconciliation = store.reconciliation(tick, RULES, session_ids)
    while reconciliation.reconcile_next_piece():
        pass
    return reconciliation.counts


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks and threads go on until the condition holds; for ten seconds at the most."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (what is waited for is often in a database)
            await asyncio.sleep(0.002)


class FakeBilling:
    """A billing service that answers from a table, 200 where there is no entry.

    A checkout id in `held` is not answered before its event is set. `asked` counts requests.
    """

    def __init__(self, answers: Mapping[str, Answer] | None = None) -> None:
        self.answers = dict(answers or {})
        self.held: dict[str | None, asyncio.Event] = {}
        self.asked: Counter[str | None] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0

    async def check(self, billing_checkout_id: str | None) -> Answer:
        self.asked[billing_checkout_id] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if event := self.held.get(billing_checkout_id):
                await event.wait()
            else:
                await asyncio.sleep(0)
        finally:
            self.in_flight -= 1
        return self.answers.get(billing_checkout_id or "", Answer(Outcome.ACTIVE, 200, 0.01))


class Passes:
    """Runs passes over a shop with an injected clock; one store and one database thread a pass.

    Without `billing` there is no API key.
    """

    def __init__(self, shop: Shop, clock: FakeClock, billing: FakeBilling | None) -> None:
        self.shop = shop
        self.clock = clock
        self.billing = billing
        self.choose = lambda _low, high: high
        self.publisher: Publisher | None = None
        self.start_worker: StartWorker | None = None
        store = Store(database_of(shop, clock))
        store.prepare()
        store.close()

    def recorded(self, checks: int) -> bool:
        """Whether the passes have recorded that many checks in all."""
        return self.shop.run("SELECT SUM(checked) FROM checkout_session_run") == [(checks,)]

    async def run(self, options: PassOptions | None = None, **env: str) -> Summary:
        settings = settings_for(self.shop, **env)
        with self._store(settings) as (store, thread):
            return await check_open_checkout_sessions(
                store,
                self.billing,
                settings,
                options or PassOptions(Reason.TICK, self.clock.now),
                database_thread=thread,
                start_worker=self.start_worker,
                choose=self.choose,
            )

    async def trigger(self, session_ids: Sequence[str] | None = None) -> Summary:
        settings = settings_for(self.shop)
        with self._store(settings) as (store, thread):
            return await trigger_checkout_session_check(
                store,
                self.billing,
                settings,
                database_thread=thread,
                session_ids=session_ids,
            )

    @contextmanager
    def _store(self, settings: Settings) -> Iterator[tuple[Store, ThreadPoolExecutor]]:
        with ThreadPoolExecutor(1) as thread:
            store = Store(
                database_of(self.shop, self.clock),
                self.publisher,
                late_payments_for=settings.late_payments_for,
                late_status_updates=settings.late_status_updates,
                batch_size=settings.max_concurrency,
            )
            try:
                yield store, thread
            finally:
                thread.submit(store.close).result()


def note_statements(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that connections to this shop's engine execute from now on."""
    statements: list[str] = []
    connection = SQLiteConnection if isinstance(shop, SQLiteShop) else MySQLConnection
    for method in ("query", "execute"):

        def note(
            self: Any,  # noqa: ANN401 (of either engine)
            sql: str,
            parameters: Sequence[Value] = (),
            *,
            run: Callable[..., Any],
        ) -> Any:  # noqa: ANN401 (what the method returns)
            statements.append(sql)
            return run(self, sql, parameters)

        noting = partialmethod(note, run=getattr(connection, method))
        monkeypatch.setattr(connection, method, noting)
    return statements


def setting_variables() -> set[str]:
    """Every environment variable that is a setting."""
    sources = (ROOT / "src/core" / name for name in ("settings.py", "billing/settings.py"))
    texts = (source.read_text(encoding="utf-8") for source in sources)
    return {name for text in texts for name in re.findall(r'"([A-Z][A-Z_]{4,})"', text)}

"""A monitor in virtual time that somebody watches: what the page and health say each second."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, NamedTuple, override

from core.domain.model import Answer, Outcome
from core.settings import Settings
from core.store.status_report import read_status
from core.store.store import Store
from testkit.clock import NOON
from tests.passes.virtual import VirtualMonitor

ACTIVE = Answer(Outcome.ACTIVE, 200, 0.1)
# Billing does not answer.
SILENCE = Answer(Outcome.TIMEOUT)


class Seen(NamedTuple):
    """What the page and health say at a time."""

    at: float  # seconds since the first tick
    level: str
    text: str
    waiting: dict[str, Any]
    is_blind: bool
    heard: dict[str, float]  # when billing has last said something usable about each session
    clock_changed_at: float  # of the database

    @property
    def is_red(self) -> bool:
        return self.level == "critical"


class WatchedMonitor(VirtualMonitor):
    """Billing answers `answer(checkout id, seconds since the first tick)`, after 0.1 s."""

    def __init__(
        self, answer: Callable[[str, float], Answer] = lambda *_: ACTIVE, **env: str
    ) -> None:
        super().__init__(lambda *_: 0.1, **env)
        self.answer = answer
        self.seen: list[Seen] = []
        self.heard: dict[str, float] = {}
        self.clock_offset = 0.0  # of the database's clock
        self._clock_changed_at = 0.0
        self._clock_was_set_back = False  # since the last tick
        self.has_ticks: Callable[[float], bool] = lambda _at: True
        self.changes: dict[float, Callable[[], None]] = {}  # of the world, by time
        Store(self.database).prepare()

    @override
    def now(self) -> datetime:
        # The parent's constructor reads the clock, too.
        offset = getattr(self, "clock_offset", 0.0)
        return NOON + timedelta(milliseconds=round((self.loop.now + offset) * 1000))

    @property
    def checkouts(self) -> list[str]:
        """Of the open sessions that have one."""
        sql = (
            "SELECT billing_checkout_id FROM checkout_session WHERE billing_checkout_id IS NOT NULL"
        )
        return [str(c) for (c,) in self.database.run(lambda connection: connection.query(sql))]

    def set(self, **env: str) -> None:
        """Change settings, as a deployment does."""
        self.settings = Settings.from_env({"DATABASE_URL": "sqlite:///unused", **env})

    def set_clock(self, offset: float) -> None:
        """Set the database's clock so many seconds ahead of the loop's."""
        if offset != self.clock_offset:
            self._clock_was_set_back = offset < self.clock_offset
            self.clock_offset, self._clock_changed_at = offset, self.loop.now

    def watch(self, seconds: int, *, every: int = 1) -> None:
        """Tick for so long, and look every so many seconds."""
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._watch(seconds, every))
        self.open_checkouts = self.checkouts
        self.database.close()

    async def _watch(self, seconds: int, every: int) -> None:
        for at in range(seconds + 1):
            await asyncio.sleep(at - self.loop.now)
            if change := self.changes.get(at):
                change()
            if self._clock_was_set_back:  # the next leader corrects the due times
                self._clock_changed_at = self.loop.now
            if at % every == 0:
                self.look()
            if at % self.settings.interval_seconds == 0 and self.has_ticks(at):
                self._start(NOON + timedelta(seconds=at), helps=False)
                self._clock_was_set_back = False
        for task in self._passes:
            task.cancel()
        await asyncio.gather(*self._passes, return_exceptions=True)

    def look(self) -> None:
        report: Any = read_status(self.database, self.settings)
        store, rules = Store(self.database), self.settings.check_rules()
        counts = store.state.last_counts()
        is_blind = store.read_waiting(rules, counts).is_blind(counts.open)
        verdict = report["verdict"]
        self.seen.append(
            Seen(
                self.loop.now,
                verdict["level"],
                verdict["text"],
                report["waiting"],
                is_blind,
                dict(self.heard),
                self._clock_changed_at,
            )
        )

    @override
    async def check(self, billing_checkout_id: str | None) -> Answer:
        if billing_checkout_id is None:
            return Answer(Outcome.INVALID_SESSION)
        answer = self.answer(billing_checkout_id, self.loop.now)
        self.asked[billing_checkout_id].append(self.loop.now)
        if answer == SILENCE:
            await asyncio.sleep(self.settings.request_timeout_seconds)
            return answer
        await asyncio.sleep(answer.seconds or 0.1)
        if not answer.outcome.is_error:
            self.heard[billing_checkout_id] = self.loop.now
        return answer

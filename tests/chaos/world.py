"""A shop, its billing service, its event bus and the monitor's workers, on a fake clock.

The tests use only what users of the monitor have: settings, `Worker`, the database and the output.
`World.invariants` checks what must hold after every fault.
"""

import json
import random
import re
import sqlite3
import threading  # noqa: TC003 (no import cycle to avoid)
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import pymysql

from core import metrics
from core.billing.status_words import WORDS
from core.domain.model import iso
from core.domain.summary import Summary
from core.errors import StoreError
from core.settings import Settings
from core.store.health import Health
from core.store.status_report import HISTORY
from core.worker import Worker
from testkit.clock import FakeClock
from testkit.queue import LAST_CHECK, OF_SESSIONS
from testkit.shops import Shop, settings_for
from tests.chaos.billing import FaultyBilling
from tests.chaos.bus import Bus
from tests.chaos.proxy import Proxy
from tests.test_alarms import Setup, alarms_after, emitted, failing_passes, started

KEY = "the-key-that-nobody-may-see"
INTERVAL = 5
BACKOFF = 10
TIMEOUT = 1.2
# A lease covers the time to start a check, to wait for the answer and to record it.
LEASE = 5 + TIMEOUT + 5
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
# Outcomes for which billing may have sent no answer.
UNANSWERED = ("invalid_session", "network_error", "timeout")
RECHECK_SECONDS = LEASE + INTERVAL + BACKOFF


@dataclass
class World:
    """A shop and everything around it.

    `crashed` lifts the only invariant that a crash may break: that nothing is asked twice.
    """

    shop: Shop
    clock: FakeClock
    billing: FaultyBilling
    bus: Bus
    read_output: Callable[[], str]  # what was printed since the last call
    database_url: str = ""  # instead of the shop's own URL
    crashed: bool = False
    may_repeat: frozenset[str] = frozenset()  # checkouts that may be asked about twice at once
    closed_by_shop: set[str] = field(default_factory=set)
    refused_sessions: frozenset[str] = frozenset()  # the shop's database refuses to change them
    workers: list[Worker] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # of passes that raised a StoreError
    heard: dict[str, datetime] = field(default_factory=dict)  # billing's last usable word, or seen
    _output: str = ""
    _settings: Settings | None = None  # of the newest worker
    _passes: int = 0  # under way

    def environment(self, **env: str) -> dict[str, str]:
        """The environment variables of a worker."""
        return {
            "DATABASE_URL": self.database_url or self.shop.url,
            "APIKEY": KEY,
            "BILLING_API_URL": self.billing.url,
            "REQUEST_TIMEOUT_SECONDS": str(TIMEOUT),
            "CHECK_BACKOFF_MAX_SECONDS": str(BACKOFF),
            "STATUS_UPDATES": "true",
            "EVENT_BUS_NAME": "shop",
            **env,
        }

    def worker(self, **env: str) -> Worker:
        """Add a worker, as a new execution environment does."""
        settings = self._settings = Settings.from_env(self.environment(**env))
        worker = Worker(settings, clock=self.clock)
        self.workers.append(worker)
        return worker

    def tick(
        self, worker: Worker | None = None, *, seconds: float = 60.0, at: datetime | None = None
    ) -> Summary | None:
        """Run a tick's pass, by default on the first worker; returns None after a StoreError."""
        if worker is None:
            worker = self.workers[0] if self.workers else self.worker()
        self.assert_nothing_hides()
        summary, began = None, self.clock.now
        self._passes += 1
        try:
            summary = worker.check_open_checkout_sessions(at or self.clock.now, seconds=seconds)
        except StoreError as error:
            self.errors.append(str(error))
        finally:
            self._passes -= 1
        late = self.assert_nothing_hides()
        if late and self.clock.now == began and (summary is None or summary.led):
            assert self.alarms(summary), f"no alarm although {late} wait: {summary}"
        return summary

    def alarms(self, summary: Summary | None) -> set[str]:
        """The alarms that are on if each pass of the next 20 minutes ends like this."""
        if summary is None:
            return alarms_after(failing_passes(Setup(), 0))
        passes = 60 // INTERVAL
        return alarms_after(emitted(partial(metrics.measure, summary), passes) | started(passes))

    def assert_nothing_hides(self) -> list[str]:
        """Whoever has waited for longer than the promise is named, and the page is not green.

        Longer than its cadence, three intervals and a backoff. A tenth of the sessions makes it
        red, and they are returned; all of them make health fail. Nobody can be named while the
        database is away or nothing has run yet.
        """
        self._listen()
        settings = self._settings or Settings.from_env(self.environment())
        interval = settings.interval_seconds
        every = max(interval, *(step.every_seconds for step in settings.cadence.steps))
        promise = every + 3 * interval + max(every, settings.backoff_max_seconds)
        late = [
            i for i, at in self.heard.items() if self.clock.now - at > timedelta(seconds=promise)
        ]
        if not late:
            return []
        report = self.report()
        health = self.health() if self._passes == 0 else None  # a pass may change it meanwhile
        if report is None or report["last_pass_at"] is None:
            assert health is None or not health.ok, f"{late} wait: {health}"
            return late
        verdict, waiting = report["verdict"], report["waiting"]
        assert verdict["level"] in ("warning", "critical"), f"{late} wait: {verdict}"
        assert re.search("wait|No pass", verdict["text"]), f"{late} wait: {verdict}"
        late_for_billing = len(late) - waiting["causes"].get("invalid_session", 0)
        if late_for_billing < len(self.heard) / 10:
            return []
        assert verdict["level"] == "critical", f"{late} wait: {verdict}"
        if late_for_billing == len(self.heard):
            assert health is None or not health.ok, f"{late} wait: {health}"
        return late

    def _listen(self) -> None:
        """Note what billing has said about each open session, as the monitor's tables have it."""
        sql = f"SELECT c.session_id, c.last_outcome, {LAST_CHECK} {OF_SESSIONS}"
        try:
            rows = self.shop.run(sql)
        except (pymysql.Error, sqlite3.Error):
            rows = []
        usable = {
            str(i): _as_datetime(at)
            for i, outcome, at in rows
            if at is not None and outcome in ("active", "not_found", "closed")
        }
        now = self.clock.now  # a later time is of a clock that was ahead
        self.heard = {
            i: min(now, max(self.heard.get(i, _LONG_AGO), usable.get(i, _LONG_AGO)))
            if i in self.heard
            else now
            for i in self.open_sessions()
        }

    def report(self) -> Any:  # noqa: ANN401 (JSON)
        """The report of the page, as a monitor like the newest worker makes it; None: it cannot."""
        try:
            return self._watch(Worker.status)
        except StoreError:
            return None

    def health(self) -> Health:
        return self._watch(Worker.health)

    def _watch[T](self, look: Callable[[Worker], T]) -> T:
        """What a new worker sees that has a connection of its own to the shop's database."""
        settings = self._settings or Settings.from_env(self.environment())
        database = settings_for(self.shop).database
        worker = Worker(settings._replace(database=database), clock=self.clock)
        try:
            return look(worker)
        finally:
            worker.close()

    def advance(self, seconds: float = INTERVAL) -> None:
        self.clock.advance(seconds)

    def sessions(self) -> Mapping[str, tuple[str | None, str]]:
        """The shop's sessions: checkout and status by id."""
        rows = self.shop.run("SELECT id, billing_checkout_id, status FROM checkout_session")
        return {str(i): (checkout, status) for i, checkout, status in rows}

    def open_sessions(self) -> list[str]:
        return [i for i, (_, status) in self.sessions().items() if status == "open"]

    def invariants(self, *, recheck: bool = True) -> None:
        """Heal billing and the bus, then assert every invariant.

        Pass `recheck=False` where the workers use another billing service or a real clock.
        """
        self.billing.healed = True
        # After a failed call a worker does not try the bus again for five real seconds.
        worker = self.worker() if self.bus.fails else None
        self.bus.rejects = self.bus.fails = False
        if recheck:
            self._assert_open_sessions_are_rechecked(worker)
            self._assert_paid_sessions_are_closed()
            self._assert_nobody_waits(worker)
        self._assert_nothing_was_asked_twice()
        self._assert_statuses_came_from_billing()
        self._assert_events_match_changes()
        self._assert_run_table_is_correct(count_answers=recheck)
        self._assert_status_report_matches_tables()
        self._assert_output_is_clean()
        assert not [h for h in self.billing.redirected if KEY in h], "the key went to another host"

    def _assert_nobody_waits(self, worker: Worker | None) -> None:
        """But those that nobody can ask about, and those that the shop's database refuses.

        So health is good, and no alarm is on after the next tick.
        """
        waiting = self.report()["waiting"]
        allowed = {"invalid_session", *(["refused"] if self.refused_sessions else [])}
        assert set(waiting["causes"]) <= allowed, waiting
        health = self.health()
        assert health.ok or self.refused_sessions, health
        self.advance()
        summary = self.tick(worker)
        assert summary is not None
        assert self.refused_sessions or not self.alarms(summary), summary

    def _assert_paid_sessions_are_closed(self) -> None:
        """A session that billing has closed is closed, unless the shop's database refuses it."""
        for session_id, (checkout, status) in self.sessions().items():
            billing_status = self.billing.statuses.get(checkout or "", "open")
            may_be_open = WORDS[billing_status] == "open" or session_id in self.refused_sessions
            assert status != "open" or may_be_open, (
                f"{session_id} is open, but billing's status is {billing_status}"
            )

    def _assert_open_sessions_are_rechecked(self, worker: Worker | None) -> None:
        """Each open session is claimed or due within a lease, an interval and a backoff."""
        self.tick(worker)  # it may have to create dropped tables again
        self.advance()
        self.tick(worker)
        was_open = set(self.open_sessions())
        before = self._last_checks()
        for _ in range(10):
            # A pause may last MAX_RETRY_AFTER_SECONDS.
            self.advance(max(RECHECK_SECONDS, self._pause_seconds() + 1))
            assert self.tick(worker) is not None, f"the next pass fails: {self.errors[-1]}"
            after = self._last_checks()
            left = [
                i
                for i in was_open & set(self.open_sessions())
                if after.get(i, "") <= before.get(i, "")
            ]
            if not left:
                break
        assert not left, f"open but not checked: {left[:5]}"
        known = {str(i) for (i,) in self.shop.run("SELECT session_id FROM checkout_session_check")}
        assert known == set(self.open_sessions()), "the queue differs from the open sessions"

    def _last_checks(self) -> dict[str, str]:
        """When each session was checked last; '' if it never was."""
        rows = self.shop.run(f"SELECT c.session_id, {LAST_CHECK} {OF_SESSIONS}")
        return {str(i): str(at or "") for i, at in rows}

    def _pause_seconds(self) -> float:
        [(until,)] = self.shop.run(
            "SELECT paused_until FROM checkout_session_pause WHERE id = 1"
        ) or [(None,)]
        if until is None:
            return 0.0
        return float((_as_datetime(until) - self.clock.now).total_seconds())

    def _assert_nothing_was_asked_twice(self) -> None:
        for checkout, log in self.billing.log.items():
            if self.crashed or checkout in self.may_repeat:
                continue
            assert log.max_in_flight == 1, f"{checkout} was asked about twice at once"
            gaps = [(b - a).total_seconds() for a, b in pairwise(sorted(log.requested_at))]
            short = [gap for gap in gaps if gap < INTERVAL]
            assert not short, f"{checkout} was asked about again after {short[0]} s"

    def _changes(self) -> set[tuple[str, str | None, str]]:
        """The status changes that the monitor made: session, its checkout at the time, new status.

        They come from the change log, because the shop may alter a session's row afterwards. Where
        a case has dropped the log, they come from the rows.
        """
        try:
            logged = self.shop.run(
                "SELECT session_id, billing_checkout_id, new_status FROM checkout_session_change"
            )
        except pymysql.ProgrammingError:
            logged = []
        known = {session_id for session_id, _checkout, _status in logged}
        return {(str(i), checkout, str(status)) for i, checkout, status in logged} | {
            (session_id, checkout, status)
            for session_id, (checkout, status) in self.sessions().items()
            if status != "open" and session_id not in self.closed_by_shop | known
        }

    def _assert_statuses_came_from_billing(self) -> None:
        """Each new status is one that billing answered for that checkout."""
        for session_id, checkout, status in self._changes():
            answered = {WORDS[word] for word in self.billing.log[checkout or ""].statuses}
            assert status in answered, (
                f"{session_id} is {status}; billing answered {answered} for {checkout}"
            )
        reopened = [i for i in self.closed_by_shop if self.sessions().get(i, ("", ""))[1] == "open"]
        assert not reopened, f"closed by the shop but open again: {reopened}"

    def _assert_events_match_changes(self) -> None:
        changes = self._changes()
        published = {
            (e["session_id"], e["billing_checkout_id"], e["new_status"]) for e in self.bus.events
        }
        assert changes <= published, f"not published: {changes - published}"
        not_made = {e for e in published - changes if e[0] not in self.closed_by_shop}
        assert not not_made, f"published but not made: {not_made}"
        ids = {e["event_id"]: e["session_id"] for e in self.bus.events}
        assert len(ids) == len(published), "the same change was published under two ids"

    def _assert_run_table_is_correct(self, *, count_answers: bool) -> None:
        rows = self.shop.run(
            "SELECT reason, checked, status_changes, outcomes FROM checkout_session_run"
            " WHERE finished_at IS NOT NULL"
        )
        assert all(checked == sum(json.loads(found).values()) for _, checked, _, found in rows)
        found: Counter[str] = Counter()
        for row in rows:
            found.update(json.loads(row[3]))
        recorded = found.total() - sum(found[outcome] for outcome in UNANSWERED)
        answered = sum(log.answered for log in self.billing.log.values())
        if count_answers:
            assert recorded <= answered, f"{recorded} answers recorded, {answered} sent"
        published = len({e["event_id"] for e in self.bus.events})
        changes = sum(int(row[2]) for row in rows)
        message = f"{changes} changes in the run table, {published} published"
        assert changes <= published, message
        if not self.crashed and not self.errors:
            assert changes == published, message

    def _assert_status_report_matches_tables(self) -> None:
        report = self.report()
        since = self.clock.now - HISTORY
        ticks: dict[str, Counter[str]] = {}
        for tick, *counts in self.shop.run(
            "SELECT tick, checked, errors, status_changes FROM checkout_session_run"
            " WHERE reason = 'tick' AND tick IS NOT NULL"
        ):
            if _as_datetime(tick) > since:
                key = iso(_as_datetime(tick))
                names = ("checked", "errors", "status_changes")
                ticks.setdefault(key, Counter())
                ticks[key].update(dict(zip(names, counts, strict=True)), workers=1)
        passes = {p["tick"]: p for p in report["passes"] if p["tick"]}
        newest = sorted(ticks, reverse=True)[:60]
        assert sorted(passes, reverse=True) == newest
        for tick in newest:
            assert {n: passes[tick][n] for n in ticks[tick]} == dict(ticks[tick]), (
                f"the pass of {tick}"
            )
        failing = self.shop.run(
            "SELECT failing_since FROM checkout_session_check"
            " WHERE consecutive_failures > 0 ORDER BY failing_since LIMIT 10"
        )
        shown = [f["failing_since"] for f in report["failing"]]
        assert shown == [iso(_as_datetime(since)) for (since,) in failing], f"{shown} {failing}"
        changes = self.shop.run(
            "SELECT session_id, new_status FROM checkout_session_change ORDER BY id DESC LIMIT 10"
        )
        assert [(c["session_id"], c["new_status"]) for c in report["changes"]] == [
            (str(i), status) for i, status in changes
        ]
        assert report["open"]["count"] is None or report["open"]["count"] >= len(
            self.open_sessions()
        )

    def _assert_output_is_clean(self) -> None:
        self._output += self.read_output()
        assert KEY not in self._output
        assert "Traceback (most recent call last)" not in self._output
        assert "hidden-pass" not in self._output
        assert "\x1b" not in self._output

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def _as_datetime(value: str | datetime) -> datetime:
    """A database's timestamp, which a driver returns as text or without a time zone."""
    time = datetime.fromisoformat(value) if isinstance(value, str) else value
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def outcomes(summaries: Sequence[Summary | None]) -> Counter[str]:
    """The outcomes of several passes, added up."""
    total: Counter[str] = Counter()
    for summary in summaries:
        if summary is not None:
            total.update({outcome.value: n for outcome, n in summary.outcomes.items()})
    return total


def later(time: datetime, seconds: float) -> datetime:
    return time + timedelta(seconds=seconds)


SESSIONS = {
    "open-1": "fine-1",
    "open-2": "fine-2",
    "paid-1": "paid-1",
    "paid-2": "paid-2",
    "failed": "failed-1",
    "broken": "500-1",
    "without": None,
}
STATUSES = {"paid-1": "paid", "paid-2": "paid", "failed-1": "failed"}


class ProxiedWorld:
    """A world whose MariaDB or MySQL is behind a proxy; `reset` prepares it for the next case."""

    def __init__(self, engine: str, world: World, proxy: Proxy) -> None:
        self.engine = engine
        self.world = world
        self.proxy = proxy
        self.shop_thread: threading.Thread | None = None  # what the shop does during a pass
        self._statements_per_pass = 0
        world.database_url = proxy.url(world.shop.database)  # type: ignore[attr-defined]
        self.worker = world.worker()
        self.reset()
        self.world.tick()  # it connects and creates the tables

    def reset(self) -> None:
        """Restore the initial state, except that the worker stays warm."""
        world, run = self.world, self.world.shop.run
        self.proxy.reset()
        world.tick()  # it creates tables again that a case has dropped
        tables = [name for (name,) in run("SHOW TABLES")]
        for name in tables:
            run(f"DELETE FROM {name}")
        run(
            "INSERT INTO checkout_session (id, billing_checkout_id, status) VALUES "
            + ", ".join(["(%s, %s, 'open')"] * len(SESSIONS)),
            [value for item in SESSIONS.items() for value in item],
        )
        world.billing.log.clear()
        world.billing.statuses = dict(STATUSES)
        world.billing.healed = False
        world.billing.before_answer = lambda _checkout: None
        world.bus.events.clear()
        world.closed_by_shop.clear()
        world.heard.clear()
        world.crashed = False
        world.errors.clear()
        world.advance(60)
        self.proxy.reset()

    def statements_per_pass(self) -> int:
        """The number of statements in a pass that does everything a pass can do."""
        if self._statements_per_pass == 0:
            self.reset()
            self.world.tick()
            self._statements_per_pass = self.proxy.count
        return self._statements_per_pass

    def sample_statements(self, count: int, random: random.Random) -> list[int]:
        return sorted(random.sample(range(1, self.statements_per_pass() + 1), count))

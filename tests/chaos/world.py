"""A shop, its billing service, its bus and the monitor's workers, on a clock that is moved by hand.

Only what users of the monitor have is used: settings, `Worker`, the database, and what is printed.
`World.invariants` is what must hold after whatever happened.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pymysql

from core.billing.status_words import WORDS
from core.domain.model import iso
from core.domain.summary import Summary
from core.errors import StoreError
from core.settings import Settings
from core.store.status_report import HISTORY, read_status
from core.worker import Worker, open_database
from testkit.clock import FakeClock
from testkit.shops import Shop, settings_for
from tests.chaos.billing import Misbehaving
from tests.chaos.bus import Bus

KEY = "the-key-that-nobody-may-see"
INTERVAL = 5
BACKOFF = 10
TIMEOUT = 0.8
# A lease: what a pass has to begin a check, to wait for the answer and to record it.
LEASE = 5 + TIMEOUT + 5
UNANSWERED = ("invalid_session", "network_error", "timeout")
ALL_CHECKED_WITHIN = LEASE + INTERVAL + BACKOFF


@dataclass
class World:
    """See the module. `crashed` lifts the one rule that a crash may break: not to ask twice."""

    shop: Shop
    clock: FakeClock
    billing: Misbehaving
    bus: Bus
    printed: Callable[[], str]
    url: str = ""  # of the database, when it is not the shop's own
    crashed: bool = False
    asked_again: frozenset[str] = frozenset()  # checkouts that may be asked twice at once
    closed_by_shop: set[str] = field(default_factory=set)
    refused: frozenset[str] = frozenset()  # sessions that the shop's database does not change
    env: dict[str, str] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    passes: int = 0
    failed: list[str] = field(default_factory=list)
    _seen: str = ""

    def environment(self, **env: str) -> dict[str, str]:
        """The environment variables of a worker."""
        return {
            "DATABASE_URL": self.url or self.shop.url,
            "APIKEY": KEY,
            "BILLING_API_URL": self.billing.url,
            "REQUEST_TIMEOUT_SECONDS": str(TIMEOUT),
            "CHECK_BACKOFF_MAX_SECONDS": str(BACKOFF),
            "STATUS_UPDATES": "true",
            "EVENT_BUS_NAME": "shop",
            **self.env,
            **env,
        }

    def worker(self, **env: str) -> Worker:
        """One more execution environment."""
        settings = Settings.from_env(self.environment(**env))
        worker = Worker(settings, clock=self.clock)
        self.workers.append(worker)
        return worker

    def tick(
        self, worker: Worker | None = None, *, seconds: float = 60.0, at: datetime | None = None
    ) -> Summary | None:
        """One tick's pass, on the first worker if none is named; None: it ended in a StoreError."""
        if worker is None:
            worker = self.workers[0] if self.workers else self.worker()
        try:
            summary = worker.check_open_checkout_sessions(at or self.clock.now, seconds=seconds)
        except StoreError as error:
            self.failed.append(str(error))
            return None
        self.passes += 1
        return summary

    def advance(self, seconds: float = INTERVAL) -> None:
        self.clock.advance(seconds)

    def close_by_shop(self, session_id: str, status: str = "success") -> None:
        """What a webhook does."""
        self.shop.run("UPDATE checkout_session SET status = %s WHERE id = %s", (status, session_id))
        self.closed_by_shop.add(session_id)

    def sessions(self) -> Mapping[str, tuple[str | None, str]]:
        """Checkout and status by id, as the shop has them."""
        rows = self.shop.run("SELECT id, billing_checkout_id, status FROM checkout_session")
        return {str(i): (checkout, status) for i, checkout, status in rows}

    def open(self) -> list[str]:
        return [i for i, (_, status) in self.sessions().items() if status == "open"]

    def invariants(self, *, checks: bool = True) -> None:
        """Everything that must hold, whatever happened. Heals billing and the bus first.

        Without `checks` billing cannot be healed, and it is not asked whether it is.
        """
        self.billing.healed = True
        # After a call that failed, an environment does not try the bus for five real seconds.
        worker = self.worker() if self.bus.breaks else None
        self.bus.refuses = self.bus.breaks = False
        if checks:
            self._every_open_session_is_checked_again(worker)
            self._what_billing_has_closed_is_closed()
        self._nothing_was_asked_twice()
        self._statuses_are_billings_word()
        self._events_are_the_changes()
        self._runs_tell_the_truth(elsewhere=not checks)
        self._status_is_what_the_tables_say()
        self._nothing_is_printed_that_must_not_be()
        assert not [h for h in self.billing.strangers if KEY in h], "the key went to another host"

    def _what_billing_has_closed_is_closed(self) -> None:
        """But what the shop's database refuses."""
        for session_id, (checkout, status) in self.sessions().items():
            word = self.billing.words.get(checkout or "", "open")
            late = status == "open" and WORDS[word] != "open" and session_id not in self.refused
            assert not late, f"{session_id} is open, though billing says {word}"

    def _every_open_session_is_checked_again(self, worker: Worker | None) -> None:
        """None is lost: each is claimed or due within a lease, an interval and a backoff."""
        self.tick(worker)  # which may find that tables are gone, and make them anew
        self.advance()
        self.tick(worker)
        was_open = set(self.open())
        before = self._attempts()
        for _ in range(10):
            # A pause that billing asked for may last MAX_RETRY_AFTER_SECONDS.
            self.advance(max(ALL_CHECKED_WITHIN, self._pause_seconds() + 1))
            assert self.tick(worker) is not None, f"the pass after it fails: {self.failed[-1]}"
            after = self._attempts()
            left = [i for i in was_open & set(self.open()) if after.get(i, 0) <= before.get(i, 0)]
            if not left:
                break
        assert not left, f"open, and not checked: {left[:5]}"
        known = {str(i) for (i,) in self.shop.run("SELECT session_id FROM checkout_session_check")}
        assert known == set(self.open()), "the queue is not the open sessions"

    def _attempts(self) -> dict[str, int]:
        rows = self.shop.run("SELECT session_id, attempts FROM checkout_session_check")
        return {str(i): int(attempts) for i, attempts in rows}

    def _pause_seconds(self) -> float:
        [(until,)] = self.shop.run(
            "SELECT paused_until FROM checkout_session_pause WHERE id = 1"
        ) or [(None,)]
        if until is None:
            return 0.0
        return float((_moment(until) - self.clock.now).total_seconds())

    def _nothing_was_asked_twice(self) -> None:
        for checkout, asked in self.billing.asked.items():
            again = self.crashed or checkout in self.asked_again
            assert again or asked.most_in_flight == 1, f"{checkout} was asked twice at once"
            moments = sorted(asked.at)
            gaps = [(b - a).total_seconds() for a, b in pairwise(moments)]
            soon = [gap for gap in gaps if gap < INTERVAL]
            assert again or not soon, f"{checkout} was asked again after {soon[0]} s"

    def _made(self) -> set[tuple[str, str | None, str]]:
        """The changes that the monitor made: session, the checkout it then had, and its status.

        By the log that is written with them: afterwards the shop may do with a row what it likes.
        Where a case has taken the log away, by the rows.
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

    def _statuses_are_billings_word(self) -> None:
        """A session that the monitor closed is what billing said of its checkout, no other's."""
        for session_id, checkout, status in self._made():
            said = {WORDS[word] for word in self.billing.asked[checkout or ""].said}
            assert status in said, f"{session_id} is {status}; billing said {said} of {checkout}"
        reopened = [i for i in self.closed_by_shop if self.sessions().get(i, ("", ""))[1] == "open"]
        assert not reopened, f"closed by the shop, and open again: {reopened}"

    def _events_are_the_changes(self) -> None:
        made = self._made()
        told = {
            (e["session_id"], e["billing_checkout_id"], e["new_status"]) for e in self.bus.events
        }
        assert made <= told, f"not published: {made - told}"
        not_made = {e for e in told - made if e[0] not in self.closed_by_shop}
        assert not not_made, f"published, and not made: {not_made}"
        ids = {e["event_id"]: e["session_id"] for e in self.bus.events}
        assert len(ids) == len(told), "the same change was published under two ids"

    def _runs_tell_the_truth(self, *, elsewhere: bool) -> None:
        rows = self.shop.run(
            "SELECT reason, checked, status_changes, outcomes FROM checkout_session_run"
            " WHERE finished_at IS NOT NULL"
        )
        assert all(checked == sum(json.loads(found).values()) for _, checked, _, found in rows)
        # Not all that is checked is answered, nor even asked.
        found: Counter[str] = Counter()
        for row in rows:
            found.update(json.loads(row[3]))
        answers = found.total() - sum(found[word] for word in UNANSWERED)
        answered = sum(asked.answered for asked in self.billing.asked.values())
        assert elsewhere or answers <= answered, f"{answers} answers told, {answered} given"
        made = len({e["event_id"] for e in self.bus.events})
        changes = sum(int(row[2]) for row in rows)
        assert changes <= made, f"{changes} changes in the run log, {made} published"
        if not self.crashed and not self.failed:
            assert changes == made, f"{changes} changes in the run log, {made} published"

    def _status_is_what_the_tables_say(self) -> None:
        settings = settings_for(self.shop)
        database = open_database(settings, clock=self.clock)
        try:
            told: Any = read_status(database, settings)
        finally:
            database.close()
        since = self.clock.now - HISTORY
        ticks: dict[str, Counter[str]] = {}
        for tick, *counts in self.shop.run(
            "SELECT tick, checked, errors, status_changes FROM checkout_session_run"
            " WHERE reason = 'tick' AND tick IS NOT NULL"
        ):
            if _moment(tick) > since:
                key = iso(_moment(tick))
                names = ("checked", "errors", "status_changes")
                ticks.setdefault(key, Counter())
                ticks[key].update(dict(zip(names, counts, strict=True)), workers=1)
        passes = {p["tick"]: p for p in told["passes"] if p["tick"]}
        newest = sorted(ticks, reverse=True)[:60]
        assert sorted(passes, reverse=True) == newest
        for tick in newest:
            assert {n: passes[tick][n] for n in ticks[tick]} == dict(ticks[tick]), f"of {tick}"
        failing = self.shop.run(
            "SELECT session_id, consecutive_failures FROM checkout_session_check"
            " WHERE consecutive_failures > 0"
        )
        most = sorted((int(n) for _, n in failing), reverse=True)[:10]
        assert [f["consecutive_failures"] for f in told["failing"]] == most
        assert {(f["session_id"], f["consecutive_failures"]) for f in told["failing"]} <= {
            (str(i), n) for i, n in failing
        }
        changes = self.shop.run(
            "SELECT session_id, new_status FROM checkout_session_change ORDER BY id DESC LIMIT 10"
        )
        assert [(c["session_id"], c["new_status"]) for c in told["changes"]] == [
            (str(i), status) for i, status in changes
        ]
        assert told["open"]["count"] is None or told["open"]["count"] >= len(self.open())

    def _nothing_is_printed_that_must_not_be(self) -> None:
        self._seen += self.printed()
        assert KEY not in self._seen
        assert "Traceback (most recent call last)" not in self._seen
        assert "hidden-pass" not in self._seen
        assert "\x1b" not in self._seen

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def _moment(value: str | datetime) -> datetime:
    """As a driver without the monitor's conversions returns it."""
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def outcomes(summaries: Sequence[Summary | None]) -> Counter[str]:
    """What passes found, added up."""
    total: Counter[str] = Counter()
    for summary in summaries:
        if summary is not None:
            total.update({outcome.value: n for outcome, n in summary.outcomes.items()})
    return total


def later(moment: datetime, seconds: float) -> datetime:
    return moment + timedelta(seconds=seconds)

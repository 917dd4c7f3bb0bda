"""Whoever waits is named and the page is not green, whatever happens, in virtual time.

The table of docs/operate.md is what these situations show; to write it again, set WRITE_GUIDE.
"""

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import Phase as HPhase
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core import metrics
from core.domain.model import Answer, Outcome
from testkit.clock import NOON
from tests import test_alarms
from tests.passes.watched import ACTIVE, SILENCE, WatchedMonitor

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[2] / "docs/operate.md"
TABLE = re.compile(r"(?<=<!-- situations -->\n).*?(?=<!-- /situations -->)", re.DOTALL)
RECOMMENDED = "5s until 10m, 30s until 1h, 5m"
MINUTE, HOUR = 60, 3600
# When billing, or whatever it is, goes wrong: just after a tick, which is the worst time.
WRONG, WELL = 31, 92

NOT_FOUND = Answer(Outcome.NOT_FOUND, 404, 0.1)
REFUSED = Answer(Outcome.UNAUTHORIZED, 401, 0.1)
FORBIDDEN = Answer(Outcome.UNAUTHORIZED, 403, 0.1)
UNREACHABLE = Answer(Outcome.NETWORK_ERROR, None, 0.1)
BROKEN = Answer(Outcome.UNEXPECTED_STATUS, 500, 0.1)
LIMITED = Answer(Outcome.RATE_LIMITED, 429, 0.1)
SETTLED = Answer(Outcome.UNKNOWN_STATUS, 200, 0.1, "'settled'")
PAGE = Answer(Outcome.UNKNOWN_STATUS, 200, 0.1, "an HTML page")
CONTRADICTORY = Answer(Outcome.MISMATCH, 200, 0.1)
FAULTS = (REFUSED, UNREACHABLE, BROKEN, SILENCE, LIMITED, SETTLED, PAGE, CONTRADICTORY)

type Billing = Callable[[str, float], Answer]


def always(answer: Answer) -> Billing:
    return lambda _checkout, _at: answer


def for_some(answer: Answer, *, first: int) -> Billing:
    """The answer about the first sessions only."""
    return lambda checkout, _at: answer if int(checkout.rpartition("_")[2]) < first else ACTIVE


def from_until(answer: Answer, begin: float, end: float = float("inf")) -> Billing:
    return lambda _checkout, at: answer if begin <= at < end else ACTIVE


def four_a_second() -> Billing:
    """A limit of four requests in each second."""
    asked: dict[int, int] = {}

    def answer(_checkout: str, at: float) -> Answer:
        asked[int(at)] = asked.get(int(at), 0) + 1
        return ACTIVE if asked[int(at)] <= 4 else LIMITED

    return answer


class Situation(NamedTuple):
    """What happens to a shop, and for how long; the page's colour at its end."""

    name: str
    colour: str
    billing: Callable[[], Billing] = partial(always, ACTIVE)
    open: int = 20
    minutes: float = 3
    env: Mapping[str, str] = {}
    is_blind: bool = False
    set_up: Callable[[WatchedMonitor], None] = lambda _monitor: None

    def watch(self) -> WatchedMonitor:
        monitor = WatchedMonitor(self.billing(), **self.env)
        if self.open:
            monitor.open(self.open)
        self.set_up(monitor)
        monitor.watch(round(self.minutes * MINUTE), every=3)
        return monitor


def stop_ticks(monitor: WatchedMonitor) -> None:
    monitor.has_ticks = lambda at: at < WRONG


def take_key(monitor: WatchedMonitor) -> None:
    monitor.changes[WRONG] = partial(monitor.set, APIKEY="")


def take_ids(monitor: WatchedMonitor) -> None:
    monitor.execute("UPDATE checkout_session SET billing_checkout_id = NULL WHERE id = 's0'")


def set_clock_back(monitor: WatchedMonitor) -> None:
    monitor.clock_offset = 3 * HOUR
    monitor.changes[WRONG] = partial(monitor.set_clock, 0.0)


def shorten_interval(monitor: WatchedMonitor) -> None:
    monitor.changes[WRONG - 1] = partial(monitor.set, APIKEY="none", CHECK_INTERVAL_SECONDS="5")


def make_old(monitor: WatchedMonitor) -> None:
    """All sessions are over an hour old, after they were adopted."""
    old = "UPDATE checkout_session_check SET first_seen_at = '2026-01-15T09:00:00.000Z'"
    monitor.changes[4] = partial(monitor.execute, old)


SITUATIONS = [
    Situation("all is well", "ok"),
    Situation("no session is open", "ok", open=0),
    Situation("a limit of 4 a second, where 10 sessions want 2", "ok", four_a_second, open=10),
    Situation(
        "a limit of 4 a second, where 200 sessions want 40",
        "critical",
        four_a_second,
        open=200,
    ),
    Situation("billing asks for a pause", "critical", partial(always, LIMITED), is_blind=True),
    Situation("the database's clock was three hours ahead", "ok", set_up=set_clock_back),
    Situation("all 404: a wrong path, or a test key", "critical", partial(always, NOT_FOUND)),
    Situation("an HTML page for all", "critical", partial(always, PAGE), is_blind=True),
    Situation(
        "billing's new word `settled` for 5 of 200",
        "critical",
        partial(for_some, SETTLED, first=5),
        open=200,
    ),
    Situation(
        "90 of 100 fail",
        "critical",
        partial(for_some, BROKEN, first=90),
        open=100,
        minutes=5,
    ),
    Situation(
        "billing is away, all sessions are old, recommended cadence",
        "critical",
        partial(from_until, UNREACHABLE, WRONG),
        minutes=6,
        env={"CHECK_CADENCE": RECOMMENDED},
        is_blind=True,
        set_up=make_old,
    ),
    Situation(
        "1 of 200 answers 403 for ever",
        "warning",
        partial(for_some, FORBIDDEN, first=1),
        open=200,
    ),
    Situation("billing refuses the key", "critical", partial(always, REFUSED), is_blind=True),
    Situation("billing does not answer", "critical", partial(always, SILENCE), is_blind=True),
    Situation(
        "5 of 100 time out",
        "warning",
        partial(for_some, SILENCE, first=5),
        open=100,
    ),
    Situation("the only session has no checkout id", "warning", open=1, set_up=take_ids),
    Situation(
        "the interval was made shorter",
        "ok",
        env={"CHECK_INTERVAL_SECONDS": "10"},
        set_up=shorten_interval,
    ),
    Situation("the loop has stopped", "critical", is_blind=True, set_up=stop_ticks),
    Situation("there is no key any more", "critical", is_blind=True, set_up=take_key),
    Situation("no key, no open session", "critical", open=0, env={"APIKEY": ""}),
    Situation(
        "the first pass after a wrong URL",
        "warning",
        partial(always, UNREACHABLE),
        minutes=0.1,
    ),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.name)
def test_what_the_page_and_health_say_is_in_the_guide(situation: Situation) -> None:
    monitor = situation.watch()
    last = monitor.seen[-1]
    assert (last.level, last.is_blind) == (situation.colour, situation.is_blind), last.text
    assert_nothing_hides(monitor)
    if "WRITE_GUIDE" not in os.environ:
        assert without_numbers(row(situation, monitor)) in without_numbers(table()).splitlines()


def test_the_guides_table_has_all_situations() -> None:
    if "WRITE_GUIDE" in os.environ:
        rows = [row(situation, situation.watch()) for situation in SITUATIONS]
        text = "\n".join([HEAD, *rows, ""])
        GUIDE.write_text(TABLE.sub(lambda _: text, GUIDE.read_text("utf-8")), encoding="utf-8")
    assert len(table().splitlines()) == len(HEAD.splitlines()) + len(SITUATIONS)


HEAD = "| situation | the page | it says | health, `answers` | alarms |\n|---|---|---|---|---|"
COLOURS = {"ok": "green", "warning": "yellow", "critical": "**red**"}


def table() -> str:
    [found] = TABLE.findall(GUIDE.read_text(encoding="utf-8"))
    return str(found)


def without_numbers(text: str) -> str:
    """How long somebody has waited depends on details."""
    return re.sub(r"\d[\d.,:]*", "#", text)


def row(situation: Situation, monitor: WatchedMonitor) -> str:
    last = monitor.seen[-1]
    health = "fails" if last.is_blind else "ok"
    alarms = ", ".join(sorted(alarms_on(monitor, int(situation.minutes)))) or "–"
    return f"| {situation.name} | {COLOURS[last.level]} | {last.text} | {health} | {alarms} |"


def alarms_on(monitor: WatchedMonitor, minutes: int) -> set[str]:
    """The alarms that are on if what the last full minute emits goes on for 20."""
    emits = [dict(test_alarms.started(0)) for _ in range(max(1, minutes))]
    for summary in monitor.summaries:
        minute = emits[min(len(emits) - 1, int((summary.started_at - NOON).total_seconds() // 60))]
        sent = test_alarms.emitted(partial(metrics.measure, summary), 1)
        for metric, values in (*sent.items(), *test_alarms.started(1).items()):
            minute[metric] = [*minute.get(metric, ()), *values]
    stack = test_alarms.Stack()
    stack.run(lambda _setup, minute: emits[min(minute, len(emits) - 1)], 20)
    return stack.on


def assert_nothing_hides(monitor: WatchedMonitor) -> None:
    """At any time, by what billing has really said; see `World.assert_nothing_hides`.

    Nobody can tell how long somebody waited before the database's clock changed, nor, if it was set
    back, before the first tick since then.
    """
    rules = monitor.settings.check_rules()
    every = max(rules.interval_seconds, *(step.every_seconds for step in rules.cadence.steps))
    promise = every + 3 * rules.interval_seconds + max(every, rules.backoff_max_seconds)
    for seen in monitor.seen:
        heard = [seen.heard.get(checkout, 0.0) for checkout in monitor.open_checkouts]
        silent = [seen.at - max(at, seen.clock_changed_at) for at in heard]
        late = [seconds for seconds in silent if seconds > promise]
        if late:
            assert seen.level in ("warning", "critical"), seen
            assert "waited" in seen.text, seen
        if late and len(late) >= len(silent) / 10:
            assert seen.is_red, seen
        if late and len(late) == len(silent):
            assert seen.is_blind, seen
        since_change = seen.at - seen.clock_changed_at
        if since_change > promise and max(silent, default=0.0) < rules.interval_seconds:
            assert set(seen.waiting["causes"]) <= {"invalid_session"}, seen


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.outcome} {fault.detail}")
def test_a_fault_is_red_within_15_s_and_green_after_a_backoff(fault: Answer) -> None:
    monitor = WatchedMonitor(from_until(fault, WRONG, WELL))
    monitor.open(20)
    monitor.watch(WELL + 70)
    red = [seen.at for seen in monitor.seen if seen.is_red]
    assert WRONG < red[0] <= WRONG + 15
    assert red[-1] <= WELL + 65
    assert monitor.seen[-1].level == "ok"


@pytest.mark.parametrize("stop", [stop_ticks, take_key])
def test_a_monitor_that_asks_nothing_is_red_within_15_s(
    stop: Callable[[WatchedMonitor], None],
) -> None:
    monitor = WatchedMonitor()
    monitor.open(20)
    stop(monitor)
    monitor.watch(WRONG + 15)
    assert monitor.seen[-1].is_red


class Phase(NamedTuple):
    """A part of a drawn story."""

    ticks: int
    fault: Answer
    faulty: int  # about so many of the sessions
    has_ticks: bool
    workers: int
    clock_offset: int


phases = st.builds(
    Phase,
    ticks=st.integers(1, 9),
    fault=st.sampled_from((ACTIVE, NOT_FOUND, *FAULTS)),
    faulty=st.sampled_from((0, 1, 3, 20)),
    has_ticks=st.sampled_from((True, True, True, False)),
    workers=st.sampled_from((1, 1, 2)),
    clock_offset=st.sampled_from((0, 0, 0, -30, 30, 10_000)),
)
ENVIRONMENTS: tuple[Mapping[str, str], ...] = (
    {},
    {"CHECK_INTERVAL_SECONDS": "10"},
    {"CHECK_CADENCE": "10s until 1m, 20s"},
    {"MAX_CONCURRENCY": "2"},
    {"BILLING_MAX_PER_SECOND": "3"},
)


@settings(
    max_examples=8,
    deadline=None,
    derandomize="CI" in os.environ,
    phases=[HPhase.explicit, HPhase.generate],
)
@given(st.lists(phases, min_size=1, max_size=6), st.sampled_from(ENVIRONMENTS))
@example([Phase(9, SILENCE, 3, True, 2, 0), Phase(9, ACTIVE, 0, True, 1, 10_000)], {})
@example([Phase(9, LIMITED, 20, True, 1, 0), Phase(9, SETTLED, 1, False, 1, 0)], {})
@example(
    [
        Phase(6, UNREACHABLE, 20, True, 1, 0),
        Phase(3, BROKEN, 20, False, 1, 30),
        Phase(3, REFUSED, 1, True, 1, 10_000),
        Phase(9, ACTIVE, 1, True, 2, 0),
    ],
    {"BILLING_MAX_PER_SECOND": "3"},
)
def test_nobody_waits_unseen_whatever_happens(story: list[Phase], env: Mapping[str, str]) -> None:
    monitor = WatchedMonitor(always(ACTIVE), **{"CHECK_BACKOFF_MAX_SECONDS": "20", **env})
    monitor.open(20)
    began = 0.0
    for phase in story:
        monitor.changes[began] = partial(begin, monitor, phase)
        began += phase.ticks * monitor.settings.interval_seconds
    monitor.watch(round(began))
    assert_nothing_hides(monitor)


def begin(monitor: WatchedMonitor, phase: Phase) -> None:
    monitor.answer = for_some(phase.fault, first=phase.faulty)
    monitor.has_ticks = lambda at: phase.has_ticks or at == 0  # which adopts the sessions
    monitor.workers_a_tick = phase.workers
    monitor.set_clock(phase.clock_offset)

"""The template's own loop on virtual clocks: half an hour of executions takes a second."""

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from local import loop
from local.loop import Arguments, Definition, Parameter, TaskError
from testkit.clock import VirtualClock

pytestmark = pytest.mark.slow

NOON = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC).timestamp()
MINUTES = [NOON + 60 * minute for minute in range(31)]  # half an hour, and the start that ends it
LASTS = 185  # seconds from an execution's start to its last slot

# The error of an attempt to start a slot's check, or None; attempts count from 0.
type Fails = Callable[[float, int], str | None]


@dataclass(frozen=True, order=True)
class Start:
    """A check that was started: when, and for which slot. Times are seconds since 1970."""

    at: float
    slot: float


@dataclass(frozen=True)
class Execution:
    """Its beginning and end, in seconds since 1970."""

    begun: float
    ended: float


class SlowParameter(Parameter):
    """The parameter on a virtual clock; with an error set, every call fails with it."""

    def __init__(
        self, clock: VirtualClock, seconds: Callable[[], float], error: str | None
    ) -> None:
        super().__init__()
        self.calls: list[tuple[float, str]] = []  # when, and "get" or "put"
        self._clock = clock
        self._seconds = seconds
        self._error = error

    def get(self) -> str:
        self._call("get")
        return super().get()

    def put(self, value: str) -> None:
        self._call("put")
        super().put(value)

    def _call(self, what: str) -> None:
        self.calls.append((self._clock.now, what))
        self._clock.wait_until(self._clock.now + self._seconds())
        if self._error is not None:
            raise TaskError(self._error)


@dataclass
class StepFunctions:
    """Step Functions with its latencies, on one virtual clock."""

    interval_seconds: int = 5
    wait_ends_late: Callable[[], float] = lambda: 0.05
    invoke_seconds: Callable[[], float] = lambda: 0.05
    parameter_seconds: Callable[[], float] = lambda: 0.03
    parameter_error: str | None = None
    worker_seconds: float = 0.2
    fails: Fails = lambda _slot, _attempt: None
    attempts: Counter[float] = field(default_factory=Counter)
    executions_run: list[Execution] = field(default_factory=list)
    clock: VirtualClock = field(default_factory=VirtualClock)
    definition: Definition = field(init=False)
    latest: SlowParameter = field(init=False)

    def __post_init__(self) -> None:
        self.definition = loop.definition(self.interval_seconds)
        self.latest = SlowParameter(self.clock, self.parameter_seconds, self.parameter_error)

    def executions(self, begins: Iterable[float]) -> list[Start]:
        """The checks that executions begun at these times start, in order."""
        starts: list[Start] = []
        self.clock.run(lambda: self._execution(starts), begins)
        return sorted(starts)

    def execution(self, begins: float) -> list[Start]:
        """The checks that one execution starts if no other follows it."""
        return self.executions([begins])

    def _execution(self, starts: list[Start]) -> None:
        start_check = self.definition["States"]["StartCheck"]
        [retry] = start_check["Retry"]
        clock, begun = self.clock, self.clock.now
        attempts: Counter[float] = Counter()

        def wait_until(time: float) -> None:
            clock.wait_until(time + self.wait_ends_late())

        def invoke(arguments: Arguments) -> None:
            slot = datetime.fromisoformat(arguments["Payload"]["tick"]).timestamp()
            starts_at = clock.now
            seconds = self.invoke_seconds()
            if arguments["InvocationType"] != "Event":
                seconds += self.worker_seconds
            error = self.fails(slot, attempts[slot])
            attempts[slot] += 1
            self.attempts[slot] += 1
            if error is None:
                starts.append(Start(starts_at, slot))
            elif error == "States.Timeout":
                seconds += start_check["TimeoutSeconds"]
            elif error in retry["ErrorEquals"] and attempts[slot] <= retry["MaxAttempts"]:
                seconds += retry["IntervalSeconds"] * retry["BackoffRate"] ** (attempts[slot] - 1)
            clock.wait_until(clock.now + seconds)
            if error is not None:
                raise TaskError(error)

        loop.execute(
            self.definition, invoke, self.latest, now=lambda: clock.now, wait_until=wait_until
        )
        self.executions_run.append(Execution(begun, clock.now))


def slots(first: float, last: float, interval_seconds: int) -> list[float]:
    """The multiples of the interval after `first`, up to and including `last`."""
    number = int(first // interval_seconds) + 1
    return [float(n * interval_seconds) for n in range(number, int(last // interval_seconds) + 1)]


def served(starts: Sequence[Start]) -> list[float]:
    return sorted({start.slot for start in starts})


def lateness(starts: Sequence[Start]) -> float:
    return max(start.at - start.slot for start in starts)


def jittered(seed: int) -> list[float]:
    """Starts within 60 s of their minute, which is what EventBridge Scheduler guarantees."""
    draw = random.Random(seed)
    return [minute + draw.uniform(0, 60) for minute in MINUTES]


def extremes() -> list[float]:
    """Two early, then two late: every kind of gap, and the longest one around a lost start."""
    return [minute + (0.1 if number % 4 < 2 else 59.9) for number, minute in enumerate(MINUTES)]


def without_one_in_thirty(begins: Sequence[float]) -> list[float]:
    return [at for number, at in enumerate(begins) if number % 30 != 17]


STARTS = pytest.mark.parametrize(
    "begins",
    [jittered(1), jittered(2), jittered(3), extremes(), MINUTES],
    ids=["jitter", "other jitter", "more jitter", "extremes", "on the minute"],
)


@STARTS
@pytest.mark.parametrize("loses", [False, True], ids=["none lost", "one in thirty lost"])
def test_late_lost_and_duplicate_starts_miss_no_slot(begins: list[float], loses: bool) -> None:
    """In half an hour of starts, as late as EventBridge Scheduler allows."""
    draw = random.Random(0)
    step_functions = StepFunctions(
        wait_ends_late=lambda: draw.uniform(0, 0.4),
        invoke_seconds=lambda: draw.uniform(0.01, 0.3),
        parameter_seconds=lambda: draw.uniform(0.01, 0.9),
    )
    actual = without_one_in_thirty(begins) if loses else begins

    starts = step_functions.executions([*actual, actual[20]])

    whole = slots(NOON + 60, MINUTES[-1], 5)
    assert set(whole) <= set(served(starts))
    assert lateness(starts) < 0.5


def test_no_slot_is_missed_if_the_parameter_is_unavailable() -> None:
    """Executions then do not know of each other."""
    begins = without_one_in_thirty(extremes())[:22]

    starts = StepFunctions(parameter_error="Ssm.SsmException").executions(begins)

    assert set(slots(NOON, begins[-1], 5)) <= set(served(starts))
    assert lateness(starts) < 0.5


@STARTS
def test_an_execution_ends_soon_after_a_later_one_starts(
    begins: list[float],
) -> None:
    """Within two slots of the first check that the later one starts."""
    step_functions = StepFunctions()

    step_functions.executions(begins)

    executions_run = sorted(step_functions.executions_run, key=lambda execution: execution.begun)
    for one, later in itertools.pairwise(executions_run):
        assert one.ended <= max(one.begun + 65, later.begun + 5) + 5.5


def test_executions_make_few_parameter_calls() -> None:
    """The executions take half an hour in all; CloudTrail records every call."""
    step_functions = StepFunctions()

    step_functions.executions(MINUTES)

    *followed, last = sorted(step_functions.executions_run, key=lambda execution: execution.begun)
    assert max(execution.ended - execution.begun for execution in followed) <= 70.5
    assert last.ended - last.begun > LASTS
    calls = Counter(what for at, what in step_functions.latest.calls if at < last.begun)
    assert calls["put"] == len(followed)
    assert calls["get"] <= 2 * len(followed)


def test_an_execution_that_starts_no_check_announces_nothing() -> None:
    """So the one before it goes on."""
    step_functions = StepFunctions(fails=lambda _slot, _attempt: "Lambda.ServiceException")

    step_functions.execution(NOON)

    assert step_functions.latest.calls == []


@pytest.mark.parametrize("value", ["", "soon", str(int((NOON + 86400) * 1000)), "-1", "NaN"])
def test_a_foreign_parameter_value_costs_no_tick_and_is_replaced(
    value: str,
) -> None:
    """Whatever somebody else writes is gone a minute later."""
    step_functions = StepFunctions()
    step_functions.latest.value = value
    overwritten = itertools.count()
    put = step_functions.latest.put

    def put_and_overwrite(value_: str) -> None:
        put(value if next(overwritten) == 0 else value_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_functions.latest, "put", put_and_overwrite)
        starts = step_functions.executions([NOON, NOON + 60, NOON + 120])

    assert set(slots(NOON, NOON + 300, 5)) <= set(served(starts))
    assert step_functions.latest.value == str(int((NOON + 120) * 1000))


def test_every_start_passes_its_slot_in_iso_8601() -> None:
    ticks: list[str] = []
    clock = [NOON + 0.2]

    loop.execute(
        loop.definition(5),
        lambda arguments: ticks.append(arguments["Payload"]["tick"]),
        Parameter(),
        now=lambda: clock[0],
        wait_until=lambda time: clock.__setitem__(0, time),
    )

    assert ticks[:2] == ["2026-01-15T12:00:05.000Z", "2026-01-15T12:00:10.000Z"]


@pytest.mark.parametrize("interval_seconds", [1, 7, 60])
def test_no_slot_is_missed_with_other_intervals(interval_seconds: int) -> None:
    begins = without_one_in_thirty(extremes())

    starts = StepFunctions(interval_seconds).executions(begins)

    whole = slots(begins[0], MINUTES[-1], interval_seconds)
    assert [slot for slot in served(starts) if slot <= whole[-1]] == whole
    assert all(slot % interval_seconds == 0 for slot in served(starts))


@pytest.mark.parametrize("interval_seconds", [1, 5, 7, 60])
def test_an_execution_begins_with_the_next_slot_and_lasts_3_minutes(
    interval_seconds: int,
) -> None:
    for begins in (NOON, NOON + 0.001, NOON + 4.999, NOON + 5):
        starts = StepFunctions(interval_seconds).execution(begins)

        assert begins < starts[0].slot <= begins + interval_seconds
        assert begins + LASTS - interval_seconds - 1 < starts[-1].slot <= begins + LASTS + 1


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        ("Lambda.ServiceException", 3),
        ("Lambda.TooManyRequestsException", 3),
        ("Lambda.ResourceNotFoundException", 1),
        ("States.Timeout", 1),
    ],
)
def test_a_failed_start_loses_only_its_own_tick(error: str, attempts: int) -> None:
    lost = NOON + 20
    step_functions = StepFunctions(fails=lambda slot, _attempt: error if slot == lost else None)

    starts = step_functions.execution(NOON)

    assert served(starts) == [slot for slot in slots(NOON, NOON + LASTS, 5) if slot != lost]
    assert step_functions.attempts[lost] == attempts
    assert lateness(starts) < 0.1


def test_a_start_succeeds_at_the_third_attempt() -> None:
    step_functions = StepFunctions(
        fails=lambda slot, attempt: "Lambda.ServiceException" if attempt < 2 else None
    )

    starts = step_functions.execution(NOON)

    assert served(starts) == slots(NOON, NOON + LASTS, 5)


def test_the_loop_continues_if_every_start_fails() -> None:
    step_functions = StepFunctions(fails=lambda _slot, _attempt: "Lambda.ServiceException")

    assert step_functions.execution(NOON) == []
    assert sorted(step_functions.attempts) == slots(NOON, NOON + LASTS, 5)


def test_a_worker_that_takes_12_seconds_delays_no_tick() -> None:
    starts = StepFunctions(worker_seconds=12).execution(NOON)

    assert served(starts) == slots(NOON, NOON + LASTS, 5)
    assert lateness(starts) < 0.1


def test_a_late_tick_skips_slots_and_does_not_catch_up() -> None:
    late = iter([0.0, 0.0, 12.0])

    starts = StepFunctions(wait_ends_late=lambda: next(late, 0.0)).execution(NOON)

    assert [start.slot - NOON for start in starts[:5]] == [5, 10, 15, 30, 35]
    assert [start.at - NOON for start in starts[:5]] == [5, 10, 27, 30, 35]


def test_a_wait_that_ends_early_starts_no_slot_twice() -> None:
    starts = StepFunctions(wait_ends_late=lambda: -0.03, invoke_seconds=lambda: 0.01).execution(
        NOON
    )

    assert [start.slot for start in starts] == slots(NOON, NOON + LASTS, 5)


class VirtualStop(threading.Event):
    """An event on whose clock waiting takes no time; it is set once `ends` is reached."""

    def __init__(self, now: float, ends: float) -> None:
        super().__init__()
        self.now = now
        self._ends = ends

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.now = min(self.now + timeout, self._ends)
        if self.now == self._ends:
            self.set()
        return self.is_set()


def test_local_executions_follow_without_gap_or_overlap() -> None:
    stopping = VirtualStop(NOON, NOON + 300.5)
    ticks: list[float] = []

    loop.run(lambda tick: ticks.append(tick.timestamp()), 5, stopping, now=lambda: stopping.now)

    assert ticks == slots(NOON, NOON + 300, 5)


def test_no_check_is_started_after_the_monitor_stops() -> None:
    stopping = VirtualStop(NOON, NOON + 300)
    ticks: list[datetime] = []

    def start_check(tick: datetime) -> None:
        ticks.append(tick)
        stopping.set()

    loop.run(start_check, 5, stopping, now=lambda: stopping.now)

    assert ticks == [datetime.fromtimestamp(NOON + 5, UTC)]


def test_a_bug_in_a_check_ends_the_local_loop() -> None:
    stopping = VirtualStop(NOON, NOON + 300)

    def start_check(_tick: datetime) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop.run(start_check, 5, stopping, now=lambda: stopping.now)


def test_the_local_interval_is_the_templates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loop.default_interval_seconds() == 5
    text = loop.TEMPLATE.read_text(encoding="utf-8")
    changed = tmp_path / "template.yaml"
    before, parameter, after = text.partition("\n  CheckIntervalSeconds:\n")
    changed.write_text(before + parameter + after.replace("Default: 5", "Default: 3", 1))
    monkeypatch.setattr(loop, "TEMPLATE", changed)

    assert loop.default_interval_seconds() == 3


def test_the_definition_has_no_placeholder_left() -> None:
    definition: Definition = loop.definition(7)

    assert "${" not in str(definition)

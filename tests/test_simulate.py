"""The simulation of `make simulate`, with few sessions for a short time."""

import pytest

from bench import simulate
from bench.simulate import STEP_SECONDS, not_later_than, simulated

pytestmark = pytest.mark.slow


def test_a_simulated_quarter_of_an_hour_checks_every_session_on_time() -> None:
    with simulated(open_sessions=3000, seconds=900) as simulation:
        ticks: list[float] = []
        seen = simulation.run(ticks.append)

        assert ticks == list(range(0, 900, 5))
        assert simulation.left() == 0
        assert not_later_than(seen.late, 1.0) < 5
        assert not_later_than(seen.first_late, 1.0) < 5
        # A day's sessions, of which a 144th is younger than 10 minutes: 21 every 5 s, 104 every
        # 30 s and 2,875 every 5 minutes are 17.2 checks a second.
        assert 15_000 <= seen.checks <= 16_000
        assert seen.under_way == 0


def test_a_simulated_tick_too_large_for_one_worker_gets_helpers() -> None:
    with simulated(open_sessions=60_000, seconds=20) as simulation:
        seen = simulation.run()

        assert seen.workers_started > 4
        assert not_later_than(seen.late, 1.0) < 5


def test_each_priced_step_occurs_in_a_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class RecordingDict(dict[str, float]):
        def get(self, name: str, default: float) -> float:  # type: ignore[override]
            taken.add(name)
            return super().get(name, default)

    taken: set[str] = set()
    monkeypatch.setattr(simulate, "STEP_SECONDS", RecordingDict(STEP_SECONDS))
    with simulated(open_sessions=1000, seconds=10) as simulation:
        simulation.run()
    assert taken > set(STEP_SECONDS)

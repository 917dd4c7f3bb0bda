"""The simulation that `make simulate` runs, on few sessions for a short time."""

from contextlib import closing

from bench.simulate import Simulation, not_later_than


def test_a_simulated_quarter_of_an_hour_checks_every_session_on_time() -> None:
    with closing(Simulation(open_sessions=3000, seconds=900)) as simulation:
        simulation.prepare()
        ticks = list(simulation.run())

    assert ticks == list(range(0, 900, 5))
    assert simulation.left() == 0
    assert not_later_than(simulation.seen.lateness, 1.0) <= 5
    # A day's sessions, of which a 144th is younger than 10 minutes: 21 every 5 s, 104 every 30 s
    # and 2,875 every 5 minutes are 17.2 checks a second.
    assert 15_000 <= simulation.seen.checks <= 16_000

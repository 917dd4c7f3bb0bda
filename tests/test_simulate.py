"""The simulation of `make simulate`, with few sessions for a short time."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from bench.simulate import not_later_than, simulated
from testkit.virtual_time import Meter


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    """2,000 rows by a text id, as the shop's and the monitor's tables have them."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE session (rowid INTEGER PRIMARY KEY, id TEXT UNIQUE, due)")
        rows = ((f"s{number:04}", number) for number in range(2000))
        connection.executemany("INSERT INTO session (id, due) VALUES (?, ?)", rows)
        yield connection


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


def test_a_simulation_repeats_itself() -> None:
    """No figure depends on the speed of the machine that simulates."""

    def figures() -> object:
        with simulated(open_sessions=20_000, seconds=20) as simulation:
            return simulation.run()

    assert figures() == figures()


def test_a_statement_without_rows_takes_2_ms(connection: sqlite3.Connection) -> None:
    meter = Meter(connection)
    connection.execute("SELECT 1 FROM session WHERE id = 'none'").fetchall()
    assert meter.seconds == pytest.approx(0.002)


def test_a_claim_of_500_takes_20_ms_and_one_of_1000_takes_longer(
    connection: sqlite3.Connection,
) -> None:
    def claim(count: int) -> float:
        meter = Meter(connection)
        connection.execute("SELECT 'pause'").fetchall()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("SELECT * FROM session LIMIT ?", (count,)).fetchall()
        for first in range(0, count, 500):
            connection.execute(
                "UPDATE session SET due = 1 WHERE rowid > ? AND rowid <= ?", (first, first + 500)
            )
        connection.execute("COMMIT")
        return meter.seconds

    assert claim(500) == pytest.approx(0.020, rel=0.1)
    assert claim(1000) == pytest.approx(0.032, rel=0.1)


def test_rows_that_are_only_counted_take_time_too(connection: sqlite3.Connection) -> None:
    """As in a piece of the reconciling walk: three statements look at 2,000 rows each."""
    meter = Meter(connection)
    for _ in range(3):
        connection.execute("SELECT COUNT(*) FROM session a JOIN session b USING (id)").fetchall()
    assert 0.007 <= meter.seconds <= 0.010

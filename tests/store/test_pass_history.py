"""The log of passes: a row each, kept for a day, and the heartbeat that it gives."""

import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import pytest

from core.domain.model import Outcome, Reason, Skip
from core.domain.summary import Summary
from core.store import old_rows
from core.store.store import Store
from testkit.clock import NOON, FakeClock
from testkit.shops import Shop


def test_a_pass_is_one_row_kept_for_a_day(store: Store, shop: Shop, clock: FakeClock) -> None:
    summary = Summary(
        Reason.TICK,
        NOON,
        NOON,
        open=3,
        outcomes=Counter({Outcome.ACTIVE: 1, Outcome.TIMEOUT: 1}),
        skipped=Counter({Skip.IN_FLIGHT: 1}),
        overdue_seconds=1.5,
        latencies=[0.1, 0.2],
        duration_seconds=0.25,
    )
    store.history.end(store.history.begin(summary), summary)
    columns = (
        "reason, duration_ms, open_sessions, checked, errors, outcomes, skipped, overdue_ms,"
        " latency_p50_ms, latency_max_ms"
    )
    newest = f"SELECT {columns} FROM checkout_session_run ORDER BY id DESC LIMIT 1"
    assert shop.run(newest) == [
        ("tick", 250, 3, 2, 1, '{"active": 1, "timeout": 1}', '{"in_flight": 1}', 1500, 100, 200)
    ]
    assert store.history.last_start() == NOON
    store.history.begin(Summary(Reason.TICK, NOON))  # a pass that was killed
    clock.advance(timedelta(days=1, seconds=1).total_seconds())
    store.history.forget_old()
    assert shop.run("SELECT COUNT(*) FROM checkout_session_run") == [(0,)]


def test_old_rows_are_deleted_some_at_a_time(
    store: Store, shop: Shop, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, no statement takes long, and what is deleted stays deleted."""
    monkeypatch.setattr(old_rows, "ROWS_AT_ONCE", 2)
    for _ in range(5):
        store.history.begin(Summary(Reason.TICK, NOON))
    clock.advance(timedelta(days=1, seconds=1).total_seconds())
    assert [store.forget_old() for _ in range(3)] == [True, True, False]
    assert shop.run("SELECT COUNT(*) FROM checkout_session_run") == [(0,)]


def test_a_manual_pass_is_no_sign_that_ticks_are_made(store: Store, clock: FakeClock) -> None:
    store.history.begin(Summary(Reason.TICK, NOON))
    clock.advance(60)
    store.history.begin(Summary(Reason.MANUAL, clock.now))
    assert store.history.last_start() == NOON


@pytest.mark.parametrize("character", ["x", "é", "😀", '"', "\x00", "\udcff"])
def test_unknown_words_fit_into_their_column(store: Store, shop: Shop, character: str) -> None:
    """Whatever they consist of: JSON has up to twelve characters for one."""
    words = [f"{number}{character * 200}" for number in range(4)]
    summary = Summary(Reason.TICK, NOON, NOON, unknown_words=words)
    store.history.end(store.history.begin(summary), summary)
    newest = "SELECT unknown_words FROM checkout_session_run ORDER BY id DESC LIMIT 1"
    kept = json.loads(shop.run(newest)[0][0])
    assert [word[:50] for word in kept] == [word[:50] for word in words[:3]]


def test_a_new_installation_has_a_first_heartbeat(store: Store) -> None:
    assert store.history.last_start() == NOON


def test_a_start_is_late_by_its_ticks_first_pass(store: Store, clock: FakeClock) -> None:
    def begin(started: float, tick: float | None) -> None:
        at = NOON + timedelta(seconds=started)
        if tick is None:
            store.history.begin(Summary(Reason.MANUAL, at))
        else:
            store.history.begin(Summary(Reason.TICK, at, NOON + timedelta(seconds=tick)))

    begin(0.1, 0)
    begin(14.2, 5)
    begin(20, 5)  # a helper
    begin(21, None)
    begin(-700, -720)  # too old to count
    begin(100, 90)  # a tick of a clock that was ahead
    clock.advance(30)
    assert store.history.start_delays() == pytest.approx([9.2, 0.1])


def test_a_pass_is_one_row_if_the_answer_to_its_insert_is_lost(
    server_store: Store, server_shop: Shop, lose_an_answer: Callable[[], list[str]]
) -> None:
    """The statement is sent again, and must not insert a second row."""
    executed = lose_an_answer()
    server_store.history.begin(Summary(Reason.TICK, NOON))
    assert len(executed) == 2
    assert server_shop.run("SELECT COUNT(*) FROM checkout_session_run WHERE reason = 'tick'") == [
        (1,)
    ]

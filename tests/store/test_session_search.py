"""Sessions found by id, by checkout id and by outcome, on every engine."""

import json
from typing import Any

import pytest

from core.domain.model import iso
from core.store import session_search
from core.store.session_search import find_sessions, sessions_of
from core.worker import open_database
from testkit.clock import FakeClock
from testkit.history import SECOND, History
from testkit.shops import Shop, add_sessions

INDEX = "CREATE INDEX by_checkout ON checkout_session (billing_checkout_id)"


@pytest.fixture
def history(shop: Shop) -> History:
    return History(shop)


def found(history: History, text: str) -> dict[str, Any]:
    """The answer as JSON delivers it."""
    database = open_database(history.settings(), clock=FakeClock(history.now))
    try:
        database.prepare()
        return json.loads(json.dumps(find_sessions(database, text)))  # type: ignore[no-any-return]
    finally:
        database.close()


def pages(history: History, outcome: str) -> list[list[str]]:
    """The ids of every page."""
    database = open_database(history.settings(), clock=FakeClock(history.now))
    after, found = 0, []
    try:
        while True:
            answer: Any = sessions_of(database, outcome, after)
            found.append([session["session_id"] for session in answer["sessions"]])
            if answer["after"] is None:
                return found
            assert answer["after"] > after
            after = answer["after"]
    finally:
        database.close()


def test_a_failing_session_is_found_by_its_id(history: History) -> None:
    history.failing("cart-1", "checkout_1", next_check_at=history.now + 8 * SECOND)
    assert found(history, "cart-1") == {
        "timestamp": "2026-01-15T12:00:02.000Z",
        "query": "cart-1",
        "sessions": [
            {
                "session_id": "cart-1",
                "billing_checkout_id": "checkout_1",
                "status": "open",
                "first_seen_at": "2026-01-15T11:50:02.000Z",
                "outcome": "unexpected_status",
                "status_code": 500,
                "consecutive_failures": 3,
                "failing_since": "2026-01-15T11:59:02.000Z",
                "last_checked_at": "2026-01-15T12:00:01.000Z",
                "next_check_at": "2026-01-15T12:00:10.000Z",
                "in_flight": False,
                "change": None,
            }
        ],
        "note": None,
    }


@pytest.mark.parametrize(("due_in", "in_flight"), [(3, False), (-1, True)])
def test_a_healthy_session_has_the_times_of_its_batch(
    history: History, due_in: int, in_flight: bool
) -> None:
    """A claimed batch holds sessions that are due; the others are not being checked."""
    due = history.now + due_in * SECOND
    history.session("cart-1", "c", next_check_at=due, claimed_until=history.now + 9 * SECOND)
    history.shop.run("UPDATE checkout_session_batch SET checked_at = due_at")
    history.shop.run("UPDATE checkout_session_check SET next_check_at = NULL")
    [session] = found(history, "cart-1")["sessions"]
    assert session["last_checked_at"] == session["next_check_at"] == iso(due)
    assert session["in_flight"] is in_flight


def test_a_closed_session_says_what_billing_said(history: History) -> None:
    add_sessions(history.shop, {"cart-2": "checkout_2"}, status="success")
    history.change("cart-2", billing_status="paid")
    [session] = found(history, "cart-2")["sessions"]
    assert (session["status"], session["outcome"]) == ("success", None)
    assert session["change"] == {
        "new_status": "success",
        "billing_status": "paid",
        "changed_at": "2026-01-15T11:59:32.000Z",
    }


@pytest.mark.new_database
@pytest.mark.parametrize("indexed", [True, False])
def test_sessions_are_found_by_their_checkout(shop: Shop, indexed: bool) -> None:
    history = History(shop)
    if indexed:
        shop.run(INDEX)
    for session_id in ("a", "b"):
        history.session(session_id, "both")
    add_sessions(shop, {"c": "closed-one"}, status="failure")
    assert {s["session_id"] for s in found(history, "both")["sessions"]} == {"a", "b"}
    closed = found(history, "closed-one")
    assert [s["session_id"] for s in closed["sessions"]] == (["c"] if indexed else [])
    assert closed["note"] == (
        None
        if indexed
        else "checkout_session has no index on billing_checkout_id, so checkout ids are searched "
        "among the newest 5,000 sessions only."
    )


@pytest.mark.parametrize("text", ["nobody", "é\U0001f642", "'; DROP TABLE x; --%s", "\ud800"])
def test_an_id_that_no_session_has_is_found_nowhere(history: History, text: str) -> None:
    history.session("cart-1", "checkout_1")
    assert found(history, text)["sessions"] == []


def test_the_sessions_of_an_outcome_come_in_pages(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_search, "PAGE", 2)
    for n in range(5):
        history.session(f"s{n}", f"c{n}")
        history.failing(f"f{n}", f"d{n}")
    history.session("new", None, last_outcome=None)
    history.shop.run("UPDATE checkout_session SET status = 'success' WHERE id = 'f3'")
    assert pages(history, "active") == [["s0", "s1"], ["s2", "s3"], ["s4"]]
    assert pages(history, "unexpected_status") == [["f0", "f1"], ["f2"], ["f4"]]
    assert pages(history, "unchecked") == [["new"]]
    assert pages(history, "timeout") == [[]]


def test_an_open_session_whose_status_is_in_capitals_is_on_the_page(server_shop: Shop) -> None:
    """MySQL's usual collations take it as the same word, and so it is checked."""
    history = History(server_shop)
    history.session("cart-1", "checkout_1")
    server_shop.run("UPDATE checkout_session SET status = 'OPEN'")
    assert pages(history, "active") == [["cart-1"]]


@pytest.mark.parametrize("outcome", ["not_found", "timeout"])
def test_a_page_reads_a_bounded_number_of_rows(
    history: History, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    """More sessions fail than one answer reads; the one that is asked for is the last."""
    monkeypatch.setattr(session_search, "READ", 3)
    monkeypatch.setattr(session_search, "FEW", 3)
    for n in range(7):
        history.failing(f"f{n}", f"d{n}")
    history.failing("last", "c", last_outcome=outcome)
    assert pages(history, outcome) == [[], [], ["last"]]

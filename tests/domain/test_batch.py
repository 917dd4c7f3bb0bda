"""What is written when a batch is given back."""

from collections.abc import Sequence
from datetime import datetime, timedelta

import pytest

from core.domain.batch import CheckRecord, Settlement, settle
from core.domain.model import Answer, BatchClaim, Claim, Outcome, Recheck
from testkit.clock import NOON

SOON, LATER = NOON + timedelta(seconds=5), NOON + timedelta(minutes=5)
UNTIL = NOON + timedelta(seconds=20)
# What a session's last check found.
HEALTHY, NEVER, FAILED = ("active", 200, 0), (None, None, 0), ("timeout", None, 2)


def claim(
    number: int = 1,
    last: tuple[str | None, int | None, int] = HEALTHY,
    *,
    has_due_time: bool = False,
) -> Claim:
    outcome, code, failures = last
    return Claim(
        number, f"s{number}", "c", NOON, failures, NOON, UNTIL, 7, outcome, code, has_due_time
    )


def recheck(
    claim: Claim, due: datetime = SOON, outcome: Outcome = Outcome.ACTIVE, code: int | None = 200
) -> Recheck:
    return Recheck(claim, Answer(outcome, code), due)


def batch(claims: Sequence[Claim], *, due: datetime = NOON) -> BatchClaim:
    return BatchClaim(7, NOON, UNTIL, due, due <= NOON, claims, ())


def test_checks_that_find_nothing_new_write_no_row() -> None:
    rechecks = [recheck(claim(n)) for n in range(50)]
    written = settle(Settlement(batch([r.claim for r in rechecks]), rechecks), NOON)
    assert (written.is_checked, written.next_check_at, list(written.records)) == (True, SOON, [])


@pytest.mark.parametrize(
    ("claim", "due", "outcome", "code", "own_due"),
    [
        (claim(last=NEVER), SOON, Outcome.ACTIVE, 200, None),
        (claim(), SOON, Outcome.NOT_FOUND, 404, None),
        (claim(last=("not_found", 404, 0)), SOON, Outcome.NOT_FOUND, 410, None),
        (claim(last=FAILED), SOON, Outcome.ACTIVE, 200, None),
        (claim(last=FAILED, has_due_time=True), SOON, Outcome.ACTIVE, 200, None),
        (claim(has_due_time=True), SOON, Outcome.ACTIVE, 200, None),
        (claim(), LATER, Outcome.ACTIVE, 200, LATER),
        (claim(last=FAILED), LATER, Outcome.TIMEOUT, None, LATER),
        (claim(last=FAILED), SOON, Outcome.TIMEOUT, None, None),
    ],
)
def test_a_session_is_written_where_it_differs_from_its_batch(
    claim: Claim, due: datetime, outcome: Outcome, code: int | None, own_due: datetime | None
) -> None:
    healthy = recheck(claim._replace(rowid=2, last_outcome="active", has_due_time=False))
    healthy = healthy._replace(claim=healthy.claim._replace(consecutive_failures=0))
    healthy = healthy._replace(claim=healthy.claim._replace(last_status_code=200))
    found = recheck(claim, due, outcome, code)
    written = settle(Settlement(batch([claim, healthy.claim]), [found, healthy]), NOON)
    assert written.next_check_at == SOON
    assert list(written.records) == [CheckRecord(claim, outcome, code, own_due)]


def test_a_batch_is_due_with_the_first_of_its_healthy_sessions() -> None:
    """A failing one is due by itself, and does not bring the others forward."""
    failing = recheck(claim(1), SOON, Outcome.TIMEOUT, None)
    healthy, old = recheck(claim(2), LATER), recheck(claim(3), LATER + timedelta(minutes=5))
    found = [failing, healthy, old]
    written = settle(Settlement(batch([r.claim for r in found]), found), NOON)
    assert written.next_check_at == LATER
    assert {r.claim.rowid: r.next_check_at for r in written.records} == {
        1: SOON,
        3: LATER + timedelta(minutes=5),
    }


def test_where_all_fail_the_batch_is_due_with_the_first() -> None:
    found = [recheck(claim(n), due, Outcome.TIMEOUT) for n, due in enumerate([LATER, SOON])]
    written = settle(Settlement(batch([r.claim for r in found]), found), NOON)
    assert written.next_check_at == SOON
    assert [r.next_check_at for r in written.records] == [LATER, None]


@pytest.mark.parametrize(
    ("asked", "left", "is_checked", "rows"), [(3, 1, True, 0), (1, 3, False, 1), (2, 2, False, 2)]
)
def test_the_fewer_of_asked_and_left_get_a_due_time(
    asked: int, left: int, is_checked: bool, rows: int
) -> None:
    claims = [claim(n) for n in range(asked + left)]
    rechecks = [recheck(one) for one in claims[:asked]]
    written = settle(Settlement(batch(claims), rechecks, left=claims[asked:]), NOON)
    assert (written.is_checked, len(written.records)) == (is_checked, rows)
    assert list(written.left) == (claims[asked:] if is_checked else [])


def test_sessions_given_back_with_a_due_time_keep_it() -> None:
    claims = [claim(1), claim(2, has_due_time=True)]
    written = settle(Settlement(batch(claims), [recheck(claims[0])], left=claims[1:]), NOON)
    assert (written.is_checked, list(written.left)) == (True, [])


@pytest.mark.parametrize(
    ("batch_due", "outcome", "now", "own_due"),
    [
        (SOON, Outcome.ACTIVE, NOON, None),
        (SOON, Outcome.ACTIVE, SOON, LATER),  # it is due again by now
        (LATER + timedelta(seconds=1), Outcome.ACTIVE, NOON, LATER),
        (SOON, Outcome.TIMEOUT, NOON, LATER),
    ],
)
def test_a_recovered_session_joins_its_batch_if_that_is_due_in_time(
    batch_due: datetime, outcome: Outcome, now: datetime, own_due: datetime | None
) -> None:
    """Only this session was due; its batch is due later."""
    one = claim(last=FAILED, has_due_time=True)
    written = settle(Settlement(batch([one], due=batch_due), [recheck(one, LATER, outcome)]), now)
    assert (written.is_checked, written.next_check_at) == (False, None)
    assert [r.next_check_at for r in written.records] == [own_due]

"""SESSION_EXPIRES_AFTER: an old session becomes `timeout` when billing says that it is open."""

import pytest

from core.domain.model import Answer, Outcome
from core.domain.summary import Summary
from testkit.shops import add_sessions, numbered
from tests.store.fake_bus import FAILED, OPEN, PAID, Bus, statuses
from tests.support import FakeBilling, Passes


async def run_with_expiry(passes: Passes) -> Summary:
    return await passes.run(STATUS_UPDATES="true", SESSION_EXPIRES_AFTER="1h")


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (OPEN, "timeout"),
        (OPEN._replace(in_progress=True, billing_status="processing"), "open"),
        (PAID, "success"),
        (FAILED, "failure"),
        (Answer(Outcome.NOT_FOUND, 404, 0.01), "open"),
        (Answer(Outcome.UNKNOWN_STATUS, 200, 0.01, "'refunded'"), "open"),
        (Answer(Outcome.UNEXPECTED_STATUS, 500, 0.01), "open"),
        (Answer(Outcome.TIMEOUT, None, 10.0), "open"),
        (Answer(Outcome.NETWORK_ERROR, None, 0.01), "open"),
        (Answer(Outcome.ACTIVE, 200, 0.01), "open"),
    ],
)
async def test_an_old_session_expires_only_if_billing_says_it_is_open(
    passes: Passes, billing: FakeBilling, answer: Answer, status: str
) -> None:
    bus = passes.publisher = Bus()
    add_sessions(passes.shop, numbered(1))
    await run_with_expiry(passes)
    billing.answers = {"checkout_active_0": answer}
    passes.clock.advance(3600)
    await run_with_expiry(passes)
    assert statuses(passes.shop) == {"s0": status}
    assert [change.billing_status for change in bus.published] == (
        [answer.billing_status] if status != "open" else []
    )


async def test_a_session_younger_than_the_expiry_stays_open(
    passes: Passes, billing: FakeBilling
) -> None:
    add_sessions(passes.shop, numbered(1))
    await run_with_expiry(passes)
    billing.answers = {"checkout_active_0": OPEN}
    passes.clock.advance(3595)
    assert (await run_with_expiry(passes)).outcomes == {Outcome.ACTIVE: 1}
    assert statuses(passes.shop) == {"s0": "open"}

"""Ten minutes without a billing service, on an injected clock."""

import random
from datetime import timedelta

import pytest

from core.domain.model import Answer, Outcome
from testkit.clock import NOON, FakeClock
from testkit.shops import add_sessions, numbered
from tests.support import FakeBilling, Passes

SESSIONS = 40
TICKS = 10 * 60 // 5


@pytest.mark.slow
async def test_an_outage_costs_few_requests_and_ends_within_the_backoff_cap(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    """Waits of 5, 10, 20, 40 and then at most 60 s, with jitter: about 17 requests, not 120."""
    passes.choose = random.Random(7).randint
    add_sessions(passes.shop, numbered(SESSIONS))
    all_checkouts = set(numbered(SESSIONS).values())
    unreachable = Answer(Outcome.NETWORK_ERROR, None, 0.01, "Connection refused")
    billing.answers = dict.fromkeys(all_checkouts, unreachable)  # type: ignore[arg-type]

    for _ in range(TICKS):
        await passes.run()
        clock.advance(5)
    during = billing.asked.copy()

    billing.answers = {}
    ended = clock.now
    billing.asked.clear()
    while set(billing.asked) != all_checkouts:
        assert clock.now <= ended + timedelta(seconds=60)
        await passes.run()
        clock.advance(5)

    assert set(during) == all_checkouts
    assert min(during.values()) >= 12  # never further apart than the cap
    assert max(during.values()) <= 24
    assert ended == NOON + timedelta(minutes=10)
    assert passes.shop.run("SELECT COUNT(*) FROM checkout_session_check") == [(SESSIONS,)]
    assert (await passes.run()).checked == SESSIONS  # every 5 s again

"""Ten minutes without a billing service, on a virtual clock."""

import random
from datetime import timedelta

from core.domain.model import Answer, Outcome
from testkit.clock import NOON, FakeClock
from testkit.shops import add_sessions, numbered
from tests.support import FakeBilling, Passes

SESSIONS = 40
TICKS = 10 * 60 // 5


async def test_an_outage_costs_few_requests_and_every_session_is_checked_within_a_cap_of_its_end(
    passes: Passes, clock: FakeClock, billing: FakeBilling
) -> None:
    """5, 10, 20, 40 and then at most 60 s apart, with jitter: about 17 requests, not 120."""
    passes.choose = random.Random(7).randint
    add_sessions(passes.shop, numbered(SESSIONS))
    everyone = set(numbered(SESSIONS).values())
    away = Answer(Outcome.NETWORK_ERROR, None, 0.01, "Connection refused")
    billing.answers = dict.fromkeys(everyone, away)  # type: ignore[arg-type]

    for _ in range(TICKS):
        await passes.run()
        clock.advance(5)
    during = billing.asked.copy()

    billing.answers = {}
    ended = clock.now
    billing.asked.clear()
    while set(billing.asked) != everyone:
        assert clock.now <= ended + timedelta(seconds=60)
        await passes.run()
        clock.advance(5)

    assert set(during) == everyone
    assert min(during.values()) >= 12  # never further apart than the cap
    assert max(during.values()) <= 24
    assert ended == NOON + timedelta(minutes=10)
    assert passes.shop.run("SELECT COUNT(*) FROM checkout_session_check") == [(SESSIONS,)]
    assert (await passes.run()).checked == SESSIONS  # every 5 s again

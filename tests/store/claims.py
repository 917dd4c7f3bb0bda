"""Steps that most tests of the queue take."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from core.domain.model import Answer, Claim, Outcome, Recheck
from core.store.store import Store

LEASE = timedelta(seconds=20)


def claim_all(store: Store, tick: datetime, limit: int = 10_000) -> list[Claim]:
    return store.queue.claim_due(store.now(), tick=tick, lease=LEASE, limit=limit)


def claim_due(store: Store) -> list[Claim]:
    """What is due now by the server's clock, 500 at most."""
    now = store.now()
    return store.queue.claim_due(now, tick=now, lease=LEASE, limit=500)


def rechecks(claims: Sequence[Claim], next_check_at: datetime, outcome: Outcome) -> list[Recheck]:
    return [Recheck(claim, Answer(outcome, 200), next_check_at) for claim in claims]


def ids(claims: Sequence[Claim]) -> list[str]:
    return sorted(claim.session_id for claim in claims)

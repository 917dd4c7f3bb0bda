"""Steps that most tests of the queue take."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from weakref import WeakKeyDictionary

from core.domain.model import Answer, Claim, Outcome, Recheck, Recorded, StatusChange
from core.passes.held_claims import HeldClaims
from core.store.queue import Claimed
from core.store.store import Store

LEASE = timedelta(seconds=20)

_held: WeakKeyDictionary[Store, HeldClaims] = WeakKeyDictionary()


def hold(store: Store, claimed: Claimed) -> list[Claim]:
    """Hold what a worker has claimed, as its pass does; returns the sessions."""
    _held.setdefault(store, HeldClaims()).hold(claimed)
    return claimed.claims


def claim_all(
    store: Store, tick: datetime, limit: int = 10_000, lease: timedelta = LEASE
) -> list[Claim]:
    return hold(store, store.queue.claim_due(store.now(), tick=tick, lease=lease, limit=limit))


def claim_due(store: Store) -> list[Claim]:
    """What is due now by the server's clock, 500 at most."""
    return claim_all(store, store.now(), limit=500)


def claim_unchecked(
    store: Store, since: datetime, session_ids: Sequence[str] | None = None
) -> list[Claim]:
    now, queue = store.now(), store.queue
    return hold(
        store,
        queue.claim_unchecked(now, since=since, lease=LEASE, limit=10, session_ids=session_ids),
    )


def record(
    store: Store, rechecks: Sequence[Recheck] = (), changes: Sequence[StatusChange] = ()
) -> Recorded:
    """Record decisions; a batch is written when the last of its sessions is decided."""
    held, now = _held.setdefault(store, HeldClaims()), store.now()
    held.decide(rechecks, at=0.0)
    recorded = store.record(held.take_ready(now, at=0.0), changes, now)
    held.forget((change.claim for change in changes), at=0.0)
    return recorded


def give_back(store: Store, claims: Sequence[Claim]) -> None:
    held, now = _held.setdefault(store, HeldClaims()), store.now()
    held.give_back(claims)
    store.record(held.take_ready(now, at=0.0), (), now)


def release_all(store: Store) -> None:
    """Give back everything that is held, as a pass does at its end."""
    store.record(_held.setdefault(store, HeldClaims()).take_all(), (), store.now())


def rechecks(claims: Sequence[Claim], next_check_at: datetime, outcome: Outcome) -> list[Recheck]:
    return [Recheck(claim, Answer(outcome, 200), next_check_at) for claim in claims]


def ids(claims: Sequence[Claim]) -> list[str]:
    return sorted(claim.session_id for claim in claims)

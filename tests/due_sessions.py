"""Open sessions that are due, and healthy answers about them."""

from core.domain.model import Answer, Outcome
from core.store.store import Store
from testkit.clock import FakeClock
from testkit.shops import Shop, add_sessions, numbered
from tests.support import database_of, reconcile


def add_due_sessions(shop: Shop, clock: FakeClock, count: int) -> None:
    """Put open sessions into the shop and adopt them; all are due at once."""
    add_sessions(shop, numbered(count))
    store = Store(database_of(shop, clock))
    store.prepare()
    reconcile(store, clock.now)
    store.close()


def healthy_answers(count: int, seconds: float = 0.1) -> dict[str, Answer]:
    """Answers about that many of the numbered sessions."""
    return dict.fromkeys(
        [str(c) for c in numbered(count).values()], Answer(Outcome.ACTIVE, 200, seconds)
    )

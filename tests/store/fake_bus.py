"""An event bus in memory, and billing's answers that change a status."""

from collections.abc import Callable, Collection, Sequence

from core.domain.model import Answer, Outcome, SessionStatus, StatusChangedEvent
from core.store.status_changes import CHANGES_AT_ONCE, Publisher
from testkit.clock import FakeClock
from testkit.shops import Shop
from tests.support import FakeBilling, Passes

PAID = Answer(Outcome.ACTIVE, 200, 0.01, status=SessionStatus.SUCCESS, billing_status="paid")
FAILED = Answer(Outcome.ACTIVE, 200, 0.01, status=SessionStatus.FAILURE, billing_status="failed")
OPEN = Answer(Outcome.ACTIVE, 200, 0.01, status=SessionStatus.OPEN, billing_status="pending")


class Bus:
    """Accepts every event except those of the sessions in `rejects`; keeps what it accepted."""

    def __init__(self) -> None:
        self.published: list[StatusChangedEvent] = []
        self.rejects: set[str] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    @property
    def session_ids(self) -> list[str]:
        return [change.session_id for change in self.published]

    def publish(self, changes: Sequence[StatusChangedEvent]) -> Collection[str]:
        assert 1 <= len(changes) <= CHANGES_AT_ONCE
        self.meanwhile()
        accepted = [change for change in changes if change.session_id not in self.rejects]
        self.published += accepted
        return [change.session_id for change in accepted]


def publishing_passes(
    shop: Shop, clock: FakeClock, billing: FakeBilling, publisher: Publisher
) -> Passes:
    passes = Passes(shop, clock, billing)
    passes.publisher = publisher
    return passes


def statuses(shop: Shop) -> dict[str, str]:
    return dict(shop.run("SELECT id, status FROM checkout_session"))

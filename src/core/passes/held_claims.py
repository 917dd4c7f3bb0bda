"""The claims of a pass: each is held until its session is decided or given back."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from core.domain.batch import Settlement
from core.domain.model import BatchClaim, Claim, Recheck
from core.store.queue import Claimed
from core.store.results import Results

# A batch is given back at the latest this long after its first decision, so that those that billing
# has not answered about delay nobody: they are then held by themselves, which takes writes.
HOLD_SECONDS = 1.0
# With a short interval it is due before: then this long before it is due, which is two writes.
SETTLE_BEFORE = timedelta(seconds=0.5)


_ANY_TIME = datetime.min.replace(tzinfo=UTC)  # nothing is undecided


class _HeldBatch:
    def __init__(self, claim: BatchClaim) -> None:
        self.claim = claim
        self.undecided = {one.rowid: one for one in claim.claims}
        self.rechecks: list[Recheck] = []
        self.left: list[Claim] = []
        self.first_due: datetime | None = None  # of the rechecks
        self.first_decided: float | None = None  # when, by the event loop's clock

    def is_ready(self, now: datetime, at: float) -> bool:
        """Whether it can be given back, or has to be."""
        if not self.undecided or self.left:
            return True
        if self.first_decided is None:
            return False
        is_due = self.first_due is not None and now >= self.first_due - SETTLE_BEFORE
        return is_due or at >= self.first_decided + HOLD_SECONDS


class HeldClaims:
    """Keeps a batch until all of its sessions are decided, or HOLD_SECONDS are over.

    `now` is the database's clock, `at` the event loop's.
    """

    def __init__(self) -> None:
        self._batches: dict[int, _HeldBatch] = {}
        self._sessions: dict[int, Claim] = {}  # whose own row is claimed
        self._rechecks: list[Recheck] = []  # of these
        self._released: list[Claim] = []

    def __len__(self) -> int:
        """How many sessions are held."""
        of_batches = sum(
            len(held.undecided) + len(held.rechecks) + len(held.left)
            for held in self._batches.values()
        )
        return of_batches + len(self._sessions) + len(self._rechecks) + len(self._released)

    @property
    def batches(self) -> int:
        """How many batches are held."""
        return len(self._batches)

    def hold(self, claimed: Claimed) -> None:
        for batch in claimed.batches:
            self._batches[batch.id] = _HeldBatch(batch)
        self._sessions |= {claim.rowid: claim for claim in claimed.sessions}

    def decide(self, rechecks: Iterable[Recheck], at: float) -> None:
        for recheck in rechecks:
            held = self._take(recheck.claim, at)
            if held is None:
                self._rechecks.append(recheck)
                continue
            due = recheck.next_check_at
            if held.first_due is None or due < held.first_due:
                held.first_due = due
            held.rechecks.append(recheck)

    def give_back(self, claims: Iterable[Claim]) -> None:
        for claim in claims:
            held = self._take(claim, None)
            (self._released if held is None else held.left).append(claim)

    def forget(self, claims: Iterable[Claim], at: float) -> None:
        """Forget sessions whose rows were written or deleted with their status change."""
        for claim in claims:
            self._take(claim, at)

    def take_ready(self, now: datetime, at: float) -> Results:
        """What can be written now, and is not held any more."""
        settlements = []
        for batch_id, held in list(self._batches.items()):
            if held.is_ready(now, at):
                del self._batches[batch_id]
                self._sessions |= held.undecided
                waiting = list(held.undecided.values())
                settlements.append(Settlement(held.claim, held.rechecks, waiting, held.left))
        rechecks, self._rechecks = self._rechecks, []
        released, self._released = self._released, []
        return Results(settlements, rechecks, released)

    def take_all(self) -> Results:
        """Everything that is held; what is undecided is given back."""
        self._released += self._sessions.values()
        self._sessions.clear()
        for held in self._batches.values():
            held.left += held.undecided.values()
            held.undecided.clear()
        return self.take_ready(_ANY_TIME, 0.0)

    def _take(self, claim: Claim, decided: float | None) -> _HeldBatch | None:
        """Take a claim out; returns its batch, or None if the session's own row is claimed."""
        held = self._batches.get(claim.batch_id) if claim.batch_id is not None else None
        if held is not None and held.undecided.get(claim.rowid) is claim:
            del held.undecided[claim.rowid]
            if held.first_decided is None:
                held.first_decided = decided
            return held
        if self._sessions.get(claim.rowid) is claim:
            del self._sessions[claim.rowid]
        return None

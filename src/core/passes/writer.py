"""Writes what a pass decides, in the background, and holds every claim until then."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from core.database.thread import DatabaseThread, wait_to_end
from core.domain.model import Claim, Decision, Outcome, Recheck, Recorded, StatusChange
from core.domain.summary import count_errors
from core.errors import StoreError
from core.log import PassLog
from core.passes.held_claims import HeldClaims
from core.passes.pause import SharedPause
from core.store.queue import Claimed
from core.store.status_changes import CHANGES_AT_ONCE
from core.store.store import Store

# Decisions are collected for this long, or until there are so many, so that one statement records
# many of them and claims wait for few. A killed pass loses that much, and those sessions are then
# checked once more.
WRITE_EVERY_SECONDS, WRITE_AT_ONCE = 0.25, 2000
# Status changes that are not made this long after the pass had to end are given back: a slow event
# bus must not keep a Lambda from ending in time.
FINISH_CHANGES_SECONDS = 2.0
# Where a bus takes a second a call, this many changes take ten: none of their claims lapses.
MAX_WAITING_CHANGES = 10 * CHANGES_AT_ONCE
# A pass records this often that it is under way.
PROGRESS_EVERY_SECONDS = 1.0


class Progress(NamedTuple):
    """How many sessions a pass holds, and has checked without closing them."""

    held: int = 0
    rechecks: int = 0


class Writer:
    """Takes claims and decisions, and writes while the block `running` is open.

    However the block ends (normally, by a deadline, a cancellation or an error), the decisions made
    so far are recorded and the other claims are given back. Only if the database cannot be used,
    the claims are left to expire.
    """

    def __init__(
        self, store: Store, database: DatabaseThread, pause: SharedPause, log: PassLog
    ) -> None:
        self._store = store
        self._database = database
        self._pause = pause
        self._log = log
        self._rechecks: list[Recheck] = []
        self._changes = deque[StatusChange]()
        self._alone = deque[StatusChange]()  # changes of which one may be refused
        self._making = 0  # changes in the transaction that is under way
        self._unwanted: list[Claim] = []
        self.gave_back = False  # since a claim waited for it
        self._all_given_back = asyncio.Event()
        self._wake = asyncio.Event()
        self._written = asyncio.Event()
        self._closing = False
        # Changed on the database's thread only:
        self._held = HeldClaims()
        self.outcomes = Counter[Outcome]()  # of all that has been recorded
        self.status_changes = 0
        self.unpublished = 0
        self._closed: list[str] = []  # ids of sessions, until somebody takes them

    @property
    def closing(self) -> bool:
        """Whether the block has ended, so that nothing more may be claimed."""
        return self._closing

    @property
    def batches_held(self) -> int:
        """How many batches this pass holds; read it on the database's thread."""
        return self._held.batches

    def hold(self, claimed: Claimed) -> None:
        """Take claims, on the database's thread, in the same step in which they were made.

        A pass may be stopped before it receives the result of that step.
        """
        self._held.hold(claimed)

    def progress(self) -> Progress:
        """What this pass holds and has written; call it on the database's thread."""
        rechecks = self.outcomes.total() - self.outcomes[Outcome.CLOSED]
        return Progress(len(self._held), rechecks)

    def take_closed(self) -> list[str]:
        """The sessions closed since the last call; call it on the database's thread."""
        closed, self._closed = self._closed, []
        return closed

    def write(self, decision: Decision) -> None:
        """Take a decision; rechecks are written within WRITE_EVERY_SECONDS, changes in turn."""
        if isinstance(decision, Recheck):
            self._rechecks.append(decision)
        else:
            self._changes.append(decision)
        if decision.answer.outcome is Outcome.RATE_LIMITED:
            self._pause.rate_limited()
            self._wake.set()
        elif len(self._rechecks) + len(self._changes) >= WRITE_AT_ONCE:
            self._wake.set()

    @property
    def has_room(self) -> bool:
        """Whether fewer than MAX_WAITING_CHANGES are still to be made."""
        to_make = len(self._changes) + len(self._alone) + self._making
        return to_make < MAX_WAITING_CHANGES

    async def wait_for_room(self) -> None:
        """Wait until there is room: what comes before would wait long."""
        while not self.has_room:
            self._written.clear()
            await self._written.wait()

    def give_back(self, claims: Iterable[Claim]) -> None:
        """Take claims whose check has not begun; other workers may have them at once."""
        self._unwanted.extend(claims)
        self.gave_back = True
        self._all_given_back.clear()
        self._wake.set()

    async def wait_until_given_back(self) -> None:
        """Wait until all claims that this pass gave back can be claimed again."""
        self.gave_back = False
        await self._all_given_back.wait()

    @asynccontextmanager
    async def running(self, pass_id: int, began: float, ends: float) -> AsyncIterator[None]:
        """Write until the block ends, and keep the pass's row of the history up to date.

        `began` is when the pass did, `ends` when it has to end, by the event loop's clock.

        Raises:
            StoreError: the database cannot be used.
        """
        try:
            async with asyncio.TaskGroup() as background:
                writing = background.create_task(self._write_until_closed(pass_id, began, ends))
                try:
                    yield
                finally:
                    self._closing = True
                    self._wake.set()
                    await wait_to_end(writing)
        except ExceptionGroup as failed:
            store_errors, others = failed.split(StoreError)
            if store_errors is None or others is not None:
                raise
            raise _first(store_errors) from None

    async def _write_until_closed(self, pass_id: int, began: float, ends: float) -> None:
        loop = asyncio.get_running_loop()
        progress_at = loop.time()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(WRITE_EVERY_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            closing = self._closing
            await self._write_collected()
            late = loop.time() > ends + FINISH_CHANGES_SECONDS
            if closing and (late or not (self._changes or self._alone)):
                break
            if loop.time() - progress_at >= PROGRESS_EVERY_SECONDS:
                progress_at = loop.time()
                await self._database.run(
                    self._store.history.update_progress,
                    pass_id,
                    seconds=progress_at - began,
                    checked=self.outcomes.total(),
                    errors=count_errors(self.outcomes),
                )
        await self._database.run(self._give_back_rest)

    async def _write_collected(self) -> None:
        """Write all rechecks, and as many changes as one transaction takes.

        A slow event bus or trigger delays the next changes, but neither rechecks nor claims nor the
        progress.
        """
        rechecks, self._rechecks = self._rechecks, []
        changes = self._next_changes()
        self._making = len(changes)
        unwanted, self._unwanted = self._unwanted, []
        at = asyncio.get_running_loop().time()
        recorded = await self._database.run(self._record, rechecks, changes, unwanted, at)
        self._alone.extend(recorded.untried)
        self._making = 0
        self._written.set()
        if self._changes or self._alone:
            self._wake.set()
        if not self._unwanted:
            self._all_given_back.set()
        self._log.status_changes(recorded.changed)
        self._log.refusals(recorded.refusals)

    def _next_changes(self) -> list[StatusChange]:
        """The changes of the next transaction: those that were refused together come last."""
        if self._changes or not self._alone:
            count = min(len(self._changes), CHANGES_AT_ONCE)
            return [self._changes.popleft() for _ in range(count)]
        return [self._alone.popleft()]

    def _record(
        self,
        rechecks: list[Recheck],
        changes: list[StatusChange],
        unwanted: list[Claim],
        at: float,
    ) -> Recorded:
        decided: list[Decision] = [*rechecks, *changes]
        now = self._pause.agree(decision.answer for decision in decided)
        self._held.decide(rechecks, at)
        self._held.give_back(unwanted)
        recorded = self._store.record(self._held.take_ready(now, at), changes, now)
        untried = {change.claim.rowid for change in recorded.untried}
        self._held.forget((c.claim for c in changes if c.claim.rowid not in untried), at)
        self._count(recorded)
        return recorded

    def _give_back_rest(self) -> None:
        if results := self._held.take_all():
            self._count(self._store.record(results, (), self._store.now()))

    def _count(self, recorded: Recorded) -> None:
        self.outcomes += recorded.outcomes
        self.status_changes += len(recorded.changed)
        self.unpublished += recorded.unpublished
        self._closed += [c.claim.session_id for c in (*recorded.changed, *recorded.gone)]


def _first(group: BaseExceptionGroup[StoreError]) -> StoreError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")

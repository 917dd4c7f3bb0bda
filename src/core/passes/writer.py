"""A pass's unit of work: it holds every claim until its result is written or it is given back."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from typing import NamedTuple

from core.database.port import STATEMENT_ROWS
from core.domain.model import Claim, Outcome, Pause, Recorded, Result, Summary
from core.errors import StoreError
from core.log import PassLog, logger
from core.store.store import Store

# Results are gathered this long, or until they fill a statement, so that one records many of them
# and a claim waits for few. A killed pass loses that much, and those sessions are then checked once
# more.
RECORD_EVERY_SECONDS = 0.25
# A pass says this often that it is under way.
PROGRESS_EVERY_SECONDS = 1.0


class DatabaseThread:
    """Runs steps one after the other on the thread that owns the connection, off the event loop."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def run[**P, T](self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        began = loop.time()
        result = await loop.run_in_executor(self._executor, partial(step, *args, **kwargs))
        logger.debug(f"Database: {step.__name__} took {(loop.time() - began) * 1000:.1f} ms")
        return result


class Own(NamedTuple):
    """How many sessions a pass holds, has closed, and has checked without closing them."""

    held: int = 0
    closed: int = 0
    checked: int = 0


class Recorder:
    """Takes claims and results, and writes in the background while the block `running` is open.

    However the block is left (its end, a deadline, a cancellation, an error), what was learned is
    recorded and the rest is given back, unless the database cannot be used; then the claims lapse.
    """

    def __init__(
        self, store: Store, database: DatabaseThread, summary: Summary, log: PassLog, pause: Pause
    ) -> None:
        self._store = store
        self._database = database
        self._summary = summary
        self._log = log
        self._pause = pause  # as all workers shared it when the pass began
        self._settled = _Settled()
        self._hurry = asyncio.Event()
        self._closing = False
        self._limited = False
        # The database thread's own:
        self._held: dict[str, Claim] = {}  # claimed, and neither written nor given back
        self._written = Counter[Outcome]()

    @property
    def paused(self) -> bool:
        """Whether billing has asked, this pass or another one, to be left alone."""
        return self._limited or self._summary.paused_until is not None

    def own(self) -> Own:
        """What this pass has claimed and written by now. On the database's thread."""
        closed = self._written[Outcome.CLOSED]
        return Own(len(self._held), closed, self._written.total() - closed)

    @asynccontextmanager
    async def running(self, run_id: int, began: float) -> AsyncIterator[None]:
        """Write until the block ends, and keep the pass's row of the run log up to date.

        `began` is when the pass did, by the event loop's clock.

        Raises:
            StoreError: the database cannot be used.
        """
        try:
            async with asyncio.TaskGroup() as background:
                writing = background.create_task(self._write_until_closed(run_id, began))
                try:
                    yield
                finally:
                    self._closing = True
                    self._hurry.set()
                    await _uncut(writing)
        except ExceptionGroup as failed:
            store_errors, others = failed.split(StoreError)
            if store_errors is None or others is not None:
                raise
            raise _first(store_errors) from None

    async def claim(self, claim: Callable[[datetime], list[Claim]]) -> list[Claim]:
        """Call `claim(now)` on the database's thread, unless billing is to be left alone."""

        def claim_unless_paused() -> tuple[Pause, list[Claim]]:
            pause, now = self._store.shared.read_pause()
            claims = [] if self._closing or self._is_news(pause) else claim(now)
            # Held from here on, not from where they are awaited: a pass may be stopped in between.
            self._held |= {claim.session_id: claim for claim in claims}
            return pause, claims

        pause, claims = await self._database.run(claim_unless_paused)
        self._hear_of(pause)
        return claims

    def settle(self, result: Result) -> None:
        """Take a result; it is written within RECORD_EVERY_SECONDS."""
        self._settled.results.append(result)
        if result.answer.outcome is Outcome.RATE_LIMITED:
            self._limited = True
            self._hurry.set()
        elif len(self._settled.results) >= STATEMENT_ROWS:
            self._hurry.set()

    def give_back(self, claims: Iterable[Claim]) -> None:
        """Take claims whose check has not begun; others may have them at once."""
        self._settled.unwanted.extend(claims)
        self._hurry.set()

    async def _write_until_closed(self, run_id: int, began: float) -> None:
        loop = asyncio.get_running_loop()
        told = loop.time()
        while not self._closing:
            with suppress(TimeoutError):
                async with asyncio.timeout(RECORD_EVERY_SECONDS):
                    await self._hurry.wait()
            self._hurry.clear()
            await self._write()
            if loop.time() - told >= PROGRESS_EVERY_SECONDS:
                told = loop.time()
                await self._database.run(
                    self._store.runs.progress,
                    run_id,
                    seconds=told - began,
                    checked=self._summary.checked,
                    errors=self._summary.errors,
                )
        await self._write()
        await self._database.run(self._give_back_rest)

    async def _write(self) -> None:
        settled, self._settled = self._settled, _Settled()
        pause, now = await self._database.run(self._agree_on_pause, settled.results)
        self._hear_of(pause)
        if settled.results or settled.unwanted:
            recorded = await self._database.run(self._record, settled, now)
            self._summary.outcomes += Counter(recorded.outcomes)
            self._summary.status_changes += len(recorded.changed)
            self._summary.unpublished += recorded.unpublished
            self._log.changed(recorded.changed)
            self._log.refused(recorded.refusals)

    def _agree_on_pause(self, results: Sequence[Result]) -> tuple[Pause, datetime]:
        """Tell the other workers that billing limits us, or hear it from them; and the time."""
        pause, now = self._store.shared.read_pause()
        limited = [r.answer for r in results if r.answer.outcome is Outcome.RATE_LIMITED]
        healthy = any(not result.answer.outcome.is_error for result in results)
        if limited:
            # The longest that was asked for; a number of seconds counts more than none.
            asked = [answer.retry_after for answer in limited if answer.retry_after is not None]
            pause = self._store.shared.pause(max(asked, default=None))
        elif healthy and self._pause.in_a_row and not self._is_news(pause):
            self._store.shared.end_pauses(self._pause)
            self._pause = Pause(self._pause.until, 0)
        return pause, now

    def _record(self, settled: "_Settled", now: datetime) -> Recorded:
        recorded = self._store.record(settled.results, now)
        self._store.queue.release(settled.unwanted)
        self._written += recorded.outcomes
        for claim in (*(result.claim for result in settled.results), *settled.unwanted):
            if self._held.get(claim.session_id) is claim:
                del self._held[claim.session_id]
        return recorded

    def _give_back_rest(self) -> None:
        self._store.queue.release(self._held.values())
        self._held.clear()

    def _is_news(self, pause: Pause) -> bool:
        """Whether any worker's requests have led to this pause since this pass began."""
        return pause.until > self._pause.until

    def _hear_of(self, pause: Pause) -> None:
        if self._is_news(pause):
            self._summary.paused_until = pause.until


class _Settled:
    """What waits to be written."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.unwanted: list[Claim] = []


async def _uncut(writing: asyncio.Task[None]) -> None:
    """Wait for the last write, and let a cancellation wait for it, too."""
    cancelled = None
    while not writing.done():
        try:
            await asyncio.wait([writing])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _first(group: BaseExceptionGroup[StoreError]) -> StoreError:
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an exception group is never empty")

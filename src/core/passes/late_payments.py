"""A leader's look at expired sessions, once a minute: was one of them paid after all?"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from core.database.thread import DatabaseThread
from core.domain.model import Answer, Outcome, SessionStatus
from core.domain.rate import MAX_RESERVED_SECONDS
from core.errors import StoreError
from core.log import log_paid_late, log_unusable, logger
from core.passes.pause import SharedPause
from core.store.monitor_state import MonitorState

if TYPE_CHECKING:
    from core.store.late_payments import ExpiredSession, LatePayments

type Ask = Callable[[str | None], Awaitable[Answer]]

# With these billing has said nothing about the session. It may not even have been asked.
SAYS_NOTHING = frozenset(
    (
        Outcome.RATE_LIMITED,
        Outcome.TIMEOUT,
        Outcome.NETWORK_ERROR,
        Outcome.UNAUTHORIZED,
        Outcome.UNEXPECTED_STATUS,
        Outcome.INTERNAL_ERROR,
    )
)
# With these it has said what the monitor cannot use, so a payment may be overlooked.
UNUSABLE = (Outcome.UNKNOWN_STATUS, Outcome.MISMATCH)
# In one minute. 50,000 sessions that expire in a day are looked at 520 times a minute.
MAX_LOOKS = 1000


def in_turn(
    ask: Ask,
    state: MonitorState,
    database: DatabaseThread,
    *,
    known_limit: int | None,
    until: float,
) -> Ask:
    """Ask billing under the budget, when no pass is there to reserve requests.

    A session whose turn has not come at `until`, by the event loop's clock, is RATE_LIMITED.
    """
    pause = SharedPause(state, known_limit=known_limit)
    one_at_a_time = asyncio.Lock()

    async def has_turn() -> bool:
        await database.run(pause.claimed, 1)
        try:
            while True:
                await database.run(pause.read)
                with suppress(TimeoutError):
                    async with asyncio.timeout(MAX_RESERVED_SECONDS):
                        return await pause.wait_for_turn()
        finally:
            pause.gone(1)

    async def ask_in_turn(billing_checkout_id: str | None) -> Answer:
        turn = False
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until), one_at_a_time:
                turn = await has_turn()
        if not turn:
            return Answer(Outcome.RATE_LIMITED)
        answer = await ask(billing_checkout_id)
        if answer.outcome is Outcome.RATE_LIMITED:
            pause.rate_limited(answer)
            await database.run(pause.read)
        else:
            pause.answered(answer)
        return answer

    return ask_in_turn


async def look_for_late_payments(
    late_payments: "LatePayments",
    ask: Ask,
    database: DatabaseThread,
    *,
    at_once: int,
    until: float,
) -> None:
    """Ask billing about the expired sessions that are due, `at_once` in parallel.

    No request begins after `until`, by the event loop's clock, nor after billing has limited one.
    A payment is kept as soon as it is known: under a budget, the last turn may come much later. A
    session about which billing has said nothing is looked at again soon. What cannot be used is
    logged.

    Raises:
        StoreError: the database cannot be used.
    """
    loop, looks = asyncio.get_running_loop(), 0
    while loop.time() < until and looks < MAX_LOOKS:
        sessions = await database.run(late_payments.claim_due, min(at_once, MAX_LOOKS - looks))
        if not sessions:
            return
        looks += len(sessions)
        asking = [asyncio.create_task(_asked(ask, session)) for session in sessions]
        try:
            for coming in asyncio.as_completed(asking):
                session, answer = await coming
                if answer.status is SessionStatus.SUCCESS:
                    await _record(late_payments, database, session, answer)
        finally:  # nobody would keep what they still find
            for task in asking:
                task.cancel()
        answers = [task.result() for task in asking]
        looked_at = [
            session
            for session, answer in answers
            if answer.outcome not in SAYS_NOTHING and answer.status is not SessionStatus.SUCCESS
        ]
        if looked_at:
            await database.run(late_payments.looked_at, looked_at)
        log_unusable([(s.session_id, a) for s, a in answers if a.outcome in UNUSABLE])
        if any(answer.outcome is Outcome.RATE_LIMITED for _, answer in answers):
            return


async def _asked(ask: Ask, session: "ExpiredSession") -> "tuple[ExpiredSession, Answer]":
    try:
        return session, await ask(session.billing_checkout_id)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is looked at again)
        detail = f"{type(error).__name__}: {error}"
        return session, Answer(Outcome.INTERNAL_ERROR, detail=detail)


async def _record(
    late_payments: "LatePayments",
    database: DatabaseThread,
    session: "ExpiredSession",
    answer: Answer,
) -> None:
    try:
        status = await database.run(late_payments.record_paid, session, answer)
    except StoreError:
        raise
    except Exception as error:  # noqa: BLE001 (its event; the other sessions go on)
        logger.error(
            f"❌ The late payment of session {session.session_id!r} cannot be published: "
            f"{type(error).__name__}: {error}"
        )
        return
    if status:
        log_paid_late(
            session.session_id, session.billing_checkout_id, answer.billing_status, status
        )

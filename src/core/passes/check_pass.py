"""The check pass: claim what is due, ask billing about it in parallel, record the answers.

Any number of passes may work at once, in any number of processes. The store hands each due session
to one of them (a claim, for the length of a lease), so no session is checked twice, and the claims
of a dead pass expire. One pass of each tick leads: beside its checks it reconciles the queue with
the shop's open sessions, and starts the workers that the tick needs besides itself.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress

from core.database.thread import DatabaseThread
from core.domain.model import Reason
from core.domain.other_monitors import OTHER_MONITOR
from core.domain.summary import Summary
from core.errors import StoreError
from core.log import logger, shown
from core.passes.checks import Billing
from core.passes.late_payments import in_turn, look_for_late_payments
from core.passes.running_pass import PassOptions, RunningPass
from core.passes.scaling import StartWorker
from core.settings import Settings
from core.store.store import Store, View

# API Gateway gives up after 29 s; a manual pass ends well before.
MANUAL_SECONDS = 22.0


async def trigger_checkout_session_check(
    store: Store,
    billing: Billing | None,
    settings: Settings,
    *,
    database_thread: Executor,
    session_ids: Sequence[str] | None = None,
) -> Summary:
    """Check all open sessions now, due or not, or just those named; none that is in flight.

    Ends within MANUAL_SECONDS, plus the time of a few statements. Raises what
    `check_open_checkout_sessions` raises.
    """
    start_seconds = max(1.0, MANUAL_SECONDS - settings.request_timeout_seconds)
    options = PassOptions(
        Reason.MANUAL,
        session_ids=session_ids,
        start_seconds=start_seconds,
        total_seconds=MANUAL_SECONDS,
    )
    return await check_open_checkout_sessions(
        store, billing, settings, options, database_thread=database_thread
    )


async def check_open_checkout_sessions(
    store: Store,
    billing: Billing | None,
    settings: Settings,
    options: PassOptions,
    *,
    database_thread: Executor,
    start_worker: StartWorker | None = None,
    choose: Callable[[int, int], int] = random.randint,
) -> Summary:
    """Make one pass and return what it did.

    `billing` is None if there is no API key: then nothing is claimed and no request is sent.
    Every call of `store` runs on `database_thread`, so that it never delays the requests.
    `start_worker` starts another worker for the same tick; None: this is the only worker.
    `choose(low, high)` draws the backoff's jitter.

    Raises:
        StoreError: the database cannot be used. Requests in flight were given up; their sessions
            are checked again when their lease is over.
    """
    database = DatabaseThread(database_thread)
    for warning in await database.run(store.prepare):
        logger.warning(f"⚠️ {warning}")
    began = asyncio.get_running_loop().time()
    by_tick = options.reason is Reason.TICK
    view = await database.run(store.look, options.tick, interval_seconds=settings.interval_seconds)
    may_lead = by_tick and not options.helps
    leads = may_lead and await database.run(store.take_lead, view)
    summary = Summary(
        options.reason,
        view.now,
        options.tick,
        led=leads,
        open=view.last_counts.open,
        failing=view.last_counts.failing,
        only_not_found=view.last_counts.only_not_found,
        overdue_seconds=view.overdue_seconds,
        paused_until=view.paused_until,
    )
    next_slot = view.tick + view.interval
    may_check = billing is not None and (view.paused_until is None or view.paused_until < next_slot)
    if may_lead and not leads and view.state.budget:
        may_check = False  # one worker sends what billing allows, or the leader starts more
    if by_tick and not leads and not (may_check and view.has_due):
        # The tick's leader has left this worker nothing to do.
        await _show_monitor(store, database, view, options, summary)
        return summary
    under_way = await database.run(store.history.count_under_way) if by_tick else 0
    # Under a budget, the older passes hand over to this one.
    if under_way >= settings.max_workers and not (leads and view.state.budget):
        may_check = False
        if not leads:
            await _show_monitor(store, database, view, options, summary)
            return summary
    running = RunningPass(
        store,
        billing if may_check else None,
        settings,
        options,
        database,
        view,
        summary,
        began,
        start_worker,
        under_way,
        choose,
        has_api_key=billing is not None,
    )
    summary = await running.complete()
    if leads and view.tick.second < settings.interval_seconds:  # one slot of each minute
        await _log_other_monitors(store, database)
        late_payments = store.late_payments if summary.paused_until is None else None
        if late_payments is not None and billing is not None:
            until = began + options.start_seconds
            ask = in_turn(
                billing.check,
                store.state,
                database,
                known_limit=settings.billing_max_per_second,
                until=until,
            )
            await look_for_late_payments(
                late_payments, ask, database, at_once=settings.max_concurrency, until=until
            )
            unpublished = summary.unpublished + late_payments.take_unpublished()
            summary = summary._replace(unpublished=unpublished)
    return summary


async def _show_monitor(
    store: Store, database: DatabaseThread, view: View, options: PassOptions, summary: Summary
) -> None:
    """Record, once a minute, that this monitor exists if one with other settings does its work."""
    by_others = not options.helps and store.others.differ(view.newest_settings)
    if by_others and await database.run(store.others.show_this, summary):
        await _log_other_monitors(store, database)


async def _log_other_monitors(store: Store, database: DatabaseThread) -> None:
    with suppress(StoreError):  # the pass is complete; the next one raises it
        for other in await database.run(store.others.find):
            logger.warning(f"⚠️ {OTHER_MONITOR}: {shown(str(other))}")

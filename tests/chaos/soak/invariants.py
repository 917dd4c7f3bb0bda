"""The invariants that must hold at the end of a soak."""

import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from core.billing.status_words import WORDS
from testkit.queue import CLAIMED_UNTIL, DUE_AT, LAST_CHECK
from tests.chaos.soak.faults import INTERVAL, LEASE, PASSWORD, Soak
from tests.chaos.world import KEY, UNANSWERED


def violations(soak: Soak, healed_at: datetime, log: str) -> Iterator[str]:
    """Yield a sentence for each invariant that is violated at the end."""
    yield from soak.violations
    yield from _session_violations(soak, healed_at)
    yield from _event_violations(soak)
    yield from _run_table_violations(soak)
    yield from (f"in the log: {secret}" for secret in (KEY, PASSWORD) if secret in log)
    if any(KEY in head for head in soak.billing.redirected):
        yield "the API key went to another host"
    bugs = ("Traceback", "panicked")
    yield from (line for line in log.splitlines() if any(bug in line for bug in bugs))


def _run_table_violations(soak: Soak) -> Iterator[str]:
    """Compare the finished passes in the run table with what billing and the bus received."""
    found = Counter[str]()
    changes = 0
    for checked, changed, outcomes in soak.shop.run(
        "SELECT checked, status_changes, outcomes FROM checkout_session_run"
        " WHERE finished_at IS NOT NULL"
    ):
        of_pass = Counter[str](json.loads(outcomes))
        found += of_pass
        changes += changed
        if checked != of_pass.total():
            yield f"a pass checked {checked} sessions but recorded {outcomes}"
    recorded = found.total() - sum(found[outcome] for outcome in UNANSWERED)
    answered = sum(log.answered for log in soak.billing.log.values())
    if recorded > answered:
        yield f"the passes recorded {recorded} answers, but billing sent {answered}"
    published = len({event["event_id"] for event in soak.bus.events})
    if changes > published:
        yield f"the passes recorded {changes} changes, but {published} were published"


def _session_violations(soak: Soak, healed_at: datetime) -> Iterator[str]:
    soon = datetime.now(UTC) + timedelta(seconds=LEASE + INTERVAL)
    for session_id, checkout, order, checked_at, due, until in soak.shop.run(
        f"SELECT s.id, s.billing_checkout_id, s.billing_order_id, {LAST_CHECK}, {DUE_AT},"
        f" {CLAIMED_UNTIL} FROM checkout_session s LEFT JOIN (checkout_session_check c"
        " LEFT JOIN checkout_session_batch b ON b.id = c.batch_id) ON c.session_id = s.id"
        " WHERE s.status = 'open'"
    ):
        if order is not None:
            yield f"{session_id} was closed by the shop but is open again"
        if checked_at is None or checked_at.replace(tzinfo=UTC) < healed_at:
            yield f"{session_id} is open but was not checked after the faults ended"
        elif max(due, until or due).replace(tzinfo=UTC) > soon:
            yield f"{session_id} is due at {due} and claimed until {until}"
        if soak.billing.statuses.get(checkout, "open") != "open":
            yield f"{session_id} is open, but billing closed {checkout}"


type Change = tuple[str, str, str]  # session, its checkout at the time, new status


def _changes(soak: Soak) -> tuple[set[Change], set[Change]]:
    """The status changes that the monitor made, and those that it published."""
    made = soak.shop.run(
        "SELECT id, billing_checkout_id, status FROM checkout_session"
        " WHERE status <> 'open' AND billing_order_id IS NULL"
    )
    published = {
        (e["session_id"], e["billing_checkout_id"], e["new_status"]) for e in soak.bus.events
    }
    return {(i, checkout, status) for i, checkout, status in made}, published


def overruled_changes(soak: Soak) -> set[Change]:
    """Published changes that the shop overruled because their commit was cut.

    An event is published before the commit, so that none can be missing. If the commit then fails,
    the session is unlocked, and the shop may close it or give it a new checkout.
    """
    by_shop = soak.retried_sessions | {
        session_id
        for (session_id,) in soak.shop.run(
            "SELECT id FROM checkout_session WHERE billing_order_id IS NOT NULL"
        )
    }
    made, published = _changes(soak)
    return {change for change in published - made if change[0] in by_shop}


def _event_violations(soak: Soak) -> Iterator[str]:
    """Find changes that billing did not cause, and differences between changes and events."""
    made, published = _changes(soak)
    for session_id, checkout, status in made | published:
        if status not in {WORDS[answer] for answer in soak.billing.log[checkout].statuses}:
            yield f"{session_id} is {status}, which billing did not answer for {checkout}"
    yield from (f"not published: {change}" for change in made - published)
    overruled = overruled_changes(soak)
    yield from (f"published but not made: {change}" for change in published - made - overruled)
    faults = sum(n for (group, _), n in soak.faults.items() if group in ("database", "process"))
    if len(overruled) > faults:
        yield f"published but not made: {len(overruled)}, more than the {faults} possible causes"

"""The report of a soak: faults, status changes, times between checks, memory."""

import os
import resource
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tests.chaos.soak.faults import Soak
from tests.chaos.soak.invariants import overruled_changes


class Memory(NamedTuple):
    """Resident memory in MB."""

    worker: float  # the first, which lives for the whole soak
    services: float  # this process: simulated services, shop and proxies

    @classmethod
    def now(cls, soak: Soak) -> "Memory":
        return cls(_resident_mb(soak.workers[0].pid), _resident_mb(os.getpid()))


def _resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 1e6


def seconds_between_checks(soak: Soak) -> list[float]:
    """The times between two checks of the same healthy checkout.

    For a session that is still open, the last one counts up to the last check of any session.
    """
    healthy = {
        checkout: log.requested_at
        for checkout, log in soak.billing.log.items()
        if log.requested_at and checkout not in soak.faulty_checkouts
    }
    last = max(times[-1] for times in healthy.values())
    still_open = soak.shop.run(
        "SELECT billing_checkout_id FROM checkout_session WHERE status = 'open'"
    )
    series = [*healthy.values(), *([healthy[c][-1], last] for (c,) in still_open if c in healthy)]
    return [(b - a).total_seconds() for times in series for a, b in pairwise(times)]


def faults_survived(soak: Soak, group: str) -> str:
    """The number of faults and kinds, and except for billing the number of each kind."""
    by_kind = {kind: n for (of, kind), n in soak.faults.items() if of == group}
    total = f"{sum(by_kind.values()):,}, {len(by_kind)} of {soak.kind_count(group)} kinds"
    if not by_kind:
        return total
    if group == "billing":
        return f"{total}, {min(by_kind.values())} to {max(by_kind.values())} of each"
    return f"{total}: {', '.join(f'{kind} ({n})' for kind, n in sorted(by_kind.items()))}"


def report(
    soak: Soak, parameters: str, log: str, memory: Sequence[Memory], violated: Sequence[str]
) -> list[str]:
    """The lines of the report's table; `memory` is of a minute, of halfway and of the end."""
    [(checked,)] = soak.shop.run("SELECT SUM(checked) FROM checkout_session_run")
    seconds = sorted(seconds_between_checks(soak))
    median, p99 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
    published = len({event["event_id"] for event in soak.bus.events})
    completed, failed = log.count('"PassesCompleted":1'), log.count('"PassesFailed":1')
    rows = {
        "seed, minutes, open sessions": parameters,
        "checks recorded": f"{int(checked):,}",
        "passes; failed with a database error": f"{completed + failed:,}, {failed:,}",
        **{
            f"{group} faults survived": faults_survived(soak, group)
            for group in ("billing", *soak.kinds)
        },
        "status changes published; published twice": (
            f"{published:,}, {len(soak.bus.events) - published:,}"
        ),
        "published, then overruled by the shop because the commit was cut": (
            f"{len(overruled_changes(soak)):,}"
        ),
        "time between two checks of a healthy session: median, 99 %, maximum": (
            f"{median:.1f} s, {p99:.1f} s, {seconds[-1]:.1f} s"
        ),
        "memory of a worker after a minute, halfway and at the end": (
            ", ".join(f"{sample.worker:.0f} MB" for sample in memory)
        ),
        "memory of the simulated services, the shop and the proxies, likewise": (
            ", ".join(f"{sample.services:.0f} MB" for sample in memory)
        ),
        "invariants": f"{len(violated)} violated" if violated else "all held",
    }
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]

"""How many checks a second each program makes, in several rounds of all programs in turn."""

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.jobs import Job, Report
from bench.machine import Machine, make_due, pass_job
from bench.programs import (
    AIOHTTP,
    HTTP,
    MARIADB,
    MYSQL,
    NODE_ALL,
    NODE_BOUNDED,
    SQLITE,
    WRK,
    Client,
    Program,
)
from bench.report import Results, cpu_seconds_a_check, peak_mb, progress, rate
from testkit.shops import Shop, numbered

WARM_UP = 1000
# A shared machine's rounds differ by a fifth and more. Versions of one program that take turns, in
# both orders, for this many rounds are compared to some 3 %. Other programs differ by more.
ROUNDS, ROUNDS_OF_OTHERS = 9, 3
OTHERS = (NODE_ALL, NODE_BOUNDED, AIOHTTP, WRK)


@dataclass(frozen=True, slots=True)
class Condition:
    """How many sessions, how many in flight, and how billing answers."""

    sessions: int
    in_flight: int = 100
    delay: str = "at-once"
    tls: bool = False

    @property
    def label(self) -> str:
        how = ("TLS, " if self.tls else "") + self.delay.replace("-", " ").replace("ms", " ms")
        return f"{self.sessions:,}, {how}, {self.in_flight} in flight"


THOUSAND = Condition(1000)
AT_ONCE = Condition(10_000)
LARGEST = Condition(20_000)
CONDITIONS = (
    THOUSAND,
    AT_ONCE,
    LARGEST,
    Condition(10_000, 500, "50ms"),
    Condition(10_000, tls=True),
    Condition(10_000, 500, "50ms", tls=True),
)
QUICK_CONDITIONS = (THOUSAND, AT_ONCE, Condition(1000, 100, "50ms", tls=True))


def programs(machine: Machine) -> list[Program]:
    ours = [version for program in _ours(machine) for version in machine.versions(program)]
    return [*ours, *OTHERS]


def _ours(machine: Machine) -> list[Program]:
    return [HTTP, MARIADB, *([MYSQL] if machine.mysql else []), SQLITE]


def measure(machine: Machine, results: Results) -> None:
    conditions = QUICK_CONDITIONS if machine.quick else CONDITIONS
    for condition in conditions:
        results.rounds[condition.label] = _measure(machine, condition)
    _compare(machine, results, conditions)
    if machine.before:
        _compare_with(machine.before, machine, results, conditions)


def _measure(machine: Machine, condition: Condition) -> dict[str, list[Report]]:
    """Run the programs in turn, for several rounds."""
    url = machine.billing.url(condition.delay, tls=condition.tls)
    reports: dict[str, list[Report]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        running: list[tuple[Client, Job, Shop | None]] = []
        for program in programs(machine):
            shop = None
            if program.engine:
                sessions = numbered(condition.sessions)
                shop = stack.enter_context(machine.shop(program.engine, sessions))
            job = pass_job(url, shop, condition.sessions, condition.in_flight)
            client = stack.enter_context(machine.client(program))
            # One request on each connection; more for Node, whose compiler needs to warm up.
            warm_up = max(
                condition.in_flight, WARM_UP if program in {NODE_ALL, NODE_BOUNDED} else 0
            )
            client.run(job if shop else {**job, "sessions": warm_up, "warm_up": True})
            running.append((client, job, shop))
        for round_ in range(1 if machine.quick else ROUNDS):
            for client, job, shop in running[:: 1 if round_ % 2 == 0 else -1]:
                label, recorded = client.program.label, 0.0
                if client.program in OTHERS and round_ % (ROUNDS // ROUNDS_OF_OTHERS):
                    continue
                # Reopen connections that were closed during the others' turns.
                if shop:
                    make_due(shop)
                    client.run(job)
                    make_due(shop)
                    recorded = _recorded(shop)
                elif client.program is not WRK:
                    client.run({**job, "sessions": condition.in_flight, "warm_up": True})
                _accepted, before = machine.billing.counters()
                report = client.run(job)
                _accepted, after = machine.billing.counters()
                report["sessions"] = 1 if client.program is WRK else condition.sessions
                report["requests"] = after - before - 1  # without the one that reads the counters
                if shop:
                    report["recorded"] = _recorded(shop) - recorded - condition.sessions
                reports[label].append(report)
                progress(f"{condition.label} · {label}: {rate([report]):,.0f} checks/s")
    return dict(reports)


def _recorded(shop: Shop) -> float:
    """Checks recorded so far."""
    [(checked,)] = shop.run("SELECT SUM(checked) FROM checkout_session_run")
    return float(checked)


def _compare(machine: Machine, results: Results, conditions: tuple[Condition, ...]) -> None:
    """Compare the programs' throughput."""
    at = AT_ONCE.label  # a pass over 1,000 is spread over half a second
    measured = results.rounds[at]

    def ratio(program: Program, other: Program, min_times: float) -> None:
        times = rate(measured[program.label]) / rate(measured[other.label])
        results.target(
            f"{program.label}, compared with {other.label}, {at}",
            f"≥ {min_times} times",
            f"{times:.2f} times",
            met=times >= min_times,
        )

    ratio(MARIADB, NODE_ALL, 8)
    ratio(MARIADB, NODE_BOUNDED, 5)
    ratio(HTTP, AIOHTTP, 1.8)
    if machine.mysql:
        ratio(MYSQL, MARIADB, 0.95)
    per_pass, per_request = (
        cpu_seconds_a_check(measured[program.label]) for program in (MARIADB, HTTP)
    )
    results.state(
        f"processor time that claiming, deciding, recording and logging add, {at}",
        f"{(per_pass - per_request) * 1e6:.0f} µs, to {per_request * 1e6:.0f} µs for the request",
    )

    largest = LARGEST if LARGEST in conditions else AT_ONCE
    passes = results.rounds[largest.label][MARIADB.label]
    n = largest.sessions
    lost = sum(abs(n - r["requests"]) + abs(r["recorded"]) + n - r["checked"] for r in passes)
    what = f"sessions lost or checked twice, {largest.label}"
    results.target(what, "0", f"{lost:.0f}", met=lost == 0)
    few, many = peak_mb(results.rounds[THOUSAND.label][MARIADB.label]), peak_mb(passes)
    results.target(
        f"peak memory of a pass over {n:,} sessions",
        "≤ 75 MB, ≤ 10 MB more than over 1,000",
        f"{many:.0f} MB, {many - few:+.0f} MB",
        met=many <= 75 and many - few <= 10,
    )


def _compare_with(
    before: Path, machine: Machine, results: Results, conditions: tuple[Condition, ...]
) -> None:
    """Compare each program with its earlier version, turn by turn."""
    for condition in conditions:
        measured = results.rounds[condition.label]
        ratios = []
        for program in _ours(machine):
            turns = zip(measured[program.label], measured[program.of(before).label], strict=True)
            ratio = median(rate([ours]) / rate([theirs]) for ours, theirs in turns)
            ratios.append(f"{program.label.removeprefix('ours, ')} {ratio:.2f}")
        what = f"checks a second, compared with {before.name}, {condition.label}"
        results.state(what, ", ".join(ratios))

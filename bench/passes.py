"""Single passes: their cost, their connections, and how they cope with slow billing."""

import contextlib
import time
from collections import Counter
from statistics import median

from bench.machine import Machine, adopt, fill_queue, make_due, pass_job
from bench.programs import HTTP, MARIADB, Program
from bench.report import Results, cpu_seconds_a_check
from core.store.status_report import read_status
from core.worker import open_database
from testkit.clock import FakeClock
from testkit.history import History
from testkit.shops import Shop, add_sessions, numbered

CLOSED = 100_000
DAY_OF_PASSES = 17_280
MILLION = 1_000_000
# Lambda's memory sizes to report, and the one that has a whole vCPU.
MEMORY_MB, FULL_CPU_MB = (256, 512, 1024, 1769), 1769


def reuse(machine: Machine, results: Results) -> None:
    """Whether a second pass reuses the connections of the first one."""
    opened = []
    for _ in range(machine.rounds):
        with machine.shop("mariadb", numbered(1000)) as shop, machine.client(MARIADB) as client:
            job = pass_job(machine.billing.url("50ms"), shop, 1000)
            adopt(client, job, shop)
            before, _requests = machine.billing.counters()
            client.run(job)
            after, _requests = machine.billing.counters()
            opened.append(after - before - 1)  # without the one that reads the counters
    what = "new connections of a second pass over 1,000 sessions, billing after 50 ms"
    results.target(what, "0", f"{max(opened)}", met=max(opened) == 0)


def idle(machine: Machine, results: Results) -> None:
    """The time of a pass that finds nothing due, with many closed and with many open sessions."""
    many = 1000 if machine.quick else 20_000
    for program in machine.versions(MARIADB):
        took = _idle(machine, program, 1000, CLOSED)
        what = f"{program.label}, nothing due"
        measured = f"{took * 1000:.1f} ms"
        few_open = f"{what}, 1,000 open, {CLOSED:,} closed"
        if program is MARIADB:
            results.target(few_open, "≤ 10 ms", measured, met=took <= 0.010)
        else:
            results.state(few_open, measured)
        results.state(f"{what}, {many:,} open", f"{_idle(machine, program, many, 0) * 1000:.1f} ms")


def _idle(machine: Machine, program: Program, open_: int, closed: int) -> float:
    with machine.shop("mariadb", numbered(open_)) as shop, machine.client(program) as client:
        add_sessions(shop, {f"closed-{n}": f"c{n}" for n in range(closed)}, "success")
        job = pass_job(machine.billing.url(), shop, open_)
        client.run(job)
        return median(float(client.run(job)["seconds"]) for _ in range(31))


def processor(machine: Machine, results: Results) -> None:
    """Processor time on two cores, as Lambda has them; below 1,769 MB it gives a share of it."""
    n = 1000 if machine.quick else 10_000
    took: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        running = []
        for program in (v for p in (HTTP, MARIADB) for v in machine.versions(p)):
            shop = None
            if program.engine:
                shop = stack.enter_context(machine.shop(program.engine, numbered(n)))
            client = stack.enter_context(machine.client(program, *machine.cores))
            job = pass_job(machine.billing.url(), shop, n)
            client.run(job)
            running.append((client, job, shop))
            took[program.label] = []
        for _ in range(3 * machine.rounds):
            for client, job, shop in running:
                if shop:
                    make_due(shop)
                took[client.program.label].append(cpu_seconds_a_check([client.run(job)]))
    on = f"over {n:,}, two cores"
    for label, seconds in took.items():
        results.state(f"processor time of a check, {label} {on}", f"{median(seconds) * 1e6:.0f} µs")
    if machine.before:
        before = MARIADB.of(machine.before)
        ratio = median(took[MARIADB.label]) / median(took[before.label])
        what = f"processor time of a check, {MARIADB.label}, compared with {before.label}, {on}"
        results.state(what, f"{ratio:.2f} times")
    by_memory = ", ".join(
        f"{mb:,} MB: {mb / FULL_CPU_MB / median(took[MARIADB.label]):,.0f}" for mb in MEMORY_MB
    )
    results.state("checks a second for which a Lambda's processor time suffices", by_memory)


def workers(machine: Machine, results: Results) -> None:
    """Several workers over the same sessions at the same time."""
    n = 2000 if machine.quick else 20_000
    for count in (1, 2, 4):
        with contextlib.ExitStack() as stack:
            shop = stack.enter_context(machine.shop("mariadb", numbered(n)))
            clients = [stack.enter_context(machine.client(MARIADB)) for _ in range(count)]
            job = pass_job(machine.billing.url("50ms", logged=True), shop, n)
            for client in clients:  # the first adopts and checks the sessions
                client.run(job)
            make_due(shop)
            machine.billing.forget_requests()
            began, cpu = time.perf_counter(), machine.mariadb_cpu_seconds()
            for client in clients:
                client.start(job)
            checked = sum(client.report()["checked"] for client in clients)
            took = time.perf_counter() - began
            busy = (machine.mariadb_cpu_seconds() - cpu) / took
            asked = Counter(request.checkout_id for request in machine.billing.requests())
        twice = sum(1 for times in asked.values() if times > 1)
        what = f"{count} worker{'s'[: count - 1]} at once, {n:,} sessions, billing after 50 ms"
        measured = f"{twice} twice, {checked / took:,.0f} checks/s, MariaDB {busy:.0%} of its core"
        results.target(
            what,
            "none twice, MariaDB below 90 %",
            measured,
            met=twice == 0 and len(asked) == n and busy < 0.9,
        )


def slow_billing(machine: Machine, results: Results) -> None:
    """A pass with ten in flight while answers take 0.8 s: slow is not the same as stuck."""
    seconds, in_flight, latency = 40.0, 10, 0.8
    # A pass ends 5 s early, and begins no check within the request timeout before that.
    possible = int(in_flight * (seconds - 15) / latency)
    what = (
        f"checks made of the {possible} possible, {in_flight} in flight, billing after {latency} s"
    )
    for program in machine.versions(MARIADB):
        with machine.shop("mariadb", numbered(1000)) as shop:
            with machine.client(program) as client:
                adopt(client, pass_job(machine.billing.url(), shop, 1000), shop)
            with machine.client(program) as client:
                job = pass_job(machine.billing.url("800ms"), shop, 1000, in_flight)
                report = client.run({**job, "seconds": seconds})
        share = report["checked"] / possible
        measured = f"{report['checked']} ({share:.0%}) in {report['seconds']:.1f} s"
        if program is MARIADB:
            results.target(f"{program.label}: {what}", "≥ 85 %", measured, met=share >= 0.85)
        else:
            results.state(f"{program.label}: {what}", measured)


def million(machine: Machine, results: Results) -> None:
    """A million open sessions: memory of the first pass, and the first request of a later one."""
    open_ = 20_000 if machine.quick else MILLION
    for program in machine.versions(MARIADB):
        with machine.shop("mariadb", {}) as shop:
            _fill(shop, open_)
            with machine.client(program) as client:
                job = pass_job(machine.billing.url("100ms", logged=True), shop, open_)
                first = client.run({**job, "seconds": 60.0})
            what = f"{program.label}: peak memory of the first pass over {open_:,}"
            measured = f"{first['peak_mb']:.0f} MB"
            if program is MARIADB:
                results.target(what, "≤ 65 MB", measured, met=first["peak_mb"] <= 65)
            else:
                results.state(what, measured)
            fill_queue(shop)
            delays, later, cpu = [], {}, 0.0
            with machine.client(program) as client:
                client.run({**job, "warm_up": True})
                for _ in range(machine.rounds):
                    make_due(shop)
                    machine.billing.forget_requests()
                    cpu = machine.mariadb_cpu_seconds()
                    later = client.run({**job, "seconds": 25.0})
                    cpu = machine.mariadb_cpu_seconds() - cpu
                    [request, *_more] = machine.billing.requests()
                    delays.append(request.began - later["began"])
            results.state(
                f"{program.label}: one worker, {open_:,} open, billing after 0.1 s",
                f"{later['checked'] / later['seconds']:,.0f} checks/s,"
                f" MariaDB {cpu / later['seconds']:.0%} of a core",
            )
            what = f"{program.label}: from the tick to the first request, {open_:,} open"
            measured = f"{median(delays) * 1000:.0f} ms"
            if program is MARIADB:
                results.target(what, "≤ 50 ms", measured, met=median(delays) <= 0.05)
            else:
                results.state(what, measured)


def status(machine: Machine, results: Results) -> None:
    """How long the page's data take to read: a day of passes, one session in 100 failing."""
    for open_, max_seconds in (
        ((1000, 0.020),) if machine.quick else ((10_000, 0.020), (MILLION, 0.100))
    ):
        with machine.shop("mariadb", {}) as shop:
            _fill(shop, open_)
            history = History(shop)
            history.passes(DAY_OF_PASSES)
            history.counted({"active": open_ * 99 // 100, "timeout": open_ // 100})
            failing = "billing_order_id MOD 100 = 0"
            fill_queue(
                shop,
                ", last_outcome, consecutive_failures, failing_since",
                f", IF({failing}, 'timeout', 'active'), IF({failing}, billing_order_id MOD 977, 0),"
                f" IF({failing}, UTC_TIMESTAMP(3), NULL)",
            )
            took = []
            database = open_database(history.settings(), clock=FakeClock(history.now))
            for _ in range(31):
                began = time.perf_counter()
                read_status(database, history.settings())
                took.append(time.perf_counter() - began)
            database.close()
        measured = f"{median(took) * 1000:.1f} ms, {max(took) * 1000:.1f} ms at most"
        results.target(
            f"GET /api/status reads the tables, {open_:,} open",
            f"≤ {max_seconds * 1000:.0f} ms",
            measured,
            met=median(took) <= max_seconds,
        )


def _fill(shop: Shop, open_: int) -> None:
    shop.run(
        "INSERT INTO checkout_session (id, billing_checkout_id, billing_order_id, status)"
        f" SELECT CONCAT('s', seq), CONCAT('checkout_', seq), seq, 'open' FROM seq_1_to_{open_:d}"
    )

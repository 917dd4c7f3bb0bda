"""`make bench`: this monitor and what would otherwise be run, side by side, in one run.

Servers and clients have a core each. Every figure is the median of several rounds, in which the
programs take turns. Progress goes to stderr; the tables, or with `--json` the raw numbers, to
stdout.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.clients import Job
from bench.servers import NGINX_MODULE, Billing, billing_stub
from core.model import percentile
from tests.support import (
    Shop,
    SQLiteShop,
    add_sessions,
    mariadb_server,
    mysql_shop,
    numbered,
    statements,
)

PACKAGES = {
    "nginx": "nginx-light",
    str(NGINX_MODULE): "libnginx-mod-http-echo",
    "wrk": "wrk",
    "node": "nodejs",
    "mariadb-install-db": "mariadb-server",
    "openssl": "openssl",
}
ROUNDS = 3
WARM_UP = 1000
# What is slow is measured on fewer sessions: its rate does not depend on how many there are.
MOST = {"sequential": 1000, "httpx": 500}
MOST_SLOW_SEQUENTIAL = 100
LOOP_SECONDS = 60
CLOSED = 100_000

type Report = dict[str, float]


@dataclass(frozen=True, slots=True)
class Program:
    """A client, by the command that runs it, and the engine of its passes."""

    label: str
    command: tuple[str, ...]
    engine: str = ""

    @property
    def name(self) -> str:
        return self.command[-1]


@dataclass(frozen=True, slots=True)
class Condition:
    """How many sessions, and how billing answers."""

    sessions: int
    in_flight: int = 100
    slow: bool = False
    tls: bool = False

    @property
    def label(self) -> str:
        how = ("TLS, " if self.tls else "") + ("50 ms" if self.slow else "at once")
        return f"{self.sessions:,}, {how}, {self.in_flight} in flight"


def python(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "bench.clients", name)


NODE = ("node", str(Path(__file__).with_name("clients.mjs")))
HTTP = Program("ours, HTTP part", python("http"))
MEMORY = Program("ours, full pass without a database", python("pass"), "memory")
MARIADB = Program("ours, full pass on MariaDB", python("pass"), "mariadb")
MYSQL = Program("ours, full pass on MySQL", python("pass"), "mysql")
SQLITE = Program("ours, full pass on SQLite", python("pass"), "sqlite")
SEED = Program("Node, fetch, Promise.allSettled", (*NODE, "all"))
BOUNDED = Program("Node, fetch, bounded", (*NODE, "bounded"))
SEQUENTIAL = Program("sequential loop", python("sequential"))
HTTPX = Program("httpx.AsyncClient, gather", python("httpx"))
AIOHTTP = Program("aiohttp", python("aiohttp"))
WRK = Program("wrk: the limit", python("wrk"))

AT_10_000 = Condition(10_000)
AT_500_IN_FLIGHT = Condition(1000, 500)
CONDITIONS = (
    Condition(1000),
    AT_10_000,
    Condition(20_000),
    AT_500_IN_FLIGHT,
    Condition(10_000, 500, slow=True),
    Condition(10_000, tls=True),
    Condition(10_000, 500, slow=True, tls=True),
)
QUICK_CONDITIONS = (Condition(1000), AT_500_IN_FLIGHT, Condition(1000, slow=True, tls=True))


class Client:
    """A running client program."""

    def __init__(self, program: Program, cores: Sequence[int], authority: Path) -> None:
        self.program = program
        environment = os.environ | {
            "SSL_CERT_FILE": str(authority),
            "NODE_EXTRA_CA_CERTS": str(authority),
        }
        self._process = subprocess.Popen(
            ["taskset", "--cpu-list", ",".join(map(str, cores)), *program.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def start(self, job: Job) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def report(self) -> Report:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.program.label} ended with {self._process.wait()}")
        report: Report = json.loads(line)
        return report

    def run(self, job: Job) -> Report:
        self.start(job)
        return self.report()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@dataclass
class Bench:
    """The servers, and what has been measured."""

    billing: Billing
    mariadb: str
    mariadb_pid: int
    mysql: str | None
    directory: Path
    cores: tuple[int, int]  # the servers' and the clients'
    rounds: int
    quick: bool
    throughput: dict[Condition, dict[str, list[Report]]] = field(default_factory=dict)
    checks: list[tuple[str, str, str, bool]] = field(default_factory=list)  # of the targets

    @contextlib.contextmanager
    def client(self, program: Program, *cores: int) -> Iterator[Client]:
        """Start it on the clients' core, unless others are named."""
        client = Client(program, cores or self.cores[1:], self.billing.authority)
        with contextlib.closing(client):
            yield client

    @contextlib.contextmanager
    def shop(self, engine: str, sessions: Mapping[str, str | None]) -> Iterator[Shop]:
        with contextlib.ExitStack() as stack:
            shop: Shop
            if engine == "sqlite":
                shop = SQLiteShop(Path(stack.enter_context(_directory(self.directory))) / "db")
                for statement in statements("sqlite"):
                    shop.run(statement)
            else:
                server = self.mariadb if engine == "mariadb" else self.mysql
                assert server is not None
                shop = stack.enter_context(mysql_shop(server))
            add_sessions(shop, sessions)
            yield shop

    def measure(self, condition: Condition) -> None:
        """Every program in turn, `rounds` times."""
        url = self.billing.url(slow=condition.slow, tls=condition.tls)
        reports: dict[str, list[Report]] = defaultdict(list)
        with contextlib.ExitStack() as stack:
            running: list[tuple[Client, Job, Shop | None]] = []
            for program in self.programs():
                shop = None
                if program.engine not in ("", "memory"):
                    sessions = numbered(condition.sessions)
                    shop = stack.enter_context(self.shop(program.engine, sessions))
                job = a_job(url, _sessions(program, condition), shop, condition.in_flight)
                client = stack.enter_context(self.client(program))
                few = (
                    job["sessions"] if shop else min(_warm_up(program, condition), job["sessions"])
                )
                client.run({**job, "sessions": few, "warm_up": True})
                running.append((client, job, shop))
            for round_ in range(self.rounds):
                for client, job, shop in running:
                    if shop:
                        make_due(shop)
                    elif client.program in (SEED, BOUNDED, AIOHTTP):
                        # Connections that they gave up while the others had their turn.
                        client.run({**job, "sessions": condition.in_flight, "warm_up": True})
                    accepted, requests = self.billing.counters()
                    report = client.run(job)
                    now_accepted, now_requests = self.billing.counters()
                    report["connections"] = now_accepted - accepted - 1  # one asks for counters
                    report["requests"] = now_requests - requests - 1
                    report["sessions"] = job["sessions"]
                    if shop:
                        report["recorded"] = recorded(shop) - job["sessions"] * (round_ + 1)
                    label = client.program.label
                    reports[label].append(report)
                    tell(f"{condition.label} · {label}: {rate([report]):,.0f} checks/s")
        self.throughput[condition] = dict(reports)

    def programs(self) -> list[Program]:
        ours = [HTTP, MEMORY, MARIADB, *([MYSQL] if self.mysql else []), SQLITE]
        return [*ours, SEED, BOUNDED, SEQUENTIAL, HTTPX, AIOHTTP, WRK]

    def check(self, what: str, at_least: str, measured: str, *, met: bool) -> None:
        self.checks.append((what, at_least, measured, met))
        tell(f"{what}: {measured}")

    def ratio(self, condition: Condition, program: Program, other: Program) -> float:
        measured = self.throughput[condition]
        return rate(measured[program.label]) / rate(measured[other.label])

    def compare(self) -> None:
        """What follows from the throughput alone."""
        at = AT_10_000 if AT_10_000 in self.throughput else Condition(1000)
        for other, least in ((SEED, 2.5), (BOUNDED, 1.5)):
            ratio = self.ratio(at, MARIADB, other)
            what = f"full pass on MariaDB against {other.label}, {at.sessions:,} sessions"
            self.check(what, f"{least} times", f"{ratio:.1f} times", met=ratio >= least)
        ratio = self.ratio(AT_500_IN_FLIGHT, HTTP, HTTPX)
        what = "HTTP part against stock httpx.AsyncClient, 500 in flight"
        self.check(what, "20 times", f"{ratio:.0f} times", met=ratio >= 20)
        ratio = self.ratio(at, HTTP, AIOHTTP)
        what = f"HTTP part against aiohttp, {at.sessions:,} sessions"
        self.check(what, "0.8 times", f"{ratio:.1f} times", met=ratio >= 0.8)

        most = max((c for c in self.throughput if not c.slow and not c.tls), key=_by_sessions)
        passes = self.throughput[most][MARIADB.label]
        n = most.sessions
        lost = sum(abs(n - r["requests"]) + abs(r["recorded"]) + n - r["checked"] for r in passes)
        what = f"sessions lost or checked twice, {n:,} sessions"
        self.check(what, "0", f"{lost:.0f}", met=lost == 0)
        small = peak(self.throughput[Condition(1000)][MARIADB.label])
        large = peak(passes)
        what = f"peak memory of a pass over {n:,} sessions"
        told = f"{large:.0f} MB, {large - small:+.0f} MB"
        self.check(
            what, "≤ 128 MB, ≤ 10 MB over 1,000's", told, met=large <= 128 and large - small <= 10
        )

        reports = self.throughput[at][MARIADB.label]
        without = self.throughput[at][MEMORY.label]
        share = 1 - rate(reports) / rate(without)
        busy = median(r["database_seconds"] / r["seconds"] for r in reports)
        what = f"what the database adds to a full pass over {at.sessions:,}, as a share of it"
        told = f"{share:.0%} (its thread is busy {busy:.0%} of the pass, beside the requests)"
        self.check(what, "≤ 25 %", told, met=share <= 0.25)

    def reuse(self) -> None:
        """Whether a second pass finds the connections of the first one."""
        opened = []
        for _ in range(self.rounds):
            with self.shop("mariadb", numbered(1000)) as shop, self.client(MARIADB) as client:
                job = a_job(self.billing.url(slow=True), 1000, shop)
                client.run(job)
                make_due(shop)
                before, _requests = self.billing.counters()
                client.run(job)
                after, _requests = self.billing.counters()
                opened.append(after - before - 1)  # one asks for counters
        what = "new connections of a second pass over 1,000 sessions, billing after 50 ms"
        self.check(what, "0", f"{max(opened)}", met=max(opened) == 0)

    def idle(self) -> None:
        """What a pass costs that finds nothing due: with many closed sessions, with many open."""
        open_ = 1000 if self.quick else 20_000
        what = "idle pass on MariaDB, nothing due"
        few, many = self._idle(1000, CLOSED), self._idle(open_, 0)
        told = f"{few * 1000:.1f} ms"
        self.check(f"{what}, 1,000 open, {CLOSED:,} closed", "≤ 10 ms", told, met=few <= 0.010)
        told = f"{many * 1000:.1f} ms, {many / open_ * 1e6:.1f} µs for each open one"
        self.check(f"{what}, {open_:,} open", "(for capacity)", told, met=True)

    def _idle(self, open_: int, closed: int) -> float:
        with self.shop("mariadb", numbered(open_)) as shop, self.client(MARIADB) as client:
            add_sessions(shop, {f"closed-{n}": f"c{n}" for n in range(closed)}, "success")
            job = a_job(self.billing.url(), open_, shop)
            client.run(job)
            return median(client.run(job)["seconds"] for _ in range(31))

    def processor(self) -> None:
        """Lambda gives a function two cores and, below 1,769 MB, a share of their time."""
        n = 1000 if self.quick else 10_000
        with (
            self.shop("mariadb", numbered(n)) as shop,
            self.client(MARIADB, *self.cores) as client,
        ):
            job = a_job(self.billing.url(), n, shop)
            client.run(job)
            times = []
            for _ in range(self.rounds):
                make_due(shop)
                report = client.run(job)
                times.append(report["cpu_seconds"] / report["checked"])
        took = median(times)
        what = f"processor time of a check, full pass over {n:,} on MariaDB, on two cores"
        by_memory = ", ".join(
            f"{mb:,} MB: {mb / 1769 / took:,.0f}" for mb in (256, 512, 1024, 1769)
        )
        told = f"{took * 1e6:.0f} µs; checks/s of a Lambda with {by_memory}"
        self.check(what, "(for capacity)", told, met=True)

    def imports(self) -> None:
        script = (
            "import sys, time; began = time.perf_counter(); import {}; "
            "print(time.perf_counter() - began, 'boto3' in sys.modules)"
        )
        seconds: dict[str, list[float]] = defaultdict(list)
        has_boto3 = ""
        for _ in range(2 * ROUNDS + 1):
            for name in ("handlers.check", "boto3"):
                command = [sys.executable, "-c", script.format(name)]
                done = subprocess.run(
                    ["taskset", "--cpu-list", str(self.cores[1]), *command],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                took, imported = done.stdout.split()
                seconds[name].append(float(took))
                if name == "handlers.check":
                    has_boto3 = imported
        ours, theirs = (median(seconds[name]) for name in ("handlers.check", "boto3"))
        told = f"{ours / theirs:.2f} times ({ours * 1000:.0f} ms), boto3 imported: {has_boto3}"
        met = ours <= theirs / 2 and has_boto3 == "False"
        self.check("import of handlers.check against import boto3", "≤ 0.5 times", told, met=met)

    def gaps(self) -> None:
        """The loop, for a minute, while a tenth of the sessions hang."""
        sessions = {f"s{n}": f"checkout_{'hang' if n % 10 == 0 else 'ok'}_{n}" for n in range(1000)}
        self.billing.forget_checks()
        with self.shop("mariadb", sessions) as shop:
            with self.client(Program("the loop", python("loop"))) as client:
                client.start(a_job(self.billing.url(logged=True), 1000, shop))
                for left in range(LOOP_SECONDS // 4 if self.quick else LOOP_SECONDS, 0, -15):
                    tell(f"the loop with 100 of 1,000 sessions hanging: {left} s left")
                    time.sleep(15)
            checks = self.billing.checks()
        times: dict[str, list[float]] = defaultdict(list)
        for at, id_ in sorted(checks):
            if "_ok_" in id_:
                times[id_].append(at)
        gaps = sorted(b - a for those in times.values() for a, b in pairwise(those))
        middle, late = median(gaps), percentile(gaps, 0.99)
        what = "gap between checks of a healthy session, 10 % of 1,000 hang 10 s"
        told = f"median {middle:.2f} s, 99th percentile {late:.2f} s ({len(gaps):,} gaps)"
        met = abs(middle - 5) < 0.05 and late <= 5.5 and len(times) == 900
        self.check(what, "median 5.0 s, 99th percentile 5.5 s", told, met=met)

    def workers(self) -> None:
        n = 2000 if self.quick else 20_000
        for count in (1, 2, 4):
            with contextlib.ExitStack() as stack:
                shop = stack.enter_context(self.shop("mariadb", numbered(n)))
                clients = [stack.enter_context(self.client(MARIADB)) for _ in range(count)]
                job = a_job(self.billing.url(slow=True, logged=True), n, shop)
                for client in clients:  # the first one adopts the sessions and checks them
                    client.run(job)
                make_due(shop)
                self.billing.forget_checks()
                began, cpu = time.perf_counter(), cpu_seconds(self.mariadb_pid)
                for client in clients:
                    client.start(job)
                checked = sum(client.report()["checked"] for client in clients)
                took = time.perf_counter() - began
                busy = (cpu_seconds(self.mariadb_pid) - cpu) / took
                asked = Counter(id_ for _at, id_ in self.billing.checks())
            twice = sum(1 for times in asked.values() if times > 1)
            what = f"{count} worker{'s'[: count - 1]} at once, {n:,} sessions, billing after 50 ms"
            told = f"{twice} twice, {checked / took:,.0f} checks/s, MariaDB {busy:.0%} of its core"
            met = twice == 0 and len(asked) == n and busy < 0.9
            self.check(what, "none twice, database below its limit", told, met=met)

    def tables(self) -> str:
        rows = [["checks a second", *(c.label for c in self.throughput)]]
        for program in self.programs():
            cells = [cell(measured[program.label]) for measured in self.throughput.values()]
            rows.append([program.label, *cells])
        memory = [["peak memory, MB", *(c.label for c in self.throughput)]]
        for program in (HTTP, MARIADB, SEED, BOUNDED, AIOHTTP):
            cells = [
                f"{peak(measured[program.label]):.0f}" for measured in self.throughput.values()
            ]
            memory.append([program.label, *cells])
        targets = [["what", "at least", "measured", ""]]
        targets += [[w, at, told, "met" if met else "NOT MET"] for w, at, told, met in self.checks]
        return "\n\n".join(map(markdown, (rows, memory, targets)))

    def raw(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "throughput": [
                {**asdict(condition), "program": label, "rounds": reports}
                for condition, measured in self.throughput.items()
                for label, reports in measured.items()
            ],
            "targets": [
                dict(zip(("what", "at_least", "measured", "met"), target, strict=True))
                for target in self.checks
            ],
        }


def a_job(url: str, sessions: int, shop: Shop | None, in_flight: int = 100) -> Job:
    database = shop.url if shop else ""
    return Job(url=url, sessions=sessions, in_flight=in_flight, database=database, warm_up=False)


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def rate(reports: Sequence[Report]) -> float:
    """Sessions that got their answer, a second."""
    return median(report["checked"] / report["seconds"] for report in reports)


def peak(reports: Sequence[Report]) -> float:
    return max(report["peak_mb"] for report in reports)


def cell(reports: Sequence[Report]) -> str:
    lost = sum(r["sessions"] - r["checked"] for r in reports if r["checked"] < r["sessions"])
    text = f"{rate(reports):,.0f}"
    return f"{text} ({lost / len(reports):,.0f} lost)" if lost else text


def make_due(shop: Shop) -> None:
    shop.run("UPDATE checkout_session_check SET next_check_at = first_seen_at")


def recorded(shop: Shop) -> float:
    """Checks recorded since the warm-up, which was one of each session."""
    [(attempts, sessions)] = shop.run("SELECT SUM(attempts), COUNT(*) FROM checkout_session_check")
    return float(attempts - sessions)


def cpu_seconds(pid: int) -> float:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _sessions(program: Program, condition: Condition) -> int:
    if program is WRK:
        return 1
    if program is SEQUENTIAL and condition.slow:
        return MOST_SLOW_SEQUENTIAL
    return min(condition.sessions, MOST.get(program.name, condition.sessions))


def _warm_up(program: Program, condition: Condition) -> int:
    """One request on each connection; more for what a compiler makes faster while it runs."""
    return max(condition.in_flight, WARM_UP if program in {SEED, BOUNDED} else 0)


def _by_sessions(condition: Condition) -> tuple[int, int]:
    return condition.sessions, -condition.in_flight


def _directory(within: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=within)


def install() -> None:
    """Debian's packages of what is missing; exits with one sentence where that cannot be."""
    missing = [p for name, p in PACKAGES.items() if not (shutil.which(name) or Path(name).exists())]
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        sys.exit(f"❌ make bench needs {', '.join(missing)}: apt-get install {' '.join(missing)}")
    tell(f"installing {', '.join(missing)}")
    for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        subprocess.run(["apt-get", "-qq", *command], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def prepared(*, rounds: int, quick: bool) -> Iterator[Bench]:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        sys.exit("❌ make bench needs two processor cores: one for the servers, one for the client")
    cores = (usable[0], usable[1])
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.sched_setaffinity(0, {cores[0]})  # the servers inherit it
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for part in ("nginx", "mariadb"):
            (directory / part).mkdir()
        billing = stack.enter_context(billing_stub(directory / "nginx", min(hard, 65_536)))
        mariadb = stack.enter_context(mariadb_server(directory / "mariadb"))
        pid = int((directory / "mariadb" / "pid").read_text(encoding="ascii"))
        mysql = os.environ.get("TEST_MYSQL_URL")
        yield Bench(billing, mariadb, pid, mysql, directory, cores, rounds, quick)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the raw numbers, not tables")
    parser.add_argument(
        "--quick", action="store_true", help="one round of the smallest sizes: does it run at all?"
    )
    arguments = parser.parse_args()
    install()
    with prepared(rounds=1 if arguments.quick else ROUNDS, quick=arguments.quick) as bench:
        for condition in QUICK_CONDITIONS if arguments.quick else CONDITIONS:
            bench.measure(condition)
        steps: tuple[Callable[[], None], ...] = (
            bench.compare,
            bench.reuse,
            bench.idle,
            bench.imports,
            bench.processor,
            bench.gaps,
            bench.workers,
        )
        for step in steps:
            step()
        print(json.dumps(bench.raw(), indent=1) if arguments.json else bench.tables())
        # A shared machine may be too busy for a target; that is for the reader to judge.


if __name__ == "__main__":
    main()

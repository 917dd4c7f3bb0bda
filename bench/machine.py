"""What every case runs on: servers on one core, clients on the other, and shops."""

import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pymysql

from bench.jobs import Job
from bench.nginx import NGINX_MODULE, Billing, billing_stub
from bench.programs import ROOT, Client, Program
from bench.report import progress
from local.mariadb import mariadb_server
from testkit import queue
from testkit.shops import MySQLShop, Shop, SQLiteShop, add_sessions, mysql_shop, statements

PACKAGES = {
    "nginx": "nginx-light",
    str(NGINX_MODULE): "libnginx-mod-http-echo",
    "wrk": "wrk",
    "node": "nodejs",
    "mariadb-install-db": "mariadb-server",
    "openssl": "openssl",
}
# A pass that takes longer than an interval must not check a session twice.
CHECKED_ONCE = {"CHECK_CADENCE": "1d"}


@dataclass(frozen=True, slots=True)
class Machine:
    """The running servers. `before` is a checkout of an earlier version to measure as well."""

    billing: Billing
    mariadb: str
    mariadb_pid: int
    mysql: str | None
    directory: Path
    cores: tuple[int, int]  # of the servers, of the clients
    before: Path | None
    quick: bool

    @property
    def rounds(self) -> int:
        return 1 if self.quick else 3

    def versions(self, program: Program) -> list[Program]:
        """The program, and with --before also its earlier version."""
        return [program, *([program.of(self.before)] if self.before else [])]

    @contextlib.contextmanager
    def client(self, program: Program, *cores: int) -> Iterator[Client]:
        """Start the program, on the clients' core by default."""
        path = self._path(program.checkout) if program.checkout else [ROOT]
        client = Client(program, cores or self.cores[1:], self.billing.authority, path)
        with contextlib.closing(client):
            yield client

    def _path(self, checkout: Path) -> list[Path]:
        """Where that checkout of the monitor and its dependencies are, and this bench."""
        dependencies = self.directory / f"dependencies of {checkout}".replace("/", "_")
        if not dependencies.exists():
            install_dependencies(checkout, dependencies)
        return [checkout / "src", dependencies, ROOT]

    @contextlib.contextmanager
    def shop(self, engine: str, sessions: Mapping[str, str | None]) -> Iterator[Shop]:
        with contextlib.ExitStack() as stack:
            shop: Shop
            if engine == "sqlite":
                directory = stack.enter_context(tempfile.TemporaryDirectory(dir=self.directory))
                shop = SQLiteShop(Path(directory) / "db")
                for statement in statements("sqlite"):
                    shop.run(statement)
            else:
                server = self.mariadb if engine == "mariadb" else self.mysql
                assert server is not None
                shop = stack.enter_context(mysql_shop(server))
            add_sessions(shop, sessions)
            yield shop

    def mariadb_cpu_seconds(self) -> float:
        """Processor time that MariaDB has used so far."""
        stat = Path(f"/proc/{self.mariadb_pid}/stat").read_text(encoding="ascii")
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def install_dependencies(checkout: Path, target: Path) -> None:
    """Install what the monitor of that checkout ships with, without bytecode."""
    uv = shutil.which("uv") or ROOT / ".uv/bin/uv"
    requirements = checkout / "src/requirements.txt"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--target", target, "-r", requirements], check=True
    )


def pass_job(url: str, shop: Shop | None, sessions: int, in_flight: int = 100) -> Job:
    """A job that checks each session once: those due in `shop`, or numbered ones without it."""
    env = {**CHECKED_ONCE, "DATABASE_URL": shop.url} if shop else {}
    return Job(url=url, sessions=sessions, in_flight=in_flight, warm_up=False, env=env)


def adopt(client: Client, job: Job, shop: Shop) -> None:
    """Let a pass adopt a new shop's sessions, then make them due again."""
    client.run(job)
    make_due(shop)


def make_due(shop: Shop) -> None:
    """Make all sessions due now, as a tick finds them: none has waited."""
    if _has_batches(shop):
        now = datetime.now(UTC)
        queue.make_due(shop, f"{now:%F %T}" if isinstance(shop, MySQLShop) else f"{now:%FT%T}.000Z")
    else:
        shop.run("UPDATE checkout_session_check SET next_check_at = first_seen_at")


def fill_queue(shop: Shop, columns: str = "", values: str = "") -> None:
    """Queue all open sessions, due now, with more columns of their rows if need be."""
    due = "UTC_TIMESTAMP(3)"
    if _has_batches(shop):
        shop.run(
            "INSERT IGNORE INTO checkout_session_batch (id, next_check_at, due_at)"
            f" SELECT DISTINCT 1 + {_NUMBER} DIV 50, {due}, {due} FROM checkout_session"
        )
        shop.run(
            f"INSERT IGNORE INTO checkout_session_check (session_id, batch_id, first_seen_at"
            f"{columns}) SELECT id, 1 + {_NUMBER} DIV 50, {due}{values} FROM checkout_session"
        )
    else:
        shop.run(
            f"INSERT IGNORE INTO checkout_session_check (session_id, next_check_at, first_seen_at"
            f"{columns}) SELECT id, {due}, {due}{values} FROM checkout_session"
        )


# `fill_shop` numbers its sessions in this column.
_NUMBER = "CAST(billing_order_id AS UNSIGNED)"


def _has_batches(shop: Shop) -> bool:
    """Whether the tables are not of an earlier checkout."""
    try:
        shop.run("SELECT 1 FROM checkout_session_batch LIMIT 1")
    except (pymysql.ProgrammingError, sqlite3.OperationalError):
        return False
    return True


def install() -> None:
    """Install missing Debian packages; without the right to do so, exit with a message."""
    missing = [p for name, p in PACKAGES.items() if not (shutil.which(name) or Path(name).exists())]
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        sys.exit(f"❌ make bench needs {', '.join(missing)}: apt-get install {' '.join(missing)}")
    progress(f"installing {', '.join(missing)}")
    for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        subprocess.run(["apt-get", "-qq", *command], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def running(*, before: Path | None, quick: bool) -> Iterator[Machine]:
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        sys.exit("❌ make bench needs two processor cores: one for servers, one for clients")
    cores = (usable[0], usable[1])
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.sched_setaffinity(0, {cores[0]})  # servers inherit it
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for part in ("nginx", "mariadb"):
            (directory / part).mkdir()
        billing = stack.enter_context(billing_stub(directory / "nginx", min(hard, 65_536)))
        mariadb = stack.enter_context(mariadb_server(directory / "mariadb"))
        pid = int((directory / "mariadb" / "pid").read_text(encoding="ascii"))
        mysql = os.environ.get("TEST_MYSQL_URL")
        yield Machine(billing, mariadb, pid, mysql, directory, cores, before, quick)


def wait(seconds: float, what: str) -> None:
    """Sleep, and print every 15 seconds how much time is left."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        progress(f"{what}: {left:.0f} s left")
        time.sleep(min(15, left))

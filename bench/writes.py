"""What the checks cost the database: bytes written, its time, and claims beside an old snapshot."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from statistics import median

from bench.machine import Machine, adopt, make_due, pass_job
from bench.programs import MARIADB, MYSQL
from bench.report import Results, progress
from core.domain.batch import Settlement
from core.domain.model import Answer, Outcome, Recheck
from core.store.queue import Claimed
from core.store.results import Results as CheckResults
from core.store.store import Store
from core.worker import open_database
from local.mariadb import mariadb_server
from testkit.clock import NOON, FakeClock
from testkit.shops import MySQLShop, add_sessions, connect, mysql_shop, numbered, settings_for

INTERVAL = timedelta(seconds=5)
LEASE = timedelta(seconds=20)
TICKS = 120  # ten minutes
CLAIM = 500  # sessions, as a pass claims first
# The position in the redo log by its name on MariaDB and on MySQL, and logged transactions.
STATUS = ("Innodb_lsn_current", "Innodb_redo_log_current_lsn", "Binlog_commits")
# As MySQL logs by default: each row that changes.
LOG_ROWS = ("--log-bin=log", "--binlog-format=ROW", "--server-id=1")


def writes(machine: Machine, results: Results) -> None:
    """Bytes of redo and binary log, and the server's time, for a check that finds nothing new."""
    open_ = 1000 if machine.quick else 10_000
    with _servers(machine) as servers:
        for name, server in servers.items():
            took: dict[str, float] = {}
            for program in machine.versions(MARIADB if name == "MariaDB" else MYSQL):
                with mysql_shop(server) as shop:
                    add_sessions(shop, numbered(open_))
                    with machine.client(program) as client:
                        job = pass_job(machine.billing.url(), shop, open_)
                        adopt(client, job, shop)
                        measured = []
                        for _ in range(3 * machine.rounds):
                            make_due(shop)
                            before = (*written(shop), _seconds(shop))
                            client.run(job)
                            after = (*written(shop), _seconds(shop))
                            measured.append(
                                [(b - a) / open_ for a, b in zip(before, after, strict=True)]
                            )
                redo, log, _commits, seconds = (
                    median(column) for column in zip(*measured, strict=True)
                )
                took[program.label] = seconds
                what = f"{program.label}: bytes of redo and binary log for a check"
                text = f"{redo:.0f} + {log:.0f}"
                if program in (MARIADB, MYSQL):
                    results.target(what, "≤ 30", text, met=redo + log <= 30)
                else:
                    results.state(what, text)
                results.state(
                    f"{program.label}: time of the server for a check", f"{seconds * 1e6:.1f} µs"
                )
            if machine.before:
                ours, earlier = took.values()
                most = 0.45 if name == "MariaDB" else 0.6
                results.target(
                    f"{name}: time of the server for a check, against before",
                    f"≤ ×{most}",
                    f"×{ours / earlier:.2f}",
                    met=ours / earlier <= most,
                )


def snapshot(machine: Machine, results: Results) -> None:
    """The longest claim while a transaction has been open for ten minutes of ticks."""
    open_, ticks = (1000, 12) if machine.quick else (20_000, TICKS)
    with _servers(machine) as servers:
        for name, server in servers.items():
            with mysql_shop(server) as shop:
                add_sessions(shop, numbered(open_))
                longest = _longest_claim(shop, ticks)
            results.target(
                f"{name}: longest claim with a snapshot open for {ticks * 5 / 60:.0f} minutes, "
                f"{open_:,} open",
                "≤ 15 ms",
                f"{longest * 1000:.1f} ms",
                met=longest <= 0.015,
            )


def _longest_claim(shop: MySQLShop, ticks: int) -> float:
    clock = FakeClock(NOON)
    database = open_database(settings_for(shop), clock=clock)
    store = Store(database)
    store.prepare()
    reconciliation = store.reconciliation(NOON, settings_for(shop).check_rules())
    while reconciliation.reconcile_next_piece():
        pass
    longest = 0.0
    with connect(shop.server, shop.database) as other, other.cursor() as cursor:
        cursor.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT")
        cursor.execute("SELECT COUNT(*) FROM checkout_session")
        for tick in range(ticks):
            if tick % 12 == 0:
                progress(f"a snapshot open for {tick * 5 // 60} minutes")
            while True:
                began = time.perf_counter()
                claimed = store.queue.claim_due(clock.now, tick=clock.now, lease=LEASE, limit=CLAIM)
                took = time.perf_counter() - began
                if not claimed.claims:
                    break
                longest = max(longest, took) if tick == ticks - 1 else longest
                store.queue.write(_healthy(claimed, clock), clock.now)
            clock.advance(INTERVAL.total_seconds())
    store.close()
    return longest


def _healthy(claimed: Claimed, clock: FakeClock) -> CheckResults:
    answer, due = Answer(Outcome.ACTIVE, 200), clock.now + INTERVAL
    return CheckResults(
        [
            Settlement(b, [Recheck(claim, answer, due) for claim in b.claims])
            for b in claimed.batches
        ]
    )


@contextlib.contextmanager
def _servers(machine: Machine) -> Iterator[dict[str, str]]:
    """A MariaDB that logs rows as MySQL does by default, and MySQL if there is one."""
    options = (*LOG_ROWS, "--performance-schema=ON")
    with (
        tempfile.TemporaryDirectory(dir=machine.directory) as directory,
        mariadb_server(Path(directory), *options) as mariadb,
    ):
        yield {"MariaDB": mariadb, **({"MySQL": machine.mysql} if machine.mysql else {})}


def written(shop: MySQLShop) -> tuple[int, int, int]:
    """Bytes of the server's redo and binary log so far, and transactions in the latter."""
    status = dict(shop.run("SHOW GLOBAL STATUS WHERE variable_name IN (%s, %s, %s)", STATUS))
    commits = int(status.pop("Binlog_commits", "0"))  # MySQL does not count them
    [redo] = status.values()
    return int(redo), sum(int(row[1]) for row in shop.run("SHOW BINARY LOGS")), commits


def _seconds(shop: MySQLShop) -> float:
    """The time that the server has spent in statements so far."""
    [(picoseconds,)] = shop.run(
        "SELECT SUM(sum_timer_wait)"
        " FROM performance_schema.events_statements_summary_global_by_event_name"
    )
    return float(picoseconds) / 1e12

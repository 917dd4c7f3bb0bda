"""Workers that are killed, stopped, frozen or out of file descriptors at any point of a pass."""

import asyncio
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from core.errors import StoreError
from core.settings import Settings
from core.worker import Worker
from testkit.queue import claimed
from testkit.shops import add_sessions
from tests.chaos.conftest import Cases
from tests.chaos.proxy import Statement
from tests.chaos.test_database_faults import SEED
from tests.chaos.world import ProxiedWorld, World

SRC = Path(__file__).parents[2] / "src"

ONE_PASS = """
import os, resource, sys
from datetime import datetime
from core.errors import StoreError
from core.settings import Settings
from core.worker import Worker

now = datetime.fromisoformat(sys.argv[1])
worker = Worker(Settings.from_env(os.environ), clock=lambda: now)
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
try:
    print(worker.check_open_checkout_sessions(now).outcomes)
except StoreError as error:
    print(error)
"""

on_mariadb = pytest.mark.parametrize("proxied", ["mariadb"], indirect=True)


def start_process(world: World, *arguments: str) -> subprocess.Popen[str]:
    """Start a worker process that runs one pass."""
    return subprocess.Popen(
        [sys.executable, "-c", ONE_PASS, world.clock.now.isoformat(), *arguments],
        cwd=SRC,
        env={**os.environ, **world.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_first(workers: list[subprocess.Popen[str]], _statement: Statement) -> None:
    workers[0].kill()
    workers[0].wait()


@on_mariadb
def test_worker_killed_at_some_statement_loses_nothing(proxied: ProxiedWorld, cases: Cases) -> None:
    for number in [*proxied.sample_statements(6, random.Random(SEED)), 1]:
        proxied.reset()

        workers: list[subprocess.Popen[str]] = []
        proxied.proxy.before[number] = partial(kill_first, workers)
        worker = start_process(proxied.world)
        workers.append(worker)
        worker.communicate()
        with cases.case(f"killed at statement {number}"):
            assert worker.returncode == -9
            proxied.proxy.reset()
            proxied.world.crashed = True
            proxied.world.invariants()


@on_mariadb
def test_worker_killed_with_requests_in_flight_loses_nothing(proxied: ProxiedWorld) -> None:
    world = proxied.world
    proxied.reset()
    world.billing.before_answer = lambda checkout: worker.kill() if checkout == "paid-2" else None
    worker = start_process(world)
    worker.communicate()
    assert worker.returncode == -9
    world.billing.before_answer = lambda _checkout: None
    world.crashed = True
    world.invariants()


def stop_at(proxied: ProxiedWorld, number: int) -> None:
    """Stop the worker at a statement, as SIGTERM does on a laptop."""
    proxied.reset()
    proxied.proxy.before[number] = lambda _statement: proxied.worker.stop()
    with suppress(asyncio.CancelledError):
        proxied.worker.check_open_checkout_sessions(proxied.world.clock.now)


@on_mariadb
def test_worker_stopped_at_some_statement_loses_nothing(
    proxied: ProxiedWorld, cases: Cases
) -> None:
    for number in proxied.sample_statements(8, random.Random(SEED)):
        with cases.case(f"stopped at statement {number}"):
            stop_at(proxied, number)
            proxied.world.crashed = True
            proxied.world.invariants()


@on_mariadb
def test_stopped_worker_releases_its_claims(proxied: ProxiedWorld) -> None:
    """The remaining sessions are due at once, not after a lease."""
    left = {}
    for number in range(1, proxied.statements_per_pass() + 1):
        stop_at(proxied, number)
        left[number] = claimed(proxied.world.shop)
    assert {number: sessions for number, sessions in left.items() if sessions} == {}


@pytest.mark.parametrize("world", ["mariadb"], indirect=True)
def test_worker_near_its_deadline_starts_nothing_it_cannot_finish(world: World) -> None:
    world.billing.statuses = {f"paid-{n}": "paid" for n in range(20)}
    add_sessions(world.shop, {f"silent-{n}": f"silent-{n}" for n in range(40)})
    add_sessions(world.shop, {f"paid-{n}": f"paid-{n}" for n in range(20)})
    worker = world.worker(MAX_CONCURRENCY="10", REQUEST_TIMEOUT_SECONDS="8")
    for seconds in (5.5, 6.0):
        began = time.monotonic()
        assert world.tick(worker, seconds=seconds) is not None
        assert time.monotonic() - began < seconds + 5
        assert claimed(world.shop) == 0
        world.advance()
    world.crashed = True  # requests cancelled in flight are sent again
    world.invariants()


@pytest.mark.parametrize("when", ["between two passes", "during a pass"])
def test_worker_frozen_for_ten_minutes_with_dead_connections(
    proxied: ProxiedWorld, when: str
) -> None:
    """Late answers do not overwrite what another worker has recorded since."""
    world = proxied.world
    proxied.reset()
    other = world.worker()
    taken_over: list[object] = []

    def freeze(checkout: str | None = "paid-1") -> None:
        if checkout == "paid-1" and not taken_over:
            taken_over.append(None)
            world.advance(600)
            world.billing.statuses["paid-1"] = "open"  # the earlier answer is out of date
            proxied.proxy.cut_all()
            world.billing.statuses["paid-2"] = "failed"
            taken_over.append(world.tick(other))
            world.billing.statuses["paid-1"] = "paid"

    if when == "between two passes":
        world.tick()
        world.advance(600)
        proxied.proxy.cut_all()
        world.billing.end_connections(reset=True)
    else:
        world.billing.before_answer = freeze
    summary = world.tick()
    assert summary is not None, world.errors
    world.billing.before_answer = lambda _checkout: None
    world.crashed = True
    world.invariants()


@pytest.mark.parametrize("descriptors", [24, 30, 40])
def test_worker_out_of_descriptors_says_so_and_loses_nothing(
    world: World, descriptors: int
) -> None:
    add_sessions(world.shop, {f"ok-{n}": f"fine-{n}" for n in range(60)})
    world.billing.statuses = {f"fine-{n}": "paid" for n in range(10)}
    world.billing.before_answer = lambda _checkout: time.sleep(0.1)
    worker = start_process(world, str(descriptors))
    output, _ = worker.communicate()
    assert worker.returncode == 0, output[-1000:]
    assert "Traceback" not in output
    assert "Too many open files" in output or "unable to open" in output
    world.billing.before_answer = lambda _checkout: None
    world.crashed = True
    world.invariants()


def test_worker_can_be_closed_after_any_fault(proxied: ProxiedWorld) -> None:
    world = proxied.world
    for fault in ("none", "cut", "unreachable"):
        proxied.reset()
        worker = Worker(Settings.from_env(world.environment()), clock=world.clock)
        worker.check_open_checkout_sessions(world.clock.now)
        if fault != "none":
            proxied.proxy.cut_all()
        proxied.proxy.refuses_connections = fault == "unreachable"
        if fault == "unreachable":
            with pytest.raises(StoreError):
                worker.check_open_checkout_sessions(world.clock.now)
        worker.close()
        proxied.proxy.refuses_connections = False
    world.invariants(recheck=False)

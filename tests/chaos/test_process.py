"""Workers that are killed, stopped, frozen, or out of descriptors, at whichever moment."""

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
from testkit.shops import add_sessions
from tests.chaos.conftest import Cases
from tests.chaos.proxy import Statement
from tests.chaos.stage import Stage
from tests.chaos.test_database_faults import SEED
from tests.chaos.world import World

SRC = Path(__file__).parents[2] / "src"

PROGRAM = """
import os, resource, sys
from datetime import datetime
from core.errors import StoreError
from core.settings import Settings
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

on_mariadb = pytest.mark.parametrize("stage", ["mariadb"], indirect=True)


def process(world: World, *arguments: str) -> subprocess.Popen[str]:
    """A worker in a process of its own, which runs one pass."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, world.clock.now.isoformat(), *arguments],
        cwd=SRC,
        env={**os.environ, **world.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killing(workers: list[subprocess.Popen[str]], _statement: Statement) -> None:
    workers[0].kill()
    workers[0].wait()


@on_mariadb
def test_a_worker_that_is_killed_at_some_statement_loses_nothing(
    stage: Stage, cases: Cases
) -> None:
    for number in [*stage.sometimes(6, random.Random(SEED)), 1]:
        stage.set()

        workers: list[subprocess.Popen[str]] = []
        stage.proxy.before[number] = partial(killing, workers)
        worker = process(stage.world)
        workers.append(worker)
        worker.communicate()
        with cases.case(f"killed at statement {number}"):
            assert worker.returncode == -9
            stage.proxy.reset()
            stage.world.crashed = True
            stage.world.invariants()


@on_mariadb
def test_a_worker_that_is_killed_with_requests_in_flight_loses_nothing(stage: Stage) -> None:
    world = stage.world
    stage.set()
    world.billing.before = lambda checkout: worker.kill() if checkout == "paid-2" else None
    worker = process(world)
    worker.communicate()
    assert worker.returncode == -9
    world.billing.before = lambda _checkout: None
    world.crashed = True
    world.invariants()


CLAIMED = "SELECT COUNT(*) FROM checkout_session_check WHERE claimed_until IS NOT NULL"


def stop_at(stage: Stage, number: int) -> None:
    """As SIGTERM does it on a laptop."""
    stage.set()
    stage.proxy.before[number] = lambda _statement: stage.worker.stop()
    with suppress(asyncio.CancelledError):
        stage.worker.check_open_checkout_sessions(stage.world.clock.now)


@on_mariadb
def test_a_worker_that_is_stopped_at_some_statement_loses_nothing(
    stage: Stage, cases: Cases
) -> None:
    for number in stage.sometimes(8, random.Random(SEED)):
        with cases.case(f"stopped at statement {number}"):
            stop_at(stage, number)
            stage.world.crashed = True
            stage.world.invariants()


@on_mariadb
def test_a_worker_that_is_stopped_gives_its_claims_back(stage: Stage) -> None:
    """What is left is due at once, not after a lease."""
    left = {}
    for number in range(1, stage.statements_of_a_pass() + 1):
        stop_at(stage, number)
        left[number] = stage.world.shop.run(CLAIMED)
    assert {number: rows for number, rows in left.items() if rows != [(0,)]} == {}


@pytest.mark.parametrize("world", ["sqlite", "mariadb"], indirect=True)
def test_near_its_deadline_a_worker_begins_nothing_that_it_cannot_finish(world: World) -> None:
    world.billing.words = {f"paid-{n}": "paid" for n in range(20)}
    add_sessions(world.shop, {f"silent-{n}": f"silent-{n}" for n in range(40)})
    add_sessions(world.shop, {f"paid-{n}": f"paid-{n}" for n in range(20)})
    worker = world.worker(MAX_CONCURRENCY="10", REQUEST_TIMEOUT_SECONDS="8")
    for seconds in (5.5, 6.0):
        began = time.monotonic()
        assert world.tick(worker, seconds=seconds) is not None
        assert time.monotonic() - began < seconds + 5
        assert world.shop.run(CLAIMED) == [(0,)]
        world.advance()
    world.crashed = True  # what was given up in flight is asked again
    world.invariants()


@pytest.mark.parametrize("when", ["between two passes", "in the middle of one"])
def test_ten_minutes_frozen_with_every_connection_dead(stage: Stage, when: str) -> None:
    """What another worker has taken over is not overwritten by what this one has heard."""
    world = stage.world
    stage.set()
    other = world.worker()
    taken_over: list[object] = []

    def freeze(checkout: str | None = "paid-1") -> None:
        if checkout == "paid-1" and not taken_over:
            taken_over.append(None)
            world.advance(600)
            world.billing.words["paid-1"] = "open"  # and what was said before is not true any more
            stage.proxy.cut_all()
            world.billing.words["paid-2"] = "failed"
            taken_over.append(world.tick(other))
            world.billing.words["paid-1"] = "paid"

    if when == "between two passes":
        world.tick()
        world.advance(600)
        stage.proxy.cut_all()
        world.billing.end_connections(reset=True)
    else:
        world.billing.before = freeze
    summary = world.tick()
    assert summary is not None, world.failed
    world.billing.before = lambda _checkout: None
    world.crashed = True
    world.invariants()


@pytest.mark.parametrize("descriptors", [24, 30, 40])
def test_a_worker_without_descriptors_says_so_and_loses_nothing(
    world: World, descriptors: int
) -> None:
    add_sessions(world.shop, {f"ok-{n}": f"fine-{n}" for n in range(60)})
    world.billing.words = {f"fine-{n}": "paid" for n in range(10)}
    world.billing.before = lambda _checkout: time.sleep(0.1)
    worker = process(world, str(descriptors))
    said, _ = worker.communicate()
    assert worker.returncode == 0, said[-1000:]
    assert "Traceback" not in said
    assert "Too many open files" in said or "unable to open" in said
    world.billing.before = lambda _checkout: None
    world.crashed = True
    world.invariants()


def test_a_worker_may_be_closed_whatever_has_happened_to_it(stage: Stage) -> None:
    world = stage.world
    for fault in ("nothing", "cut", "away"):
        stage.set()
        worker = Worker(Settings.from_env(world.environment()), clock=world.clock)
        worker.check_open_checkout_sessions(world.clock.now)
        if fault != "nothing":
            stage.proxy.cut_all()
        stage.proxy.refusing = fault == "away"
        if fault == "away":
            with pytest.raises(StoreError):
                worker.check_open_checkout_sessions(world.clock.now)
        worker.close()
        stage.proxy.refusing = False
    world.invariants(checks=False)

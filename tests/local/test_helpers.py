"""The laptop's workers start helpers of their own, as a leader on Lambda does."""

import threading
from collections.abc import Callable
from datetime import datetime

import pytest

from core.domain.model import Reason
from core.domain.summary import Summary
from core.settings import Settings
from local import workers
from local.workers import Workers
from testkit.clock import NOON

TIMEOUT = 30


def test_the_laptop_tells_its_helpers_that_they_are_helpers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tick's pass starts one, which tries to start another one: Workers marks both."""
    passes: list[tuple[datetime, bool]] = []
    third = threading.Event()

    class Starting:
        def __init__(
            self, _: Settings, *, start_worker: Callable[[datetime], None], name: str
        ) -> None:
            self.start_worker = start_worker

        def check_open_checkout_sessions(
            self, tick: datetime, *, helps: bool, seconds: float
        ) -> Summary:
            passes.append((tick, helps))
            if len(passes) < 3:
                self.start_worker(tick)
            else:
                third.set()
            return Summary(Reason.TICK, NOON, tick)

        def stop(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(workers, "Worker", Starting)
    pool = Workers(Settings.from_env({"DATABASE_URL": "sqlite:////nowhere"}), 3)
    pool.start_check(NOON)
    assert third.wait(TIMEOUT)
    pool.close()
    assert passes == [(NOON, False), (NOON, True), (NOON, True)]

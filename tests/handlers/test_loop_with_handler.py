"""The template's loop with the real check handler: half an hour on a virtual clock."""

import random
from collections import Counter
from datetime import UTC, datetime

import httpx
import pytest
from aws_lambda_powertools.utilities.typing import LambdaContext

from core.domain.model import iso
from core.worker import Worker
from handlers import check
from testkit.clock import FakeClock
from testkit.shops import Shop, add_sessions, numbered, settings_for
from tests.test_loop import MINUTES, NOON, StepFunctions, jittered, slots


@pytest.mark.slow
@pytest.mark.parametrize("skew_seconds", [0.0, -0.3, 0.7])
def test_every_session_is_checked_once_in_every_slot(
    sqlite_shop: Shop, context: LambdaContext, monkeypatch: pytest.MonkeyPatch, skew_seconds: float
) -> None:
    """Also if the database's clock is behind or ahead of the loop's."""
    add_sessions(sqlite_shop, numbered(3))
    clock = FakeClock()
    checks: Counter[tuple[float, str]] = Counter()
    slot = 0.0

    def billing(request: httpx.Request) -> httpx.Response:
        checks[slot, request.url.path] += 1
        return httpx.Response(200, json={"status": "open"})

    worker = Worker(settings_for(sqlite_shop), transport=httpx.MockTransport(billing), clock=clock)
    monkeypatch.setattr(check, "worker", lambda: worker)
    draw = random.Random(0)
    begins = jittered(1)
    step_functions = StepFunctions(wait_ends_late=lambda: draw.uniform(0, 0.4))

    for start in step_functions.executions([*begins, begins[17]]):
        slot = start.slot
        clock.now = datetime.fromtimestamp(round(start.at + skew_seconds, 3), UTC)
        check.handler({"tick": iso(datetime.fromtimestamp(slot, UTC))}, context)
    worker.close()

    assert set(checks.values()) == {1}
    sessions_in = Counter(slot for slot, _path in checks)
    assert {sessions_in[whole] for whole in slots(NOON + 60, MINUTES[-1], 5)} == {3}

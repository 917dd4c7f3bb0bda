"""How many bytes a pass logs; CloudWatch bills every one of them."""

import uuid

import httpx
import pytest
from aws_lambda_powertools.utilities.typing import LambdaContext

from core.log import logger
from core.worker import Worker
from handlers import check
from testkit.shops import Shop, add_sessions, settings_for

# For ids of common lengths; each of the five lines has two ids, twice.
MAX_BYTES = 3_000


async def answer(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"status": "active"}, request=request)


@pytest.mark.parametrize("count", [0, 10, 1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_pass_logs_at_most_3000_bytes(  # noqa: PLR0917 (fixtures)
    count: int,
    sqlite_shop: Shop,
    context: LambdaContext,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However many sessions are open."""
    ids = [str(uuid.uuid5(uuid.NAMESPACE_URL, str(n))) for n in range(count)]
    add_sessions(sqlite_shop, {session: f"checkout_{session[:13]}" for session in ids})
    monkeypatch.setenv("POWERTOOLS_SERVICE_NAME", "checkout-session-monitor")
    worker = Worker(settings_for(sqlite_shop), transport=httpx.MockTransport(answer))
    monkeypatch.setattr(check, "worker", lambda: worker)
    capsys.readouterr()
    summary = check.handler({}, context)
    worker.close()
    # Some are checked twice if a slow pass reaches into the next slot.
    assert int(str(summary["checked"])) >= count
    records = [logger.registered_handler.format(record) for record in caplog.records]
    metrics = [line for line in capsys.readouterr().out.splitlines() if '"_aws"' in line]
    assert len(metrics) == 1
    written = sum(len(f"{line}\n".encode()) for line in [*records, *metrics])
    assert 0 < written <= MAX_BYTES

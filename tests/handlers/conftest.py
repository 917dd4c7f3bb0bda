from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from aws_lambda_powertools.utilities.typing import LambdaContext

from handlers import check
from local.billing import SimulatedBilling, running_billing
from testkit.shops import Shop


@pytest.fixture
def context() -> LambdaContext:
    context: Any = SimpleNamespace(get_remaining_time_in_millis=lambda: 60_000)
    return context  # type: ignore[no-any-return]


@pytest.fixture
def simulated() -> Iterator[SimulatedBilling]:
    with running_billing() as billing:
        yield billing


@pytest.fixture
def environment(
    sqlite_shop: Shop, simulated: SimulatedBilling, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """A new execution environment over an SQLite shop and the simulated billing service."""
    monkeypatch.setenv("DATABASE_URL", sqlite_shop.url)
    monkeypatch.setenv("BILLING_API_URL", simulated.url)
    monkeypatch.setenv("APIKEY", "test-key")
    check.worker.cache_clear()
    yield monkeypatch
    if check.worker.cache_info().currsize:
        check.worker().close()
    check.worker.cache_clear()

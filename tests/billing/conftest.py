from collections.abc import Iterator

import pytest

from local.billing import SimulatedBilling, running_billing


@pytest.fixture(scope="module")
def simulated() -> Iterator[SimulatedBilling]:
    with running_billing(pause_seconds=0.01) as billing:
        yield billing

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from local.billing import SimulatedBilling, running_billing
from tests.e2e.support import (
    API_KEY,
    HOST,
    Sam,
    Shop,
    build,
    mariadb_container,
    shop_on,
)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sam") / "build")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a database server that Docker containers can reach."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
    else:
        with mariadb_container() as url:
            yield url


@pytest.fixture
def shop(server: str) -> Iterator[Shop]:
    with shop_on(server) as shop:
        yield shop


@pytest.fixture
def billing() -> Iterator[SimulatedBilling]:
    with running_billing(host="0.0.0.0", api_key=API_KEY) as billing:
        yield billing


@pytest.fixture
def variables(shop: Shop, billing: SimulatedBilling) -> dict[str, str]:
    """The functions' environment variables that depend on this machine."""
    url = urlsplit(billing.url)
    return {
        "APIKEY": API_KEY,
        "DATABASE_URL": shop.url,
        "BILLING_API_URL": url._replace(netloc=f"{HOST}:{url.port}").geturl(),
    }


@pytest.fixture
def sam(package: Path, tmp_path: Path, variables: Mapping[str, str]) -> Sam:
    return Sam(package, tmp_path, variables)


@pytest.fixture
def api(sam: Sam) -> Iterator[str]:
    """The URL of the API that `sam local start-api` serves."""
    with sam.api() as url:
        yield url

"""What a check sends over TLS, as the kernel counts it: AWS bills data out by the byte."""

import asyncio
from pathlib import Path

import pytest

from core.billing.client import BillingClient
from core.billing.status_words import PATH, WORDS, StatusReader
from core.domain.model import Outcome
from testkit import tls_billing

pytestmark = pytest.mark.slow

CHECKS, IN_FLIGHT = 400, 40


@pytest.mark.parametrize(
    ("reader", "max_bytes"),
    [(None, 192), (StatusReader(PATH, WORDS), 205)],
    ids=["", "status updates"],
)
async def test_a_check_on_a_keepalive_connection_sends_few_bytes(
    reader: StatusReader | None, max_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check_all(client: BillingClient) -> None:
        permits = asyncio.Semaphore(IN_FLIGHT)

        async def check(number: int) -> None:
            async with permits:
                answer = await client.check(f"cs_{number:024d}")
                assert answer.outcome in (Outcome.ACTIVE, Outcome.UNKNOWN_STATUS)

        await asyncio.gather(*(check(number) for number in range(CHECKS)))
        await asyncio.sleep(0.1)  # the last acknowledgements are delayed

    async def both_passes(service: tls_billing.Service) -> tls_billing.Counts:
        client = BillingClient(
            api_url=service.url,
            credentials={"APIKEY": "k" * 32},
            timeout_seconds=10,
            status_reader=reader,
        )
        await check_all(client)
        before = service.counts()
        await check_all(client)
        counts = service.counts() - before
        await client.aclose()
        return counts

    with tls_billing.service(tmp_path, latency_seconds=0.05) as service:
        monkeypatch.setenv("SSL_CERT_FILE", str(service.authority))
        counts = await both_passes(service)
    assert (counts.requests, counts.connections) == (CHECKS, 0)
    assert counts.bytes_in / counts.requests <= max_bytes
    assert counts.segments_in / counts.requests <= 2  # the request, and an acknowledgement

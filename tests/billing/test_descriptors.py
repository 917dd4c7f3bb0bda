"""A thousand requests that all time out, within the 1,024 file descriptors of Lambda."""

import asyncio
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"

PROGRAM = """
import asyncio, resource, sys
from collections import Counter
from core.billing.client import BillingClient

resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

async def main():
    client = BillingClient(api_url=sys.argv[1], credentials={"APIKEY": "key"}, timeout_seconds=1)
    permits = asyncio.Semaphore(1100)  # a thousand, and the sockets that are still closing

    async def check(n):
        async with permits:
            return await client.check(f"c{n}")

    answers = await asyncio.gather(*(check(n) for n in range(3000)))
    print(sorted(Counter((a.outcome.value, a.detail) for a in answers).items()))

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_thousand_timeouts_fit_into_lambdas_descriptors() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    async def scenario() -> str:
        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # for the service's side
        server = await asyncio.start_server(silent, "127.0.0.1", 0, backlog=2000)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, url, cwd=SRC, stdout=subprocess.PIPE
        )
        printed, _ = await process.communicate()
        server.close()
        server.abort_clients()
        return printed.decode()

    assert asyncio.run(scenario()).splitlines() == ["[(('timeout', ''), 3000)]"]

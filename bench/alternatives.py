"""The clients that the monitor is compared with: aiohttp and wrk. Node's is `clients.mjs`.

`python -m bench.alternatives NAME` reads one JSON job per line from stdin and answers each with one
JSON line.
"""

import asyncio
import os
import ssl
import subprocess
import sys
from http import HTTPStatus

import aiohttp

from bench.jobs import TIMEOUT_SECONDS, Job, Report, Run, bounded, checkout_id, serve

HEADERS = {"x-api-key": "bench", "accept": "application/json"}


def with_aiohttp() -> Run:
    runner = asyncio.Runner()
    kept: list[aiohttp.ClientSession] = []

    async def run(job: Job) -> int:
        if not kept:
            authority = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=job["in_flight"], ssl=authority),
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
                headers=HEADERS,
            )
            kept.append(session)
        [session] = kept

        async def check(id_: str) -> bool:
            try:
                async with session.get(f"{job['url']}/{id_}") as response:
                    await response.read()
            except aiohttp.ClientError:
                return False
            return response.status == HTTPStatus.OK

        return await bounded(check, job)

    return lambda job: {"checked": runner.run(run(job))}


def wrk() -> Run:
    def run(job: Job) -> Report:
        seconds = 1 if job["warm_up"] else 2
        command = ["wrk", "-t1", f"-c{job['in_flight']}", f"-d{seconds}", "-H", "x-api-key: bench"]
        done = subprocess.run(
            [*command, f"{job['url']}/{checkout_id(1)}"], check=True, capture_output=True, text=True
        )
        [rate] = [line.split()[1] for line in done.stdout.splitlines() if "Requests/sec" in line]
        return {"checked": float(rate) * seconds, "seconds": seconds}

    return run


if __name__ == "__main__":
    program = {"aiohttp": with_aiohttp, "wrk": wrk}[sys.argv[1]]
    serve(program(), os.fdopen(1, "w", buffering=1))

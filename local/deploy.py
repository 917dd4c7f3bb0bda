"""`make deploy-local`: deploy the stack with SAM onto an emulated AWS on this machine.

It needs no account and no Docker. The schedule starts the loop, and the loop starts the check
function, which checks the sessions in a MariaDB against the simulated billing service. Each
function has only the rights of its role. The program calls the endpoints as one does after a
deployment and then shows every pass until Ctrl-C. With ARGS=--once it stops after a minute of ticks
and fails if one is missing.
"""

import argparse
import contextlib
import json
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pymysql

from local import aws, mariadb, output, package
from local.billing import running_billing
from local.loop import default_interval_seconds
from local.samples import SAMPLES

DATABASE = "shop"
ONCE_SECONDS = 60.0
# The schedule starts the loop within a minute; a cold start takes a second or two, and longer on a
# busy machine.
FIRST_TICK_SECONDS = 120.0
# A pass that waits for a session's timeout ends about ten seconds after its tick.
PASS_SECONDS = 15.0


class Pass(NamedTuple):
    """The row of a tick's pass in checkout_session_run."""

    tick: datetime
    started_at: datetime
    open_sessions: int
    checked: int
    errors: int
    status_changes: int
    duration_ms: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="make deploy-local", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after a minute of ticks")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        with deployed() as (stack, database):
            try_endpoints(stack)
            show_what_is_next(stack)
            show_passes(database, once=arguments.once)
    except aws.DeployError as error:
        print(f"❌ {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopping all servers.")
    except BrokenPipeError:  # of a print
        output.discard()
    return 0


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def deployed() -> Iterator[tuple[aws.Stack, str]]:
    """Deploy the stack; yields it and the URL of the shop's database. Both end with the block.

    Raises:
        DeployError: something is not installed, or the build or deployment failed.
    """
    if not mariadb.is_installed():
        raise aws.DeployError("MariaDB is not installed. Install the package mariadb-server.")
    api_key, password = secrets.token_hex(8), secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("mariadb", "aws"):
            (directory / name).mkdir()
        build = subprocess.Popen(  # noqa: S603 (the build runs while the servers start)
            [sys.executable, "-m", "local.package", *package.FOR_THIS_MACHINE], cwd=aws.ROOT
        )
        server = stack.enter_context(mariadb.mariadb_server(directory / "mariadb"))
        create_shop(server, password)
        billing = stack.enter_context(running_billing(api_key=api_key))
        url = stack.enter_context(aws.running_aws(directory / "aws"))
        if build.wait():
            raise aws.DeployError("The build failed.")
        arns = create_secrets(
            url,
            api_key,
            {
                "username": "monitor",
                "password": password,
                "host": "127.0.0.1",
                "port": urlsplit(server).port,
                "dbname": DATABASE,
            },
        )
        monitor = aws.Stack(url, aws.ROOT / package.BUILT)
        monitor.deploy(
            arns
            | {
                "BillingApiUrl": billing.url,
                "StatusUpdates": "true",
                "EventBusName": "default",
                "Architecture": package.ARCHITECTURE,
            }
        )
        yield monitor, f"{server}{DATABASE}"


def create_shop(server: str, password: str) -> None:
    """Create a shop with the sample sessions, and the monitor's database user."""
    with _connect(server) as connection, connection.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {DATABASE}")
        cursor.execute(f"USE {DATABASE}")
        for statement in (
            *mariadb.statements(mariadb.SCHEMA / "mysql.sql"),
            *mariadb.user_statements(DATABASE, "monitor", password),
        ):
            cursor.execute(statement)
        cursor.executemany(
            "INSERT INTO checkout_session (id, billing_checkout_id, status)"
            " VALUES (%s, %s, 'open')",
            SAMPLES,
        )


def create_secrets(url: str, api_key: str, database: Mapping[str, object]) -> dict[str, str]:
    """Create the two secrets; returns the stack parameters with their ARNs."""
    manager = aws.client(url, "secretsmanager")
    values = {
        "ApiKeySecretArn": ("checkout/billing-key", api_key),
        "DatabaseSecretArn": ("checkout/database", json.dumps(database)),
    }
    return {
        parameter: manager.create_secret(Name=name, SecretString=value)["ARN"]
        for parameter, (name, value) in values.items()
    }


def try_endpoints(stack: aws.Stack) -> None:
    """Do what follows a deployment: show the outputs, the health, and a check of all sessions."""
    outputs = stack.outputs()
    for name, value in outputs.items():
        print(f"{name:14} {value}")
    _curl(outputs["HealthUrl"])
    _curl(outputs["TriggerUrl"], "-X", "POST")
    _curl(outputs["TriggerUrl"], "-X", "POST", api_key=stack.api_key())


def show_what_is_next(stack: aws.Stack) -> None:
    """Say where the page is, and which key it asks for."""
    outputs = stack.outputs()
    print(f"\nThe monitor's page: {outputs['PageUrl']}")
    print(f"It asks for the API key: {stack.api_key()}")
    print(
        'Open it, press "Check all now", find the session cart-1008. Below is a line for each '
        "pass; the first\ncomes within a minute. Ctrl-C stops all servers.",
        flush=True,
    )


def _curl(url: str, *options: str, api_key: str | None = None) -> None:
    """Run curl and show its command, without the key, and its output."""
    header = [] if api_key is None else ["-H", f"x-api-key: {api_key}"]
    command = ["curl", *options, *header, url]
    shown = shlex.join(command)
    print(f"\n$ {shown.replace(api_key, '…') if api_key else shown}")
    silently = ["--silent", "--show-error", "--max-time", "30"]
    answer = subprocess.run([*command, *silently], capture_output=True, text=True, check=False)  # noqa: S603
    print(answer.stdout + answer.stderr, flush=True)


def show_passes(database: str, *, once: bool) -> None:
    """Print each tick's pass when it has finished. Raises DeployError if a tick is missing."""
    print(
        "\ntick      started_at    open  checked  errors  status_changes  duration_ms", flush=True
    )
    began = time.monotonic()
    shown = 0
    while True:
        found = finished_passes(database)
        for row in found[shown:]:
            print(
                f"{row.tick:%H:%M:%S}  {row.started_at:%H:%M:%S.%f}"[:-3]
                + f"  {row.open_sessions:>4}  {row.checked:>7}  {row.errors:>6}"
                f"  {row.status_changes:>14}  {row.duration_ms:>11}",
                flush=True,
            )
        shown = len(found)
        ticks = sorted({row.tick for row in found})
        if once and not ticks and time.monotonic() - began > FIRST_TICK_SECONDS:
            raise aws.DeployError(f"No tick within {FIRST_TICK_SECONDS:.0f} s.")
        if once and ticks and (ticks[-1] - ticks[0]).total_seconds() > ONCE_SECONDS + PASS_SECONDS:
            check_for_gaps(ticks)
            return
        time.sleep(1)


def check_for_gaps(ticks: Sequence[datetime]) -> None:
    """Print how many ticks the first minute has. Raises DeployError if one is missing."""
    interval = timedelta(seconds=default_interval_seconds())
    slots = [ticks[0] + n * interval for n in range(int(ONCE_SECONDS / interval.seconds) + 1)]
    if missing := set(slots) - set(ticks):
        raise aws.DeployError(f"No pass for the slot of {min(missing):%H:%M:%S}.")
    print(f"{len(slots)} ticks in {ONCE_SECONDS:.0f} s, one every {interval.seconds} s.")


def finished_passes(database: str) -> list[Pass]:
    """The finished passes of ticks, in the order in which they finished."""
    with _connect(database) as connection, connection.cursor() as cursor:
        cursor.execute(
            f"SELECT {', '.join(Pass._fields)} FROM checkout_session_run"
            " WHERE tick IS NOT NULL AND finished_at IS NOT NULL ORDER BY finished_at, id"
        )
        return [Pass(*row) for row in cursor.fetchall()]


def _connect(url: str) -> "pymysql.Connection[Any]":
    parts = urlsplit(url)
    return pymysql.connect(
        host=parts.hostname,
        port=parts.port or 3306,
        user=parts.username,
        password=parts.password or "",
        database=parts.path.strip("/") or None,
        autocommit=True,
    )


if __name__ == "__main__":
    sys.exit(main())

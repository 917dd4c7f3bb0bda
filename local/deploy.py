"""`make deploy-local`: the stack deployed by SAM onto an emulated AWS on this machine.

No account, no Docker. The schedule starts the loop, the loop the check function, and sessions in a
MariaDB are checked against the simulated billing service, each function with the rights of its role
alone. It shows what one does after a deployment, then every pass, until Ctrl-C; with ARGS=--once,
until a minute of ticks has passed, and fails if one is missing.
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

from local import aws, mariadb, package
from local.billing import running_billing
from local.loop import default_interval_seconds
from local.samples import SAMPLES

DATABASE = "shop"
ONCE_SECONDS = 60.0
# The schedule's first start comes within a minute; a cold start takes a second or two, more on a
# machine that is busy.
FIRST_TICK_SECONDS = 120.0
# A pass that waits for a session that hangs ends some ten seconds after its tick.
PASS_SECONDS = 15.0


class Pass(NamedTuple):
    """A row of checkout_session_run that a tick made."""

    tick: datetime
    started_at: datetime
    open_sessions: int
    checked: int
    errors: int
    status_changes: int
    duration_ms: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="make deploy-local", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after a minute of ticks")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        with deployed() as (stack, database):
            look(stack)
            watch(database, once=arguments.once)
    except aws.DeployError as error:
        print(f"❌ {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopping: everything that was started ends.")
    return 0


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def deployed() -> Iterator[tuple[aws.Stack, str]]:
    """The stack, and the URL of the shop's database, on servers that end with the block.

    Raises:
        DeployError: something is not installed, or cannot be built or deployed.
    """
    if not mariadb.is_installed():
        raise aws.DeployError("There is no MariaDB here: install mariadb-server.")
    api_key, password = secrets.token_hex(8), secrets.token_hex(8)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("mariadb", "aws"):
            (directory / name).mkdir()
        built = subprocess.Popen(  # noqa: S603 (it runs beside the servers' start)
            [sys.executable, "-m", "local.package", *package.FOR_THIS_MACHINE], cwd=aws.ROOT
        )
        server = stack.enter_context(mariadb.mariadb_server(directory / "mariadb"))
        make_shop(server, password)
        billing = stack.enter_context(running_billing(api_key=api_key))
        url = stack.enter_context(aws.running_aws(directory / "aws"))
        if built.wait():
            raise aws.DeployError("The functions cannot be built.")
        arns = put_secrets(
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


def make_shop(server: str, password: str) -> None:
    """A shop with the sample sessions, and the monitor's user in it."""
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


def put_secrets(url: str, api_key: str, database: Mapping[str, object]) -> dict[str, str]:
    """The two secrets; returns the parameters that name them."""
    manager = aws.client(url, "secretsmanager")
    values = {
        "ApiKeySecretArn": ("checkout/billing-key", api_key),
        "DatabaseSecretArn": ("checkout/database", json.dumps(database)),
    }
    return {
        parameter: manager.create_secret(Name=name, SecretString=value)["ARN"]
        for parameter, (name, value) in values.items()
    }


def look(stack: aws.Stack) -> None:
    """What one does after a deployment: read the outputs, ask for health, check all sessions."""
    outputs = stack.outputs()
    for name, value in outputs.items():
        print(f"{name:14} {value}")
    _curl(outputs["HealthUrl"])
    _curl(outputs["TriggerUrl"], "-X", "POST")
    _curl(outputs["TriggerUrl"], "-X", "POST", api_key=stack.api_key())


def _curl(url: str, *options: str, api_key: str | None = None) -> None:
    """Run curl and show it, without the key."""
    header = [] if api_key is None else ["-H", f"x-api-key: {api_key}"]
    command = ["curl", *options, *header, url]
    shown = shlex.join(command)
    print(f"\n$ {shown.replace(api_key, '…') if api_key else shown}")
    silently = ["--silent", "--show-error", "--max-time", "30"]
    answer = subprocess.run([*command, *silently], capture_output=True, text=True, check=False)  # noqa: S603
    print(answer.stdout + answer.stderr, flush=True)


def watch(database: str, *, once: bool) -> None:
    """Show each pass of a tick as it ends. Raises DeployError for a tick that is missing."""
    print(
        "\ntick      started_at    open  checked  errors  status_changes  duration_ms", flush=True
    )
    began = time.monotonic()
    shown = 0
    while True:
        found = passes(database)
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
            raise aws.DeployError(f"No tick came within {FIRST_TICK_SECONDS:.0f} s.")
        if once and ticks and (ticks[-1] - ticks[0]).total_seconds() > ONCE_SECONDS + PASS_SECONDS:
            without_a_gap(ticks)
            return
        time.sleep(1)


def without_a_gap(ticks: Sequence[datetime]) -> None:
    """Say that the first minute of ticks is whole. Raises DeployError when it is not."""
    interval = timedelta(seconds=default_interval_seconds())
    slots = [ticks[0] + n * interval for n in range(int(ONCE_SECONDS / interval.seconds) + 1)]
    if missing := set(slots) - set(ticks):
        raise aws.DeployError(f"No pass was made in the slot of {min(missing):%H:%M:%S}.")
    print(f"{len(slots)} ticks in {ONCE_SECONDS:.0f} s, one every {interval.seconds} s.")


def passes(database: str) -> list[Pass]:
    """The passes of ticks that have ended, in the order in which they did."""
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

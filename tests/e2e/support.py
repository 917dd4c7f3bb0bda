"""SAM's containers, and the database and billing service on this machine that they use."""

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pymysql
import pytest
from pymysql.cursors import DictCursor

from local import mariadb
from local.package import ARCHITECTURE, FOR_THIS_MACHINE
from testkit.shops import MySQLShop, connect, mysql_shop

ROOT = Path(__file__).parents[2]
EVENTS = ROOT / "events"
HOST = "host.docker.internal"  # this machine's name in the containers
API_KEY = f"key-{secrets.token_hex(8)}"
PASSWORD = f"password-{secrets.token_hex(8)}"
START_SECONDS = 120.0

# Locally, APIKEY and DATABASE_URL replace the secrets.
LOCAL = (
    "--parameter-overrides",
    f"Architecture={ARCHITECTURE} ApiKeySecretArn='' DatabaseSecretArn='' AllowHttp=true",
)


def show(text: str) -> None:
    """Print text for the person who runs the tests; fails if it contains a secret."""
    for secret in (API_KEY, PASSWORD):
        assert secret not in text, f"a secret is in the output: {text.replace(secret, '<secret>')}"
    print(text, flush=True)  # noqa: T201 (the output is part of the result)


class Shop:
    """A shop's database, and the monitor's user with only the rights it needs."""

    def __init__(self, shop: MySQLShop) -> None:
        self._shop = shop
        self.database = self.user = shop.database
        self.port = urlsplit(shop.server).port or 3306
        self.url = f"mysql://{self.user}:{PASSWORD}@{HOST}:{self.port}/{self.database}"
        for statement in mariadb.user_statements(self.database, self.user, PASSWORD):
            shop.run(statement)

    def close(self) -> None:
        self._shop.run(f"DROP USER {self.user}")

    @property
    def owner_url(self) -> str:
        """The URL for the tests' own queries."""
        return self._shop.url

    def add(self, sessions: Mapping[str, str], status: str = "open") -> None:
        """Add sessions, given as billing checkout ids by session id."""
        for session_id, checkout_id in sessions.items():
            self._shop.run(
                "INSERT INTO checkout_session (id, billing_checkout_id, status)"
                " VALUES (%s, %s, %s)",
                (session_id, checkout_id, status),
            )

    def rows(self, table: str) -> list[dict[str, Any]]:
        with (
            connect(self._shop.server, self._shop.database) as connection,
            connection.cursor(DictCursor) as cursor,
        ):
            cursor.execute(f"SELECT * FROM {table} ORDER BY 1")
            return list(cursor.fetchall())

    def show(self, when: str) -> None:
        for (table,) in self._shop.run("SHOW TABLES"):
            show(f"\n{when}: {table}\n{as_table(self.rows(table))}")


def as_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Format rows as aligned columns under their names."""
    if not rows:
        return "  (empty)"
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(["", *(text.ljust(width) for text, width in zip(line, widths, strict=True))])
        for line in lines
    )


@contextlib.contextmanager
def shop_on(server: str) -> Iterator[Shop]:
    with mysql_shop(server) as database:
        shop = Shop(database)
        try:
            yield shop
        finally:
            shop.close()


class Invocation(NamedTuple):
    """One `sam local invoke`: the handler's result, or its error as SAM prints it, and the log."""

    result: dict[str, Any]
    log: str


class Sam:
    """`sam local` on the output of `sam build`; everything that it prints is shown."""

    def __init__(self, package: Path, directory: Path, variables: Mapping[str, str]) -> None:
        self._log = directory / "start-api.log"
        settings = directory / "env.json"
        settings.write_text(json.dumps({"Parameters": dict(variables)}))
        self._arguments = [
            "--skip-pull-image",
            f"--template-file={package / 'template.yaml'}",
            f"--env-vars={settings}",
            f"--add-host={HOST}:host-gateway",
            *LOCAL,
        ]

    def invoke(self, function: str, event: str) -> Invocation:
        command = ["sam", "local", "invoke", function, "-e", f"events/{event}"]
        ran = run([*command, *self._arguments], shown=command)
        return Invocation(json.loads(ran.stdout), ran.stderr)

    @contextlib.contextmanager
    def api(self) -> Iterator[str]:
        """Serve the API; yields its URL. Containers are kept between requests, as on Lambda."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = ["sam", "local", "start-api", "--port", str(port), "--warm-containers", "LAZY"]
        show(f"\n$ {shlex.join(command)}")
        with self._log.open("w") as log:
            process = subprocess.Popen(
                # A shell's background programs ignore SIGINT, and SAM would inherit that.
                ["env", "--default-signal=INT", *command, *self._arguments],
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(lambda: is_listening(port, process), f"sam local start-api on port {port}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)  # SAM removes its containers
            try:
                process.wait(60)
            finally:
                process.kill()
                process.wait()
                show(self._log.read_text())


def build(directory: Path, *options: str) -> Path:
    """Run `make build`; returns the directory with the template and each function's directory."""
    command = [sys.executable, "-m", "local.package"]
    options = options or FOR_THIS_MACHINE
    run(
        [*command, "--no-cached", f"--build-dir={directory}", *options],
        shown=["make", "build", f"ARGS={' '.join(options)}"],
    )
    return directory


def run(
    command: Sequence[str], *, shown: Sequence[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command, show it with its output, and fail if it fails."""
    show(f"\n$ {shlex.join(shown or command)}")
    ran = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    show(ran.stderr + ran.stdout)
    assert ran.returncode == 0, f"{command[0]} failed with exit code {ran.returncode}"
    return ran


class Reply(NamedTuple):
    status: int
    body: dict[str, Any]


def curl(url: str, *arguments: str, api_key: str | None = None) -> Reply:
    command = ["curl", *arguments, url]
    silently = ["-sS", "-m", "120", "-w", "\n%{http_code}"]
    header = [] if api_key is None else ["-H", f"x-api-key: {api_key}"]
    shown = [*command, *(["-H", "x-api-key: …"] if api_key else [])]
    output = run([*command, *silently, *header], shown=shown)
    body, _, status = output.stdout.rpartition("\n")
    return Reply(int(status), json.loads(body))


def trigger(api: str, event: str, *, api_key: str | None = None) -> Reply:
    """Call the trigger with the body of a file in events/."""
    body = json.loads((EVENTS / event).read_text())["body"]
    data = () if body is None else ("-H", "Content-Type: application/json", "-d", body)
    return curl(f"{api}/api/test/checkout-sessions", "-X", "POST", *data, api_key=api_key)


def environment() -> dict[str, str]:
    """This process's environment without any AWS account."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
        "SAM_CLI_TELEMETRY": "0",
    }


@contextlib.contextmanager
def mariadb_container() -> Iterator[str]:
    """Run MariaDB in a container, for a machine with nothing but Docker; yields its URL."""
    password = secrets.token_hex(8)
    container = subprocess.run(
        shlex.split("docker run --detach --publish=3306 --env=MARIADB_ROOT_PASSWORD mariadb:lts"),
        env=os.environ | {"MARIADB_ROOT_PASSWORD": password},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    try:
        address = run(["docker", "port", container, "3306/tcp"]).stdout.splitlines()[0]
        server = f"mysql://root:{password}@127.0.0.1:{address.rpartition(':')[2]}/"
        wait_until(lambda: is_ready(server), "the database in its container")
        yield server
    finally:
        run(["docker", "rm", "--force", "--volumes", container])


def is_ready(server: str) -> bool:
    with contextlib.suppress(pymysql.OperationalError):
        connect(server).close()
        return True
    return False


def is_listening(port: int, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the process exited before it listened"
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"Not ready after {seconds:.0f} seconds: {what}")
        time.sleep(0.2)

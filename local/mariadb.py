"""A temporary MariaDB server, from the binaries installed on this machine."""

import contextlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pymysql

SCHEMA = Path(__file__).parent / "schema"
START_SECONDS = 60.0


def is_installed() -> bool:
    return shutil.which("mariadb-install-db") is not None


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def mariadb_server(directory: Path, *options: str) -> Iterator[str]:
    """Run a server on 127.0.0.1 until the block ends; yields its URL for root.

    `options` are passed to the server, e.g. `--ssl-cert=…`.

    Raises:
        RuntimeError: the server did not start; the message is its log.
    """
    data, log = directory / "data", directory / "log"
    port = free_port()
    user = ["--user=root"] if Path("/root").owner() == "root" else []
    with log.open("wb") as output:
        subprocess.run(  # noqa: S603
            [  # noqa: S607
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={data}",
                f"--tmpdir={directory}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
                *user,
            ],
            check=True,
            stdout=output,
            stderr=output,
        )
        server = subprocess.Popen(  # noqa: S603
            [
                shutil.which("mariadbd") or "/usr/sbin/mariadbd",
                "--no-defaults",
                "--skip-ssl",  # MariaDB 11.4 and later offer TLS by default
                f"--datadir={data}",
                # A server that starts removes temporary tables there, even those of others.
                f"--tmpdir={directory}",
                f"--port={port}",
                "--bind-address=127.0.0.1",
                f"--socket={directory}/s",
                f"--pid-file={directory}/pid",
                *user,
                *options,
            ],
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that Ctrl-C does not stop it before its clients
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _is_ready(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text(errors="replace"))
                time.sleep(0.1)
            yield f"mysql://root@127.0.0.1:{port}/"
        finally:
            server.terminate()
            server.wait()


def _is_ready(port: int) -> bool:
    with contextlib.suppress(pymysql.OperationalError):
        pymysql.connect(host="127.0.0.1", port=port, user="root").close()
        return True
    return False


def statements(script: Path) -> list[str]:
    """The statements of an SQL script, without its comments."""
    text = re.sub(r"--.*", "", script.read_text(encoding="utf-8"))
    return [statement.strip() for statement in text.split(";") if statement.strip()]


def user_statements(database: str, user: str, password: str) -> list[str]:
    """The statements of docs/deploy.md that create the monitor's user, for a given database."""
    return [
        statement.replace("shop.", f"{database}.")
        .replace("monitor@", f"{user}@")
        .replace("'…'", f"'{password}'")
        for statement in statements(SCHEMA / "user.sql")
    ]

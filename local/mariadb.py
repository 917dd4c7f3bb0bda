"""A MariaDB server of one's own, from the binaries of this machine."""

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


@contextlib.contextmanager
def mariadb_server(directory: Path, *options: str) -> Iterator[str]:
    """Run a server on 127.0.0.1 until the block ends; yields the URL of its root.

    `options` are more of the server's own, e.g. `--ssl-cert=…`.

    Raises:
        RuntimeError: it does not start; with what it says.
    """
    data, log = directory / "data", directory / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    user = ["--user=root"] if Path("/root").owner() == "root" else []
    with log.open("wb") as output:
        subprocess.run(  # noqa: S603
            [  # noqa: S607
                "mariadb-install-db",
                "--no-defaults",
                f"--datadir={data}",
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
                "--skip-ssl",  # MariaDB 11.4 and later would offer it by themselves
                f"--datadir={data}",
                f"--port={port}",
                "--bind-address=127.0.0.1",
                f"--socket={directory}/s",
                f"--pid-file={directory}/pid",
                *user,
                *options,
            ],
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us; it ends when we are done with it
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(port):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text(errors="replace"))
                time.sleep(0.1)
            yield f"mysql://root@127.0.0.1:{port}/"
        finally:
            server.terminate()
            server.wait()


def _answers(port: int) -> bool:
    with contextlib.suppress(pymysql.OperationalError):
        pymysql.connect(host="127.0.0.1", port=port, user="root").close()
        return True
    return False


def statements(script: Path) -> list[str]:
    """The statements of an SQL script, without its comments."""
    text = re.sub(r"--.*", "", script.read_text(encoding="utf-8"))
    return [statement.strip() for statement in text.split(";") if statement.strip()]


def user_statements(database: str, user: str, password: str) -> list[str]:
    """What makes the monitor's user of a database, as docs/deploy.md has it."""
    return [
        statement.replace("shop.", f"{database}.")
        .replace("monitor@", f"{user}@")
        .replace("'…'", f"'{password}'")
        for statement in statements(SCHEMA / "user.sql")
    ]

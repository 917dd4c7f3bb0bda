"""What the cluster's cases run on: two Galera nodes, and HAProxy in front of a database."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pymysql

from local.mariadb import free_port, mariadb_server
from testkit.shops import connect

GALERA = Path("/usr/lib/galera/libgalera_smm.so")
PACKAGES = {
    "mariadb-install-db": "mariadb-server",
    "rsync": "rsync",
    "haproxy": "haproxy",
    str(GALERA): "galera-4",
}
START_SECONDS = 60.0
# A dead node is noticed in a second instead of five.
PROVIDER_OPTIONS = (
    "gmcast.listen_addr=tcp://127.0.0.1:{group};ist.recv_addr=127.0.0.1:{increments};"
    "evs.keepalive_period=PT0.3S;evs.suspect_timeout=PT1S;evs.inactive_check_period=PT0.3S;"
    "evs.inactive_timeout=PT2S;gcache.size=32M"
)
HAPROXY = """\
global
  maxconn 200
defaults
  mode tcp
  timeout connect 2s
  timeout client {idle:g}s
  timeout server {idle:g}s
  retries 3
  option redispatch 1
listen database
  bind 127.0.0.1:{port}
{servers}
listen statistics
  bind 127.0.0.1:{statistics}
  mode http
  stats enable
  stats uri /
"""


def install() -> None:
    """Install Debian's packages of what is missing, or exit with one sentence."""
    missing = [p for name, p in PACKAGES.items() if not (shutil.which(name) or Path(name).exists())]
    if not missing:
        return
    if os.geteuid() or not shutil.which("apt-get"):
        sys.exit(f"❌ make cluster needs {', '.join(missing)}: apt-get install {' '.join(missing)}")
    print(f"installing {', '.join(missing)}", flush=True)
    for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        subprocess.run(["apt-get", "-qq", *command], check=True, stdout=subprocess.DEVNULL)


def wait_until_open(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(log.read_text("utf-8", "replace")[-3000:])


def _galera_options(name: str, group: int, peer: int | None) -> list[str]:
    provider = PROVIDER_OPTIONS.format(group=group, increments=free_port())
    return [
        "--wsrep-on=ON",
        f"--wsrep-provider={GALERA}",
        "--wsrep-cluster-name=shop",
        f"--wsrep-cluster-address=gcomm://{f'127.0.0.1:{peer}' if peer else ''}",
        f"--wsrep-node-name={name}",
        f"--wsrep-node-address=127.0.0.1:{group}",
        "--wsrep-sst-method=rsync",
        f"--wsrep-sst-receive-address=127.0.0.1:{free_port()}",
        f"--wsrep-provider-options={provider}",
        "--binlog-format=ROW",
        "--innodb-autoinc-lock-mode=2",
        "--innodb-flush-log-at-trx-commit=2",
    ]


class SecondNode:
    """The node that joins the first one, and that can be killed and started again."""

    def __init__(self, directory: Path, peer: int) -> None:
        self.port = free_port()
        self.url = f"mysql://root@127.0.0.1:{self.port}/"
        self._log = directory / "log"
        self._data = directory / "data"
        directory.mkdir()
        self._command = [
            shutil.which("mariadbd") or "/usr/sbin/mariadbd",
            "--no-defaults",
            "--skip-ssl",
            f"--datadir={self._data}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            f"--socket={directory}/s",
            f"--pid-file={directory}/pid",
            *(["--user=root"] if os.geteuid() == 0 else []),
            *_galera_options("second", free_port(), peer),
        ]

    def start(self) -> None:
        """Start it without any data: all of it comes from the first node."""
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir()
        if os.geteuid() == 0:  # the rsync that receives the data gives up root's rights
            shutil.chown(self._data, "nobody")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True
            )
        wait_until_open(self.port, self._process, self._log)
        wait_for_state(self.url, "wsrep_ready", "ON")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


class Cluster:
    """The two nodes. `urls` are their servers'."""

    def __init__(self, first: str, second: SecondNode) -> None:
        self.first = first
        self.second = second

    @property
    def urls(self) -> tuple[str, str]:
        return self.first, self.second.url

    def bootstrap(self) -> None:
        """Tell the first node, as an operator does, that it alone is the cluster now."""
        wait_for_state(self.first, "wsrep_cluster_status", "non-Primary")
        with connect(self.first) as connection, connection.cursor() as cursor:
            cursor.execute("SET GLOBAL wsrep_provider_options = 'pc.bootstrap=YES'")
        wait_for_state(self.first, "wsrep_ready", "ON")


def wait_for_state(server: str, name: str, value: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with (
            suppress(pymysql.MySQLError),
            connect(server) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SHOW GLOBAL STATUS LIKE %s", (name,))
            if cursor.fetchall() == ((name, value),):
                return
        time.sleep(0.1)
    raise RuntimeError(f"{name} of {server} did not become {value}")


@contextmanager
def galera(directory: Path) -> Iterator[Cluster]:
    """Run two nodes until the block ends."""
    group = free_port()
    with ExitStack() as stack:
        (directory / "first").mkdir()
        first = stack.enter_context(
            mariadb_server(directory / "first", *_galera_options("first", group, None))
        )
        second = SecondNode(directory / "second", group)
        second.start()
        stack.callback(second.end)
        yield Cluster(first, second)


class HAProxy:
    """The running proxy."""

    def __init__(self, port: int, statistics: int) -> None:
        self.url = f"mysql://root@127.0.0.1:{port}/"
        self._statistics = f"http://127.0.0.1:{statistics}/;csv"

    def connections(self) -> int:
        """How many connections it has accepted for the database until now."""
        head, *lines = httpx.get(self._statistics).text.removeprefix("# ").splitlines()
        names = head.split(",")
        rows = [dict(zip(names, line.split(","), strict=False)) for line in lines]
        [total] = [
            r["stot"] for r in rows if (r["pxname"], r["svname"]) == ("database", "FRONTEND")
        ]
        return int(total)


@contextmanager
def haproxy(directory: Path, servers: Sequence[str], *, idle: float) -> Iterator[HAProxy]:
    """Run it in front of the first of these servers; the others stand in when that one is away.

    It ends connections that nothing was sent on for `idle` seconds.
    """
    port, statistics = free_port(), free_port()
    lines = [
        f"  server s{number} 127.0.0.1:{urlsplit(url).port} check inter 200ms fall 1 rise 1"
        f"{' backup' if number else ''} on-marked-down shutdown-sessions"
        for number, url in enumerate(servers)
    ]
    file, log = directory / "haproxy.cfg", directory / "haproxy.log"
    file.write_text(
        HAPROXY.format(idle=idle, port=port, statistics=statistics, servers="\n".join(lines)),
        encoding="utf-8",
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            [shutil.which("haproxy") or "/usr/sbin/haproxy", "-db", "-f", str(file)],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_until_open(port, process, log)
        yield HAProxy(port, statistics)
    finally:
        process.terminate()
        process.wait()

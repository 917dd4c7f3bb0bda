"""nginx as the billing service that the clients are measured against.

It answers ten times as many requests as the fastest client here can send, so the figures are the
client's.
"""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx

NGINX_MODULE = Path("/usr/lib/nginx/modules/ngx_http_echo_module.so")
# How long billing takes, by the first part of its path. `hang` takes as long as a request may, so
# that nginx logs when the request ended.
DELAYS = {"at-once": 0.0, "50ms": 0.05, "100ms": 0.1, "800ms": 0.8, "hang": 10.0}
ANSWER = '{"status":"active"}'
# `make run` uses 3001 and 4000.
PORT, TLS_PORT, LOGGED_PORT = 4180, 4143, 4181

CONFIGURATION = """\
load_module {module};
daemon off;
pid {directory}/pid;
error_log {directory}/error.log warn;
# One process may not open as many files as the largest case has requests in flight.
worker_processes 2;
events {{ worker_connections {connections}; }}
http {{
  access_log off;
  default_type application/json;
  keepalive_requests 1000000000;
  keepalive_timeout 600s;
  client_body_temp_path {directory}/1;
  proxy_temp_path {directory}/2;
  fastcgi_temp_path {directory}/3;
  uwsgi_temp_path {directory}/4;
  scgi_temp_path {directory}/5;
  log_format checks '$msec $request_time $request_uri';
  ssl_certificate {directory}/server.pem;
  ssl_certificate_key {directory}/server.key;
  server {{
    listen 127.0.0.1:{port} backlog=65535 reuseport;
    listen 127.0.0.1:{tls_port} ssl backlog=65535 reuseport;
    location = /counters {{ stub_status; }}
    {locations}
  }}
  server {{
    listen 127.0.0.1:{logged_port} backlog=65535;
    access_log {directory}/checks.log checks buffer=64k flush=1s;
    {locations}
    location ~ _hang_ {{ echo_sleep {hang}; echo '{answer}'; }}
  }}
}}
"""


class Request(NamedTuple):
    """One request as billing saw it; times are seconds since 1970, to the millisecond."""

    began: float
    ended: float
    checkout_id: str


@dataclass(frozen=True, slots=True)
class Billing:
    """The running service. At each of its addresses every id gets status 200."""

    directory: Path

    def url(self, delay: str = "at-once", *, tls: bool = False, logged: bool = False) -> str:
        port = TLS_PORT if tls else LOGGED_PORT if logged else PORT
        return f"{'https' if tls else 'http'}://localhost:{port}/{delay}"

    @property
    def authority(self) -> Path:
        """The CA certificate for clients of the TLS address."""
        return self.directory / "ca.pem"

    def counters(self) -> tuple[int, int]:
        """Connections accepted and requests received so far, on the ports without a log."""
        with httpx.Client() as client:
            lines = client.get(f"http://127.0.0.1:{PORT}/counters").text.splitlines()
        accepted, _handled, requests = map(int, lines[2].split())
        return accepted, requests

    def requests(self) -> list[Request]:
        """The finished requests to the logged port, in the order in which they began."""
        self._await_log()
        lines = (self.directory / "checks.log").read_text(encoding="utf-8").splitlines()
        split = (line.split() for line in lines)
        return sorted(
            Request(float(ended) - float(took), float(ended), uri.rpartition("/")[2])
            for ended, took, uri in split
        )

    def forget_requests(self) -> None:
        self._await_log()
        (self.directory / "checks.log").write_text("", encoding="utf-8")

    @staticmethod
    def _await_log() -> None:
        time.sleep(1.5)  # it is flushed every second


@contextmanager
def billing_stub(directory: Path, connections: int) -> Iterator[Billing]:
    """Run nginx, for up to `connections` connections in each of its two processes."""
    _certificates(directory)
    configuration = directory / "nginx.conf"
    configuration.write_text(
        CONFIGURATION.format(
            module=NGINX_MODULE,
            directory=directory,
            connections=connections,
            port=PORT,
            tls_port=TLS_PORT,
            logged_port=LOGGED_PORT,
            locations="\n    ".join(_location(*delay) for delay in DELAYS.items()),
            hang=DELAYS["hang"],
            answer=ANSWER,
        ),
        encoding="utf-8",
    )
    command = ["nginx", "-p", str(directory), "-c", str(configuration)]
    with (directory / "output").open("wb") as output:
        nginx = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        billing = Billing(directory)
        for _ in range(100):
            try:
                billing.counters()
                break
            except httpx.TransportError:
                if nginx.poll() is not None:
                    raise RuntimeError((directory / "output").read_text()) from None
                time.sleep(0.05)
        yield billing
    finally:
        nginx.terminate()
        nginx.wait()


def _location(name: str, seconds: float) -> str:
    how = f"echo_sleep {seconds}; echo '{ANSWER}';" if seconds else f"return 200 '{ANSWER}';"
    return f"location /{name}/ {{ {how} }}"


def _certificates(directory: Path) -> None:
    """Make a CA, and a certificate for localhost that it signs."""
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    authority = [*new, "-subj", "/CN=bench", "-keyout", "ca.key", "-out", "ca.pem"]
    authority += ["-addext", "keyUsage=critical,keyCertSign"]
    server = [*new, "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.pem"]
    server += ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=CA:FALSE"]
    server += ["-addext", "subjectAltName=DNS:localhost"]
    for command in (authority, server):
        subprocess.run(command, cwd=directory, check=True, capture_output=True)

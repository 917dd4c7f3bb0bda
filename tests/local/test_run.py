"""`make run` as a newcomer runs it: a separate process, real ports, Ctrl-C."""

import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from testkit.queue import CLAIMED_UNTIL, OF_SESSIONS

ROOT = Path(__file__).parents[2]


class Monitor:
    """The running process and what it has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.printed: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def until(self, pattern: str) -> re.Match[str]:
        """Read up to the first line that matches."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.printed.append(line)
            if match := re.search(pattern, line):
                return match
        pytest.fail(f"exited without {pattern!r}:\n{''.join(self.printed)}")

    def interrupt(self) -> int:
        """Send Ctrl-C; returns the exit code."""
        self._process.send_signal(signal.SIGINT)
        return self.exit_code()

    def exit_code(self) -> int:
        rest, _ = self._process.communicate(timeout=10)
        self.printed.append(rest)
        return self._process.returncode


@contextmanager
def running(directory: Path, env: Mapping[str, str], *arguments: str) -> Iterator[Monitor]:
    process = subprocess.Popen(
        [sys.executable, "-m", "local", "--api-port", "0", "--billing-port", "0", *arguments],
        cwd=directory,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            "CHECK_INTERVAL_SECONDS": "1",
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield Monitor(process)
    finally:
        process.kill()
        process.communicate()


def request(url: str, method: str) -> tuple[int, dict[str, object]]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    try:
        connection.request(method, parts.path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_first_line_is_the_url_of_the_page(tmp_path: Path) -> None:
    with running(tmp_path, {"APIKEY": "k"}) as monitor:
        address = monitor.until(r"The monitor's page: (http://localhost:\d+)/$")[1]
        assert len(monitor.printed) == 1
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert "All times are UTC." in answer.read().decode()
        connection.close()


def test_sample_sessions_are_checked_at_every_tick_and_the_api_answers(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("APIKEY=from-dotenv\n", encoding="utf-8")
    with running(tmp_path, {}) as monitor:
        api = monitor.until(r"API: (http://\S+)/api/health")[1]
        monitor.until(r"Checking 11 open checkout sessions\.\.\.")
        monitor.until("✅ Success: Checkout session cart-1001 .* is still active")
        monitor.until("Checking 11 open checkout sessions")
        status, health = request(f"{api}/api/health", "GET")
        assert (status, health["status"]) == (200, "ok")
        status, trigger = request(f"{api}/api/test/checkout-sessions", "POST")
        assert status == 200
        assert re.match(r"Checked \d+ of 11 open checkout sessions", str(trigger["message"]))
        assert request(f"{api}/api/nothing", "GET")[0] == 404
        assert monitor.interrupt() == 0
    connection = sqlite3.connect(tmp_path / ".local" / "checkout.db")
    ticks = [
        tick
        for (tick,) in connection.execute(
            "SELECT tick FROM checkout_session_run WHERE reason = 'tick' ORDER BY tick"
        )
    ]
    [(claimed,)] = connection.execute(f"SELECT COUNT({CLAIMED_UNTIL}) {OF_SESSIONS}")
    connection.close()
    assert len(ticks) == len(set(ticks)) > 0
    assert all(tick.endswith(".000Z") for tick in ticks)
    assert claimed == 0
    assert "from-dotenv" not in "".join(monitor.printed)


def test_missing_api_key_is_a_warning(tmp_path: Path) -> None:
    with running(tmp_path, {}) as monitor:
        api = monitor.until(r"API: (http://\S+)/api/health")[1]
        monitor.until("⚠️ APIKEY not found in environment variables")
        status, health = request(f"{api}/api/health", "GET")
        assert (status, health["status"]) == (503, "degraded")
        assert monitor.interrupt() == 0


def test_port_in_use_is_reported_without_a_traceback(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option in ("--api-port", "--billing-port"):
            with running(tmp_path, {}, option, str(port)) as monitor:
                monitor.until(rf"^❌ Port {port} is in use by another program\. .*{option}")
                assert monitor.exit_code() == 1
            assert "Traceback" not in "".join(monitor.printed)


def test_wrong_setting_is_reported_without_a_traceback(tmp_path: Path) -> None:
    with running(tmp_path, {"CHECK_CADENCE": "5x"}) as monitor:
        monitor.until(r"^❌ CHECK_CADENCE is '5x': .*; it must be a number with s, m, h or d")
        assert monitor.exit_code() == 1
    assert "Traceback" not in "".join(monitor.printed)


def test_a_dotenv_that_is_not_utf8_is_reported_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("APIKEY=x\n", encoding="utf-16")
    with running(tmp_path, {}) as monitor:
        assert monitor.exit_code() == 1
    assert monitor.printed == ["❌ .env is not text in UTF-8; save it as UTF-8.\n"]


@pytest.mark.parametrize(
    ("env", "arguments"), [({"STATUS_UPDATES": "true"}, ()), ({}, ("--service", "stripe"))]
)
def test_simulated_answers_close_no_session_of_a_shop(
    tmp_path: Path, env: dict[str, str], arguments: tuple[str, ...]
) -> None:
    shop = {"DATABASE_URL": "mysql://user:secret@127.0.0.1:1/shop"}
    with running(tmp_path, shop | env, *arguments) as monitor:
        assert monitor.exit_code() == 1
    assert "Billing is simulated, and with STATUS_UPDATES its answers would" in monitor.printed[-1]


def test_unreachable_database_is_one_line_per_tick_and_no_crash(tmp_path: Path) -> None:
    env = {"DATABASE_URL": "mysql://shop:hidden-pass@127.0.0.1:1/shop", "APIKEY": "hidden-key"}
    with running(tmp_path, {**env, "DEBUG": "true"}) as monitor:
        for _ in range(2):
            monitor.until(r"^❌ The database 127\.0\.0\.1:1/shop cannot be used: Can't connect")
        assert monitor.interrupt() == 0
    output = "".join(monitor.printed)
    assert "Traceback" not in output
    assert "hidden" not in output

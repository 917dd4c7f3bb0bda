"""The end of `make run`: promptly, without a traceback, with every claim given back."""

import os
import queue
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from core.domain.model import Reason
from core.domain.summary import Summary
from core.errors import StoreError
from core.settings import Settings
from local import workers
from local.workers import Workers
from testkit.clock import NOON
from testkit.queue import CLAIMED_UNTIL, OF_SESSIONS
from testkit.shops import SQLiteShop, add_sessions, numbered, statements
from tests.local.test_run import ROOT, request, running

SESSIONS = 5
TIMEOUT = 20.0  # seconds until a waiting test fails


class HangingBilling(ThreadingHTTPServer):
    """Answers at once, except for the ids of `hang`, which wait until the server closes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hanging = queue.Queue[str]()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/paysession"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HangingBilling

    def do_GET(self) -> None:
        if "hang" in self.path:
            self.server.hanging.put(self.path)
            self.server.closing.wait(TIMEOUT)
            self.close_connection = True
            return
        body = b'{"status": "open"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def billing() -> Iterator[HangingBilling]:
    with HangingBilling() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def shop_at(directory: Path, word: str) -> SQLiteShop:
    (directory / ".local").mkdir()
    shop = SQLiteShop(directory / ".local" / "checkout.db")
    for statement in statements("sqlite"):
        shop.run(statement)
    add_sessions(shop, numbered(SESSIONS, word))
    return shop


def claims(directory: Path) -> int:
    connection = sqlite3.connect(directory / ".local" / "checkout.db")
    [(found,)] = connection.execute(f"SELECT COUNT({CLAIMED_UNTIL}) {OF_SESSIONS}")
    connection.close()
    return int(found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_manual_pass_that_waits_for_billing(
    tmp_path: Path, billing: HangingBilling, number: signal.Signals
) -> None:
    shop = shop_at(tmp_path, "active")
    env = {"APIKEY": "k", "BILLING_API_URL": billing.url, "CHECK_CADENCE": "1h"}
    with (
        ThreadPoolExecutor(1) as pool,
        running(tmp_path, {**env, "REQUEST_TIMEOUT_SECONDS": "20"}) as monitor,
    ):
        api = monitor.until(r"API: (http://\S+)/api/health")[1]
        monitor.until(r"check complete: 5 success")  # from here on no tick has anything to check
        shop.run("UPDATE checkout_session SET billing_checkout_id = 'hang_' || id")
        asked = pool.submit(request, f"{api}/api/test/checkout-sessions", "POST")
        for _ in range(SESSIONS):
            billing.hanging.get(timeout=TIMEOUT)
        assert claims(tmp_path) == SESSIONS
        os.kill(monitor.pid, number)
        assert monitor.exit_code() == 0  # within ten seconds
        status, answer = asked.result(TIMEOUT)
    assert (status, answer["message"]) == (503, "The monitor is stopping.")
    assert claims(tmp_path) == 0
    output = "".join(monitor.printed)
    assert "Traceback" not in output
    assert "ERROR" not in output


def test_ctrl_c_cuts_off_a_client_that_still_sends_its_request(tmp_path: Path) -> None:
    with running(tmp_path, {"APIKEY": "k"}) as monitor:
        api = monitor.until(r"API: (http://\S+)/api/health")[1]
        address = urlsplit(api)
        assert address.hostname is not None
        with socket.create_connection((address.hostname, address.port or 0), TIMEOUT) as client:
            client.sendall(
                b"POST /api/test/checkout-sessions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n"
            )
            assert client.recv(4096).startswith(b"HTTP/1.1 100 ")  # it waits for the body
            assert monitor.interrupt() == 0
    assert "Traceback" not in "".join(monitor.printed)


@pytest.mark.parametrize("lines", [0, 1, 3, 8])
def test_closed_pipe_ends_the_program_quietly(tmp_path: Path, lines: int) -> None:
    """As `make run | head -3` does; it does not wait for the next line to find out."""
    shop_at(tmp_path, "active")
    interval = "1" if lines >= 8 else "60"
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "local", "--api-port", "0", "--billing-port", "0"],
        cwd=tmp_path,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
            "CHECK_INTERVAL_SECONDS": interval,
            "APIKEY": "k",
        },
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as output:
            for _ in range(lines):
                assert output.readline()
        _, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, errors) == (0, b"")
    if lines >= 8:  # a pass has begun
        assert claims(tmp_path) == 0


class FakeWorker:
    """A worker whose manual pass lasts until it is stopped for the second time."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.closed = False
        self._stopped = threading.Semaphore(0)

    def trigger_checkout_session_check(self, session_ids: object = None) -> Summary:
        self.begun.set()
        for _ in range(2):
            assert self._stopped.acquire(timeout=TIMEOUT)
        return Summary(Reason.MANUAL, NOON)

    def stop(self) -> None:
        self._stopped.release()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeWorker:
    worker = FakeWorker()
    monkeypatch.setattr(workers, "Worker", lambda *_, **__: worker)
    return worker


@pytest.fixture
def pool(fake: FakeWorker) -> Iterator[Workers]:
    pool = Workers(Settings.from_env({"DATABASE_URL": "sqlite:////nowhere"}), 1)
    yield pool
    pool.close()


def test_waiting_call_is_answered_before_its_pass_has_ended(
    fake: FakeWorker, pool: Workers
) -> None:
    with ThreadPoolExecutor(2) as callers:
        calls = [callers.submit(pool.trigger_checkout_session_check) for _ in range(2)]
        assert fake.begun.wait(TIMEOUT)
        pool.stop()
        for call in calls:  # one has the only worker, and the other one waits for it
            with pytest.raises(StoreError, match="stopping"):
                call.result(TIMEOUT)
    assert not fake.closed


def test_pass_that_began_while_the_monitor_stopped_is_stopped_again(
    fake: FakeWorker, pool: Workers
) -> None:
    with ThreadPoolExecutor(1) as callers:
        call = callers.submit(pool.trigger_checkout_session_check)
        assert fake.begun.wait(TIMEOUT)
        pool.close()
        assert isinstance(call.exception(TIMEOUT), StoreError)
    assert fake.closed


def test_nothing_starts_once_the_monitor_stops(fake: FakeWorker, pool: Workers) -> None:
    pool.stop()
    pool.start_check(NOON)
    for call in (pool.health, pool.status, pool.trigger_checkout_session_check):
        with pytest.raises(StoreError, match="stopping"):
            call()
    assert not fake.begun.is_set()

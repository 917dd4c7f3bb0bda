"""`make trigger`, against the API of `make run` and against other servers."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from core.domain.model import Outcome, Reason, Skip
from core.domain.summary import Summary
from core.errors import SettingsError, StoreError
from core.store.health import Health
from local import trigger
from local.api import running_api
from testkit.clock import NOON

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}


class FakeMonitor:
    """Checks two of three sessions, or raises the given error."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def health(self) -> Health:
        return Health({}, NOON, None)

    def status(self) -> dict[str, object]:
        return {}

    def find_sessions(self, text: str) -> dict[str, object]:
        raise NotImplementedError

    def sessions_of(self, outcome: str, after: int) -> dict[str, object]:
        raise NotImplementedError

    def trigger_checkout_session_check(self, session_ids: Sequence[str] | None = None) -> Summary:
        if self._error is not None:
            raise self._error
        return Summary(
            Reason.MANUAL,
            NOON,
            open=3,
            outcomes=Counter({Outcome.ACTIVE: 1, Outcome.TIMEOUT: 1}),
            skipped=Counter({Skip.IN_FLIGHT: 1}),
        )


class OtherServer(BaseHTTPRequestHandler):
    """Answers every POST with the status in its path and with `body`."""

    body: bytes
    api_keys: list[str | None]

    def do_POST(self) -> None:
        self.api_keys.append(self.headers["x-api-key"])
        self.send_response(int(self.path.removeprefix("/")))
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def other_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that is not the monitor."""
    monkeypatch.setattr(OtherServer, "body", b"{}", raising=False)
    monkeypatch.setattr(OtherServer, "api_keys", [], raising=False)
    with HTTPServer(("127.0.0.1", 0), OtherServer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def refused() -> Iterator[str]:
    """A URL whose port is bound but refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/x"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Run":
    return Run(monkeypatch, capsys)


class Run:
    """Runs the program in this process; returns its exit code and its output by lines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, url: str, *arguments: str) -> tuple[int, list[str]]:
        self._monkeypatch.setattr(sys, "argv", ["trigger", "--url", url, *arguments])
        code = trigger.main()
        return code, self._capsys.readouterr().out.splitlines()


def route(port: int) -> str:
    return f"http://127.0.0.1:{port}/api/test/checkout-sessions"


def test_result_is_printed_with_its_summary(run: Run) -> None:
    with running_api(0, FakeMonitor) as port:
        code, [line, *summary] = run(route(port))
    assert code == 0
    assert line == "✅ 200 Checked 2 of 3 open checkout sessions; skipped: 1 in_flight."
    assert len(summary) > 10
    assert json.loads("\n".join(summary))["outcomes"] == {"active": 1, "timeout": 1}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (StoreError("The database is away."), "❌ 503 The database is away."),
        (SettingsError("DEBUG is 'yes'."), "❌ 500 DEBUG is 'yes'."),
    ],
)
def test_monitor_that_cannot_check_says_why(run: Run, error: Exception, line: str) -> None:
    with running_api(0, lambda: FakeMonitor(error)) as port:
        assert run(route(port)) == (1, [line])


def test_without_a_monitor_the_output_says_how_to_start_one(run: Run, refused: str) -> None:
    code, [line] = run(refused)
    assert code == 1
    assert line.startswith(f"❌ No answer from {refused}: ")
    assert "Connection refused" in line
    assert line.endswith(". Is the monitor running (make run)?")


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "localhost:3001/x",
        "http://",
        "http://localhost:port",
        "ftp://localhost/x",
        f"http://{'a' * 64}.example/x",
    ],
)
def test_invalid_url_is_refused_on_one_line(run: Run, url: str) -> None:
    code, [line] = run(url)
    assert code == 1
    assert line.startswith(f"❌ No answer from {url}: ")
    assert ".." not in line


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (200, "not JSON", "❌ 200 not JSON"),
        (502, "Bad Gateway", "❌ 502 Bad Gateway"),
        (403, '{"message": "Forbidden"}', "❌ 403 Forbidden"),
        (500, '{"success": true, "message": "odd"}', "❌ 500 odd"),
        (200, '{"success": false, "message": "odd"}', "❌ 200 odd"),
        (200, '{"success": "true", "message": "odd"}', "❌ 200 odd"),
        (302, "Found", "❌ 302 Found"),
        (200, "[]", "❌ 200 []"),
        (200, "null", "❌ 200 null"),
        (200, "<html>\n<p>Hello</p>", "❌ 200 <html> <p>Hello</p>"),
    ],
)
def test_any_other_answer_is_shown_as_a_failure(
    run: Run, other_server: str, status: int, body: str, line: str
) -> None:
    OtherServer.body = body.encode()
    assert run(f"{other_server}/{status}") == (1, [line])


def test_api_key_is_sent_and_not_shown(run: Run, other_server: str) -> None:
    OtherServer.body = b'{"success": true, "message": "done"}'
    url = f"{other_server}/200"
    assert [run(url), run(url, "--api-key", "hidden")] == [(0, ["✅ 200 done"])] * 2
    assert OtherServer.api_keys == [None, "hidden"]


@pytest.mark.parametrize("key", ["hiddé", "hidden\nkey", "hidden key"])
def test_key_that_no_header_can_carry_is_refused_but_not_shown(
    run: Run, other_server: str, key: str
) -> None:
    code, [line] = run(f"{other_server}/200", "--api-key", key)
    assert code == 1
    assert line.startswith(
        "❌ --api-key contains a space, a control character or a character outside"
    )
    assert "hidd" not in line
    assert not OtherServer.api_keys


def test_program_exits_with_the_same_code(other_server: str, refused: str) -> None:
    OtherServer.body = b'{"success": true}'
    for url, code in ((f"{other_server}/200", 0), (refused, 1)):
        program = [sys.executable, "-m", "local.trigger", "--url", url]
        ran = subprocess.run(program, env=ENVIRONMENT, capture_output=True, check=False)
        assert (ran.returncode, ran.stderr) == (code, b"")

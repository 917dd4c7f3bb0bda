"""A real browser with the real page, served by a stand-in for an API Gateway stage."""

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from aws_lambda_powertools.event_handler import APIGatewayRestResolver
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from core.database.port import Database
from core.domain.model import JsonObject, Outcome, Reason, Skip
from core.domain.summary import Summary
from core.errors import StoreError
from core.settings import Settings
from core.store.health import Health
from core.store.session_search import find_sessions, sessions_of
from core.store.status_report import read_status
from core.worker import open_database
from handlers.routes import OPENAPI, add_routes
from testkit.clock import FakeClock
from testkit.history import History
from testkit.shops import SQLiteShop, statements
from tests.support import event

SCREENSHOTS = Path(__file__).parents[2] / ".screenshots"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Debian's, or what GitHub's machines have.
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NO_CHROMIUM = "no Chromium: apt-get install chromium"
DASHBOARD = "https://console.aws.amazon.com/cloudwatch/home?region=r#dashboards/dashboard/s-r"
SECURED = json.loads(OPENAPI.read_text(encoding="utf-8"))["paths"]


class Monitor:
    """Reports what a history's tables hold at its time; a trigger returns a fixed summary."""

    def __init__(self, history: History, **env: str) -> None:
        self.history = history
        self.error: str | None = None
        self.waiting: JsonObject | None = None
        self.answers = threading.Event()  # cleared: it does not answer
        self.answers.set()
        self._env = env

    def health(self) -> Health:
        return Health({}, self.history.now, None)

    def status(self) -> JsonObject:
        self.answers.wait()
        found = self._read(read_status)
        return found | {"waiting": self.waiting} if self.waiting else found

    def find_sessions(self, text: str) -> JsonObject:
        return self._read(lambda database, _settings: find_sessions(database, text))

    def sessions_of(self, outcome: str, after: int) -> JsonObject:
        return self._read(lambda database, _settings: sessions_of(database, outcome, after))

    def _read(self, read: Callable[[Database, Settings], JsonObject]) -> JsonObject:
        if self.error is not None:
            raise StoreError(self.error)
        settings = self.history.settings(**self._env)
        database = open_database(settings, clock=FakeClock(self.history.now))
        try:
            return read(database, settings)
        finally:
            database.close()

    def trigger_checkout_session_check(self, session_ids: Sequence[str] | None = None) -> Summary:
        return Summary(
            Reason.MANUAL,
            self.history.now,
            open=9,
            outcomes=Counter({Outcome.ACTIVE: 7, Outcome.UNEXPECTED_STATUS: 1}),
            skipped=Counter({Skip.IN_FLIGHT: 1}),
        )


class Stage:
    """Serves the Lambda function's routes as API Gateway does: below /live, some with a key."""

    def __init__(self, monitor: Monitor, key: str | None) -> None:
        self.key = key
        self.is_up = True
        self._app = APIGatewayRestResolver()
        add_routes(self._app, lambda: monitor, dashboard=lambda: DASHBOARD)

    def answer(self, method: str, target: str, headers: Any, body: str) -> dict[str, Any]:  # noqa: ANN401
        url = urlsplit(target)
        path = url.path.removeprefix("/live") or "/"
        operation = SECURED.get(path, {}).get(method.lower())
        if operation is None:
            return _refused("Missing Authentication Token")
        public = operation.get("security") == []
        if self.key is not None and not public and headers["x-api-key"] != self.key:
            return _refused("Forbidden")
        request = {
            **event("health"),
            "httpMethod": method,
            "path": path,
            "body": body,
            "queryStringParameters": dict(parse_qsl(url.query)),
        }
        return self._app.resolve(request, SimpleNamespace())  # type: ignore[arg-type]


@contextmanager
def serving(stage: Stage) -> Iterator[str]:
    """Serve the stage on a free port; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
            if not stage.is_up:
                self.close_connection = True
                return
            answer = stage.answer(self.command, self.path, self.headers, body)
            content = answer["body"].encode()
            self.send_response(answer["statusCode"])
            for name, values in answer["multiValueHeaders"].items():
                for value in values:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def _refused(message: str) -> dict[str, Any]:
    return {
        "statusCode": 403,
        "multiValueHeaders": {"Content-Type": ["application/json"]},
        "body": json.dumps({"success": False, "message": message}),
    }


@dataclass
class View:
    """The page in the browser, with its requests and console output."""

    page: Page
    stage: Stage
    monitor: Monitor
    url: str
    requests: list[Request] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    @property
    def history(self) -> History:
        return self.monitor.history

    def open(self, path: str = "/live/") -> None:
        self.page.goto(f"{self.url}{path}")

    def expect_verdict(self, text: str, level: str) -> None:
        expect(self.page.get_by_label("Verdict").get_by_role("status").first).to_have_text(text)
        expect(self.page.locator("#verdict")).to_have_class(f"panel {level}")

    def capture(self, name: str) -> None:
        capture(self.page, name)


def capture(page: Page, name: str) -> None:
    """Save a screenshot for people to look at, and assert that axe finds no violation."""
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail(NO_CHROMIUM)
        pytest.skip(NO_CHROMIUM)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def context(browser: Browser, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    """A fresh browser profile, with the options of the test's marker `browser_options`."""
    marker = request.node.get_closest_marker("browser_options")
    options = {"viewport": {"width": 1120, "height": 900}, **(marker.kwargs if marker else {})}
    opened = browser.new_context(**options)
    yield opened
    opened.close()


@pytest.fixture
def history(tmp_path: Path) -> History:
    shop = SQLiteShop(tmp_path / "shop.db")
    for statement in statements("sqlite"):
        shop.run(statement)
    return History(shop)


@pytest.fixture
def view(
    context: BrowserContext, history: History, request: pytest.FixtureRequest
) -> Iterator[View]:
    """The page, not opened yet. Asserts at the end: no console error, no request to other hosts."""
    marker = request.node.get_closest_marker("deployed")
    deployed = marker.kwargs if marker else {}
    monitor = Monitor(history, **deployed.get("env", {}))
    stage = Stage(monitor, deployed.get("key"))

    with serving(stage) as url:
        view = View(context.new_page(), stage, monitor, url)

        def requested(request: Request) -> None:
            view.requests.append(request)

        view.page.on("request", requested)
        view.page.on(
            "console", lambda message: view.console.append(f"{message.type}: {message.text}")
        )
        view.page.on("pageerror", lambda error: view.console.append(f"error: {error}"))
        yield view
        view.page.close()
    other_hosts = {r.url for r in view.requests if not r.url.startswith((url, "data:"))}
    errors = [line for line in view.console if line.startswith(("error", "warning"))]
    assert other_hosts == set()
    expected = request.node.get_closest_marker("console_errors")
    if expected is None:
        assert errors == []

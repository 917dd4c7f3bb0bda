"""Requests of other sites' pages to the servers of this machine, over real sockets."""

import http.client
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from core.domain.model import Reason
from core.domain.summary import Summary
from core.store.health import Health
from local.api import running_api
from local.billing import BY_ID, SimulatedBilling, running_billing
from testkit.clock import NOON

TRIGGER = "/api/test/checkout-sessions"
SESSION = "/billing/api/v1/paysession/checkout_active_1"
READS = ["/", "/api/status", "/api/health", "/api/openapi.json", "/simulate"]

# Host headers, with PORT in place of the server's port.
OUR_HOSTS = [
    "localhost:PORT", "127.0.0.1:PORT", "[::1]:PORT", "LocalHost:PORT", "localhost", "127.0.0.1",
    "[::1]", "localhost:1", "localhost:",
]  # fmt: skip
OTHER_HOSTS = [
    "evil.example", "evil.example:PORT", "localhost.evil.example", "localhost.evil.example:PORT",
    "evil.localhost.example", "notlocalhost", "127.0.0.1.evil.example",
    "127.0.0.1:PORT.evil.example", "evil@localhost", "localhost@evil.example:PORT", "localhost#",
    "localhost/evil.example", "localhost, evil.example", "localhost evil.example",
    "[::1].evil.example", "[::1", "::1", "192.0.2.1", "10.0.0.1:PORT", "[2001:db8::1]:PORT",
    "localhost:PORT:PORT", "localhost:x", "", ":PORT",
]  # fmt: skip
OUR_ORIGINS = [
    None, "http://localhost:PORT", "http://127.0.0.1:PORT", "http://[::1]:PORT", "http://localhost",
    "https://localhost:8443", "HTTP://LOCALHOST:PORT",
]  # fmt: skip
OTHER_ORIGINS = [
    "https://evil.example", "http://evil.example:PORT", "http://localhost.evil.example",
    "http://localhost:PORT.evil.example", "http://localhost@evil.example", "http://evil.example/localhost",
    "http://127.0.0.1.evil.example:PORT", "null", "", "localhost", "file://", "file://localhost",
    "chrome-extension://abcdefgh", "ftp://localhost", "http://192.0.2.1:PORT", "http://localhost/",
    "http://localhost, http://evil.example",
]  # fmt: skip


class FakeMonitor:
    """Counts the calls that a request made."""

    def __init__(self) -> None:
        self.calls = 0

    def health(self) -> Health:
        self.calls += 1
        return Health({}, NOON, None)

    def status(self) -> dict[str, object]:
        self.calls += 1
        return {}

    def find_sessions(self, text: str) -> dict[str, object]:
        raise NotImplementedError

    def sessions_of(self, outcome: str, after: int) -> dict[str, object]:
        raise NotImplementedError

    def trigger_checkout_session_check(self, session_ids: Sequence[str] | None = None) -> Summary:
        self.calls += 1
        return Summary(Reason.MANUAL, NOON)


class Server:
    """A server's address, and what is behind it."""

    def __init__(
        self, port: int, billing: SimulatedBilling, monitor: FakeMonitor | None = None
    ) -> None:
        self.port = port
        self.billing = billing
        self.monitor = monitor or FakeMonitor()

    def ask(
        self,
        method: str,
        path: str,
        *,
        host: str = "localhost:PORT",
        origin: str | None = None,
        body: str = "",
        address: str = "127.0.0.1",
    ) -> tuple[int, Any]:
        """The status and the JSON of the answer (an empty object for another kind of body)."""
        connection = http.client.HTTPConnection(address, self.port, timeout=20)
        headers = {"Host": host, "x-api-key": "k"} | ({} if origin is None else {"Origin": origin})
        headers = {name: value.replace("PORT", str(self.port)) for name, value in headers.items()}
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            text = answer.read()
            is_json = (answer.getheader("Content-Type") or "").startswith("application/json")
            return answer.status, json.loads(text) if is_json else {}
        finally:
            connection.close()


@pytest.fixture(scope="module")
def api() -> Iterator[Server]:
    """The API of `make run`."""
    monitor, billing = FakeMonitor(), SimulatedBilling()
    with running_api(0, lambda: monitor, billing) as port:
        yield Server(port, billing, monitor)


@pytest.fixture(scope="module")
def service() -> Iterator[Server]:
    """The simulated billing service as `make run` starts it."""
    with running_billing() as billing:
        yield Server(port_of(billing), billing)


@pytest.fixture(scope="module")
def open_service() -> Iterator[Server]:
    """The simulated billing service as containers reach it, on every address of this machine."""
    with running_billing(host="0.0.0.0") as billing:
        yield Server(port_of(billing), billing)


@pytest.fixture(params=["api", "service", "open_service"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each server that has /simulate."""
    found: Server = request.getfixturevalue(request.param)
    found.billing.simulate(BY_ID)
    found.monitor.calls = 0
    return found


def port_of(billing: SimulatedBilling) -> int:
    return int(billing.url.split(":")[2].partition("/")[0])


@pytest.mark.parametrize("host", OUR_HOSTS)
def test_host_that_names_this_machine_is_answered(server: Server, host: str) -> None:
    assert server.ask("GET", "/simulate", host=host)[0] == 200
    assert server.ask("POST", "/simulate", host=host, body="failing")[0] == 200
    assert server.billing.mode == "failing"


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_host_of_another_name_is_refused(server: Server, host: str) -> None:
    for method in ("GET", "POST"):
        status, answer = server.ask(method, "/simulate", host=host, body="failing")
        assert status == 403
        sentence = answer.get("message") or answer["error"]
        assert sentence.startswith("The request's Host header does not name this machine; use")
    assert server.billing.mode == BY_ID


@pytest.mark.parametrize("origin", OUR_ORIGINS)
def test_page_of_this_machine_may_change_the_mode(server: Server, origin: str | None) -> None:
    assert server.ask("POST", "/simulate", origin=origin, body="failing")[0] == 200
    assert server.billing.mode == "failing"


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_page_of_another_site_may_not_change_the_mode(server: Server, origin: str) -> None:
    status, answer = server.ask("POST", "/simulate", origin=origin, body="failing")
    assert status == 403
    sentence = answer.get("message") or answer["error"]
    assert sentence.startswith("The request's Origin header names another site")
    assert server.billing.mode == BY_ID


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:PORT", "192.0.2.1"])
@pytest.mark.parametrize("path", READS)
def test_rebound_name_reads_nothing_from_the_api(api: Server, path: str, host: str) -> None:
    api.monitor.calls = 0
    assert api.ask("GET", path)[0] == 200
    calls = api.monitor.calls
    status, answer = api.ask("GET", path, host=host)
    assert (status, answer["success"]) == (403, False)
    assert sorted(answer) == ["message", "success", "timestamp"]
    assert api.monitor.calls == calls


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_page_of_another_site_cannot_start_a_pass(api: Server, origin: str) -> None:
    api.monitor.calls = 0
    status, answer = api.ask("POST", TRIGGER, origin=origin)
    assert (status, answer["success"]) == (403, False)
    assert api.monitor.calls == 0
    assert api.ask("POST", TRIGGER, origin="http://localhost:PORT")[0] == 200
    assert api.monitor.calls == 1


def test_read_with_a_foreign_origin_is_answered(api: Server) -> None:
    """The browser keeps the answer from the other site's page."""
    assert api.ask("GET", "/api/status", origin="https://evil.example")[0] == 200


@pytest.mark.parametrize("host", ["host.docker.internal:PORT", "172.17.0.1:PORT", "billing", "x"])
def test_containers_may_ask_about_sessions_by_any_name(open_service: Server, host: str) -> None:
    open_service.billing.simulate(BY_ID)
    assert open_service.ask("GET", SESSION, host=host) == (
        200,
        {"id": "checkout_active_1", "status": "open"},
    )


def test_address_that_was_reached_names_this_machine(open_service: Server) -> None:
    """As a container does that changes the mode by the bridge's address."""
    for address, host, status in (
        ("127.0.0.2", "127.0.0.2:PORT", 200),
        ("127.0.0.2", "127.0.0.3:PORT", 403),
        ("127.0.0.1", "0.0.0.0:PORT", 200),  # what the user named
    ):
        for method in ("GET", "POST"):
            asked = open_service.ask(method, "/simulate", host=host, body=BY_ID, address=address)
            assert asked[0] == status

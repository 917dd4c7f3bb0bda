"""The simulated billing service, over real sockets."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest

from local.billing import SimulatedBilling, running_billing

ROOT = Path(__file__).parents[2]
KEY = "a-key-nobody-may-see"
LONG = 3600.0  # a pause longer than any test
TIMEOUT = 20.0  # seconds until a waiting test fails


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def billing(clock: Clock) -> Iterator[SimulatedBilling]:
    with running_billing(clock=clock, pause_seconds=0.001) as billing:
        yield billing


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(headers={"x-api-key": KEY}, timeout=TIMEOUT, trust_env=False) as client:
        yield client


def session_url(billing: SimulatedBilling, checkout_id: str) -> str:
    return f"{billing.url}/{quote(checkout_id, safe='')}"


def port_of(billing: SimulatedBilling) -> int:
    return urlsplit(billing.url).port or 0


def connect(billing: SimulatedBilling) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(billing)), timeout=TIMEOUT)


def request(checkout_id: str, *headers: str, version: str = "1.1") -> bytes:
    line = f"GET /billing/api/v1/paysession/{checkout_id} HTTP/{version}"
    return "\r\n".join([line, "Host: x", f"x-api-key: {KEY}", *headers, "", ""]).encode()


def read_all(connected: socket.socket) -> bytes:
    """Read until the service closes the connection."""
    received = b""
    while chunk := connected.recv(65536):
        received += chunk
    return received


@pytest.mark.parametrize(
    "checkout_id",
    ["checkout_active_1", "active", "checkout_xyz789", "checkout_", "cs_1", "checkout_200_1",
     "checkout_100_1", "checkout_600_1", "checkout_4040_1", "checkout_paidup_1", "x_hang"],
)  # fmt: skip
def test_session_is_open_unless_its_id_says_otherwise(
    billing: SimulatedBilling, client: httpx.Client, checkout_id: str
) -> None:
    answer = client.get(session_url(billing, checkout_id))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"id": checkout_id, "status": "open"}
    assert billing.requests == {checkout_id: 1}


@pytest.mark.parametrize("status", [201, 204, 299, 304, 307, 401, 403, 404, 410, 418, 500, 599])
def test_status_code_in_id_is_answered_on_a_reusable_connection(
    billing: SimulatedBilling, client: httpx.Client, status: int
) -> None:
    for _ in range(2):
        answer = client.get(session_url(billing, f"checkout_{status}_2"))
        assert answer.status_code == status
        assert "retry-after" not in answer.headers
    assert billing.connections == 1


@pytest.mark.parametrize(
    ("word", "status", "retry_after"),
    [("429", 429, "30"), ("503", 503, "30"), ("ratelimited", 429, None)],
)
def test_rate_limits_with_and_without_retry_after(
    billing: SimulatedBilling, client: httpx.Client, word: str, status: int, retry_after: str | None
) -> None:
    answer = client.get(session_url(billing, f"checkout_{word}_1"))
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after


@pytest.mark.parametrize(
    ("checkout_id", "seconds"),
    [("checkout_paid", 60), ("checkout_failed_x", 60), ("expired_²", 60),
     ("checkout_paid_20_7", 20), ("checkout_failed_1", 1), ("expired_600_x_y", 600)],
)  # fmt: skip
def test_final_status_comes_some_seconds_after_the_first_request(
    billing: SimulatedBilling, client: httpx.Client, clock: Clock, checkout_id: str, seconds: int
) -> None:
    def status() -> str:
        return str(client.get(session_url(billing, checkout_id)).json()["status"])

    final = checkout_id.removeprefix("checkout_").partition("_")[0]
    assert status() == "open"
    clock.now += seconds - 0.5
    assert status() == "open"
    clock.now += 0.5
    assert status() == final
    clock.now += 1_000_000
    assert status() == final


def test_each_id_has_its_own_delay(
    billing: SimulatedBilling, client: httpx.Client, clock: Clock
) -> None:
    client.get(session_url(billing, "checkout_paid_1"))
    client.get(session_url(billing, "checkout_paid_60_1"))
    clock.now += 60
    assert client.get(session_url(billing, "checkout_paid_60_1")).json()["status"] == "paid"
    assert client.get(session_url(billing, "checkout_paid_60_2")).json()["status"] == "open"


def test_drip_sends_headers_and_then_single_bytes(
    billing: SimulatedBilling, client: httpx.Client
) -> None:
    with client.stream("GET", session_url(billing, "checkout_drip_1")) as answer:
        assert answer.status_code == 200
        dripping = answer.iter_raw(1)
        assert [len(next(dripping)) for _ in range(5)] == [1] * 5


def test_drip_pauses_between_bytes() -> None:
    with contextlib.ExitStack() as running:
        billing = running.enter_context(running_billing(pause_seconds=LONG))
        with connect(billing) as connected:
            connected.sendall(request("checkout_drip_1"))
            received = b""
            while not received.endswith(b"\r\n\r\n "):
                received += connected.recv(65536)
            running.close()
            assert read_all(connected) == b""


def test_slow_answers_after_its_pause(billing: SimulatedBilling, client: httpx.Client) -> None:
    answer = client.get(session_url(billing, "checkout_slow_1"))
    assert answer.json() == {"id": "checkout_slow_1", "status": "open"}


def test_request_that_arrives_during_slow_is_answered_after_it(billing: SimulatedBilling) -> None:
    with connect(billing) as connected:
        connected.sendall(request("checkout_slow_1") + request("later", "Connection: close"))
        received = read_all(connected)
    assert 0 < received.find(b'"checkout_slow_1"') < received.find(b'"later"')


@pytest.mark.parametrize("word", ["slow", "hang"])
def test_unanswered_request_does_not_delay_stop(word: str) -> None:
    with contextlib.ExitStack() as running:
        billing = running.enter_context(running_billing(pause_seconds=LONG))
        with connect(billing) as connected:
            connected.sendall(request("checkout_404_1") + request(f"checkout_{word}_1"))
            assert connected.recv(65536).startswith(b"HTTP/1.1 404 ")
            running.close()
            assert read_all(connected) == b""
    assert billing.requests[f"checkout_{word}_1"] == 1
    assert billing.in_flight == 0


def test_reset_reaches_the_client(billing: SimulatedBilling) -> None:
    with connect(billing) as connected:
        connected.sendall(request("checkout_reset_1"))
        with pytest.raises(ConnectionResetError):
            connected.recv(65536)


def test_garbage_is_not_http(billing: SimulatedBilling, client: httpx.Client) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        client.get(session_url(billing, "checkout_garbage_1"))
    with connect(billing) as connected:
        connected.sendall(request("checkout_garbage_1"))
        assert read_all(connected) == b"This is not HTTP.\r\n\r\n"


def test_huge_body_is_one_mebibyte_of_json(billing: SimulatedBilling, client: httpx.Client) -> None:
    answer = client.get(session_url(billing, "checkout_huge_1"))
    assert answer.status_code == 200
    assert len(answer.content) == 1024 * 1024
    assert answer.json()["id"] == "checkout_huge_1"


def test_text_is_not_json(billing: SimulatedBilling, client: httpx.Client) -> None:
    answer = client.get(session_url(billing, "checkout_text_1"))
    assert answer.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        answer.json()


def test_followed_redirect_is_counted(billing: SimulatedBilling, client: httpx.Client) -> None:
    url = session_url(billing, "checkout_redirect_1")
    assert client.get(url).status_code == 302
    assert billing.redirects_followed == 0
    assert client.get(url, follow_redirects=True).status_code == 200
    assert billing.redirects_followed == 1
    assert billing.requests == {"checkout_redirect_1": 2}


@pytest.mark.parametrize(
    ("expected", "given", "status"),
    [(None, None, 401), (None, "", 401), (None, "any", 200),
     (KEY, None, 401), (KEY, "", 401), (KEY, "any", 401), (KEY, KEY, 200)],
)  # fmt: skip
def test_request_with_a_missing_or_wrong_key_is_refused_for_any_id(
    expected: str | None, given: str | None, status: int
) -> None:
    headers = {} if given is None else {"x-api-key": given}
    with (
        running_billing(api_key=expected) as billing,
        httpx.Client(headers=headers, timeout=TIMEOUT, trust_env=False) as client,
    ):
        checkout_id = "checkout_active_1" if status == 200 else "checkout_hang_1"
        answer = client.get(session_url(billing, checkout_id))
        assert answer.status_code == status
        assert answer.json() == (
            {"id": checkout_id, "status": "open"} if status == 200 else {"error": "Unauthorized"}
        )
        assert billing.requests == {checkout_id: 1}


def test_output_and_repr_do_not_show_the_key(
    capfd: pytest.CaptureFixture[str], client: httpx.Client
) -> None:
    with running_billing(api_key=KEY) as billing:
        for checkout_id in ("active", "404", "text", "redirect"):
            client.get(session_url(billing, checkout_id))
        client.get(session_url(billing, "active"), headers={"x-api-key": f"not-{KEY}"})
        with connect(billing) as connected:
            connected.sendall(f"x-api-key: {KEY}\r\n\r\n".encode())
            assert KEY.encode() not in read_all(connected)
    assert capfd.readouterr() == ("", "")
    assert KEY not in repr(billing)


@pytest.mark.parametrize(
    "path",
    ["/", "/?x", "/billing/api/v1/paysession", "/billing/api/v1/paysession/",
     "/billing/api/v1/paysession/a/b", "/x/billing/api/v1/paysession/a",
     "/billing/api/v1/redirected/a"],
)  # fmt: skip
def test_unknown_path_is_404(billing: SimulatedBilling, client: httpx.Client, path: str) -> None:
    answer = client.get(f"http://127.0.0.1:{port_of(billing)}{path}")
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})
    assert not billing.requests


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "PATCH", "get"])
def test_other_method_is_405_and_its_body_is_skipped(
    billing: SimulatedBilling, method: str
) -> None:
    content = None if method == "HEAD" else b"GET / HTTP/1.1\r\n\r\n"
    with connect(billing) as connected:
        head = f"{method} /billing/api/v1/paysession/active HTTP/1.1\r\nHost: x\r\n"
        length = f"Content-Length: {len(content or b'')}\r\n\r\n"
        connected.sendall((head + length).encode())
        connected.sendall((content or b"") + request("404", "Connection: close"))
        received = read_all(connected)
    assert received.startswith(b"HTTP/1.1 405 Method Not Allowed\r\nAllow: GET\r\n")
    assert received.count(b"HTTP/1.1 ") == 2
    assert received.count(b"HTTP/1.1 404 ") == 1
    assert (b'Method Not Allowed"}' in received) is (method != "HEAD")
    assert billing.requests == {"404": 1}


@pytest.mark.parametrize(
    "malformed",
    [b"\x16\x03\x01\x02\x00\x01", b"hello\r\n",
     b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
     b"GET nowhere HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
     b"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
     b"GET /billing/api/v1/paysession/%ff HTTP/1.1\r\nHost: x\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
     b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"],
)  # fmt: skip
def test_invalid_http_is_refused_and_the_connection_closed(
    billing: SimulatedBilling, malformed: bytes
) -> None:
    with connect(billing) as connected:
        connected.sendall(malformed)
        received = read_all(connected)
    assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in received
    assert billing.in_flight == 0


@pytest.mark.parametrize("start", [b"GET /", request("checkout_hang_1")])
def test_endless_request_is_cut_off(billing: SimulatedBilling, start: bytes) -> None:
    with connect(billing) as connected:
        connected.sendall(start)
        with pytest.raises(ConnectionError):
            connected.sendall(b"x" * 100_000_000)


def test_connections_are_kept_alive(billing: SimulatedBilling, client: httpx.Client) -> None:
    for _ in range(5):
        client.get(session_url(billing, "checkout_active_1"))
    assert billing.requests["checkout_active_1"] == 5
    assert billing.connections == 1


@pytest.mark.parametrize(
    "sent", [request("active", "Connection: close"), request("active", version="1.0")]
)
def test_connection_is_closed_when_the_client_asks_for_it(
    billing: SimulatedBilling, sent: bytes
) -> None:
    with connect(billing) as connected:
        connected.sendall(sent)
        assert b"\r\nConnection: close\r\n" in read_all(connected)


def test_pipelined_and_fragmented_requests_are_each_answered(billing: SimulatedBilling) -> None:
    with connect(billing) as connected:
        connected.sendall(request("pipelined") * 2000)
        for byte in request("fragmented", "Connection: close"):
            connected.sendall(bytes([byte]))
        assert read_all(connected).count(b"HTTP/1.1 200 OK\r\n") == 2001
    assert billing.requests == {"pipelined": 2000, "fragmented": 1}
    assert billing.max_in_flight == 1


@pytest.mark.parametrize(
    "checkout_id",
    [
        "../..",
        "a/../b",
        "a?b=c",
        "a#b",
        "a b",
        "100%",
        "%2F",
        "é ü 漢字 🛒",
        "a+b",
        "\n",
        "é" * 255,
    ],
)
def test_id_is_percent_decoded(
    billing: SimulatedBilling, client: httpx.Client, checkout_id: str
) -> None:
    assert client.get(session_url(billing, checkout_id)).json()["id"] == checkout_id
    assert billing.requests == {checkout_id: 1}


def test_query_is_not_part_of_the_id(billing: SimulatedBilling, client: httpx.Client) -> None:
    client.get(f"{billing.url}/checkout_404_1?x=y")
    assert billing.requests == {"checkout_404_1": 1}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - the counters are plain numbers, without events
        await asyncio.sleep(0)


async def test_requests_count_as_in_flight_until_their_clients_leave() -> None:
    async with asyncio.timeout(TIMEOUT), SimulatedBilling() as billing:
        clients = [connect(billing) for _ in range(2)]
        for client in clients:
            client.sendall(request("checkout_hang_1"))
        await until(lambda: billing.in_flight == 2)
        for client in clients:
            client.close()
        await until(lambda: billing.in_flight == 0)
        assert billing.max_in_flight == 2
        assert billing.connections == 2


@pytest.mark.parametrize("iterations", range(6))
async def test_connection_made_while_the_service_stops_is_dropped(iterations: int) -> None:
    async with SimulatedBilling() as billing:
        connected = connect(billing)
        connected.sendall(request("checkout_hang_1"))
        for _ in range(iterations):
            await asyncio.sleep(0)
    with connected, contextlib.suppress(ConnectionResetError):
        assert read_all(connected) == b""


def test_service_can_restart_on_the_same_port(client: httpx.Client) -> None:
    billing = SimulatedBilling()
    with pytest.raises(RuntimeError):
        _ = billing.url
    with running_billing() as first:
        url = session_url(first, "checkout_404_1")
        assert client.get(url).status_code == 404
    with pytest.raises(httpx.ConnectError):
        client.get(url)
    with running_billing(port=port_of(first)):
        assert client.get(url).status_code == 404


def test_port_in_use_is_an_error_and_leaves_no_thread(billing: SimulatedBilling) -> None:
    threads = threading.active_count()
    with pytest.raises(OSError, match="in use"), running_billing(port=port_of(billing)):
        pass
    assert threading.active_count() == threads


@contextlib.contextmanager
def program_on(port: int) -> Iterator[subprocess.Popen[str]]:
    """Run the service as a separate program."""
    command = [sys.executable, "-m", "local.billing", "--port", str(port)]
    pipe = subprocess.PIPE
    # A shell starts background programs with SIGINT ignored, and child processes inherit that. They
    # do not inherit a handler, so with one set here the program starts with the default.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    finally:
        signal.signal(signal.SIGINT, inherited)
    with program:
        try:
            yield program
        finally:
            program.kill()


def test_program_prints_its_url_and_stops_quietly_on_ctrl_c(client: httpx.Client) -> None:
    with program_on(port=0) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        url = line.removeprefix("Simulated billing service: ").strip()
        assert client.get(f"{url}/checkout_410_1").status_code == 410
        program.send_signal(signal.SIGINT)
        assert program.communicate(timeout=TIMEOUT) == ("", "")
        assert program.returncode == 0


def test_program_reports_a_port_in_use_on_one_line(billing: SimulatedBilling) -> None:
    port = port_of(billing)
    with program_on(port) as program:
        assert program.communicate(timeout=TIMEOUT) == (
            "",
            f"Port {port} is in use by another program. Stop it, or use --port.\n",
        )
        assert program.returncode == 1


def test_program_reports_an_impossible_port() -> None:
    with program_on(port=70000) as program:
        output, errors = program.communicate(timeout=TIMEOUT)
        assert output == ""
        assert errors.endswith("error: argument --port: 70000 is not a port from 0 to 65535\n")
        assert program.returncode == 2


@pytest.mark.parametrize(
    ("mode", "http_status", "status"),
    [
        ("healthy", 200, "open"),
        ("slow", 200, "open"),
        ("failing", 500, None),
        ("rate-limiting", 200, "open"),
        ("paying", 200, "paid"),
    ],
)
def test_mode_applies_to_every_id(
    billing: SimulatedBilling, client: httpx.Client, mode: str, http_status: int, status: str | None
) -> None:
    control = billing.url.replace("/billing/api/v1/paysession", "/simulate")
    assert client.post(control, content=mode).json()["mode"] == mode
    for checkout_id in ("checkout_active_1", "checkout_404_1"):
        answer = client.get(session_url(billing, checkout_id))
        assert (answer.status_code, answer.json().get("status")) == (http_status, status)
    assert client.post(control, content="by id").json()["mode"] == "by id"
    assert client.get(session_url(billing, "checkout_404_1")).status_code == 404


def test_mode_rate_limiting_allows_one_request_a_second(
    billing: SimulatedBilling, client: httpx.Client, clock: Clock
) -> None:
    billing.simulate("rate-limiting")

    def statuses(count: int) -> list[int]:
        return [client.get(session_url(billing, f"checkout_{n}")).status_code for n in range(count)]

    assert statuses(5) == [200, 200, 200, 429, 429]
    clock.now += 1
    assert statuses(2) == [200, 429]


def test_mode_down_resets_connections_until_the_next_mode(
    billing: SimulatedBilling, client: httpx.Client
) -> None:
    control = billing.url.replace("/billing/api/v1/paysession", "/simulate")
    client.post(control, content="down")
    with pytest.raises(httpx.TransportError):
        client.get(session_url(billing, "checkout_active_1"))
    client.post(control, content="healthy\n")
    assert client.get(session_url(billing, "checkout_active_1")).status_code == 200


def test_unknown_mode_is_refused_with_a_list_of_modes(
    billing: SimulatedBilling, client: httpx.Client
) -> None:
    control = billing.url.replace("/billing/api/v1/paysession", "/simulate")
    answer = client.post(control, content="broken")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("Unknown mode 'broken'; use one of by id, healthy")
    assert client.get(control).json()["mode"] == "by id"
    assert client.delete(control).status_code == 405

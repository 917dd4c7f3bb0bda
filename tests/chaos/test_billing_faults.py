"""A billing fault in one session's request is recorded and affects no other session."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from core.domain.model import Outcome, Reason
from testkit.clock import FakeClock
from testkit.shops import add_sessions
from tests.chaos.billing import FAULTS, LIMITS, FaultyBilling
from tests.chaos.world import KEY, TIMEOUT, World, outcomes

HEALTHY = {f"ok-{n}": f"fine-{n}" for n in range(5)}

# The outcome of each fault. Any fault that is not listed is a `network_error`.
OUTCOMES = {
    Outcome.ACTIVE: (
        "closed after each answer",
        "reset after each answer",
        "100, then 200",
        "103, then 200",
        "non-ASCII headers",
    ),
    Outcome.TIMEOUT: (
        "silent",
        "silent after the headers",
        "drips the headers",
        "drips the body",
        "endless 100 Continue",
        "Content-Length too long",
    ),
    Outcome.UNKNOWN_STATUS: (
        "a body of 1 GB",
        "an endless body",
        "an endless chunked body",
        "a gzip bomb",
        "invalid UTF-8",
        "JSON 100,000 deep",
        "valid JSON 30,000 deep",
        "NaN",
        "a number of 10,000 digits",
        "half a surrogate pair",
        "a NUL",
        "not JSON",
        "an empty body",
        "null",
        "a list",
        "an unknown status",
        "a status of 60,000 characters",
        "Content-Length too short",
        "Content-Length and chunks",
        "two answers at once",
    ),
    Outcome.UNEXPECTED_STATUS: (
        "101",
        "204",
        "301 to another host",
        "302 to another host",
        "307 to another host",
        "308 to another host",
        "300 to nowhere",
        "400",
        "418",
        "500",
        "502",
        "503",
        "504",
        "599",
        "999",
    ),
    Outcome.UNAUTHORIZED: ("401", "403"),
    Outcome.NOT_FOUND: ("404", "410"),
}
# These look like a keep-alive connection that has just ended, so the request is sent once more on a
# fresh connection.
RETRIED = (
    "reset before the answer",
    "reset within the headers",
    "reset within the body",
    "closed before the answer",
    "closed within the headers",
    "closed after each answer",
    "reset after each answer",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_recorded_and_harms_no_other_session(world: World, fault: str) -> None:
    add_sessions(world.shop, {"faulty": f"{fault}-1"} | HEALTHY)
    if fault in RETRIED:
        world.may_repeat = frozenset({f"{fault}-1", *HEALTHY.values()})
    began = time.monotonic()
    first = world.tick()
    assert time.monotonic() - began < TIMEOUT + 5
    expected = next((o for o, faults in OUTCOMES.items() if fault in faults), Outcome.NETWORK_ERROR)
    assert first is not None
    assert outcomes([first]) == (
        {"active": 6} if expected is Outcome.ACTIVE else {"active": 5, expected.value: 1}
    )
    for _ in range(2):
        world.advance()
        summary = world.tick()
        assert summary is not None
        assert summary.outcomes[Outcome.ACTIVE] >= len(HEALTHY)
    world.invariants()


@pytest.mark.parametrize("fault", LIMITS)
def test_rate_limit_pauses_all_workers_for_a_limited_time(world: World, fault: str) -> None:
    """One that names no time pauses nobody, because billing answers about the others."""
    add_sessions(world.shop, {"limited": f"{fault}-1"} | HEALTHY)
    world.may_repeat = frozenset({f"{fault}-1"})  # it stays due
    first = world.tick()
    assert first is not None
    assert first.outcomes[Outcome.RATE_LIMITED] >= 1
    if fault in {"429 for 2 s", "429 for a year", "429 until a date", "503 for 2 s"}:
        assert first.paused_until is not None
    if first.paused_until is None:
        assert first.outcomes[Outcome.ACTIVE] == len(HEALTHY)
    else:
        assert first.paused_until - world.clock.now <= timedelta(seconds=300)
        requests = world.billing.requests
        # In the last slot before the end, the pass would wait for it.
        world.clock.now = first.paused_until - timedelta(seconds=6)
        second = world.tick(world.worker())
        assert second is not None
        assert world.billing.requests == requests
    world.invariants()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_keepalive_connections_closed_between_passes_cost_no_check(
    world: World, reset: bool
) -> None:
    add_sessions(world.shop, {f"ok-{n}": f"fine-{n}" for n in range(40)})
    world.may_repeat = frozenset(f"fine-{n}" for n in range(40))
    summaries = []
    for _ in range(4):
        summaries.append(world.tick())
        world.billing.end_connections(reset=reset)
        world.advance()
    assert outcomes(summaries) == {"active": 160}
    world.invariants()


def test_all_faults_at_once_do_not_delay_healthy_sessions(world: World) -> None:
    add_sessions(world.shop, {f"faulty {fault}": f"{fault}-1" for fault in FAULTS} | HEALTHY)
    world.may_repeat = frozenset((*(f"{fault}-1" for fault in RETRIED), *HEALTHY.values()))
    for _ in range(3):
        summary = world.tick()
        assert summary is not None
        assert summary.reason is Reason.TICK
        world.advance()
    for checkout in HEALTHY.values():
        assert len(world.billing.log[checkout].requested_at) >= 3
    world.invariants()


@pytest.fixture
def ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """A CA that the system trusts."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return ca


def server_side(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


YESTERDAY = datetime.now(UTC) - timedelta(days=1)
TLS: dict[str, Callable[[trustme.CA], trustme.LeafCert]] = {
    "a wrong name": lambda ca: ca.issue_cert("billing.example"),
    "an expired certificate": lambda ca: ca.issue_cert(
        "127.0.0.1", not_before=YESTERDAY - timedelta(days=1), not_after=YESTERDAY
    ),
    "an unknown CA": lambda _ca: trustme.CA().issue_cert("127.0.0.1"),
}


@pytest.mark.parametrize("fault", TLS)
def test_untrusted_tls_server_receives_no_request(
    world: World, ca: trustme.CA, clock: FakeClock, fault: str
) -> None:
    add_sessions(world.shop, HEALTHY)
    with FaultyBilling(clock, tls=server_side(TLS[fault](ca))) as billing:
        summary = world.tick(world.worker(BILLING_API_URL=billing.url))
        assert outcomes([summary]) == {"network_error": 5}
        assert billing.requests == 0
    world.invariants(recheck=False)


@pytest.mark.parametrize(
    ("handshake_seconds", "outcome"), [(0.0, "active"), (2 * TIMEOUT, "timeout")]
)
def test_request_timeout_includes_tls_handshake(
    world: World, ca: trustme.CA, clock: FakeClock, handshake_seconds: float, outcome: str
) -> None:
    add_sessions(world.shop, HEALTHY)
    tls = server_side(ca.issue_cert("127.0.0.1"))
    with FaultyBilling(clock, tls=tls, handshake_seconds=handshake_seconds) as billing:
        env = {"REQUEST_TIMEOUT_SECONDS": "2"} if outcome == "active" else {}
        summary = world.tick(world.worker(BILLING_API_URL=billing.url, **env))
        assert outcomes([summary]) == {outcome: 5}
    world.invariants(recheck=False)


@pytest.fixture
def full_backlog_port() -> Iterator[int]:
    """A port whose backlog is full, so that a connection attempt gets no answer."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port: int = listening.getsockname()[1]
        clients = [socket.socket() for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        yield port
        for client in clients:
            client.close()


def test_unreachable_billing_is_recorded_and_checked_once_it_is_back(
    world: World, clock: FakeClock, full_backlog_port: int
) -> None:
    add_sessions(world.shop, HEALTHY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refusing = f"http://127.0.0.1:{port}/billing"
    unreachable = {
        refusing: "network_error",
        "https://nowhere.invalid/billing": "network_error",
        "https://127.0.0.1:1/billing": "network_error",
        f"http://127.0.0.1:{full_backlog_port}/billing": "timeout",
    }
    for url, outcome in unreachable.items():
        assert outcomes([world.tick(world.worker(BILLING_API_URL=url))]) == {outcome: 5}
        world.advance(20)
    with FaultyBilling(clock, port=port) as billing:
        assert outcomes([world.tick(world.workers[0])]) == {"active": 5}
        assert {key for log in billing.log.values() for key in log.api_keys} == {KEY}
    world.invariants(recheck=False)


def test_passes_leave_no_thread_behind(world: World) -> None:
    add_sessions(world.shop, {f"silent-{n}": f"silent-{n}" for n in range(20)})
    worker = world.worker()
    world.tick(worker)
    before = threading.active_count()
    for _ in range(3):
        world.advance(20)
        world.tick(worker)
    assert threading.active_count() <= before + 20  # the service has one for each connection
    world.invariants()

"""Whatever billing does to one session's request, it is told, and no other session notices."""

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
from tests.chaos.billing import FAULTS, LIMITS, Misbehaving
from tests.chaos.world import KEY, TIMEOUT, World, outcomes

HEALTHY = {f"ok-{n}": f"fine-{n}" for n in range(5)}

# What each is told as. What is not here is `network_error`.
TOLD = {
    Outcome.ACTIVE: (
        "closed after each answer",
        "reset after each answer",
        "100, then 200",
        "103, then 200",
        "headers that are not ASCII",
    ),
    Outcome.TIMEOUT: (
        "silent",
        "silent after the headers",
        "drips the headers",
        "drips the body",
        "100 Continue for ever",
        "Content-Length too long",
    ),
    Outcome.UNKNOWN_STATUS: (
        "a body of 1 GB",
        "a body without an end",
        "an endless chunked body",
        "a gzip bomb",
        "invalid UTF-8",
        "JSON 100,000 deep",
        "deep JSON that is whole",
        "NaN",
        "a number of 10,000 digits",
        "half a surrogate pair",
        "a NUL",
        "no JSON",
        "an empty body",
        "null",
        "a list",
        "an unknown word",
        "a word of 60,000 characters",
        "Content-Length too short",
        "length and chunks",
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
# Asked once more on a connection of its own, because a kept one may have ended just then.
ASKED_AGAIN = (
    "reset before the answer",
    "reset within the headers",
    "reset within the body",
    "closed before the answer",
    "closed within the headers",
    "closed after each answer",
    "reset after each answer",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_and_harms_no_other_session(world: World, fault: str) -> None:
    add_sessions(world.shop, {"faulty": f"{fault}-1"} | HEALTHY)
    if fault in ASKED_AGAIN:
        world.asked_again = frozenset({f"{fault}-1", *HEALTHY.values()})
    began = time.monotonic()
    first = world.tick()
    assert time.monotonic() - began < TIMEOUT + 5
    told = next((o for o, faults in TOLD.items() if fault in faults), Outcome.NETWORK_ERROR)
    assert first is not None
    assert outcomes([first]) == (
        {"active": 6} if told is Outcome.ACTIVE else {"active": 5, told.value: 1}
    )
    for _ in range(2):
        world.advance()
        summary = world.tick()
        assert summary is not None
        assert summary.outcomes[Outcome.ACTIVE] >= len(HEALTHY)
    world.invariants()


@pytest.mark.parametrize("fault", LIMITS)
def test_a_limit_pauses_every_worker_for_a_while_and_no_longer(world: World, fault: str) -> None:
    add_sessions(world.shop, {"limited": f"{fault}-1"} | HEALTHY)
    first = world.tick()
    assert first is not None
    assert first.outcomes[Outcome.RATE_LIMITED] == 1
    assert first.paused_until is not None
    assert first.paused_until - world.clock.now <= timedelta(seconds=300)
    if first.paused_until > world.clock.now:
        requests = world.billing.requests
        world.clock.now = first.paused_until - timedelta(milliseconds=1)
        second = world.tick(world.worker())
        assert second is not None
        assert world.billing.requests == requests
    world.invariants()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_kept_connections_that_end_between_two_passes_cost_no_check(
    world: World, reset: bool
) -> None:
    add_sessions(world.shop, {f"ok-{n}": f"fine-{n}" for n in range(40)})
    world.asked_again = frozenset(f"fine-{n}" for n in range(40))
    summaries = []
    for _ in range(4):
        summaries.append(world.tick())
        world.billing.end_connections(reset=reset)
        world.advance()
    assert outcomes(summaries) == {"active": 160}
    world.invariants()


def test_every_fault_at_once_costs_the_healthy_ones_nothing(world: World) -> None:
    add_sessions(world.shop, {f"faulty {fault}": f"{fault}-1" for fault in FAULTS} | HEALTHY)
    world.asked_again = frozenset((*(f"{fault}-1" for fault in ASKED_AGAIN), *HEALTHY.values()))
    for _ in range(3):
        summary = world.tick()
        assert summary is not None
        assert summary.reason is Reason.TICK
        world.advance()
    for checkout in HEALTHY.values():
        assert len(world.billing.asked[checkout].at) >= 3
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
def test_a_tls_server_that_cannot_be_trusted_gets_no_request(
    world: World, ca: trustme.CA, clock: FakeClock, fault: str
) -> None:
    add_sessions(world.shop, HEALTHY)
    with Misbehaving(clock, tls=server_side(TLS[fault](ca))) as billing:
        summary = world.tick(world.worker(BILLING_API_URL=billing.url))
        assert outcomes([summary]) == {"network_error": 5}
        assert billing.requests == 0
    world.invariants(checks=False)


@pytest.mark.parametrize(("handshake_seconds", "told"), [(0.0, "active"), (2 * TIMEOUT, "timeout")])
def test_a_tls_handshake_counts_as_part_of_the_request(
    world: World, ca: trustme.CA, clock: FakeClock, handshake_seconds: float, told: str
) -> None:
    add_sessions(world.shop, HEALTHY)
    tls = server_side(ca.issue_cert("127.0.0.1"))
    with Misbehaving(clock, tls=tls, handshake_seconds=handshake_seconds) as billing:
        env = {"REQUEST_TIMEOUT_SECONDS": "2"} if told == "active" else {}
        summary = world.tick(world.worker(BILLING_API_URL=billing.url, **env))
        assert outcomes([summary]) == {told: 5}
    world.invariants(checks=False)


@pytest.fixture
def unanswered() -> Iterator[int]:
    """A port whose queue of connections is full: whoever connects hears nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        port: int = listening.getsockname()[1]
        filling = [socket.socket() for _ in range(4)]
        for one in filling:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        yield port
        for one in filling:
            one.close()


def test_a_service_that_is_away_is_told_and_asked_again_when_it_is_back(
    world: World, clock: FakeClock, unanswered: int
) -> None:
    add_sessions(world.shop, HEALTHY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refusing = f"http://127.0.0.1:{port}/billing"
    away = {
        refusing: "network_error",
        "http://nowhere.invalid/billing": "network_error",
        "https://127.0.0.1:1/billing": "network_error",
        f"http://127.0.0.1:{unanswered}/billing": "timeout",
    }
    for url, told in away.items():
        assert outcomes([world.tick(world.worker(BILLING_API_URL=url))]) == {told: 5}
        world.advance(20)
    with Misbehaving(clock, port=port) as back:
        assert outcomes([world.tick(world.workers[0])]) == {"active": 5}
        assert {key for asked in back.asked.values() for key in asked.keys} == {KEY}
    world.invariants(checks=False)


def test_no_thread_is_left_behind(world: World) -> None:
    add_sessions(world.shop, {f"silent-{n}": f"silent-{n}" for n in range(20)})
    worker = world.worker()
    world.tick(worker)
    before = threading.active_count()
    for _ in range(3):
        world.advance(20)
        world.tick(worker)
    assert threading.active_count() <= before + 20  # the service's own, one a connection
    world.invariants()

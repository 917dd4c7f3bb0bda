"""Fixtures for the chaos tests, and the table of the cases they tried."""

import os
import re
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testkit.clock import FakeClock
from testkit.shops import MySQLShop
from tests.chaos.billing import FaultyBilling
from tests.chaos.bus import Bus, running_bus
from tests.chaos.proxy import Proxy
from tests.chaos.world import ProxiedWorld, World
from tests.conftest import SERVERS, a_shop

REPORT = os.environ.get("CHAOS_REPORT")
TABLE = re.compile(r"(?<=<!-- cases -->\n).*?(?=<!-- /cases -->)", re.DOTALL)

# Cases by group (one for each module) and by whether the monitor survived them.
_cases: dict[str, Counter[bool]] = {}
# Tests that count their own cases. Every other test is one case.
_counted: set[str] = set()


def count(group: str, *, survived: bool) -> None:
    _cases.setdefault(group, Counter())[survived] += 1


def _group(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).stem.removeprefix("test_").replace("_", " ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and "tests/chaos/" in item.nodeid and item.nodeid not in _counted:
        count(_group(item.nodeid), survived=report.passed)
    return report


def table() -> str:
    rows = ["| group | cases tried | survived |", "|---|---|---|"]
    rows += [
        f"| {group} | {found.total():,} | {found[True]:,} |"
        for group, found in sorted(_cases.items())
    ]
    return "\n".join(rows) + "\n"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _cases:
        return
    terminalreporter.section("chaos")
    terminalreporter.write(table())
    if REPORT:
        path = Path(REPORT)
        path.write_text(TABLE.sub(lambda _: table(), path.read_text()), encoding="utf-8")


class Cases:
    """Counts the cases within one test. All run; the test fails at the end if any case failed."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._failed: list[str] = []

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (the other cases still run)
            self._failed.append(f"{name}: {type(error).__name__}: {error}")
            count(self._group, survived=False)
        else:
            count(self._group, survived=True)

    def check(self) -> None:
        assert not self._failed, "\n".join([f"{len(self._failed)} failed:", *self._failed])


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Iterator[Cases]:
    _counted.add(request.node.nodeid)
    cases = Cases(_group(request.node.nodeid))
    yield cases
    cases.check()


@pytest.fixture
def faulty_billing(clock: FakeClock) -> Iterator[FaultyBilling]:
    with FaultyBilling(clock) as billing:
        yield billing


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    with running_bus() as bus:
        monkeypatch.setenv("AWS_ENDPOINT_URL_EVENTBRIDGE", bus.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        yield bus


@pytest.fixture(params=["sqlite"])
def world(
    request: pytest.FixtureRequest,
    clock: FakeClock,
    faulty_billing: FaultyBilling,
    bus: Bus,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[World]:
    """A world on SQLite; a test selects other engines with `indirect`."""
    with a_shop(request, request.param) as shop:
        world = World(shop, clock, faulty_billing, bus, lambda: "".join(capfd.readouterr()))
        try:
            yield world
        finally:
            world.close()


@pytest.fixture(params=SERVERS)
def proxied(
    request: pytest.FixtureRequest,
    clock: FakeClock,
    faulty_billing: FaultyBilling,
    bus: Bus,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[ProxiedWorld]:
    """A world on each server, with a proxy in front of its database."""
    with a_shop(request, request.param) as shop:
        assert isinstance(shop, MySQLShop)
        with Proxy(shop.server) as proxy:
            world = World(shop, clock, faulty_billing, bus, lambda: "".join(capfd.readouterr()))
            try:
                yield ProxiedWorld(request.param, world, proxy)
            finally:
                world.close()

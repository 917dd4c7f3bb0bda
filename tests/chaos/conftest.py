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
# The cases of tests that count their own, by test. Every other test is one case.
_counted: dict[str, Counter[bool]] = {}
CASES = "cases survived and not"


def _group(nodeid: str) -> str:
    return Path(nodeid.partition("::")[0]).stem.removeprefix("test_").replace("_", " ")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and "tests/chaos/" in item.nodeid:
        cases = _counted.get(item.nodeid, Counter([report.passed]))
        report.user_properties.append((CASES, [cases[True], cases[False]]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count here, because with `pytest -n` another process prints the table."""
    for name, value in report.user_properties:
        if name == CASES and isinstance(value, list):
            survived, others = value
            group = _cases.setdefault(_group(report.nodeid), Counter())
            group.update({True: survived, False: others})


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

    def __init__(self) -> None:
        self.counts = Counter[bool]()
        self._failed: list[str] = []

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (the other cases still run)
            self._failed.append(f"{name}: {type(error).__name__}: {error}")
            self.counts[False] += 1
        else:
            self.counts[True] += 1

    def check(self) -> None:
        assert not self._failed, "\n".join([f"{len(self._failed)} failed:", *self._failed])


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Iterator[Cases]:
    cases = Cases()
    _counted[request.node.nodeid] = cases.counts
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

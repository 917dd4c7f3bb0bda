"""The bill: docs/cost.md shows what `make cost` computes, and it stays below the promised costs."""

from collections.abc import Mapping
from typing import Any

import pytest

from bench import cost
from bench.cost import Load, Stack, bill, data_out, in_vpc, page_with_tables, pass_seconds, total
from core.domain.cadence import Cadence

pytestmark = pytest.mark.slow

DAY = 24 * 3600
RECOMMENDED = "5s until 10m, 30s until 1h, 5m"

TEMPLATE = cost.template()
PRICES = cost.read(cost.PRICES)
MEASURED: Mapping[str, Any] = cost.read(cost.MEASURED)


def dollars(open_: int, **parameters: object) -> dict[str, float]:
    """The items of a month's bill by the first word of their names."""
    load = Load(open_, Cadence.parse("5s"), DAY, 0.1, "internet")
    stack = Stack.of(TEMPLATE, parameters)
    items = bill(load, stack, MEASURED, PRICES)
    return {item.name.split()[0].rstrip(":,"): item.dollars for item in items}


def test_page_shows_the_computed_tables() -> None:
    page = cost.PAGE.read_text(encoding="utf-8")
    assert page_with_tables(page) == page, "docs/cost.md is out of date: make cost ARGS=--write"


@pytest.mark.parametrize("cadence", ["5s", RECOMMENDED])
@pytest.mark.parametrize(("open_", "max_dollars"), [(100, 12), (1_000, 16), (10_000, 50)])
def test_month_costs_no_more_than_promised(open_: int, max_dollars: float, cadence: str) -> None:
    stack = Stack.of(TEMPLATE, {})
    load = Load(open_, Cadence.parse(cadence), DAY, 0.1, "internet")
    assert total(bill(load, stack, MEASURED, PRICES)) <= max_dollars


def test_loop_costs_its_time_in_64_mb() -> None:
    stack = Stack.of(TEMPLATE, {})
    expected = 43_200 * (stack.execution_seconds / 16 * 0.0000166667 + 0.000001)
    assert dollars(100)["loop"] == pytest.approx(expected, rel=0.01)
    assert stack.ticks == stack.execution_seconds / 5


def test_recommended_cadence_checks_a_session_of_24_hours_496_times() -> None:
    load = Load(1, Cadence.parse(RECOMMENDED), DAY, 0.1, "internet")
    assert load.checks_a_tick(5) * DAY / 5 == 496
    assert Load(7, Cadence.parse("5s"), DAY, 0.1, "internet").checks_a_tick(5) == 7


def test_pass_takes_the_longer_of_waiting_and_working() -> None:
    time = {
        "idle_processor_ms": 0,
        "idle_database_ms": 10,
        "check_processor_ms": 0.1,
        "waiting_factor": 1,
    }
    waits = Stack.of(TEMPLATE, {"WorkerMemory": 1769})
    works = Stack.of(TEMPLATE, {"WorkerMemory": 1769 / 20})
    assert pass_seconds(0, waits, 0.1, {"time": time}) == pytest.approx(0.01)
    assert pass_seconds(10, waits, 0.1, {"time": time}) == pytest.approx(0.11)
    assert pass_seconds(1_000, waits, 0.1, {"time": time}) == pytest.approx(1.01)
    assert pass_seconds(1_000, works, 0.1, {"time": time}) == pytest.approx(2.01, rel=0.01)


def test_options_cost_what_they_use() -> None:
    usual = dollars(1_000)
    assert usual["traces"] == 0
    assert dollars(1_000, Tracing="ENABLED")["traces"] > 2.5
    assert dollars(1_000, ApiKeySecretArn="another")["secrets"] == 2 * usual["secrets"]
    arm = dollars(1_000, Architecture="arm64")["worker"]
    assert arm == pytest.approx(0.8 * usual["worker"], rel=0.001)


@pytest.mark.parametrize("version", ["http1.1", "http2"])
def test_data_within_the_region_is_cheaper_but_costs_both_ways(version: str) -> None:
    def data(billing: str) -> float:
        load = Load(1_000, Cadence.parse("5s"), DAY, 0.1, billing)
        items = data_out(load, Stack.of(TEMPLATE, {}), MEASURED, PRICES)
        return items[list(MEASURED["wire"]).index(version)].dollars

    sent = 518.4e6 * MEASURED["wire"][version]["sent"] / 1e9
    assert data("internet") == pytest.approx(sent * 0.09)
    assert data("region") < data("internet") / 3


def test_vpc_costs_its_way_out_and_what_the_database_writes() -> None:
    def items(vpc: str, open_: int = 1_000) -> dict[str, float]:
        load = Load(open_, Cadence.parse("5s"), DAY, 0.1, "internet")
        found = in_vpc(load, Stack.of(TEMPLATE, {}), vpc, MEASURED, PRICES)
        return {item.name.split(":")[0]: item.dollars for item in found}

    nat, endpoints = items("nat"), items("endpoints")
    assert nat["NAT gateway and its address"] == pytest.approx(720 * 0.05)
    gb = 518.4e6 * sum(MEASURED["wire"]["http2"].values()) / 1e9
    assert nat["NAT gateway's data, both ways"] == pytest.approx(gb * 0.045)
    assert endpoints["interface endpoints"] == pytest.approx(4 * 720 * 0.01)
    writes = "Aurora, if billed by I/O (an estimate)"
    assert nat[writes] == endpoints[writes]
    assert nat[writes] < items("nat", 10_000)[writes] < 10 * nat[writes]  # a pass writes, too
    assert items("nat", 10_000)["CloudTrail's data events, if a trail records Lambda's"] > 1.5


def test_measured_passes_are_of_this_code() -> None:
    """As far as it shows without running them: the log's limit and a healthy hour's six metrics."""
    assert MEASURED["log"]["pass_bytes"] <= 3_000
    assert MEASURED["log"]["metrics"] == 6
    assert MEASURED["wire"]["http2"]["sent"] < 0.6 * MEASURED["wire"]["http1.1"]["sent"]

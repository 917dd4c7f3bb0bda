"""`make cost`: compute what a month of this stack costs.

The template gives the loop, the schedule, memory, alarm metrics and secrets. Measured passes
(measured.toml, which `--measure` rewrites) give bytes of log and on the wire, processor time and
metrics. prices.toml gives AWS's list prices. A month has 30 days.
"""

import argparse
import functools
import math
import re
import shlex
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from bench.arguments import amount, cadence, count, duration
from core.domain.cadence import Cadence
from local import loop
from testkit.clock import VirtualClock

ROOT = Path(__file__).parents[1]
PRICES = ROOT / "bench/prices.toml"
MEASURED = ROOT / "bench/measured.toml"
PAGE = ROOT / "docs/cost.md"

MONTH_SECONDS = 30 * 24 * 3600
GB = 1e9  # bytes; AWS's gigabyte of data is a little larger, so this overestimates a little
FULL_CPU_MB = 1769  # the memory at which Lambda gives a whole vCPU, by its documentation
# START, END and REPORT, which Lambda logs for each invocation.
LAMBDA_LINES, LAMBDA_BYTES = 3, 290

OPEN = (100, 1_000, 10_000)
WHERE = {"internet": "on the internet", "region": "in the region"}
# How a stack in a VPC reaches AWS: Secrets Manager and Lambda, in two zones.
VPC = ("nat", "endpoints")
ENDPOINTS, ZONES = 2, 2
MONTH_HOURS = MONTH_SECONDS / 3600


@dataclass(frozen=True, slots=True)
class Stack:
    """What the template deploys, with default parameters unless others are given."""

    interval: int
    memory_mb: int
    architecture: str
    in_flight: int
    retention_days: int
    alarm_metrics: int
    secrets: int
    traced: bool
    executions: int  # of the loop, in a month
    execution_seconds: float
    ticks: float  # of one execution

    @classmethod
    def of(cls, template: Mapping[str, Any], given: Mapping[str, object]) -> Self:
        """Read the template; `given` are the parameters that differ from their defaults."""
        values = {name: p.get("Default") for name, p in template["Parameters"].items()}
        values |= given
        interval = int(values["CheckIntervalSeconds"])
        seconds, ticks = executions(interval)
        schedule = template["Resources"]["CheckLoop"]["Properties"]["Events"]["EveryMinute"]
        [minutes] = re.findall(
            r"rate\((\d+) minutes?\)", schedule["Properties"]["ScheduleExpression"]
        )
        alarms = [
            resource["Properties"]
            for resource in template["Resources"].values()
            if resource["Type"] == "AWS::CloudWatch::Alarm"
        ]
        return cls(
            interval=interval,
            memory_mb=int(values["WorkerMemory"]),
            architecture=str(values["Architecture"]),
            in_flight=int(values["MaxConcurrency"]),
            retention_days=int(values["LogRetentionDays"]),
            alarm_metrics=sum(
                sum(
                    "MetricStat" in query for query in alarm.get("Metrics", [{"MetricStat": alarm}])
                )
                for alarm in alarms
            ),
            secrets=2 if values["ApiKeySecretArn"] else 1,
            traced=values["Tracing"] == "ENABLED",
            executions=MONTH_SECONDS // (60 * int(minutes)),
            execution_seconds=seconds,
            ticks=ticks,
        )

    @property
    def vcpu(self) -> float:
        return self.memory_mb / FULL_CPU_MB


@functools.cache
def executions(interval: int) -> tuple[float, float]:
    """Average seconds and ticks of one execution of CheckLoop.

    One begins each minute, as long as no start is lost, and ends when it learns of the next one.
    """
    clock, latest = VirtualClock(), loop.Parameter()
    definition = loop.definition(interval)
    seconds, ticks = [], []

    def execution() -> None:
        begins = clock.now
        arguments: list[loop.Arguments] = []
        loop.execute(
            definition,
            arguments.append,
            latest,
            now=lambda: clock.now,
            wait_until=clock.wait_until,
        )
        seconds.append(clock.now - begins)
        ticks.append(len(arguments))

    clock.run(execution, [60.0 * minute for minute in range(20)])
    # The last executions have no successor, so they are longer.
    return statistics.mean(seconds[:10]), statistics.mean(ticks[:10])


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the bill."""

    name: str
    dollars: float
    amount: str


@dataclass(frozen=True, slots=True)
class Load:
    """What the monitor has to check."""

    open: int
    cadence: Cadence
    sessions_last: float  # seconds; their ages are spread evenly
    latency: float  # seconds
    billing: str  # a key of WHERE

    def checks_a_tick(self, interval: int) -> float:
        """The average number of checks due at a tick."""
        age = 0.0
        checks = 0
        while age < self.sessions_last:
            checks += 1
            every = max(self.cadence.every_seconds(age), interval)
            age += math.ceil(every / interval) * interval
        return self.open * checks * interval / self.sessions_last


def pass_seconds(checks: float, stack: Stack, latency: float, measured: Mapping[str, Any]) -> float:
    """The time of one pass: its fixed part, and then either waiting or working.

    While requests wait for billing the processor works on others, so the longer of the two counts.
    Waiting is latency times the rounds of requests in flight, times a factor that was measured.
    """
    time = measured["time"]
    waiting = latency * max(1.0, checks / stack.in_flight) * time["waiting_factor"] if checks else 0
    working = checks * time["check_processor_ms"] / 1000 / stack.vcpu
    return without_checks(stack, measured) + float(max(waiting, working))


def _workers(checks: float, stack: Stack, load: Load, measured: Mapping[str, Any]) -> int:
    """How many passes of a tick finish within an interval."""
    return math.ceil(pass_seconds(checks, stack, load.latency, measured) / stack.interval)


def without_checks(stack: Stack, measured: Mapping[str, Any]) -> float:
    """The seconds of a pass that finds nothing due: database and processor."""
    time = measured["time"]
    return float(time["idle_database_ms"] + time["idle_processor_ms"] / stack.vcpu) / 1000


def invocations(load: Load, stack: Stack, measured: Mapping[str, Any]) -> int:
    """The worker's invocations of a month, duplicate ticks included."""
    slots = MONTH_SECONDS // stack.interval
    duplicates = round(stack.executions * stack.ticks) - slots
    workers = _workers(load.checks_a_tick(stack.interval), stack, load, measured)
    return slots * workers + duplicates


def bill(
    load: Load, stack: Stack, measured: Mapping[str, Any], prices: Mapping[str, Any]
) -> list[Item]:
    """A month's items, without data transfer."""
    aws_lambda, watch = prices["lambda"], prices["cloudwatch"]
    gb_second = aws_lambda["gb_second"][stack.architecture] * stack.memory_mb / 1024
    slots = MONTH_SECONDS // stack.interval
    checks = load.checks_a_tick(stack.interval)
    alone = pass_seconds(checks, stack, load.latency, measured)
    workers = _workers(checks, stack, load, measured)
    worked = alone + (workers - 1) * without_checks(stack, measured)
    duplicates = round(stack.executions * stack.ticks) - slots
    duplicate_seconds = float(measured["time"]["again_database_ms"]) / 1000
    duplicate_seconds += float(measured["time"]["again_processor_ms"]) / 1000 / stack.vcpu
    invoked = invocations(load, stack, measured)

    kind = "pass" if checks >= 1 else "idle"
    log, record = measured["log"], watch["record_bytes"]
    logged = slots * workers * (log[f"{kind}_bytes"] + record * log[f"{kind}_records"])
    logged += duplicates * (log["again_bytes"] + record * log["again_records"])
    logged += invoked * (LAMBDA_BYTES + record * LAMBDA_LINES)
    log_gb = logged / GB
    kept = log_gb * stack.retention_days / 30 * watch["stored_gb_month"]

    express = prices["express"]
    express_gb_seconds = (
        stack.executions
        * math.ceil(stack.execution_seconds * 10)
        / 10
        * express["memory_mb"]
        / 1024
    )
    return [
        Item(
            f"loop: Express executions in {express['memory_mb']} MB",
            stack.executions * express["execution"] + express_gb_seconds * express["gb_second"],
            f"{stack.executions:,} of {stack.execution_seconds:.0f} s",
        ),
        Item("its schedule", stack.executions * prices["scheduler"]["start"], ""),
        Item(
            f"worker: {slots:,} ticks at {stack.memory_mb} MB",
            slots * worked * gb_second,
            f"{worked:.2f} s" + (f" in {workers} passes" if workers > 1 else ""),
        ),
        Item(
            "duplicate ticks",
            duplicates * duplicate_seconds * gb_second,
            f"{duplicates:,} of {duplicate_seconds * 1000:.0f} ms",
        ),
        Item("invocations", invoked * aws_lambda["request"], f"{invoked:,}"),
        Item("logs", log_gb * watch["log_gb"] + kept, f"{log_gb:.1f} GB"),
        Item(
            "metrics of a healthy hour",
            measured["log"]["metrics"] * watch["metric_month"],
            f"{measured['log']['metrics']}",
        ),
        Item(
            "alarm metrics",
            stack.alarm_metrics * watch["alarm_metric_month"],
            f"{stack.alarm_metrics}",
        ),
        Item(
            "traces",
            (slots + duplicates) * prices["xray"]["trace"] if stack.traced else 0.0,
            "on" if stack.traced else "off",
        ),
        Item("secrets", stack.secrets * prices["secrets"]["secret_month"], f"{stack.secrets}"),
    ]


def data_out(
    load: Load, stack: Stack, measured: Mapping[str, Any], prices: Mapping[str, Any]
) -> list[Item]:
    """The data transfer of a month's requests, with HTTP/1.1 and with HTTP/2."""
    requests = load.checks_a_tick(stack.interval) * MONTH_SECONDS / stack.interval
    items = []
    for version, wire in measured["wire"].items():
        sent, received = (requests * wire[way] / GB for way in ("sent", "received"))
        if load.billing == "internet":
            dollars = sent * prices["data"]["internet_gb"]
        else:
            dollars = (sent + received) * prices["data"]["region_gb"]
        name = f"data to billing, {WHERE[load.billing]}, {version.upper().replace('HTTP', 'HTTP/')}"
        items.append(Item(name, dollars, f"{sent:,.0f} GB"))
    return items


def database(
    load: Load, stack: Stack, measured: Mapping[str, Any], prices: Mapping[str, Any]
) -> list[Item]:
    """What a month's passes make the database write."""
    slots, stored = MONTH_SECONDS // stack.interval, measured["database"]
    checks = load.checks_a_tick(stack.interval)
    workers = _workers(checks, stack, load, measured)

    def month(what: str) -> float:
        return float(slots * (workers * stored[f"idle_{what}"] + checks * stored[f"check_{what}"]))

    redo, aurora = month("redo_bytes"), prices["aurora"]
    requests = max(month("commits"), redo / aurora["io_bytes"])
    return [
        Item(
            "binary log, to every replica, backup and change stream", 0.0, _gb(month("log_bytes"))
        ),
        Item("redo log", 0.0, _gb(redo)),
        Item(
            "Aurora, if billed by I/O (an estimate)",
            requests * aurora["io"],
            f"{requests / 1e6:.1f} million",
        ),
    ]


def in_vpc(
    load: Load, stack: Stack, vpc: str, measured: Mapping[str, Any], prices: Mapping[str, Any]
) -> list[Item]:
    """What a month costs besides in a VPC: the way out, the database's writes, the audit's events.

    Requests use HTTP/2. With endpoints billing is in the region, because they lead nowhere else.
    """
    net, wire = prices["vpc"], measured["wire"]["http2"]
    checks = load.checks_a_tick(stack.interval) * MONTH_SECONDS / stack.interval
    gb = checks * (wire["sent"] + wire["received"]) / GB
    if vpc == "nat":
        hour, hours = net["nat_hour"] + net["address_hour"], MONTH_HOURS
        way = [
            Item("NAT gateway and its address", hour * hours, f"{hours:,.0f} hours"),
            Item("NAT gateway's data, both ways", gb * net["nat_gb"], f"{gb:,.0f} GB"),
        ]
    else:
        hours = ENDPOINTS * ZONES * MONTH_HOURS
        name = f"interface endpoints: {ENDPOINTS} services in {ZONES} zones"
        way = [Item(name, net["endpoint_hour"] * hours, "")]
    data = data_out(load, stack, measured, prices)[list(measured["wire"]).index("http2")]
    *_, writes = database(load, stack, measured, prices)
    events = invocations(load, stack, measured)
    return [
        *way,
        data,
        writes,
        Item(
            "CloudTrail's data events, if a trail records Lambda's",
            events * prices["cloudtrail"]["data_event"],
            f"{events:,}",
        ),
    ]


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"


def total(items: Sequence[Item]) -> float:
    return sum(item.dollars for item in items)


def table(bills: Mapping[int, Sequence[Item]], data: Mapping[int, Sequence[Item]]) -> str:
    """The bills for each number of open sessions, side by side, in Markdown.

    Data transfer stands below the total, because it depends on where billing is.
    """
    sums = (f"**{total(items):,.2f}**" for items in bills.values())
    lines = [
        f"| US$ a month | {' | '.join(f'{open_:,} open' for open_ in bills)} |",
        "|---|" + "---:|" * len(bills),
        *(_row(items) for items in zip(*bills.values(), strict=True)),
        f"| **total** | {' | '.join(sums)} |",
        *(_row(items) for items in zip(*data.values(), strict=True)),
    ]
    return "\n".join(lines)


def database_table(written: Mapping[int, Sequence[Item]]) -> str:
    """What is written for each number of open sessions, side by side, in Markdown."""
    lines = [
        f"| a month | {' | '.join(f'{open_:,} open' for open_ in written)} |",
        "|---|" + "---:|" * len(written),
    ]
    for items in zip(*written.values(), strict=True):
        cells = [
            f"{item.amount}, ${item.dollars:,.2f}" if item.dollars else item.amount
            for item in items
        ]
        lines.append(f"| {items[0].name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(items: Sequence[Item]) -> str:
    """One item for each number of open sessions. An amount common to all is part of its name."""
    name, amounts = items[0].name, [item.amount for item in items]
    if len(set(amounts)) == 1:
        name += f": {amounts[0]}" if amounts[0] else ""
        cells = [f"{item.dollars:,.2f}" for item in items]
    else:
        cells = [f"{item.dollars:,.2f} ({item.amount})" for item in items]
    return f"| {name} | {' | '.join(cells)} |"


def template() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml_parse((ROOT / "template.yaml").read_text(encoding="utf-8"))
    return parsed


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make cost", description=__doc__)
    add = parser.add_argument
    cadence_help = "CHECK_CADENCE, e.g. '5s until 10m, 30s until 1h, 5m'"
    add("--open", type=count, nargs="+", default=OPEN, metavar="N", help="open sessions")
    add("--cadence", type=cadence, help=cadence_help)
    add("--sessions-last", type=duration, default="24h", help="how long one stays open, e.g. 24h")
    add("--latency", type=amount, default=100, metavar="MS", help="billing's latency")
    add("--billing", choices=WHERE, default="internet")
    add("--vpc", choices=VPC, help="add what a VPC costs, and the database's writes")
    add("--interval", type=count, metavar="S")
    add("--memory", type=count, metavar="MB", help="WorkerMemory")
    add("--in-flight", type=count, metavar="N", help="MaxConcurrency")
    add("--architecture", choices=("x86_64", "arm64"))
    add("--two-secrets", action="store_true")
    add("--tracing", action="store_true")
    add("--database", action="store_true", help="what the database writes, instead of the bill")
    add("--measure", action="store_true", help="run passes first and rewrite measured.toml")
    add("--write", action="store_true", help="rewrite the tables of docs/cost.md")
    return parser


def computed(arguments: argparse.Namespace) -> str:
    """The table for some arguments."""
    given: dict[str, object] = {
        "CheckIntervalSeconds": arguments.interval,
        "WorkerMemory": arguments.memory,
        "MaxConcurrency": arguments.in_flight,
        "Architecture": arguments.architecture,
        "ApiKeySecretArn": "another" if arguments.two_secrets else None,
        "Tracing": "ENABLED" if arguments.tracing else None,
    }
    stack = Stack.of(template(), {name: v for name, v in given.items() if v is not None})
    asked = Cadence.parse(arguments.cadence or f"{stack.interval}s")
    loads = [
        Load(
            open_,
            asked,
            arguments.sessions_last,
            arguments.latency / 1000,
            arguments.billing,
        )
        for open_ in arguments.open
    ]
    given_all = stack, read(MEASURED), read(PRICES)
    if arguments.database:
        return database_table({load.open: database(load, *given_all) for load in loads})
    if arguments.vpc:
        return table(
            {
                load.open: [
                    *bill(load, *given_all),
                    *in_vpc(load, stack, arguments.vpc, *given_all[1:]),
                ]
                for load in loads
            },
            {},
        )
    return table(
        {load.open: bill(load, *given_all) for load in loads},
        {load.open: data_out(load, *given_all) for load in loads},
    )


# The page's tables. A comment above each has its arguments.
TABLE = re.compile(r"(<!-- make cost(?: ARGS='(.*?)')? -->\n)(.*?)(<!-- /make cost -->)", re.DOTALL)


def page_with_tables(text: str) -> str:
    """The page with every table recomputed."""

    def renewed(found: re.Match[str]) -> str:
        head, arguments, _, end = found.groups()
        words = shlex.split(arguments or "")
        return f"{head}\n{computed(parser().parse_args(words))}\n\n{end}"

    return TABLE.sub(renewed, text)


def main() -> int:
    arguments = parser().parse_args()
    if arguments.measure:
        from bench.measure import measure  # noqa: PLC0415 (needs a database)

        MEASURED.write_text(measure(), encoding="utf-8")
    if arguments.write:
        PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    prices = read(PRICES)
    print(computed(arguments))
    print(f"\nList prices of {prices['region']}, {prices['date']}, without free tiers.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

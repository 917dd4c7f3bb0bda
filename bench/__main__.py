"""`make bench`: measure this monitor beside its alternatives, on one machine.

Servers run on one core, clients on the other. Every figure is the median of several rounds, in
which the programs take turns. Progress goes to stderr. The tables, or the raw numbers with
`--json`, go to stdout.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import cold_start, limits, loop, machine, passes, throughput, writes
from bench.machine import Machine
from bench.report import Results, progress

CASES: Mapping[str, Callable[[Machine, Results], None]] = {
    "throughput": throughput.measure,
    "processor": passes.processor,
    "loop": loop.at_size,
    "gaps": loop.gaps,
    "limits": limits.measure,
    "slow": passes.slow_billing,
    "writes": writes.writes,
    "snapshot": writes.snapshot,
    "million": passes.million,
    "workers": passes.workers,
    "reuse": passes.reuse,
    "idle": passes.idle,
    "status": passes.status,
    "imports": cold_start.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the raw numbers, not tables")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one round of the smallest sizes, as a trial",
    )
    parser.add_argument(
        "--case", action="append", choices=CASES, help="run only this case (may be repeated)"
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="also measure the monitor in that checkout of an earlier version",
    )
    given = parser.parse_args()
    machine.install()
    results = Results()
    with machine.running(before=given.before, quick=given.quick) as here:
        for name in given.case or CASES:
            progress(f"── {name}")
            CASES[name](here, results)
    # A missed target is no error: the machine may be shared.
    print(results.as_json() if given.json else results.as_markdown())


if __name__ == "__main__":
    main()

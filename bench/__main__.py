"""`make bench`: this monitor and what would otherwise be run, side by side, in one run.

Servers and clients have a core each. Every figure is the median of several rounds, in which the
programs take turns. Progress goes to stderr; the tables, or with `--json` the raw numbers, to
stdout.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import imports, loop, machine, passes, throughput
from bench.machine import Machine
from bench.report import Results, tell

CASES: Mapping[str, Callable[[Machine, Results], None]] = {
    "throughput": throughput.measure,
    "processor": passes.processor,
    "loop": loop.at_size,
    "gaps": loop.gaps,
    "slow": passes.slow_billing,
    "million": passes.million,
    "workers": passes.workers,
    "reuse": passes.reuse,
    "idle": passes.idle,
    "status": passes.status,
    "imports": imports.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the raw numbers, not tables")
    parser.add_argument(
        "--quick", action="store_true", help="one round of the smallest sizes: does it run at all?"
    )
    parser.add_argument(
        "--case", action="append", choices=CASES, help="only this one; may be given again"
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="measure also the monitor of that checkout of an earlier version",
    )
    given = parser.parse_args()
    machine.install()
    results = Results()
    with machine.running(before=given.before, quick=given.quick) as here:
        for name in given.case or CASES:
            tell(f"── {name}")
            CASES[name](here, results)
    # A shared machine may be too busy for a target; that is for the reader to judge.
    print(results.as_json() if given.json else results.as_markdown())


if __name__ == "__main__":
    main()

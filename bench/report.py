"""What has been measured, as tables: figures by program and condition, and targets by case."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.clients import Report

type Figures = dict[str, dict[str, list[Report]]]  # rounds by program, by condition


@dataclass(frozen=True, slots=True)
class Target:
    """What a case has shown, beside what it must; `met` is None where nothing is asked."""

    what: str
    at_least: str
    measured: str
    met: bool | None


@dataclass
class Results:
    """Everything a run has measured so far. Each figure is told as soon as it is there."""

    figures: Figures = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    def target(self, what: str, at_least: str, measured: str, *, met: bool) -> None:
        self._add(Target(what, at_least, measured, met))

    def state(self, what: str, measured: str) -> None:
        """A figure of which nothing is asked."""
        self._add(Target(what, "", measured, None))

    def _add(self, target: Target) -> None:
        self.targets.append(target)
        missed = "  ← NOT MET" if target.met is False else ""
        tell(f"{target.what}: {target.measured}{missed}")

    def as_markdown(self) -> str:
        tables = [
            _table("checks a second", self.figures, _rate_and_lost),
            _table("processor time of a check, µs", self.figures, _microseconds),
            _table("peak memory, MB", self.figures, lambda reports: f"{peak_mb(reports):.0f}"),
        ]
        rows = [["what", "at least", "measured", ""]]
        rows += [
            [t.what, t.at_least, t.measured, {True: "met", False: "NOT MET", None: ""}[t.met]]
            for t in self.targets
        ]
        return "\n\n".join(table for table in (*tables, _markdown(rows)) if table)

    def as_json(self) -> str:
        raw: dict[str, Any] = {"rounds": self.figures, "targets": [asdict(t) for t in self.targets]}
        return json.dumps(raw, indent=1)


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def rate(reports: Sequence[Report]) -> float:
    """Sessions that got their answer, a second."""
    return median(float(report["checked"] / report["seconds"]) for report in reports)


def cpu_seconds_a_check(reports: Sequence[Report]) -> float:
    return median(float(report["cpu_seconds"] / report["checked"]) for report in reports)


def peak_mb(reports: Sequence[Report]) -> float:
    return max(float(report["peak_mb"]) for report in reports)


def _rate_and_lost(reports: Sequence[Report]) -> str:
    lost = sum(max(0, report["sessions"] - report["checked"]) for report in reports)
    text = f"{rate(reports):,.0f}"
    return f"{text} ({lost / len(reports):,.0f} lost)" if lost else text


def _microseconds(reports: Sequence[Report]) -> str:
    return f"{cpu_seconds_a_check(reports) * 1e6:.0f}"


def _table(what: str, figures: Figures, cell: Any) -> str:  # noqa: ANN401 (a function of a list)
    if not figures:
        return ""
    programs = list(dict.fromkeys(label for rounds in figures.values() for label in rounds))
    if cell is not _rate_and_lost:  # what wrk takes is in a process of its own
        programs = [program for program in programs if "wrk" not in program]
    rows = [
        [program, *(cell(rounds[program]) for rounds in figures.values())] for program in programs
    ]
    return _markdown([[what, *figures], *rows])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])

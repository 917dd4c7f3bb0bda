"""What was measured, as tables: rounds by program and condition, and single figures."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.jobs import Report

type Rounds = dict[str, dict[str, list[Report]]]  # by condition, by program


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of a case beside its target. Without a target, `met` is None."""

    what: str
    target: str
    measured: str
    met: bool | None


@dataclass
class Results:
    """Everything measured so far. Each figure is also printed at once, as progress."""

    rounds: Rounds = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)

    def target(self, what: str, target: str, measured: str, *, met: bool) -> None:
        self._add(Figure(what, target, measured, met))

    def state(self, what: str, measured: str) -> None:
        """Add a figure without a target."""
        self._add(Figure(what, "", measured, None))

    def _add(self, figure: Figure) -> None:
        self.figures.append(figure)
        missed = "  ← NOT MET" if figure.met is False else ""
        progress(f"{figure.what}: {figure.measured}{missed}")

    def as_markdown(self) -> str:
        tables = [
            _table("checks a second", self.rounds, _rate_and_lost),
            _table("processor time of a check, µs", self.rounds, _microseconds),
            _table("peak memory, MB", self.rounds, lambda reports: f"{peak_mb(reports):.0f}"),
        ]
        rows = [["what", "target", "measured", ""]]
        rows += [
            [f.what, f.target, f.measured, {True: "met", False: "NOT MET", None: ""}[f.met]]
            for f in self.figures
        ]
        return "\n\n".join(table for table in (*tables, _markdown(rows)) if table)

    def as_json(self) -> str:
        raw: dict[str, Any] = {"rounds": self.rounds, "figures": [asdict(f) for f in self.figures]}
        return json.dumps(raw, indent=1)


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def rate(reports: Sequence[Report]) -> float:
    """Checks answered per second."""
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


def _table(what: str, conditions: Rounds, cell: Any) -> str:  # noqa: ANN401 (any function of reports)
    if not conditions:
        return ""
    programs = list(dict.fromkeys(label for rounds in conditions.values() for label in rounds))
    if cell is not _rate_and_lost:  # it runs in a process of its own
        programs = [program for program in programs if "wrk" not in program]
    rows = [
        [program, *(cell(rounds[program]) for rounds in conditions.values())]
        for program in programs
    ]
    return _markdown([[what, *conditions], *rows])


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])

"""How long a cold start spends on imports, from a package that has never run.

Lambda's file system is read-only, so Python caches no bytecode there: the build has to compile it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.machine import Machine, install_dependencies
from bench.programs import ROOT
from bench.report import Results
from local.package import add_bytecode

TURNS = 10  # for each of the machine's rounds
SCRIPT = (
    "import sys, time; began = time.perf_counter(); import {module}; "
    "print(time.perf_counter() - began, 'boto3' in sys.modules)"
)


def measure(machine: Machine, results: Results) -> None:
    with tempfile.TemporaryDirectory(dir=machine.directory) as directory:
        packages = [Path(directory) / "package"]
        _build(ROOT, packages[0])
        [source] = _seconds(machine, packages)
        if machine.before:
            packages.append(Path(directory) / "before")
            _build(machine.before, packages[1])
        add_bytecode(Path(directory))
        compiled, *before = _seconds(machine, packages)
    [boto3] = _seconds(machine, [None])
    results.target(
        "import of handlers.check, with bytecode as packaged",
        "≤ 120 ms",
        _milliseconds(median(compiled)),
        met=median(compiled) <= 0.120,
    )
    if before:
        ratio = median(now / then for now, then in zip(compiled, before[0], strict=True))
        results.state("import of handlers.check, before", _milliseconds(median(before[0])))
        results.state("import of handlers.check, compared with before", f"{ratio:.2f} times")
    results.state("import of handlers.check without bytecode", _milliseconds(median(source)))
    results.state("import of boto3, for comparison", _milliseconds(median(boto3)))


def _build(checkout: Path, package: Path) -> None:
    """Make the Lambda package: src and its requirements, without bytecode."""
    shutil.copytree(checkout / "src", package, ignore=shutil.ignore_patterns("__pycache__"))
    install_dependencies(checkout, package)


def _seconds(machine: Machine, packages: Sequence[Path | None]) -> list[list[float]]:
    """How long fresh interpreters take to import each package, in turns; None stands for boto3."""
    took: list[list[float]] = [[] for _ in packages]
    for _ in range(TURNS * machine.rounds):
        for package, seconds in zip(packages, took, strict=True):
            seconds.append(_import(machine, package))
    return took


def _import(machine: Machine, package: Path | None) -> float:
    isolated = ["-S"] if package else []
    command = ["taskset", "--cpu-list", str(machine.cores[1]), sys.executable, *isolated, "-c"]
    done = subprocess.run(
        [*command, SCRIPT.format(module="handlers.check" if package else "boto3")],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(package or "")},
    )
    seconds, has_boto3 = done.stdout.split()
    assert (has_boto3 == "True") == (package is None)
    return float(seconds)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"

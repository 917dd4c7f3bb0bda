"""How long a cold start spends on imports, from a package that has never run.

Lambda's file system is read-only, so Python caches no bytecode there: the build has to compile it.
"""

import compileall
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.machine import Machine
from bench.programs import ROOT
from bench.report import Results

SCRIPT = (
    "import sys, time; began = time.perf_counter(); import {module}; "
    "print(time.perf_counter() - began, 'boto3' in sys.modules)"
)


def measure(machine: Machine, results: Results) -> None:
    with tempfile.TemporaryDirectory(dir=machine.directory) as directory:
        package = Path(directory) / "package"
        _build(ROOT, package)
        source = _seconds(machine, package, "handlers.check")
        compileall.compile_dir(package, quiet=2)
        compiled = _seconds(machine, package, "handlers.check")
        if machine.before:
            _build(machine.before, Path(directory) / "before")
            compileall.compile_dir(Path(directory) / "before", quiet=2)
            before = _seconds(machine, Path(directory) / "before", "handlers.check")
            results.state("import of handlers.check, before", _milliseconds(before))
            results.state(
                "import of handlers.check, compared with before",
                f"{compiled / before:.2f} times",
            )
    boto3 = _seconds(machine, None, "boto3")
    results.target(
        "import of handlers.check, with bytecode as packaged",
        "≤ 120 ms",
        _milliseconds(compiled),
        met=compiled <= 0.120,
    )
    results.state("import of handlers.check without bytecode", _milliseconds(source))
    results.state("import of boto3, for comparison", _milliseconds(boto3))


def _build(checkout: Path, package: Path) -> None:
    """Make the Lambda package: src and its requirements, without bytecode."""
    shutil.copytree(checkout / "src", package, ignore=shutil.ignore_patterns("__pycache__"))
    uv = shutil.which("uv") or ROOT / ".uv/bin/uv"
    requirements = checkout / "src/requirements.txt"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--target", package, "-r", requirements], check=True
    )


def _seconds(machine: Machine, package: Path | None, module: str) -> float:
    """How long a fresh interpreter takes to import the module, from the package if given."""
    isolated = ["-S"] if package else []
    command = ["taskset", "--cpu-list", str(machine.cores[1]), sys.executable, *isolated, "-c"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(package or "")}
    took = []
    for _ in range(3 * machine.rounds):
        done = subprocess.run(
            [*command, SCRIPT.format(module=module)],
            check=True,
            capture_output=True,
            text=True,
            env=environment,
        )
        seconds, has_boto3 = done.stdout.split()
        assert module == "boto3" or has_boto3 == "False"
        took.append(float(seconds))
    return median(took)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"

"""`make mutants`: break one guard at a time in a copy of the tree; a test has to notice each.

Cosmic Ray makes the mutants and runs the tests; `tests.mutation.operators` says how it breaks code.
Where a mutant changes nothing, end its line in `# pragma: no mutate (reason)`: the line is left
alone. Not part of CI, because all modules take hours.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_item import MutationSpec, TestOutcome

from local.mariadb import mariadb_server
from tests.mutation.operators import NAMES

ROOT = Path(__file__).parents[2]
CORE = Path("src/core")

# The modules with guards, and the tests that are about them, the nearest first.
GUARDED = {
    "domain/decision.py": "tests/domain tests/store tests/passes",
    "domain/cadence.py": "tests/domain tests/passes",
    "store/[!_]*.py": "tests/store tests/passes",
    "passes/[!_]*.py": "tests/passes tests/store",
    "billing/[!_]*.py": "tests/billing tests/passes",
    "database/[!_]*.py": "tests/database tests/store",
}

PRAGMA = re.compile(r"# pragma: no mutate \(.+\)")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".uv", "node_modules", "__pycache__", ".*_cache", ".hypothesis"
)
# Loading the plug-ins that these tests do not use takes half of a short run. A test that hangs ends
# the run, even when this program is gone.
PYTEST = (
    "-m pytest -q -x -p no:cacheprovider -p anyio"
    " -o faulthandler_timeout=60 -o faulthandler_exit_on_timeout=true"
)
SLACK_SECONDS = 60  # more than four times what the tests take on unbroken code


def modules(wanted: str) -> dict[Path, str]:
    """The guarded modules whose path contains `wanted`, and the tests of each."""
    return {
        module.relative_to(ROOT): tests
        for pattern, tests in GUARDED.items()
        for module in sorted((ROOT / CORE).glob(pattern))
        if wanted in str(module)
    }


def mutants(module: Path) -> Iterator[MutationSpec]:
    """Every mutant of the module that is valid Python, each once."""
    source = (ROOT / module).read_text(encoding="utf-8")
    lines, seen = source.splitlines(), {source}
    nodes = list(ast_nodes(get_ast(source)))
    for name in NAMES:
        operator = get_operator(name)()
        at = [p for node in nodes for p in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(at):
            code = mutate_code(source, operator, occurrence)
            if code not in seen and not PRAGMA.search(lines[start[0] - 1]) and _compiles(code):
                seen.add(code)
                yield MutationSpec(module, name, occurrence, start, end)


def _compiles(code: str) -> bool:
    try:
        compile(code, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def enter_copy(tree: Path, parent: Path) -> None:
    """Change to a new copy of the tree, for this process and the tests that it starts."""
    copy = Path(tempfile.mkdtemp(dir=parent)) / "tree"
    shutil.copytree(tree, copy, ignore=NOT_COPIED if tree == ROOT else None)
    os.chdir(copy)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["PYTHONPATH"] = f"{copy / 'src'}:{copy}"


def command(tests: str) -> list[str]:
    return [sys.executable, *PYTEST.split(), *tests.split()]


def survives(mutant: MutationSpec, tests: str, timeout: float) -> tuple[MutationSpec, str]:
    """The mutant, and its diff if no test notices it."""
    result = mutate_and_test([mutant], " ".join(command(tests)), timeout)
    if result.test_outcome is TestOutcome.KILLED:
        return mutant, ""
    return mutant, result.diff or f"could not be tested: {result.output}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.split("\n")[0])
    parser.add_argument(
        "module", nargs="?", default="", help="only modules whose path contains this"
    )
    parser.add_argument("--list", action="store_true", help="count the mutants, run none")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    options = parser.parse_args()
    chosen = modules(options.module)
    found = {module: list(mutants(module)) for module in chosen}
    if options.list:
        for module, some in found.items():
            print(f"{len(some):5} {module}: {chosen[module]}")
        return 0
    began, survived = time.monotonic(), 0
    with ExitStack() as stack:
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if "TEST_DATABASE_URL" not in os.environ and shutil.which("mariadb-install-db"):
            (parent / "mariadb").mkdir()
            server = stack.enter_context(mariadb_server(parent / "mariadb"))
            os.environ["TEST_DATABASE_URL"] = server
        enter_copy(ROOT, parent)
        takes = dict.fromkeys(chosen.values(), 0.0)
        for tests in takes:
            start = time.monotonic()
            if subprocess.run(command(tests), check=False).returncode:
                print("These tests fail on unbroken code.")
                return 2
            takes[tests] = time.monotonic() - start
        pool = stack.enter_context(
            ProcessPoolExecutor(options.jobs, initializer=enter_copy, initargs=(Path.cwd(), parent))
        )
        stack.callback(pool.shutdown, cancel_futures=True)  # after Ctrl-C, wait only for a few
        runs = [
            pool.submit(survives, mutant, tests, 4 * takes[tests] + SLACK_SECONDS)
            for module, tests in chosen.items()
            for mutant in found[module]
        ]
        for run in runs:
            mutant, diff = run.result()
            if diff:
                survived += 1
                kind = mutant.operator_name.split("/")[1]
                print(f"\n{mutant.module_path}:{mutant.start_pos[0]} {kind}")
                print(*re.findall(r"^[+-](?![+-]{2} ).*", diff, re.MULTILINE), sep="\n", flush=True)
    print(
        f"\n{len(runs)} mutants of {len(chosen)} modules in {time.monotonic() - began:.0f} s:"
        f" {len(runs) - survived} noticed, {survived} survived"
    )
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())

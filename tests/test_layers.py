"""The rooms of `src` and the direction of their imports; `make check` runs this file."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
# From bottom to top. A room imports only from itself and from rows below its own.
LAYERS = [
    {"core.errors"},
    {"core.domain"},
    {"core.log", "core.metrics"},
    {"core.database", "core.billing"},
    {"core.settings"},
    {"core.store", "core.aws"},
    {"core.passes"},
    {"core.worker"},
    {"handlers"},
]
ROW = {room: row for row, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(path for path in SRC.rglob("*.py") if path.name != "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return "handlers" if parts[0] == "handlers" else ".".join(parts[:2])


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, also within functions and for type checkers."""
    names = {name_of(other) for other in MODULES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (member if member in names else node.module for member in members)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_only_from_rooms_below_its_own(path: Path) -> None:
    room = room_of(name_of(path))
    ours = {module for module in imports_of(path) if module.split(".")[0] in ("core", "handlers")}
    upwards = {
        module for module in ours if room_of(module) != room and ROW[room_of(module)] >= ROW[room]
    }
    assert not upwards


@pytest.mark.parametrize("path", [p for p in MODULES if room_of(name_of(p)) == "core.domain"])
def test_domain_imports_only_itself_and_the_standard_library(path: Path) -> None:
    for module in imports_of(path):
        assert module.split(".")[0] in sys.stdlib_module_names or room_of(module) == "core.domain"


def test_no_module_imports_itself_through_others() -> None:
    graph = {name_of(path): set(imports_of(path)) for path in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError

"""The house rules for tests."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
MAX_NAME = 75  # characters; the rest belongs into a docstring


def function_names() -> Iterator[tuple[Path, str]]:
    """Every function of a test module, with its file."""
    for file in TESTS.glob("**/test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield file, node.name


def test_no_test_name_is_longer_than_75_characters() -> None:
    found = [(file, name) for file, name in function_names() if name.startswith("test_")]
    assert len(found) > 100
    assert [(str(file), name) for file, name in found if len(name) > MAX_NAME] == []

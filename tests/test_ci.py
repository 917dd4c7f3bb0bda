"""CI runs every script in .ci."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(file.name for file in (ROOT / ".ci").iterdir())
CALLERS = [
    ROOT / "Makefile",
    *(ROOT / ".github/workflows").iterdir(),
    *(ROOT / ".ci").iterdir(),
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_called_by_make_ci_or_another_script(script: str) -> None:
    callers = [
        caller.name
        for caller in CALLERS
        if caller.name != script and calls(caller.read_text(encoding="utf-8"), script)
    ]

    assert callers, f"nothing calls .ci/{script}"


def calls(text: str, script: str) -> bool:
    """Whether a line that is not a comment names the script."""
    lines = (line.strip() for line in text.splitlines())
    return any(f".ci/{script}" in line for line in lines if not line.startswith("#"))

"""The README keeps up with the code and the template."""

import re
from pathlib import Path

import pytest
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from core.model import Outcome, Skip
from core.status import WORDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEMPLATE = yaml_parse((ROOT / "template.yaml").read_text(encoding="utf-8"))

VARIABLES = set(re.findall(r'"([A-Z][A-Z_]{4,})"', (ROOT / "src/core/settings.py").read_text()))
ALARMS = [name for name, r in TEMPLATE["Resources"].items() if r["Type"].endswith("::Alarm")]


@pytest.mark.parametrize("name", sorted({*VARIABLES, *TEMPLATE["Parameters"]}))
def test_every_setting_is_in_its_table(name: str) -> None:
    [table] = re.findall(r"## Settings\n(.*?)\n## ", README, re.DOTALL)
    assert f"`{name}`" in table


@pytest.mark.parametrize("name", ALARMS)
def test_every_alarm_is_explained(name: str) -> None:
    assert f"| `{name.removesuffix('Alarm')}` |" in README


@pytest.mark.parametrize("name", [*Outcome, *Skip, *WORDS])
def test_every_outcome_skip_and_word_is_told(name: str) -> None:
    assert f"`{name}`" in README


def test_every_target_of_make_that_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z0-9]+)\b(?! *=)", README)) <= targets

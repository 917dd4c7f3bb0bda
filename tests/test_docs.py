"""The documentation matches the code and the template, and its links work."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from core.billing.status_words import WORDS
from core.domain.model import Outcome, Skip
from core.domain.verdict import TROUBLE
from handlers.page import FILE as PAGE
from local.billing import BY_ID, MODES
from tests.support import ROOT, setting_variables

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {page.name: page.read_text(encoding="utf-8") for page in ROOT.glob("docs/*.md")}
TEMPLATE: dict[str, Any] = yaml_parse((ROOT / "template.yaml").read_text(encoding="utf-8"))

VARIABLES = setting_variables()
ALARMS = [name for name, r in TEMPLATE["Resources"].items() if r["Type"].endswith("::Alarm")]


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_an_existing_file_and_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    broken = []
    for link in links:
        if re.match(r"https://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.is_file() or (anchor and anchor not in anchors(target.read_text("utf-8"))):
            broken.append(link)
    assert broken == []


def test_the_readme_is_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= 200


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)", README))
    assert {f"docs/{name}" for name in DOCS} <= linked


def test_the_picture_exists_and_is_small() -> None:
    [picture] = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert (ROOT / picture).stat().st_size < 200_000


def test_the_diagram_matches_the_template() -> None:
    [diagram] = re.findall(r"```mermaid\n(.*?)```", README, re.DOTALL)
    shown = set(re.findall(r"\b([A-Z][a-z]+(?:[A-Z][a-z]+)+|Alarms|Dashboard)\b", diagram))
    types = ("Function", "StateMachine", "Serverless::Api", "Queue", "Topic", "Dashboard")
    deployed = {n for n, r in TEMPLATE["Resources"].items() if r["Type"].endswith(types)}
    assert shown - {"EventBridge", "MySQL"} == deployed


@pytest.mark.parametrize("name", sorted({*VARIABLES, *TEMPLATE["Parameters"]}))
def test_every_setting_is_in_the_table(name: str) -> None:
    table = DOCS["settings.md"].partition("\n## ")[0]
    assert f"`{name}`" in table


def setting_rows(text: str) -> list[str]:
    """The names and the default of each row in the settings' table, without links' addresses."""
    _, _, table = text.partition("| variable | stack parameter | default | meaning |\n")
    rows = table.partition("\n\n")[0].splitlines()[1:]
    return [re.sub(r"\]\([^)]*\)", "]", row).rpartition(" | ")[0] for row in rows]


def test_the_readme_has_the_settings_of_the_reference() -> None:
    assert setting_rows(README) == setting_rows(DOCS["settings.md"])


@pytest.mark.parametrize("name", ALARMS)
def test_every_alarm_has_a_paragraph(name: str) -> None:
    assert f"\n### {name.removesuffix('Alarm')}\n" in DOCS["operate.md"]


@pytest.mark.parametrize("name", [*Outcome, *Skip])
def test_every_outcome_and_skip_is_documented(name: str) -> None:
    assert f"`{name}`" in DOCS["operate.md"]


@pytest.mark.parametrize("word", WORDS)
def test_every_status_word_of_billing_is_documented(word: str) -> None:
    assert f"`{word}`" in DOCS["status-updates.md"]


def test_the_pages_messages_are_documented() -> None:
    documented = DOCS["operate.md"]
    for message in ("Lost contact with the monitor", "The monitor cannot report its state"):
        assert message in documented
        assert message in PAGE.read_text(encoding="utf-8")
    for cause, trouble in TROUBLE.items():
        assert trouble in documented, cause


def test_the_modes_of_the_simulated_billing_service_are_documented() -> None:
    assert ", ".join(f'"{mode}"' for mode in (BY_ID, *MODES)) in README


def test_every_make_target_named_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:`|\$ )make ([a-z0-9-]+)\b", text))
        assert named <= targets, page.name


def test_every_test_named_in_the_docs_exists() -> None:
    named = {
        (file, name)
        for page in PAGES
        for file, name in re.findall(
            r"`([\w/]+\.py)::(test_\w+)`", page.read_text(encoding="utf-8")
        )
    }
    existing = {
        (str(file.relative_to(ROOT / "tests")), name)
        for file in ROOT.glob("tests/**/test_*.py")
        for name in re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8"))
    }
    assert named
    assert named - existing == set()

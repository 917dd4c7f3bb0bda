"""The next step under the verdict is what the operator's guide says."""

import re
from pathlib import Path

import pytest

from core.domain.next_step import next_step
from core.domain.verdict import TROUBLE, Level, Verdict
from handlers.page import FILE as PAGE

GUIDE = (Path(__file__).parents[2] / "docs/operate.md").read_text(encoding="utf-8")
TABLE = GUIDE.partition("| it says |")[2].partition("\n\n")[0]
ROWS = [re.split(r" \| ", row.strip("| ")) for row in TABLE.splitlines()[2:]]
OF_THE_PAGE = ("Lost contact with the monitor", "The monitor cannot report its state")


@pytest.mark.parametrize(("says", "_means", "does"), ROWS, ids=[row[0][:30] for row in ROWS])
def test_the_guide_and_the_verdict_have_the_same_next_step(
    says: str, _means: str, does: str
) -> None:
    if does == "nothing":
        assert next_step(Verdict(Level.OK, says)) is None
        return
    [(text, heading)] = re.findall(r"^(.+\.) \[([\w ]+)\]\(#[\w-]+\)$", does)
    assert f"\n### {heading}\n" in GUIDE
    if says.startswith(OF_THE_PAGE):  # which has no answer to show
        page = PAGE.read_text(encoding="utf-8")
        assert f'"{text}", "{heading}"' in page
        return
    for headline in re.split(", (?=Billing)", says):
        step = next_step(Verdict(Level.CRITICAL, headline))
        assert step == (text, heading)


@pytest.mark.parametrize("trouble", TROUBLE.values())
def test_every_cause_has_a_next_step(trouble: str) -> None:
    assert next_step(Verdict(Level.CRITICAL, f"{trouble}: 2 of 9 open sessions")) is not None

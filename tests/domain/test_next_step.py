"""The next step under the verdict is what the operator's guide says."""

import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from core.domain.model import Outcome
from core.domain.other_monitors import OtherMonitor
from core.domain.verdict import Quiet
from core.domain.waiting import NOT_ASKED, Waiting
from handlers.page import FILE as PAGE
from testkit.clock import NOON
from tests.domain.facts import LIMITED, PAUSED, ago, verdict_of, waiting

GUIDE = (Path(__file__).parents[2] / "docs/operate.md").read_text(encoding="utf-8")
TABLE = GUIDE.partition("| it says |")[2].partition("\n\n")[0]
ROWS = [re.split(r" \| ", row.strip("| ")) for row in TABLE.splitlines()[2:]]
OF_THE_PAGE = ("Lost contact with the monitor", "The monitor cannot report its state")
# What leads to each sentence of the guide.
SITUATIONS: list[Mapping[str, object]] = [
    {"last_pass_at": ago(40)},
    {"has_api_key": False},
    {"other_monitors": [OtherMonitor("shop-b", ())]},
    {"starts_late_by": 12.0},
    {"quiet": Quiet(2400, 120)},
    {"outcomes": {"network_error": 128}, "waiting": Waiting(NOON, failing=128)},
    {"outcomes": {"not_found": 128}},
    waiting(unauthorized=1),
    PAUSED,
    LIMITED,
    *(waiting(**{cause: 100}) for cause in (NOT_ASKED, *(o for o in Outcome if o.is_error))),
]


def without_numbers(text: str) -> str:
    return re.sub(r" \([^)]*\)", "", re.sub(r"\d[\d,.:]*", "#", text))


@pytest.mark.parametrize(("says", "_means", "does"), ROWS, ids=[row[0][:30] for row in ROWS])
def test_the_guide_and_the_verdict_have_the_same_next_step(
    says: str, _means: str, does: str
) -> None:
    if does == "nothing":
        assert verdict_of({}).next_step is None
        return
    [(text, heading)] = re.findall(r"^(.+\.) \[([\w ]+)\]\(#[\w-]+\)$", does)
    assert f"\n### {heading}\n" in GUIDE
    if says.startswith(OF_THE_PAGE):  # which has no answer to show
        page = PAGE.read_text(encoding="utf-8")
        assert f'"{text}", "{heading}"' in page
        return
    verdicts = [verdict_of(facts) for facts in SITUATIONS]
    for headline in re.split(", (?=Billing)", says):
        start = without_numbers(headline).partition(": ")[0]
        steps = {v.next_step for v in verdicts if without_numbers(v.text).startswith(start)}
        assert steps == {(text, heading)}

"""What `make deploy-local` does besides starting servers; `make e2e` runs the whole of it."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from local import aws, deploy, mariadb

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC)
A_MINUTE = [NOON + timedelta(seconds=5 * n) for n in range(13)]


def test_a_minute_of_ticks_is_said_to_be_whole(capsys: pytest.CaptureFixture[str]) -> None:
    deploy.without_a_gap(A_MINUTE)

    assert capsys.readouterr().out == "13 ticks in 60 s, one every 5 s.\n"


def test_a_tick_that_is_missing_is_named() -> None:
    with pytest.raises(aws.DeployError, match=r"No pass was made in the slot of 12:00:35\."):
        deploy.without_a_gap([tick for tick in A_MINUTE if tick.second != 35])


def test_only_alarms_on_metric_math_are_left_out() -> None:
    def alarm(**properties: object) -> dict[str, object]:
        return {"Type": "AWS::CloudWatch::Alarm", "Properties": properties}

    template = {"Resources": {"A": alarm(Metrics=[]), "B": alarm(MetricName="Errors")}}

    assert aws.leave_out_metric_math(template) == ["A"]
    assert set(template["Resources"]) == {"B"}


def test_the_user_that_the_page_makes_is_the_one_that_is_tested() -> None:
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    file = (mariadb.SCHEMA / "user.sql").read_text(encoding="utf-8")

    [shown] = re.findall(r"```sql\n(CREATE USER .*?)```", page, re.DOTALL)
    assert file.endswith(shown)


def test_the_user_is_made_for_any_database_name_and_password() -> None:
    made, *granted = mariadb.user_statements("store", "watcher", "hunter2")

    assert made == "CREATE USER watcher@'%' IDENTIFIED BY 'hunter2'"
    assert all(re.fullmatch(r"GRANT .+ ON store\.\w+ TO watcher@'%'", g) for g in granted)

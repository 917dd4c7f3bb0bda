"""The parts of `make deploy-local` that need no servers; `make e2e` runs all of it."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from local import aws, deploy, mariadb

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 1, 15, 12, 0, 0, tzinfo=UTC)
ONE_MINUTE = [NOON + timedelta(seconds=5 * n) for n in range(13)]


def test_minute_without_gaps_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    deploy.check_for_gaps(ONE_MINUTE)

    assert capsys.readouterr().out == "13 ticks in 60 s, one every 5 s.\n"


def test_missing_tick_is_named() -> None:
    with pytest.raises(aws.DeployError, match=r"No pass for the slot of 12:00:35\."):
        deploy.check_for_gaps([tick for tick in ONE_MINUTE if tick.second != 35])


def test_what_the_emulator_does_not_support_is_replaced_or_removed(tmp_path: Path) -> None:
    def alarm(**properties: object) -> dict[str, object]:
        return {"Type": "AWS::CloudWatch::Alarm", "Properties": properties}

    loop = {"Type": "AWS::Serverless::StateMachine", "Properties": {"DefinitionUri": "loop.yaml"}}
    alarms = {"A": alarm(Metrics=[]), "B": alarm(MetricName="Errors")}
    paths = {"/": {"get": "a", "x-amazon-apigateway-any-method": "b"}}
    api = {"Properties": {"DefinitionBody": {"paths": paths}}, "Type": "AWS::Serverless::Api"}
    resources = {"CheckLoop": loop, "MonitorApi": api, **alarms}
    template: aws.Template = {"Resources": resources, "Conditions": {}}
    (tmp_path / "loop.yaml").write_text("StartAt: Minute")

    assert aws.adapt(template, tmp_path) == ["A"]
    assert set(template["Resources"]) == {"CheckLoop", "MonitorApi", "B"}
    assert paths == {"/": {"get": "a", **dict.fromkeys(aws.METHODS - {"get"}, "b")}}
    assert loop["Properties"] == {"Definition": {"StartAt": "Minute"}}


def test_database_user_in_the_docs_is_the_tested_one() -> None:
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    file = (mariadb.SCHEMA / "user.sql").read_text(encoding="utf-8")

    [shown] = re.findall(r"```sql\n(CREATE USER .*?)```", page, re.DOTALL)
    assert file.endswith(shown)


def test_user_statements_take_any_database_name_and_password() -> None:
    created, *granted = mariadb.user_statements("store", "watcher", "hunter2")

    assert created == "CREATE USER watcher@'%' IDENTIFIED BY 'hunter2'"
    assert all(re.fullmatch(r"GRANT .+ ON store\.\w+ TO watcher@'%'", g) for g in granted)

"""The stack on an emulated AWS that enforces its policies, from deployment to `sam delete`.

The tests share one stack and run in order. docs/deploy.md lists the limits of the emulator.
"""

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from local import aws, deploy
from local.billing import SimulatedBilling, running_billing
from tests.e2e.support import (
    API_KEY,
    PASSWORD,
    ROOT,
    Shop,
    curl,
    run,
    shop_on,
    show,
    trigger,
    wait_until,
)

SESSIONS = {f"session_{n}": f"checkout_active_{n}" for n in range(3)}
# Each takes a second, so they are too many for one worker with one request at a time.
SLOW_SESSIONS = {f"slow_{n}": f"checkout_slow_{n}" for n in range(12)}
# Seconds. Four of five ticks differ from those of the 5 s interval.
OTHER_INTERVAL = 6
# The schedule's minute, the wait for the first slot, and a cold start.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Deployment:
    """The stack, its parameters, its shop and billing service."""

    stack: aws.Stack
    parameters: Mapping[str, str]
    shop: Shop
    billing: SimulatedBilling
    resources_before: Mapping[str, set[str]]

    def ticks(self) -> dict[float, list[int]]:
        """The number of sessions that each pass of a tick has checked, by tick."""
        checked = defaultdict[float, list[int]](list)
        for row in deploy.finished_passes(self.shop.owner_url):
            checked[row.tick.timestamp()].append(row.checked)
        return checked

    def wait_for_ticks(self, seconds: float, condition: Callable[[set[float]], bool]) -> set[float]:
        deadline = time.monotonic() + seconds
        while not condition(found := set(self.ticks())):
            if time.monotonic() > deadline:
                show("\n".join(self.log()))
                pytest.fail(f"Not within {seconds:.0f} s; the last ticks: {sorted(found)[-5:]}")
            time.sleep(1)
        return found

    def executions(self) -> dict[str, str]:
        """The status of each execution of the loop; AWS does not list Express executions."""
        arn = self.stack.outputs()["LoopArn"]
        found = self.stack.client("stepfunctions").list_executions(stateMachineArn=arn)
        return {execution["executionArn"]: execution["status"] for execution in found["executions"]}

    def log(self) -> list[str]:
        """The log lines of the check function."""
        group = f"/aws/lambda/{aws.STACK}-CheckSessions"
        events = self.stack.client("logs").filter_log_events(logGroupName=group)["events"]
        return [event["message"].rstrip() for event in events]


@pytest.fixture(scope="module", autouse=True)
def deploy_local() -> Iterator[subprocess.Popen[str]]:
    """Run `make deploy-local ARGS=--once` during the other tests; it mostly waits."""
    command = [sys.executable, "-m", "local.deploy", "--once"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    yield process
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def deployment(
    package: Path, server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    with (
        shop_on(server) as shop,
        running_billing(api_key=API_KEY) as billing,
        aws.running_aws(tmp_path_factory.mktemp("aws")) as url,
    ):
        shop.add(SESSIONS)
        arns = deploy.create_secrets(
            url,
            API_KEY,
            {
                "username": shop.user,
                "password": PASSWORD,
                "host": "127.0.0.1",
                "port": shop.port,
                "dbname": shop.database,
            },
        )
        before = resources(url)
        stack = aws.Stack(url, package, show)
        # ApiLogRole and what accounts require; functions then run under a boundary.
        parameters = arns | {
            "BillingApiUrl": billing.url,
            "ApiLogRole": "CREATE",
            "RolePath": "/shop/",
        }
        stack.deploy(parameters)
        curl(stack.outputs()["HealthUrl"])  # it creates the monitor's tables
        yield Deployment(stack, parameters, shop, billing, before)


def test_each_session_is_checked_in_every_slot_of_a_minute(
    deployment: Deployment,
) -> None:
    first = min(deployment.wait_for_ticks(START_SECONDS, bool))
    slots = {first + 5 * n for n in range(13)}

    deployment.wait_for_ticks(START_SECONDS, lambda ticks: max(ticks) > max(slots))

    checked = deployment.ticks()
    deployment.shop.show("After a minute")
    assert {slot: sum(checked[slot]) for slot in slots} == dict.fromkeys(slots, len(SESSIONS))
    assert deployment.billing.requests.total() >= len(SESSIONS) * len(slots)


def test_execution_of_the_loop_ends_when_the_next_one_starts(deployment: Deployment) -> None:
    # Alone it would run for three minutes; the previous test took one.
    deployment.wait_for_ticks(
        START_SECONDS, lambda _: "SUCCEEDED" in deployment.executions().values()
    )


def test_health_needs_no_key(deployment: Deployment) -> None:
    reply = curl(deployment.stack.outputs()["HealthUrl"])

    assert (reply.status, reply.body["status"]) == (200, "ok")


def test_page_is_public_and_its_data_needs_the_key(deployment: Deployment) -> None:
    page = deployment.stack.outputs()["PageUrl"]

    output = run(["curl", "-sS", "-m", "60", "-w", "%{http_code} %{content_type}", page])
    assert output.stdout.rpartition("</html>")[2].split() == ["200", "text/html;", "charset=utf-8"]
    assert curl(f"{page}api/status").status == 403
    status = curl(f"{page}api/status", api_key=deployment.stack.api_key())
    assert status.status == 200
    assert status.body["verdict"]


@pytest.mark.parametrize(
    ("path", "allow"), [("api/health", "GET, HEAD"), ("api/test/checkout-sessions", "POST")]
)
def test_unknown_method_gets_405_with_the_methods_that_there_are(
    deployment: Deployment, path: str, allow: str
) -> None:
    url = f"{deployment.stack.outputs()['PageUrl']}{path}"
    found = "\n%{http_code} %header{allow}"
    command = ["curl", "-sS", "-m", "60", "-X", "DELETE", "-w", found, url]

    output = run(
        [*command, "-H", f"x-api-key: {deployment.stack.api_key()}"],
        shown=[*command, "-H", "x-api-key: …"],
    )
    body, _, line = output.stdout.rpartition("\n")
    assert line == f"405 {allow}"
    assert json.loads(body)["success"] is False


def test_trigger_is_refused_without_a_key(deployment: Deployment) -> None:
    reply = curl(deployment.stack.outputs()["TriggerUrl"], "-X", "POST")

    assert reply == (403, {"message": "Forbidden"})


@pytest.mark.parametrize(
    ("event", "status"), [("trigger.json", 200), ("trigger-bad-body.json", 400)]
)
def test_trigger_with_a_key_accepts_an_empty_body_but_not_a_bad_one(
    deployment: Deployment, event: str, status: int
) -> None:
    url = deployment.stack.outputs()["TriggerUrl"].removesuffix("/api/test/checkout-sessions")

    reply = trigger(url, event, api_key=deployment.stack.api_key())

    assert (reply.status, reply.body["success"]) == (status, status == 200)


def test_missing_right_to_read_the_key_is_reported(
    deployment: Deployment,
) -> None:
    def without_read_api_key(template: aws.Template) -> None:
        document = template["Resources"]["PassPolicy"]["Properties"]["PolicyDocument"]
        document["Statement"] = [  # a statement may be an Fn::If
            statement for statement in document["Statement"] if "ReadApiKey" not in str(statement)
        ]

    # The changed setting replaces warm functions, which have already read the key.
    deployment.stack.deploy(
        {**deployment.parameters, "LogLevel": "DEBUG"}, change=without_read_api_key
    )

    url = deployment.stack.outputs()["TriggerUrl"]
    reply = curl(url, "-X", "POST", api_key=deployment.stack.api_key())
    arn = deployment.parameters["ApiKeySecretArn"]
    assert reply.status == 500
    assert reply.body["message"].startswith(f"APIKEY_SECRET_ARN names the secret {arn}, which")
    assert "not authorized to perform: secretsmanager:GetSecretValue" in reply.body["message"]
    assert curl(deployment.stack.outputs()["HealthUrl"]).status == 503


def test_update_takes_effect_and_an_overloaded_leader_starts_helpers(
    deployment: Deployment,
) -> None:
    deployment.shop.add(SLOW_SESSIONS)
    changed = {"CheckIntervalSeconds": f"{OTHER_INTERVAL}", "MaxConcurrency": "1"}
    deployment.stack.deploy({**deployment.parameters, **changed})

    ticks = deployment.wait_for_ticks(
        START_SECONDS, lambda ticks: len([tick for tick in ticks if tick % 5]) >= 4
    )

    deployment.shop.show("With another interval and one request at a time")
    assert all(tick % OTHER_INTERVAL == 0 for tick in ticks if tick % 5)
    assert max(len([n for n in checked if n]) for checked in deployment.ticks().values()) > 1
    assert not [line for line in deployment.log() if "could not be started" in line]


def test_disabled_monitor_ends_its_loop_but_keeps_its_trigger(deployment: Deployment) -> None:
    deployment.stack.deploy({**deployment.parameters, "MonitorState": "DISABLED"})
    executions = deployment.executions()

    wait_until(
        lambda: "RUNNING" not in deployment.executions().values(), "the end of the loop", 240
    )

    assert deployment.executions().keys() == executions.keys()
    url = deployment.stack.outputs()["TriggerUrl"]
    assert curl(url, "-X", "POST", api_key=deployment.stack.api_key()).status == 200


def test_api_can_require_signed_requests_instead_of_the_key(deployment: Deployment) -> None:
    key = deployment.stack.api_key()
    deployment.stack.deploy({"ApiAuth": "IAM"})
    outputs = deployment.stack.outputs()

    signed = ("--aws-sigv4", f"aws:amz:{aws.REGION}:execute-api", "--user", "test:test")
    assert curl(outputs["HealthUrl"]).status in (200, 503)
    assert curl(outputs["TriggerUrl"], "-X", "POST", api_key=key).status == 403
    assert curl(outputs["TriggerUrl"], "-X", "POST", *signed).status == 200


def test_deleted_stack_leaves_only_what_the_docs_name(deployment: Deployment) -> None:
    deployment.stack.delete()

    left = {
        kind: found - deployment.resources_before[kind]
        for kind, found in resources(deployment.stack.url).items()
        if found - deployment.resources_before[kind]
    }
    show(f"Left after sam delete: {left}")
    [role] = left.pop("iam roles")
    assert "ApiGatewayLogRole" in role
    assert left == {"s3 buckets": {bucket for bucket in left["s3 buckets"] if "aws-sam" in bucket}}


def test_make_deploy_local_shows_a_deployment_and_a_minute_of_ticks(
    deploy_local: subprocess.Popen[str],
) -> None:
    output, _ = deploy_local.communicate(timeout=600)

    show(output)
    assert deploy_local.returncode == 0
    assert '"status": "ok"' in output
    assert "Checked 11 of 11 open checkout sessions." in output
    assert "13 ticks in 60 s, one every 5 s." in output


def resources(url: str) -> dict[str, set[str]]:
    """The resources of the emulated account by kind, except secrets and the stack itself."""
    listings: dict[str, tuple[str, str, str, str]] = {
        "iam roles": ("iam", "list_roles", "Roles", "RoleName"),
        "functions": ("lambda", "list_functions", "Functions", "FunctionName"),
        "state machines": ("stepfunctions", "list_state_machines", "stateMachines", "name"),
        "schedules": ("scheduler", "list_schedules", "Schedules", "Name"),
        "schedule groups": ("scheduler", "list_schedule_groups", "ScheduleGroups", "Name"),
        "parameters": ("ssm", "describe_parameters", "Parameters", "Name"),
        "log groups": ("logs", "describe_log_groups", "logGroups", "logGroupName"),
        "queues": ("sqs", "list_queues", "QueueUrls", ""),
        "topics": ("sns", "list_topics", "Topics", "TopicArn"),
        "alarms": ("cloudwatch", "describe_alarms", "MetricAlarms", "AlarmName"),
        "dashboards": ("cloudwatch", "list_dashboards", "DashboardEntries", "DashboardName"),
        "apis": ("apigateway", "get_rest_apis", "items", "id"),
        "api keys": ("apigateway", "get_api_keys", "items", "id"),
        "usage plans": ("apigateway", "get_usage_plans", "items", "id"),
        "s3 buckets": ("s3", "list_buckets", "Buckets", "Name"),
    }
    found: dict[str, set[str]] = {}
    for kind, (service, operation, key, name) in listings.items():
        answer: dict[str, Any] = getattr(aws.client(url, service), operation)()
        found[kind] = {item[name] if name else item for item in answer.get(key, [])}
    return found

"""The stack on an emulated AWS that enforces its policies, from the deployment to `sam delete`.

One stack goes through the tests in their order. What the emulator cannot show is in docs/deploy.md.
"""

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
# Each takes a second: too many for one worker that sends one request at a time.
SLOW_SESSIONS = {f"slow_{n}": f"checkout_slow_{n}" for n in range(12)}
# Its ticks are at other seconds than those of 5 s, every fifth apart.
OTHER_INTERVAL = 6
# A start every minute, the time until an execution's first tick, and a cold start.
START_SECONDS = 120.0


@dataclass(frozen=True)
class Site:
    """The stack, the parameters it was deployed with, and what it works on."""

    stack: aws.Stack
    parameters: Mapping[str, str]
    shop: Shop
    billing: SimulatedBilling
    before: Mapping[str, set[str]]

    def ticks(self) -> dict[float, list[int]]:
        """How many sessions each pass of a tick has checked, by the tick."""
        checked = defaultdict[float, list[int]](list)
        for one in deploy.passes(self.shop.owner_url):
            checked[one.tick.timestamp()].append(one.checked)
        return checked

    def wait_for_ticks(self, seconds: float, holds: Callable[[set[float]], bool]) -> set[float]:
        deadline = time.monotonic() + seconds
        while not holds(found := set(self.ticks())):
            if time.monotonic() > deadline:
                show("\n".join(self.log()))
                pytest.fail(f"Not within {seconds:.0f} s; the last ticks: {sorted(found)[-5:]}")
            time.sleep(1)
        return found

    def executions(self) -> dict[str, str]:
        """The status of each execution of the loop; AWS has no such list of Express ones."""
        arn = self.stack.outputs()["LoopArn"]
        found = self.stack.client("stepfunctions").list_executions(stateMachineArn=arn)
        return {execution["executionArn"]: execution["status"] for execution in found["executions"]}

    def log(self) -> list[str]:
        """The check function's."""
        group = f"/aws/lambda/{aws.STACK}-CheckSessions"
        events = self.stack.client("logs").filter_log_events(logGroupName=group)["events"]
        return [event["message"].rstrip() for event in events]


@pytest.fixture(scope="module", autouse=True)
def deploy_local() -> Iterator[subprocess.Popen[str]]:
    """`make deploy-local ARGS=--once`, beside the other tests; most of its time it waits."""
    command = [sys.executable, "-m", "local.deploy", "--once"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    yield process
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def site(package: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with (
        shop_on(server) as shop,
        running_billing(api_key=API_KEY) as billing,
        aws.running_aws(tmp_path_factory.mktemp("aws")) as url,
    ):
        shop.add(SESSIONS)
        arns = deploy.put_secrets(
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
        parameters = arns | {"BillingApiUrl": billing.url}
        stack.deploy(parameters)
        curl(stack.outputs()["HealthUrl"])  # it makes the monitor's tables
        yield Site(stack, parameters, shop, billing, before)


def test_ticks_come_without_a_gap_for_a_minute_and_check_each_session_once_a_slot(
    site: Site,
) -> None:
    first = min(site.wait_for_ticks(START_SECONDS, bool))
    slots = {first + 5 * n for n in range(13)}

    site.wait_for_ticks(START_SECONDS, lambda ticks: max(ticks) > max(slots))

    checked = site.ticks()
    site.shop.show("After a minute")
    assert {slot: sum(checked[slot]) for slot in slots} == dict.fromkeys(slots, len(SESSIONS))
    assert site.billing.requests.total() >= len(SESSIONS) * len(slots)


def test_an_execution_of_the_loop_ends_when_it_hears_of_the_next_one(site: Site) -> None:
    # It would go on for three minutes; the ticks before took one.
    site.wait_for_ticks(START_SECONDS, lambda _: "SUCCEEDED" in site.executions().values())


def test_health_needs_no_key(site: Site) -> None:
    reply = curl(site.stack.outputs()["HealthUrl"])

    assert (reply.status, reply.body["status"]) == (200, "ok")


def test_the_page_is_open_and_what_it_shows_needs_the_key(site: Site) -> None:
    page = site.stack.outputs()["PageUrl"]

    said = run(["curl", "-sS", "-m", "60", "-w", "%{http_code} %{content_type}", page])
    assert said.stdout.rpartition("</html>")[2].split() == ["200", "text/html;", "charset=utf-8"]
    assert curl(f"{page}api/status").status == 403
    status = curl(f"{page}api/status", api_key=site.stack.api_key())
    assert status.status == 200
    assert status.body["verdict"]


def test_the_trigger_is_refused_without_a_key(site: Site) -> None:
    reply = curl(site.stack.outputs()["TriggerUrl"], "-X", "POST")

    assert reply == (403, {"message": "Forbidden"})


@pytest.mark.parametrize(
    ("event", "status"), [("trigger.json", 200), ("trigger-bad-body.json", 400)]
)
def test_the_trigger_with_a_key_takes_an_empty_body_and_refuses_a_bad_one(
    site: Site, event: str, status: int
) -> None:
    url = site.stack.outputs()["TriggerUrl"].removesuffix("/api/test/checkout-sessions")

    reply = trigger(url, event, api_key=site.stack.api_key())

    assert (reply.status, reply.body["success"]) == (status, status == 200)


def test_without_the_right_to_read_the_key_the_function_says_so_in_one_sentence(
    site: Site,
) -> None:
    def without_read_api_key(template: aws.Template) -> None:
        document = template["Resources"]["PassPolicy"]["Properties"]["PolicyDocument"]
        document["Statement"] = [  # it may hang on a condition
            statement for statement in document["Statement"] if "ReadApiKey" not in str(statement)
        ]

    # Another setting, because functions that run already have read the key.
    site.stack.deploy({**site.parameters, "LogLevel": "DEBUG"}, change=without_read_api_key)

    url = site.stack.outputs()["TriggerUrl"]
    reply = curl(url, "-X", "POST", api_key=site.stack.api_key())
    arn = site.parameters["ApiKeySecretArn"]
    assert reply.status == 500
    assert reply.body["message"].startswith(f"APIKEY_SECRET_ARN names the secret {arn}, which")
    assert "not authorized to perform: secretsmanager:GetSecretValue" in reply.body["message"]
    assert curl(site.stack.outputs()["HealthUrl"]).status == 503


def test_an_update_takes_effect_and_a_tick_that_is_too_much_for_one_worker_starts_others(
    site: Site,
) -> None:
    site.shop.add(SLOW_SESSIONS)
    changed = {"CheckIntervalSeconds": f"{OTHER_INTERVAL}", "MaxConcurrency": "1"}
    site.stack.deploy({**site.parameters, **changed})

    ticks = site.wait_for_ticks(
        START_SECONDS, lambda ticks: len([tick for tick in ticks if tick % 5]) >= 4
    )

    site.shop.show("With another interval, and one request at a time")
    assert all(tick % OTHER_INTERVAL == 0 for tick in ticks if tick % 5)
    assert max(len([n for n in checked if n]) for checked in site.ticks().values()) > 1
    assert not [line for line in site.log() if "could not be started" in line]


def test_a_monitor_that_is_switched_off_ends_its_loop_and_keeps_its_trigger(site: Site) -> None:
    site.stack.deploy({**site.parameters, "MonitorState": "DISABLED"})
    executions = site.executions()

    wait_until(lambda: "RUNNING" not in site.executions().values(), "the loop's end", 240)

    assert site.executions().keys() == executions.keys()
    url = site.stack.outputs()["TriggerUrl"]
    assert curl(url, "-X", "POST", api_key=site.stack.api_key()).status == 200


def test_a_stack_that_is_deleted_leaves_what_the_docs_name(site: Site) -> None:
    site.stack.delete()

    left = {
        kind: found - site.before[kind]
        for kind, found in resources(site.stack.url).items()
        if found - site.before[kind]
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
    """What is in the emulated account, by kind; secrets and the stack's own record apart."""
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

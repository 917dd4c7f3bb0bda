"""The template as CloudFormation gets it: what SAM turns it into, without AWS."""

import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from core.metrics import METRICS, NAMESPACE
from core.settings import Settings
from core.worker import FINISH_SECONDS
from handlers import routes
from tests import cloudformation
from tests.cloudformation import REQUIRED, SECRET, STACK, Resource, Stack

ROOT = Path(__file__).parents[1]
EVENTS = ROOT / "events"
VALIDATOR = ROOT / "tests/stepfunctions/node_modules/asl-validator/dist/bin/asl-validator.js"

# Statements on every resource, and why AWS accepts nothing narrower.
WIDE_STATEMENTS = {
    "Trace": "X-Ray has no resource for traces",
    "LogErrors": "the log delivery API has no resources",
    "JoinVpc": "the network interface does not exist yet; describing has no resources",
}
AWS_POLICIES = {
    "AmazonAPIGatewayPushToCloudWatchLogs": "AWS made it for API Gateway's one role in an account",
}

# Types whose names are shared by all regions of an account: CloudWatch's dashboards, IAM and S3.
GLOBAL_TYPES = {
    "AWS::CloudWatch::Dashboard",
    "AWS::IAM::Role",
    "AWS::IAM::ManagedPolicy",
    "AWS::S3::Bucket",
}
ANY = "x-amazon-apigateway-any-method"
USER_ARN = "arn:aws:rds-db:eu-central-1:123456789012:dbuser:cluster-ABC/monitor"
BUS = "arn:aws:events:eu-central-1:210987654321:event-bus/central/shop"
TOPIC = "arn:aws:sns:eu-central-1:123456789012:ops"

# The AWS metrics used here, and the dimension of each.
AWS_METRICS = {
    ("AWS/Lambda", "Errors"): "FunctionName",
    ("AWS/Lambda", "Throttles"): "FunctionName",
    ("AWS/Lambda", "Invocations"): "FunctionName",
    ("AWS/Lambda", "ConcurrentExecutions"): "FunctionName",
    ("AWS/Scheduler", "InvocationAttemptCount"): "ScheduleGroup",
    ("AWS/Scheduler", "InvocationDroppedCount"): "ScheduleGroup",
    ("AWS/States", "ExecutionsFailed"): "StateMachineArn",
    ("AWS/States", "ExecutionsTimedOut"): "StateMachineArn",
    ("AWS/SQS", "ApproximateNumberOfMessagesVisible"): "QueueName",
}

type Metric = tuple[str, str, tuple[tuple[str, object], ...]]  # namespace, name, dimensions


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    return cloudformation.template()


@pytest.fixture(scope="module")
def resources() -> dict[str, Resource]:
    return cloudformation.translated()


@pytest.fixture(scope="module")
def definition(resources: dict[str, Resource]) -> dict[str, Any]:
    """The loop's definition as Step Functions gets it."""
    text = json.dumps(cloudformation.definition())
    for name, value in resources["CheckLoop"]["Properties"]["DefinitionSubstitutions"].items():
        filled = {"CheckIntervalSeconds": "5", "AWS::Partition": "aws"}
        text = text.replace(
            f"${{{name}}}", filled.get(value.get("Ref"), f"arn:aws:lambda:::{name}")
        )
    rendered: dict[str, Any] = json.loads(text)
    return rendered


def of_type(resources: Mapping[str, Resource], kind: str) -> dict[str, dict[str, Any]]:
    """The properties of the resources of a type, by name."""
    return {
        name: resource["Properties"]
        for name, resource in resources.items()
        if resource["Type"] == kind
    }


class TestResources:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("CheckLoop", "AWS::StepFunctions::StateMachine"),
            ("CheckLoopEveryMinute", "AWS::Scheduler::Schedule"),
            ("CheckSessionsFunction", "AWS::Lambda::Function"),
            ("CheckSessionsFunctionEventInvokeConfig", "AWS::Lambda::EventInvokeConfig"),
            ("ApiFunction", "AWS::Lambda::Function"),
            ("MonitorApi", "AWS::ApiGateway::RestApi"),
            ("MonitorApiliveStage", "AWS::ApiGateway::Stage"),
            ("MonitorApiApiKey", "AWS::ApiGateway::ApiKey"),
            ("MonitorApiUsagePlan", "AWS::ApiGateway::UsagePlan"),
            ("FailedChecks", "AWS::SQS::Queue"),
            ("Alarms", "AWS::SNS::Topic"),
            ("Dashboard", "AWS::CloudWatch::Dashboard"),
        ],
    )
    def test_sam_creates_it(self, resources: dict[str, Resource], name: str, kind: str) -> None:
        assert resources[name]["Type"] == kind

    def test_an_express_loop_is_started_every_minute_with_bounded_retries(
        self, resources: dict[str, Resource]
    ) -> None:
        loop = resources["CheckLoop"]["Properties"]
        schedule = resources["CheckLoopEveryMinute"]["Properties"]

        assert loop["StateMachineType"] == "EXPRESS"
        assert loop["LoggingConfiguration"]["Level"] == "ERROR"
        assert schedule["ScheduleExpression"] == "rate(1 minute)"
        assert schedule["FlexibleTimeWindow"] == {"Mode": "OFF"}
        assert schedule["State"] == {"Ref": "MonitorState"}
        assert schedule["Target"]["RetryPolicy"]["MaximumEventAgeInSeconds"] == 60

    def test_nothing_is_traced_unless_requested(self, resources: dict[str, Resource]) -> None:
        loop = resources["CheckLoop"]["Properties"]
        stage = resources["MonitorApiliveStage"]["Properties"]

        assert loop["TracingConfiguration"] == {"Enabled": {"Fn::If": ["IsTraced", True, False]}}
        assert stage["TracingEnabled"] == {"Fn::If": ["IsTraced", True, False]}
        for function in of_type(resources, "AWS::Lambda::Function").values():
            mode = {"Fn::If": ["IsTraced", "Active", "PassThrough"]}
            assert function["TracingConfig"] == {"Mode": mode}
        tracing = [s for s in statements(resources) if "xray:" in json.dumps(s)]
        assert [s["Sid"] for s in tracing] == ["Trace", "Trace"]
        assert not [s for s in statements(resources, {}) if "xray:" in json.dumps(s)]

    def test_two_stacks_in_one_account_do_not_collide(self, resources: dict[str, Resource]) -> None:
        """Nor do stacks of the same name in two regions, which share what is global."""
        names = [
            (resource["Type"], str(value))
            for resource in resources.values()
            for key, value in resource.get("Properties", {}).items()
            # Names of stages, metrics and inline policies only count within their own resource.
            if key.endswith("Name") and key not in ("StageName", "MetricName", "PolicyName")
        ]

        assert [name for _, name in names if not re.search(r"'Ref'|AWS::StackName", name)] == []
        of_global = [name for kind, name in names if kind in GLOBAL_TYPES]
        assert of_global == ["{'Fn::Sub': '${AWS::StackName}-${AWS::Region}'}"]

    def test_the_accounts_log_role_is_kept_unless_asked_and_never_deleted(
        self, resources: dict[str, Resource]
    ) -> None:
        """Without the role that the account's setting names, all its REST APIs stop logging."""
        created = {"ApiGatewayAccount", "ApiGatewayLogRole"}

        assert not created & set(Stack().resources)
        assert created <= set(Stack({"ApiLogRole": "CREATE"}).resources)
        for name, resource in resources.items():
            policies = (resource.get("DeletionPolicy"), resource.get("UpdateReplacePolicy"))
            assert policies == (("Retain", "Retain") if name in created else (None, None))

    def test_the_failed_checks_queue_is_encrypted(self, resources: dict[str, Resource]) -> None:
        assert resources["FailedChecks"]["Properties"]["SqsManagedSseEnabled"] is True

    @pytest.mark.parametrize("region", ["cn-north-1", "cn-northwest-1", "us-gov-west-1"])
    def test_other_partitions_do_not_name_the_commercial_one(self, region: str) -> None:
        stack = Stack({name: "" for name in REQUIRED if name.endswith("Arn")}, region=region)

        rendered = json.dumps([stack.resources, stack.outputs])

        assert f"arn:{'aws-cn' if region.startswith('cn-') else 'aws-us-gov'}:" in rendered
        assert "arn:aws:" not in rendered
        assert not re.findall(r"[\w.-]*console\.aws\.amazon\.com", rendered)

    def test_a_failed_check_is_not_retried_but_reported(
        self, resources: dict[str, Resource]
    ) -> None:
        config = resources["CheckSessionsFunctionEventInvokeConfig"]["Properties"]

        assert config["MaximumRetryAttempts"] == 0
        assert config["MaximumEventAgeInSeconds"] == 60
        assert config["DestinationConfig"]["OnFailure"]["Destination"] == {
            "Fn::GetAtt": ["FailedChecks", "Arn"]
        }

    def test_the_worker_outlives_a_request_at_any_allowed_timeout(
        self, template: dict[str, Any], resources: dict[str, Resource]
    ) -> None:
        max_timeout = template["Parameters"]["RequestTimeoutSeconds"]["MaxValue"]

        timeout = resources["CheckSessionsFunction"]["Properties"]["Timeout"]

        assert timeout >= 2 * max_timeout
        assert timeout - max_timeout - FINISH_SECONDS > 0

    def test_every_handler_exists(self, resources: dict[str, Resource]) -> None:
        for function in of_type(resources, "AWS::Lambda::Function").values():
            module, _, name = function["Handler"].rpartition(".")

            assert callable(getattr(importlib.import_module(module), name))
            assert function["Runtime"] == "python3.13"

    def test_every_function_has_a_log_group_with_a_retention(
        self, resources: dict[str, Resource]
    ) -> None:
        groups = of_type(resources, "AWS::Logs::LogGroup")

        assert set(groups) == {"CheckLoopLogs", "CheckSessionsLogs", "ApiLogs", "ApiAccessLogs"}
        for days, access in (("0", "14"), ("365", "365")):
            stack = Stack({"AccessLogRetentionDays": days})
            for name in groups:
                expected = access if name == "ApiAccessLogs" else "14"
                assert stack.properties(name)["RetentionInDays"] == expected
        for function in of_type(resources, "AWS::Lambda::Function").values():
            assert function["LoggingConfig"]["LogGroup"]["Ref"] in groups


class TestParameters:
    def test_each_is_described_and_in_a_group(self, template: dict[str, Any]) -> None:
        parameters = template["Parameters"]
        interface = template["Metadata"]["AWS::CloudFormation::Interface"]
        grouped = [name for group in interface["ParameterGroups"] for name in group["Parameters"]]

        assert sorted(grouped) == sorted(parameters)
        assert all(parameter["Description"] for parameter in parameters.values())

    def test_the_defaults_are_those_of_the_code(
        self, template: dict[str, Any], resources: dict[str, Resource]
    ) -> None:
        env = environment(template, resources)

        assert Settings.from_env(env) == Settings.from_env(
            {
                "APIKEY_SECRET_ARN": REQUIRED["ApiKeySecretArn"],
                "DATABASE_SECRET_ARN": REQUIRED["DatabaseSecretArn"],
                "BILLING_API_URL": REQUIRED["BillingApiUrl"],
            }
        )

    def test_the_code_accepts_both_ends_of_every_range(
        self, template: dict[str, Any], resources: dict[str, Resource]
    ) -> None:
        for name, parameter in template["Parameters"].items():
            for end in ("MinValue", "MaxValue"):
                if end in parameter:
                    Settings.from_env(environment(template, resources, {name: parameter[end]}))

    @pytest.mark.parametrize(
        ("name", "good", "bad"),
        [
            ("BillingApiUrl", "http://billing:4000/api", "billing:4000"),
            ("CheckCadence", "5s until 10m, 30s until 1h, 5m", "5s until 10m"),
            ("CheckCadence", "1m", "60"),
            ("CheckCadence", "", "5"),
            ("ApiKeySecretArn", REQUIRED["ApiKeySecretArn"], f"{SECRET}billing/key"),
            ("ApiKeySecretArn", "", "the-key"),
            ("CheckCadence", "5s-until-10m,30s-until-1h,5m", "5s-until-10m"),
            ("DatabaseSecretArn", f"{SECRET}rds!db-0b2f-AbCdEf", f"{SECRET}shop"),
            ("DatabaseUserArn", f"{USER_ARN}", "monitor"),
            ("EventBusName", "shop-events", "arn:aws:sns:eu-central-1:123456789012:bus"),
            ("EventBusName", BUS, f"{BUS}:x"),
            ("ApiAllowedCidrs", "203.0.113.0/24,2001:db8::/32", "203.0.113.0/24, 10.0.0.0/8"),
            ("ApiVpcEndpointIds", "vpce-1,vpce-2a", "vpce-1, vpce-2"),
            ("RolePath", "/shop/monitor/", "shop"),
            ("PermissionsBoundary", "arn:aws:iam::123456789012:policy/limit", "limit"),
            ("EncryptionKeyArn", "arn:aws:kms:eu-west-1:123456789012:key/1-a", "alias/shop"),
            ("AlarmTopicArn", "arn:aws-cn:sns:cn-north-1:123456789012:ops", "ops"),
            ("SecretsKeyArn", "", "alias/shop"),
            ("BillingStatusMap", '{"paid": "success"}', "paid=success"),
            ("SessionExpiresAfter", "24h", "a day"),
            ("EventBusName", "", "my bus"),
            ("AlarmEmail", "ops@example.com", "ops"),
            ("AlarmEmail", "", "ops@example"),
        ],
    )
    def test_a_pattern_accepts_good_and_refuses_bad_values(
        self, template: dict[str, Any], name: str, good: str, bad: str
    ) -> None:
        pattern = template["Parameters"][name]["AllowedPattern"]

        assert re.search(pattern, good)
        assert not re.search(pattern, bad)


def environment(
    template: Mapping[str, Any],
    resources: Mapping[str, Resource],
    parameters: Mapping[str, object] | None = None,
    conditions: Container[str] = ("HasApiKeySecret",),
) -> dict[str, str]:
    """The worker's environment in a stack with these parameters and true conditions."""
    values: dict[str, object] = {"AWS::StackName": STACK}
    for name, parameter in template["Parameters"].items():
        values[name] = parameter.get("Default")
    values |= REQUIRED | dict(parameters or {})
    variables = resources["CheckSessionsFunction"]["Properties"]["Environment"]["Variables"]

    def rendered(value: Any) -> str:  # noqa: ANN401 (JSON)
        match value:
            case {"Ref": referred}:
                return str(values[referred])
            case {"Fn::If": [condition, then, otherwise]}:
                return rendered(then if condition in conditions else otherwise)
        return str(value)

    return {name: rendered(value) for name, value in variables.items()}


class TestPermissions:
    def test_no_statement_allows_an_action_by_a_wildcard(
        self, resources: dict[str, Resource]
    ) -> None:
        found = [s for s in statements(resources) if s["Effect"] == "Allow"]

        assert len(found) > 10
        for statement in found:
            assert not [action for action in as_list(statement["Action"]) if "*" in action]

    def test_only_what_aws_cannot_narrow_covers_every_resource(
        self, resources: dict[str, Resource]
    ) -> None:
        wide = {
            statement.get("Sid")
            for statement in statements(resources)
            if "*" in json.dumps(statement["Resource"]) and statement["Effect"] == "Allow"
        }

        assert wide == set(WIDE_STATEMENTS)

    def test_aws_managed_policies_are_used_only_for_a_reason(
        self, resources: dict[str, Resource]
    ) -> None:
        attached = {
            str(policy["Fn::Sub"]).rpartition("/")[2]
            for role in of_type(resources, "AWS::IAM::Role").values()
            for policy in role.get("ManagedPolicyArns", [])
            if policy != {"Ref": "PassPolicy"}
        }

        assert attached == set(AWS_POLICIES)

    def test_the_functions_read_the_two_secrets_and_no_other(
        self, resources: dict[str, Resource]
    ) -> None:
        readable = [
            statement["Resource"]
            for statement in statements(resources)
            if "secretsmanager:GetSecretValue" in as_list(statement["Action"])
        ]

        assert readable == [{"Ref": "ApiKeySecretArn"}, {"Ref": "DatabaseSecretArn"}]

    def test_one_secret_may_hold_the_api_key_and_the_database_address(
        self, template: dict[str, Any], resources: dict[str, Resource]
    ) -> None:
        env = environment(template, resources, {"ApiKeySecretArn": ""}, conditions={})
        readable = [
            statement["Resource"]
            for statement in statements(resources, {"HasSecretsKey", "HasDatabaseSecret"})
            if "secretsmanager:GetSecretValue" in as_list(statement["Action"])
        ]

        assert env["APIKEY_SECRET_ARN"] == env["DATABASE_SECRET_ARN"]
        assert readable == [{"Ref": "DatabaseSecretArn"}]

    @pytest.mark.parametrize(
        ("bus", "resource"),
        [
            ("shop", "arn:aws:events:eu-central-1:123456789012:event-bus/shop"),
            (BUS, BUS),
        ],
    )
    def test_the_functions_publish_only_to_the_configured_bus(
        self, bus: str, resource: str
    ) -> None:
        stack = Stack({"EventBusName": bus, "StatusUpdates": "true"})

        [found] = [s for s in stack.statements() if s["Action"] == "events:PutEvents"]
        assert found["Resource"] == resource

    def test_the_loop_and_the_worker_invoke_only_the_worker(
        self, resources: dict[str, Resource]
    ) -> None:
        invocable = {
            statement["Sid"]: statement["Resource"]
            for statement in statements(resources)
            if "lambda:InvokeFunction" in as_list(statement["Action"])
        }

        worker = {"Fn::GetAtt": ["CheckSessionsFunction", "Arn"]}
        assert invocable == {"StartChecks": worker, "StartHelpers": worker}
        assert resources["StartHelpers"]["Properties"]["Roles"] == [{"Ref": "CheckSessionsRole"}]


def statements(
    resources: Mapping[str, Resource], conditions: Container[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Every statement that applies under these conditions; None for all statements."""
    documents = [
        policy["PolicyDocument"]
        for role in of_type(resources, "AWS::IAM::Role").values()
        for policy in role.get("Policies", [])
    ]
    for kind in ("AWS::IAM::ManagedPolicy", "AWS::IAM::Policy"):
        documents += [policy["PolicyDocument"] for policy in of_type(resources, kind).values()]
    for document in documents:
        for statement in document["Statement"]:
            match statement:
                case {"Fn::If": [condition, then, _]}:
                    if conditions is None or condition in conditions:
                        yield then
                case _:
                    yield statement


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


class TestApi:
    def test_only_paths_without_shop_data_need_no_api_key(
        self, resources: dict[str, Resource]
    ) -> None:
        paths = resources["MonitorApi"]["Properties"]["Body"]["paths"]
        open_methods = {
            path: set(methods)
            for path, methods in paths.items()
            if any("security" not in settings for settings in methods.values())
        }

        assert open_methods == {
            "/": {ANY},
            "/api/health": {"get", "head", ANY},
            "/api/openapi.json": {ANY},
            "/api/operate.md": {ANY},
        }
        for path in paths.keys() - open_methods.keys():
            for settings in paths[path].values():
                assert settings["security"] == [{"api_key": []}]

    def test_every_method_reaches_the_function_which_answers_405_itself(
        self, resources: dict[str, Resource]
    ) -> None:
        paths = resources["MonitorApi"]["Properties"]["Body"]["paths"]
        [permission] = of_type(resources, "AWS::Lambda::Permission").values()

        for methods in paths.values():
            assert ANY in methods
            for settings in methods.values():
                integration = settings["x-amazon-apigateway-integration"]
                assert (integration["type"], integration["httpMethod"]) == ("aws_proxy", "POST")
                assert "functions/${ApiFunction.Arn}/" in integration["uri"]["Fn::Sub"]
        assert permission["FunctionName"] == {"Ref": "ApiFunction"}
        assert permission["SourceArn"]["Fn::Sub"].endswith(":${MonitorApi}/*")

    def test_every_method_is_throttled(self, resources: dict[str, Resource]) -> None:
        every, *health = resources["MonitorApiliveStage"]["Properties"]["MethodSettings"]
        plan = resources["MonitorApiUsagePlan"]["Properties"]

        assert (every["ResourcePath"], every["HttpMethod"]) == ("/*", "*")
        assert every["ThrottlingRateLimit"] <= 10
        assert plan["Throttle"]["RateLimit"] <= every["ThrottlingRateLimit"]
        assert [one["HttpMethod"] for one in health] == ["GET", "HEAD"]
        for method in health:
            assert method["ResourcePath"] == "/~1api~1health"
            assert method["ThrottlingRateLimit"] <= 2

    def test_a_body_is_validated_with_the_limits_and_words_of_the_code(
        self, resources: dict[str, Resource]
    ) -> None:
        body = resources["MonitorApi"]["Properties"]["Body"]
        trigger = body["paths"]["/api/test/checkout-sessions"]["post"]
        model = body["components"]["schemas"]["triggerbody"]
        ids = model["properties"]["session_ids"]
        refusals = body["x-amazon-apigateway-gateway-responses"]
        refusal = refusals["BAD_REQUEST_BODY"]
        validator = body["x-amazon-apigateway-request-validators"][
            trigger["x-amazon-apigateway-request-validator"]
        ]

        assert validator["validateRequestBody"] is True
        assert trigger["requestBody"]["required"] is False
        assert (model["additionalProperties"], "required" in model) == (False, False)
        assert (ids["minItems"], ids["maxItems"]) == (1, routes.MAX_IDS)
        assert ids["items"] == {"type": "string", "minLength": 1, "maxLength": routes.MAX_ID_LENGTH}
        assert refusal["statusCode"] == "400"
        assert json.loads(refusal["responseTemplates"]["application/json"]) == {
            "success": False,
            "message": f"{routes.BODY_FORM}.",
        }
        for kind in ("DEFAULT_4XX", "DEFAULT_5XX"):
            assert refusals[kind]["responseTemplates"]["application/json"] == (
                '{"success": false, "message": $context.error.messageString}'
            )

    def test_access_logs_are_json_without_the_key(self, resources: dict[str, Resource]) -> None:
        text = resources["MonitorApiliveStage"]["Properties"]["AccessLogSetting"]["Format"]
        variables = set(json.loads(text).values())

        assert "$context.status" in variables
        assert "$context.identity.apiKey" not in variables
        assert not [name for name in variables if "authorizer" in name or "header" in name]


class TestMonitoring:
    def test_every_alarm_has_a_description_and_notifies_the_topic(
        self, resources: dict[str, Resource]
    ) -> None:
        alarms = of_type(resources, "AWS::CloudWatch::Alarm")

        assert set(alarms) == {
            "NoPassAlarm",
            "SessionsWaitingAlarm",
            "OverdueAlarm",
            "UnauthorizedAlarm",
            "UnknownStatusAlarm",
            "LimitedAlarm",
            "EventsFailedAlarm",
            "WorkerErrorsAlarm",
            "WorkerThrottlesAlarm",
            "LoopFailedAlarm",
            "ApiErrorsAlarm",
        }
        for alarm in alarms.values():
            assert alarm["AlarmDescription"]
        for given, topic in (("", {"Ref": "Alarms"}), (TOPIC, TOPIC)):
            stack = Stack({"AlarmTopicArn": given, "AlarmEmail": "ops@example.com"})
            assert ("Alarms" in stack.resources) == (not given)
            assert ("AlarmSubscription" in stack.resources) == (not given)
            for name in alarms:
                assert stack.properties(name)["AlarmActions"] == [topic]
                assert stack.properties(name)["OKActions"] == [topic]

    def test_a_loop_that_is_switched_off_raises_no_alarm(
        self, resources: dict[str, Resource]
    ) -> None:
        """The schedule's end is a change to a state without data, which is told while it is on."""
        alarm = resources["NoPassAlarm"]["Properties"]
        assert alarm["InsufficientDataActions"] == alarm["AlarmActions"]
        assert alarm["ActionsEnabled"] == {"Fn::If": ["IsOn", True, False]}

    def test_every_metric_of_an_alarm_or_a_widget_exists(
        self, resources: dict[str, Resource]
    ) -> None:
        metrics = {*alarm_metrics(resources), *widget_metrics(resources)}

        assert len(metrics) > 20
        for namespace, name, dimensions in metrics:
            if namespace == NAMESPACE:
                assert name in METRICS
                assert dimensions == (("service", "${AWS::StackName}"),)
            else:
                [(dimension, _)] = dimensions
                assert AWS_METRICS[namespace, name] == dimension

    def test_the_code_emits_them_with_these_dimensions(
        self, template: dict[str, Any], resources: dict[str, Resource]
    ) -> None:
        emitted = subprocess.run(
            [sys.executable, "-c", "from core import metrics; metrics.measure_failure()"],
            cwd=ROOT / "src",
            env=environment(template, resources),
            capture_output=True,
            text=True,
            check=True,
        )

        record = json.loads(emitted.stdout)
        [directive] = record["_aws"]["CloudWatchMetrics"]
        assert directive["Namespace"] == "CheckoutSessionMonitor"
        assert directive["Dimensions"] == [["service"]]
        assert record["service"] == STACK

    def test_the_dashboard_shows_the_business_first_and_the_logs_last(
        self, resources: dict[str, Resource]
    ) -> None:
        widgets = dashboard(resources)["widgets"]

        assert widgets == sorted(widgets, key=lambda widget: (widget["y"], widget["x"]))
        assert widgets[0]["properties"]["metrics"][0][1] == "SessionsOpen"
        assert [widget["type"] for widget in widgets].index("log") == len(widgets) - 1
        assert all(widget["x"] + widget["width"] <= 24 for widget in widgets)


def plain(value: object) -> object:
    """A reference as `!Sub` writes it."""
    match value:
        case {"Ref": name}:
            return f"${{{name}}}"
        case {"Fn::GetAtt": [name, attribute]}:
            return f"${{{name}.{attribute}}}"
    return value


def alarm_metrics(resources: Mapping[str, Resource]) -> Iterator[Metric]:
    for alarm in of_type(resources, "AWS::CloudWatch::Alarm").values():
        queries = alarm.get("Metrics", [{"MetricStat": {"Metric": alarm}}])
        for metric in (query["MetricStat"]["Metric"] for query in queries if "MetricStat" in query):
            dimensions = tuple((d["Name"], plain(d["Value"])) for d in metric["Dimensions"])
            yield metric["Namespace"], metric["MetricName"], dimensions


def widget_metrics(resources: Mapping[str, Resource]) -> Iterator[Metric]:
    for widget in dashboard(resources)["widgets"]:
        before: list[str] = []
        for line in widget["properties"].get("metrics", []):
            given = [part for part in line if isinstance(part, str)]
            if not given:  # an expression over the others
                continue
            # A dot repeats the value of the line before in this position.
            full = [before[place] if part == "." else part for place, part in enumerate(given)]
            yield full[0], full[1], tuple(zip(full[2::2], full[3::2], strict=True))
            before = full


def dashboard(resources: Mapping[str, Resource]) -> dict[str, Any]:
    body, _ = resources["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"]
    parsed: dict[str, Any] = json.loads(body)
    return parsed


type Break = Callable[[dict[str, Any]], object]

BROKEN: dict[str, Break] = {
    "a Next that is not a state": lambda states: states["StartCheck"].update(Next="Nowhere"),
    "a Catch to an unknown state": lambda states: states["StartCheck"]["Catch"][0].update(Next="X"),
    "a broken expression in a Wait": lambda states: states["WaitForSlot"].update(
        Timestamp="{% $fromMillis($slot * 1000 %}"
    ),
    "a broken expression in the payload": lambda states: states["StartCheck"]["Arguments"][
        "Payload"
    ].update(tick="{% $fromMillis(( %}"),
    "a broken condition": lambda states: states["IsLastSlotPast"]["Choices"][0].update(
        Condition="{% $slot >> %}"
    ),
    "an unreachable state": lambda states: states["IsLastSlotPast"].pop("Default"),
    "a Wait without a time": lambda states: states["WaitForSlot"].pop("Timestamp"),
}


class TestDefinition:
    @pytest.mark.slow
    def test_it_is_valid(self, definition: dict[str, Any], tmp_path: Path) -> None:
        assert validator_findings(definition, tmp_path) == ""

    @pytest.mark.slow
    @pytest.mark.parametrize("break_it", BROKEN.values(), ids=BROKEN)
    def test_the_validator_finds_what_is_broken(
        self, definition: dict[str, Any], tmp_path: Path, break_it: Break
    ) -> None:
        broken = copy.deepcopy(definition)
        break_it(broken["States"])

        assert "is invalid" in validator_findings(broken, tmp_path)

    def test_it_ends_before_an_express_execution_must_end(self, definition: dict[str, Any]) -> None:
        assert definition["TimeoutSeconds"] <= 300

    def test_it_starts_checks_asynchronously_with_their_tick(
        self, definition: dict[str, Any]
    ) -> None:
        arguments = definition["States"]["StartCheck"]["Arguments"]

        assert arguments["InvocationType"] == "Event"
        assert set(arguments["Payload"]) == {"tick"}


def validator_findings(definition: Mapping[str, Any], directory: Path) -> str:
    """The findings of asl-validator; empty if the definition is valid."""
    node = shutil.which("node")
    if node is None or not VALIDATOR.exists():
        reason = "asl-validator is not installed: npm ci --prefix tests/stepfunctions"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    file = directory / "definition.json"
    file.write_text(json.dumps(definition))
    ran = subprocess.run(
        [node, VALIDATOR, "--json-path", file], capture_output=True, text=True, check=False
    )
    assert ran.returncode in (0, 1), ran.stderr
    return "" if ran.returncode == 0 else ran.stdout + ran.stderr


class TestEvents:
    def test_there_is_one_for_each_entry_point(self) -> None:
        assert {file.stem for file in EVENTS.iterdir()} == {
            "tick",
            "helper",
            "no-tick",
            "health",
            "trigger",
            "trigger-with-ids",
            "trigger-bad-body",
            "page",
            "status",
            "session",
            "sessions",
            "openapi",
            "operate",
        }

    def test_requests_use_methods_that_the_api_has(self, resources: dict[str, Resource]) -> None:
        paths = resources["MonitorApi"]["Properties"]["Body"]["paths"]
        description = json.loads(routes.OPENAPI.read_text())
        events = [json.loads(file.read_text()) for file in EVENTS.iterdir()]
        requests = {(e["path"], e["httpMethod"].lower()) for e in events if "httpMethod" in e}

        assert {path for path, _ in requests} == set(paths)
        assert requests == {
            (path, method)
            for path, methods in description["paths"].items()
            for method in methods
            if method != "head"
        }


class TestSamConfig:
    def test_changes_to_prod_need_confirmation_and_validation_lints(self) -> None:
        config = tomllib.loads((ROOT / "samconfig.toml").read_text())

        assert config["prod"]["deploy"]["parameters"]["confirm_changeset"] is True
        for name in ("default", "dev", "prod"):
            assert config[name]["validate"]["parameters"]["lint"] is True
            assert config[name]["build"]["parameters"]["cached"] is True
        for name in ("dev", "prod"):
            assert config[name]["deploy"]["parameters"]["capabilities"] == "CAPABILITY_IAM"

    def test_the_parameters_that_it_sets_exist(self, template: dict[str, Any]) -> None:
        config = tomllib.loads((ROOT / "samconfig.toml").read_text())
        overrides = [
            command["parameters"].get("parameter_overrides", "")
            for commands in config.values()
            if isinstance(commands, dict)
            for command in commands.values()
        ]

        named = {name for text in overrides for name in re.findall(r"(\w+)=", text)}
        assert named
        assert named <= set(template["Parameters"])

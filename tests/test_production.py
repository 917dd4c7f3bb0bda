"""What a reviewer of the stack asks, on the template that SAM renders with each parameter."""

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest

from core.errors import SettingsError
from core.settings import Settings
from tests.cloudformation import REQUIRED, ROOT, Stack, template

REGIONS = ["eu-central-1", "us-east-1", "cn-north-1", "us-gov-west-1"]
BOUNDARY = "arn:aws:iam::123456789012:policy/limit"
KEY = "arn:aws:kms:eu-central-1:123456789012:key/1234-abcd"
IAM_DATABASE = {
    "DatabaseAuth": "IAM",
    "DatabaseUserArn": "arn:aws:rds-db:eu-central-1:123456789012:dbuser:cluster-ABC/monitor",
    "DatabaseHost": "shop.cluster-abc.eu-central-1.rds.amazonaws.com",
    "DatabaseName": "shop",
    "DatabaseTls": "VERIFY",
    "DatabaseSecretArn": "",
}


def environment(stack: Stack) -> dict[str, str]:
    variables = stack.properties("CheckSessionsFunction")["Environment"]["Variables"]
    return {name: str(value) for name, value in variables.items()}


def test_the_template_is_small_enough_for_a_call_without_a_bucket() -> None:
    """As it is sent, without comments and indentation."""
    assert len(json.dumps(template(), separators=(",", ":")).encode()) < 51_200


@pytest.mark.parametrize("region", REGIONS)
def test_the_default_parameters_are_accepted_in_every_partition(region: str) -> None:
    stack = Stack(region=region)
    assert stack.refusals() == []
    assert Settings.from_env(environment(stack)).billing_api_url == REQUIRED["BillingApiUrl"]
    assert stack.properties("Dashboard")["DashboardName"] == f"shop-monitor-{region}"


def needs_key(methods: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether all methods of a path need the API key; either all or none do."""
    [security] = {str(operation.get("security")) for operation in methods.values()}
    return security == "[{'api_key': []}]"


class TestTls:
    def test_the_api_refuses_tls_before_1_2_and_logs_the_version(self) -> None:
        stack = Stack()
        api = stack.properties("MonitorApi")
        assert api["SecurityPolicy"] == "SecurityPolicy_TLS13_1_2_PFS_PQ_2025_09"
        assert api["EndpointAccessMode"] in ("BASIC", "STRICT")  # these policies need one
        log = stack.properties("MonitorApiliveStage")["AccessLogSetting"]["Format"]
        assert '"tlsVersion": "$context.tlsVersion"' in log

    @pytest.mark.parametrize("variable", ["BILLING_API_URL", "BILLING_TOKEN_URL"])
    @pytest.mark.parametrize(
        ("url", "allow", "accepted"),
        [
            ("https://billing.example.com/a", "false", True),
            ("http://billing.internal/a", "false", False),
            ("http://billing.internal/a", "true", True),
            ("http://localhost.example/a", "false", False),
            ("http://127.0.0.1:4000/a", "false", True),
            ("http://localhost:4000/a", "false", True),
        ],
    )
    def test_http_for_billing_fails_the_deployment_as_it_fails_a_pass(
        self, url: str, allow: str, variable: str, *, accepted: bool
    ) -> None:
        parameters = {"AllowHttp": allow}
        if variable == "BILLING_API_URL":
            parameters["BillingApiUrl"] = url
        else:
            parameters |= {"BillingApiUrl": "https://billing/a", "BillingTokenUrl": url}
        stack = Stack(parameters)
        guard = stack.properties("HttpNeedsAllowHttp")
        assert bool(re.fullmatch(guard["AllowedPattern"], guard["Value"])) == accepted
        for function in ("CheckSessionsFunction", "ApiFunction"):
            assert "HttpNeedsAllowHttp" in stack.resources[function]["DependsOn"]
        if accepted:
            Settings.from_env(environment(stack))
        else:
            with pytest.raises(SettingsError, match=variable):
                Settings.from_env(environment(stack))


class TestDatabase:
    def test_new_stacks_of_the_documented_way_verify_tls(self) -> None:
        config = (ROOT / "samconfig.toml").read_text(encoding="utf-8")
        deploys = re.findall(r"\[(?:dev|prod)\.deploy\.parameters\](.*?)\n\n", config, re.DOTALL)
        assert [("DatabaseTls=VERIFY" in deploy) for deploy in deploys] == [True, True]
        assert template()["Parameters"]["DatabaseTls"]["Default"] == "PREFER"

    def test_a_secret_of_rds_needs_host_and_name_as_parameters(self) -> None:
        parameters = {
            "DatabaseSecretArn": REQUIRED["DatabaseSecretArn"].replace("shop/", "rds!db-"),
            "DatabaseHost": "db",
            "DatabaseName": "shop",
        }
        stack = Stack(parameters)
        assert stack.refusals() == []
        variables = environment(stack)
        assert (variables["DATABASE_HOST"], variables["DATABASE_NAME"]) == ("db", "shop")

    def test_iam_signs_in_as_one_user_and_reads_no_secret_of_the_database(self) -> None:
        stack = Stack(IAM_DATABASE)
        assert stack.refusals() == []
        assert Settings.from_env(environment(stack))
        signs_in = [s["Resource"] for s in stack.statements() if s["Action"] == "rds-db:connect"]
        assert signs_in == [IAM_DATABASE["DatabaseUserArn"]]
        read = "secretsmanager:GetSecretValue"
        reads = [s["Resource"] for s in stack.statements() if s["Action"] == read]
        assert reads == [REQUIRED["ApiKeySecretArn"]]
        assert not [s for s in Stack().statements() if s["Action"] == "rds-db:connect"]

    @pytest.mark.parametrize(
        "missing",
        ["DatabaseUserArn", "DatabaseHost", "DatabaseName", "DatabaseTls", "ApiKeySecretArn"],
    )
    def test_iam_without_what_it_needs_is_refused_before_anything_changes(
        self, missing: str
    ) -> None:
        value = "PREFER" if missing == "DatabaseTls" else ""
        [refusal] = Stack(IAM_DATABASE | {missing: value}).refusals()
        assert refusal.startswith("DatabaseAuth=IAM needs")
        assert missing in refusal

    def test_a_password_needs_a_secret(self) -> None:
        refusals = Stack({"DatabaseSecretArn": ""}).refusals()
        assert refusals == ["DatabaseAuth=SECRET needs DatabaseSecretArn."]


class TestIam:
    def test_every_role_has_the_path_and_the_boundary(self) -> None:
        given = {"RolePath": "/shop/", "PermissionsBoundary": BOUNDARY, "ApiLogRole": "CREATE"}
        roles = Stack(given).of_type("AWS::IAM::Role")
        assert len(roles) == 5
        for role in roles.values():
            assert (role["Path"], role["PermissionsBoundary"]) == ("/shop/", BOUNDARY)

    def test_without_them_no_role_has_a_path_so_an_update_replaces_none(self) -> None:
        for role in Stack().of_type("AWS::IAM::Role").values():
            assert not {"Path", "PermissionsBoundary"} & set(role)

    def test_the_code_of_a_function_in_a_vpc_may_not_use_ec2(self) -> None:
        """Lambda's own requests for the interfaces carry no source function."""
        in_vpc = Stack({"SubnetIds": "subnet-1,subnet-2", "SecurityGroupIds": "sg-1"})
        assert in_vpc.properties("ApiFunction")["VpcConfig"]["SubnetIds"] == [
            "subnet-1",
            "subnet-2",
        ]
        denied = [s for s in in_vpc.statements("PassPolicy") if s["Effect"] == "Deny"]
        assert [(s["Action"], s["Resource"], s["Condition"]) for s in denied] == [
            ("ec2:*", "*", {"Null": {"lambda:SourceFunctionArn": "false"}})
        ]
        assert "ec2:" not in str(Stack().statements())

    def test_a_key_encrypts_every_log_group_and_the_topic(self) -> None:
        stack = Stack({"EncryptionKeyArn": KEY})
        groups = stack.of_type("AWS::Logs::LogGroup")
        assert {group["KmsKeyId"] for group in groups.values()} == {KEY}
        assert stack.properties("Alarms")["KmsMasterKeyId"] == KEY


def body(stack: Stack) -> dict[str, Any]:
    found: dict[str, Any] = stack.properties("MonitorApi")["Body"]
    return found


class TestWhoMayCallTheApi:
    def test_a_key_is_needed_by_default(self) -> None:
        scheme = body(Stack())["components"]["securitySchemes"]["api_key"]
        assert scheme == {"type": "apiKey", "in": "header", "name": "x-api-key"}

    def test_iam_needs_signed_requests_for_whatever_shows_or_changes_data(self) -> None:
        stack = Stack({"ApiAuth": "IAM"})
        scheme = body(stack)["components"]["securitySchemes"]["api_key"]
        assert scheme == {
            "type": "apiKey",
            "in": "header",
            "name": "Authorization",
            "x-amazon-apigateway-authtype": "awsSigv4",
        }
        [allow] = stack.properties("MonitorApi")["Policy"]["Statement"]
        public = [p for p, methods in body(stack)["paths"].items() if not needs_key(methods)]
        assert set(allow["Resource"]) == {
            f"execute-api:/live/{method}{path}"  # the rest needs an identity's own permission
            for path in public
            # For the root, * would match every path that ends with a slash.
            for method in (("GET", "HEAD") if path == "/" else ("*",))
        }

    def test_only_allowed_networks_may_call(self) -> None:
        [allow] = Stack().properties("MonitorApi")["Policy"]["Statement"]
        assert (allow["Effect"], allow["Resource"]) == ("Allow", "execute-api:/*")
        stack = Stack({"ApiAllowedCidrs": "203.0.113.0/24,198.51.100.7/32"})
        same, deny = stack.properties("MonitorApi")["Policy"]["Statement"]
        assert same == allow
        assert (deny["Effect"], deny["Resource"]) == ("Deny", "execute-api:/*")
        networks = ["203.0.113.0/24", "198.51.100.7/32"]
        assert deny["Condition"] == {"NotIpAddress": {"aws:SourceIp": networks}}

    def test_a_private_api_is_called_only_through_its_endpoints(self) -> None:
        stack = Stack({"ApiVpcEndpointIds": "vpce-1,vpce-2"})
        api = stack.properties("MonitorApi")
        assert api["EndpointConfiguration"] == {
            "Types": ["PRIVATE"],
            "VpcEndpointIds": ["vpce-1", "vpce-2"],
        }
        _, deny = api["Policy"]["Statement"]
        assert deny["Condition"] == {"StringNotEquals": {"aws:SourceVpce": ["vpce-1", "vpce-2"]}}
        assert Stack().properties("MonitorApi")["EndpointConfiguration"] == {"Types": ["REGIONAL"]}

    def test_what_only_parameters_change_is_deployed_too(self) -> None:
        """SAM makes a new deployment when the template changes; this API changes by parameters."""
        assert template()["Resources"]["MonitorApi"]["Properties"]["AlwaysDeploy"] is True


class TestUpgrade:
    """From a stack of version 0.2.0, of which stack-0.2.0.json has the names."""

    BEFORE = json.loads((ROOT / "tests/stack-0.2.0.json").read_text(encoding="utf-8"))

    def test_parameters_keep_their_names_defaults_and_values(self) -> None:
        before = self.BEFORE["parameters"]
        parameters = template()["Parameters"]
        changed = {n for n, d in before.items() if d != parameters[n].get("Default")}
        assert changed == {"ApiLogRole", "DatabaseSecretArn"}  # existing stacks keep their values
        given = {name: str(default) for name, default in before.items() if default is not None}
        assert Stack(given | REQUIRED).refusals() == []

    def test_resources_outputs_and_the_api_stay(self) -> None:
        """Above all the API and its key, so that URLs and callers do not change."""
        stack = Stack({"ApiLogRole": "CREATE", "AlarmEmail": "ops@example.com"})
        kept = {name: resource["Type"] for name, resource in stack.resources.items()}
        gone = self.BEFORE["resources"].keys() - kept.keys()
        assert gone == {
            "CheckLoopEveryMinuteRole",  # what takes their places: ScheduleRole
            "FailedChecksAlarm",  # SessionsWaitingAlarm
            "FailedChecksQueueAlarm",  # WorkerErrorsAlarm
            # CallApiFunction
            *(n for n in self.BEFORE["resources"] if n.endswith("Permissionlive")),
        }
        for name, kind in self.BEFORE["resources"].items():
            assert name in gone or kept[name] == kind
        assert set(self.BEFORE["outputs"]) <= set(stack.outputs)
        found = {path: needs_key(methods) for path, methods in body(stack)["paths"].items()}
        for path, methods in self.BEFORE["api"].items():
            assert found[path] == (methods != {"get": []})
        # A changed name would replace a log group, and lose its records.
        names = {group["LogGroupName"] for group in stack.of_type("AWS::Logs::LogGroup").values()}
        assert "/aws/lambda/shop-monitor-CheckSessions" in names


@pytest.mark.parametrize("example", ["terraform/main.tf", "cdk/app.py"])
def test_examples_set_parameters_and_read_outputs_that_exist(example: str) -> None:
    text = (ROOT / "examples" / example).read_text(encoding="utf-8")
    set_ = re.findall(r'^ +"?([A-Z]\w+)"? *[:=] ', text, re.MULTILINE)
    read = re.findall(r'(?:outputs\["|Outputs\.)(\w+)', text)
    parameters = template()["Parameters"]
    required = {name for name, p in parameters.items() if "Default" not in p}
    assert required <= set(set_) <= set(parameters)
    assert read
    assert set(read) <= set(template()["Outputs"])


def test_other_stacks_find_what_they_need_in_the_outputs() -> None:
    outputs: dict[str, Any] = dict(Stack().outputs)
    assert outputs["WorkerName"] == {"Ref": "CheckSessionsFunction"}
    assert outputs["AlarmTopic"] == {"Ref": "Alarms"}
    assert {"FailedChecksUrl", "ApiFunctionName", "LogGroups", "LoopArn"} <= set(outputs)
    topic = "arn:aws:sns:eu-central-1:123456789012:ops"
    assert Stack({"AlarmTopicArn": topic}).outputs["AlarmTopic"] == topic

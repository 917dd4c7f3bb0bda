"""The template as CloudFormation gets it: SAM's output, with conditions and references decided."""

import copy
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import yaml

# samtranslator has no types.
from samtranslator.parser.parser import Parser  # type: ignore[import-untyped]
from samtranslator.translator.translator import Translator  # type: ignore[import-untyped]
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
ACCOUNT = "123456789012"
STACK = "shop-monitor"
SECRET = f"arn:aws:secretsmanager:eu-central-1:{ACCOUNT}:secret:"
REQUIRED = {
    "BillingApiUrl": "https://billing.example.com/billing/api/v1/paysession",
    "ApiKeySecretArn": f"{SECRET}billing/api-key-AbCdEf",
    "DatabaseSecretArn": f"{SECRET}shop/database-AbCdEf",
}

type Resource = dict[str, Any]


class _NoValue:
    """`AWS::NoValue`: the property or the item is left out."""


NO_VALUE = _NoValue()


@cache
def template() -> dict[str, Any]:
    """The source. `!If` and the like are `Fn::If` here; do not change it."""
    parsed: dict[str, Any] = yaml_parse((ROOT / "template.yaml").read_text(encoding="utf-8"))
    return parsed


def definition() -> dict[str, Any]:
    """The loop's definition before substitutions."""
    uri = template()["Resources"]["CheckLoop"]["Properties"]["DefinitionUri"]
    parsed: dict[str, Any] = yaml.safe_load((ROOT / uri).read_text(encoding="utf-8"))
    return parsed


@cache
def translated(region: str = "eu-central-1") -> dict[str, Resource]:
    """The CloudFormation that SAM turns the template into in a region; do not change it."""
    packaged = copy.deepcopy(template())
    packaged["Globals"]["Function"]["CodeUri"] = "s3://bucket/package"  # what `sam package` does
    packaged["Resources"]["CheckLoop"]["Properties"]["DefinitionUri"] = "s3://bucket/loop"
    dashboard = packaged["Resources"]["Dashboard"]["Properties"]
    include = dashboard["DashboardBody"]["Fn::Transform"]["Parameters"]["Location"]
    dashboard["DashboardBody"] = yaml.safe_load((ROOT / include).read_text(encoding="utf-8"))
    sam = Translator({}, Parser(), boto_session=boto3.Session(region_name=region))
    found: dict[str, Resource] = sam.translate(packaged, defaults() | REQUIRED)["Resources"]
    return found


def defaults() -> dict[str, Any]:
    """The default of each parameter that has one."""
    return {
        name: parameter["Default"]
        for name, parameter in template()["Parameters"].items()
        if "Default" in parameter
    }


class Stack:
    """A stack with these parameters: its resources and outputs, as far as the template decides."""

    def __init__(
        self, parameters: Mapping[str, str] | None = None, *, region: str = "eu-central-1"
    ) -> None:
        partition = "aws-us-gov" if region.startswith("us-gov-") else "aws"
        partition = "aws-cn" if region.startswith("cn-") else partition
        values = defaults() | REQUIRED | dict(parameters or {})
        self._values: dict[str, Any] = {
            name: [item.strip() for item in str(values[name]).split(",")]
            if parameter["Type"] == "CommaDelimitedList"
            else str(values[name])
            for name, parameter in template()["Parameters"].items()
        }
        self._values |= {
            "AWS::Partition": partition,
            "AWS::Region": region,
            "AWS::AccountId": ACCOUNT,
            "AWS::StackName": STACK,
            "AWS::URLSuffix": "amazonaws.com.cn" if partition == "aws-cn" else "amazonaws.com",
            "AWS::NoValue": NO_VALUE,
        }
        self.resources: dict[str, Resource] = {
            name: self._value(resource)
            for name, resource in translated(region).items()
            if "Condition" not in resource or self.holds(resource["Condition"])
        }
        self.outputs: dict[str, str] = {
            name: self._value(output["Value"]) for name, output in template()["Outputs"].items()
        }

    def properties(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.resources[name]["Properties"]
        return found

    def of_type(self, kind: str) -> dict[str, dict[str, Any]]:
        """The properties of the resources of a type, by name."""
        return {n: r["Properties"] for n, r in self.resources.items() if r["Type"] == kind}

    def statements(self, *names: str) -> list[dict[str, Any]]:
        """The statements of these roles and policies; without names, of all."""
        found = []
        for name, resource in self.resources.items():
            if names and name not in names:
                continue
            properties = resource.get("Properties", {})
            policies = properties.get("Policies", [])
            if resource["Type"] in ("AWS::IAM::ManagedPolicy", "AWS::IAM::Policy"):
                policies = [properties]
            found += [s for policy in policies for s in policy["PolicyDocument"]["Statement"]]
        return found

    def holds(self, condition: str) -> bool:
        return bool(self._value(template()["Conditions"][condition]))

    def refusals(self) -> list[str]:
        """What the template's rules and patterns have against the parameters."""
        found = []
        for name, parameter in template()["Parameters"].items():
            value = self._values[name]
            pattern = parameter.get("AllowedPattern")
            allowed = [str(item) for item in parameter.get("AllowedValues", [])]
            if (pattern and not re.search(pattern, value)) or (allowed and value not in allowed):
                found.append(name)
        for rule in template()["Rules"].values():
            if self._value(rule["RuleCondition"]):
                found += [
                    assertion["AssertDescription"]
                    for assertion in rule["Assertions"]
                    if not self._value(assertion["Assert"])
                ]
        return found

    def _value(self, value: Any) -> Any:  # noqa: ANN401, C901, PLR0911, PLR0912 (JSON; one case each)
        match value:
            case {"Ref": name}:
                return self._values.get(name, value)
            case {"Condition": str(name)} if len(value) == 1:
                return self.holds(name)
            case {"Fn::If": [condition, then, otherwise]}:
                return self._value(then if self.holds(condition) else otherwise)
            case {"Fn::Equals": [left, right]}:
                return str(self._value(left)) == str(self._value(right))
            case {"Fn::Not": [operand]}:
                return not self._value(operand)
            case {"Fn::And": operands}:
                return all(self._value(operand) for operand in operands)
            case {"Fn::Or": operands}:
                return any(self._value(operand) for operand in operands)
            case {"Fn::Join": [separator, items]}:
                parts = self._value(items)
                return value if not _plain(parts) else separator.join(parts)
            case {"Fn::Split": [separator, text]}:
                return str(self._value(text)).split(separator)
            case {"Fn::Select": [index, items]}:
                return self._value(items)[int(index)]
            case {"Fn::Sub": [str(text), dict(names)]}:
                return self._filled(text, {name: self._value(item) for name, item in names.items()})
            case {"Fn::Sub": str(text)}:
                return self._filled(text, {})
            case dict():
                items = {key: self._value(item) for key, item in value.items()}
                return {key: item for key, item in items.items() if item is not NO_VALUE}
            case list():
                return [item for item in map(self._value, value) if item is not NO_VALUE]
        return value

    def _filled(self, text: str, names: Mapping[str, Any]) -> str:
        def found(match: re.Match[str]) -> str:
            value = names.get(match[1], self._values.get(match[1]))
            return value if isinstance(value, str) else match[0]

        return re.sub(r"\$\{([\w:.]+)\}", found, text)


def _plain(items: object) -> bool:
    return isinstance(items, list) and all(isinstance(item, str) for item in items)

"""The commands of docs/deploy.md, run in order on an emulated AWS."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from local import aws
from local.billing import running_billing
from tests.e2e.support import API_KEY, PASSWORD, ROOT, Shop, shop_on, show

PAGE = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")


@dataclass
class Terminal:
    """Runs shell commands in a copy of the project."""

    directory: Path
    environment: Mapping[str, str]

    def run(self, command: str, answers: str = "") -> str:
        """Run a line of the page, which must succeed; returns its output."""
        show(f"\n$ {command}")
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{command}"],
            cwd=self.directory,
            env=self.environment,
            input=answers,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        show(ran.stdout + ran.stderr)
        assert ran.returncode == 0, f"{command} failed with exit code {ran.returncode}"
        return ran.stdout


def commands(heading: str) -> list[str]:
    """The commands in a section of the page, without comments."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [
        re.sub(r"\s+#.*", "", line.removeprefix("$ "))
        for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


@pytest.fixture(scope="module")
def shop(server: str) -> Iterator[Shop]:
    with shop_on(server) as shop:
        shop.add({"cart-1": "checkout_active_1"})
        yield shop


@pytest.fixture(scope="module")
def terminal(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    directory = tmp_path_factory.mktemp("project") / "project"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)
    # `make` has created these already.
    for name in (".venv", ".uv"):
        if (ROOT / name).exists():
            (directory / name).symlink_to(ROOT / name)
    database = {
        "username": shop.user,
        "password": PASSWORD,
        "host": "127.0.0.1",
        "port": shop.port,
        "dbname": shop.database,
    }
    (directory / "billing-key.txt").write_text(API_KEY)
    (directory / "database.json").write_text(json.dumps(database))
    with aws.running_aws(tmp_path_factory.mktemp("aws")) as url:
        environment = aws.environment(url)
        environment["PATH"] += f":{aws.EMULATOR}"  # the AWS CLI
        yield Terminal(directory, environment)


def test_commands_of_the_page_deploy_a_working_monitor(terminal: Terminal, shop: Shop) -> None:
    lines = iter(commands("On AWS"))
    arns = {
        parameter: json.loads(terminal.run(next(lines)))["ARN"]
        for parameter in ("ApiKeySecretArn", "DatabaseSecretArn")
    }
    terminal.run(next(lines))
    adapt(terminal.directory)
    with running_billing(api_key=API_KEY) as billing:
        # The tests' MariaDB has no certificate.
        given = arns | {"BillingApiUrl": billing.url, "DatabaseTls": "PREFER"}
        guided = next(lines)
        assert "--guided" in guided
        terminal.run(guided, answers(given))

        stack = aws.Stack(terminal.environment["AWS_ENDPOINT_URL"], terminal.directory, show)
        outputs = stack.outputs()
        assert outputs["HealthUrl"]
        assert "HealthUrl" in terminal.run(next(lines))
        urls = {"HEALTH_URL": outputs["HealthUrl"], "TRIGGER_URL": outputs["TriggerUrl"]}
        terminal.environment = {**terminal.environment, **urls}
        assert '"status": "ok"' in terminal.run(next(lines))
        set_key, trigger = lines
        assert set_key.startswith("API_KEY=$(aws apigateway get-api-key …")
        completed = set_key.replace("aws apigateway get-api-key …", outputs["ApiKeyCommand"])
        assert "Checked 1 of 1 open" in terminal.run(f"{completed}; {trigger}")
        assert billing.requests == {"checkout_active_1": 1}


def test_update_and_switching_off_keep_the_other_parameters(terminal: Terminal) -> None:
    build, update, switch_off, delete = commands("Update, switch off, delete")
    stack = aws.Stack(terminal.environment["AWS_ENDPOINT_URL"], terminal.directory, show)
    before = parameters(stack)

    terminal.run(build)
    adapt(terminal.directory)
    terminal.run(update)
    assert parameters(stack) == before
    terminal.run(switch_off)

    assert parameters(stack) == before | {"MonitorState": "DISABLED"}
    [schedule] = stack.client("scheduler").list_schedules()["Schedules"]
    assert schedule["State"] == "DISABLED"
    assert delete == "sam delete --config-env dev"


def test_cadence_reaches_the_stack_as_the_page_writes_it(terminal: Terminal) -> None:
    """SAM cuts it at its first space otherwise, which is still a valid cadence."""
    stack = aws.Stack(terminal.environment["AWS_ENDPOINT_URL"], terminal.directory, show)
    [command] = commands("Parameters")

    terminal.run(command)
    assert parameters(stack)["CheckCadence"] == "5s-until-10m,30s-until-1h,5m"
    terminal.run(
        'sam deploy --config-env dev --parameter-overrides CheckCadence="5s until 10m, 5m"'
    )
    assert parameters(stack)["CheckCadence"] == "5s"


def test_page_shows_the_build_for_arm64() -> None:
    assert commands("arm64") == ['make build ARGS="--parameter-overrides Architecture=arm64"']


def adapt(project: Path) -> None:
    """Adapt the built template to the emulator, so that the page's commands work unchanged."""
    file = project / ".aws-sam/build/template.yaml"
    template = yaml_parse(file.read_text(encoding="utf-8"))
    aws.adapt(template, file.parent)
    file.write_text(json.dumps(template), encoding="utf-8")


def answers(given: Mapping[str, str]) -> str:
    """The input for `sam deploy --guided`: values without a default, and Return for the rest."""
    template = yaml_parse((ROOT / "template.yaml").read_text(encoding="utf-8"))
    typed = ["", ""]  # the stack's name, the region
    typed += [given.get(name, "") for name in template["Parameters"]]
    typed += ["", "", ""]  # confirm changes, allow roles, disable rollback
    typed += [""] * 5  # save the answers, and where
    return "\n".join(typed) + "\n"


def parameters(stack: aws.Stack) -> dict[str, str]:
    [found] = stack.client("cloudformation").describe_stacks(StackName=aws.STACK)["Stacks"]
    return {item["ParameterKey"]: item["ParameterValue"] for item in found["Parameters"]}

"""An emulated AWS on this machine, and the stack that SAM deploys onto it.

The emulator is ministack from PyPI, in its own environment (.emulator), on 127.0.0.1 only. It
enforces the policies of the functions' roles; docs/deploy.md lists its limits.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import yaml

# samtranslator has no types.
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from local.mariadb import free_port

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / ".emulator" / "bin"
METHODS = {"get", "head", "post", "put", "patch", "delete", "options"}
REGION = "us-east-1"
STACK = "checkout-session-monitor-dev"  # the name in `--config-env dev`
START_SECONDS = 60.0
SAM_SECONDS = 300.0

type Template = dict[str, Any]


class DeployError(Exception):
    """A step of the deployment failed; the message has the output of the failed program."""


@contextlib.contextmanager
def running_aws(directory: Path) -> Iterator[str]:
    """Run the emulator until the block ends; yields its URL. It writes only into `directory`.

    Raises:
        DeployError: the emulator did not start.
    """
    port = free_port()
    log = directory / "aws.log"
    settings = {
        "AUTH": "true",  # enforce IAM
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "IOT_MTLS_ENABLED": "0",  # its ports ignore BIND_HOST
        "SFTP_ENABLED": "0",
        "MINISTACK_REGION": REGION,
        "STATE_DIR": f"{directory}/state",
        "S3_DATA_DIR": f"{directory}/s3",
        "TMPDIR": os.fspath(directory),
        "HOME": os.fspath(directory),
        "PATH": os.environ["PATH"],
    }
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            [EMULATOR / "ministack"],
            env=settings,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that killpg also ends the functions' processes
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_listening(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise DeployError(f"The emulator did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def environment(url: str) -> dict[str, str]:
    """The environment that points SAM and the AWS CLI at the emulator instead of an account."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "AWS_ACCESS_KEY_ID": "test",  # the emulated account's root
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": url,
        "SAM_CLI_TELEMETRY": "0",
    }


def client(url: str, service: str) -> Any:  # noqa: ANN401 (one of hundreds of classes)
    """A boto3 client for the emulator."""
    session = boto3.Session(
        aws_access_key_id="test",
        aws_secret_access_key="test",  # noqa: S106 (the emulated account's root)
        region_name=REGION,
    )
    return session.client(service, endpoint_url=url)  # type: ignore[call-overload]


class Stack:
    """The stack on the emulator at `url`, deployed from the output of `make build` in `package`."""

    def __init__(self, url: str, package: Path, show: Callable[[str], None] = print) -> None:
        self.url = url
        self._package = package
        self._show = show

    def client(self, service: str) -> Any:  # noqa: ANN401 (one of hundreds of classes)
        return client(self.url, service)

    def deploy(
        self,
        parameters: Mapping[str, str],
        *,
        change: Callable[[Template], None] = lambda _template: None,
    ) -> None:
        """Create or update the stack with `sam deploy`. Raises DeployError."""
        template: Template = yaml_parse((self._package / "template.yaml").read_text("utf-8"))
        change(template)
        for name in adapt(template, self._package):
            self._show(f"Leaving out {name}: the emulator does not support metric math.")
        file = self._package / "emulated.json"
        file.write_text(json.dumps(template), encoding="utf-8")
        overrides = [f"{name}={value}" for name, value in parameters.items()]
        self._sam("deploy", f"--template-file={file}", "--parameter-overrides", *overrides)

    def delete(self) -> None:
        """Delete the stack with `sam delete`. Raises DeployError."""
        self._sam("delete", "--no-prompts", f"--region={REGION}")

    def _sam(self, command: str, *options: str) -> None:
        sam = ["sam", command, "--config-env=dev"]
        self._show(f"$ {' '.join(sam)}")
        ran = subprocess.run(  # noqa: S603
            [*sam, f"--config-file={ROOT / 'samconfig.toml'}", *options],
            cwd=ROOT,
            env=environment(self.url),
            capture_output=True,
            text=True,
            timeout=SAM_SECONDS,
            check=False,
        )
        if ran.returncode:
            raise DeployError(
                f"`sam {command}` failed with exit code {ran.returncode}:\n{ran.stderr}"
            )

    def outputs(self) -> dict[str, str]:
        """The stack's outputs, with the API's URLs changed to those of the emulator."""
        [stack] = self.client("cloudformation").describe_stacks(StackName=STACK)["Stacks"]
        return {
            output["OutputKey"]: self._emulated_url(output["OutputValue"])
            for output in stack["Outputs"]
        }

    def _emulated_url(self, output: str) -> str:
        host, dot, rest = output.removeprefix("https://").partition(".execute-api.")
        if not dot:
            return output
        stage, _, path = rest.partition("/")[2].partition("/")
        return f"{self.url}/restapis/{host}/{stage}/_user_request_/{path}"

    def api_key(self) -> str:
        """The API's key, which the command in the output ApiKeyCommand prints."""
        resource = self.client("cloudformation").describe_stack_resource(
            StackName=STACK, LogicalResourceId="MonitorApiApiKey"
        )
        found = self.client("apigateway").get_api_key(
            apiKey=resource["StackResourceDetail"]["PhysicalResourceId"], includeValue=True
        )
        key: str = found["value"]
        return key


def adapt(template: Template, directory: Path) -> list[str]:
    """Adapt a built template, which is in `directory`, to the emulator.

    It supports no alarms on metric math, no definition in YAML, no method that stands for all, and
    no Fn::Split in a condition, so the event bus must be one of the account. Returns the names of
    the alarms that are removed.
    """
    resources = template["Resources"]
    names = [
        name
        for name, resource in resources.items()
        if resource["Type"] == "AWS::CloudWatch::Alarm" and "Metrics" in resource["Properties"]
    ]
    for name in names:
        del resources[name]
    loop = resources["CheckLoop"]["Properties"]
    definition = directory / loop.pop("DefinitionUri")
    loop["Definition"] = yaml.safe_load(definition.read_text(encoding="utf-8"))
    for methods in resources["MonitorApi"]["Properties"]["DefinitionBody"]["paths"].values():
        every = methods.pop("x-amazon-apigateway-any-method")
        methods.update(dict.fromkeys(METHODS - methods.keys(), every))
    template["Conditions"]["HasForeignBus"] = {"Fn::Equals": ["an ARN", "a name"]}
    return names

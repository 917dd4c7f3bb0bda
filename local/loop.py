"""The loop on this machine: the state machine of the stack, executed on the real clock.

On AWS, Step Functions runs it; here sfnx interprets the same definition. No other module imports
sfnx.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any

import sfnx.testing
import yaml

TEMPLATE = Path(__file__).parents[1] / "template.yaml"
INTERVAL = "CheckIntervalSeconds"

type Definition = Mapping[str, Any]
type Arguments = Mapping[str, Any]  # of an invocation: FunctionName, InvocationType, Payload


class TaskError(Exception):
    """A task failed; `error` is its name in Step Functions, e.g. Lambda.ServiceException."""

    def __init__(self, error: str) -> None:
        super().__init__(error)
        self.error = error


@dataclass
class Parameter:
    """The parameter LatestExecution, which tells an execution that a later one has started.

    It has its initial value. `get` and `put` may raise TaskError.
    """

    value: str = "0"

    def get(self) -> str:
        return self.value

    def put(self, value: str) -> None:
        self.value = value


class _Stopped(Exception):  # noqa: N818 (not an error)
    """The monitor stops while the loop waits for a slot."""


def run(
    start_check: Callable[[datetime], None],
    interval_seconds: int,
    stopping: threading.Event,
    *,
    now: Callable[[], float] = time.time,
) -> None:
    """Call `start_check` with each tick, on time, until `stopping` is set.

    Executions follow each other without a gap: the last slot of one has passed when the next one
    looks for its first slot.
    """

    def invoke(arguments: Arguments) -> None:
        start_check(datetime.fromisoformat(arguments["Payload"]["tick"]))

    def wait_until(timestamp: float) -> None:
        while (left := timestamp - now()) > 0:
            if stopping.wait(left):
                raise _Stopped

    loop = definition(interval_seconds)
    with contextlib.suppress(_Stopped):
        while not stopping.is_set():
            execute(loop, invoke, Parameter(), now=now, wait_until=wait_until)


def execute(
    loop: Definition,
    invoke: Callable[[Arguments], None],
    latest: Parameter,
    *,
    now: Callable[[], float],
    wait_until: Callable[[float], None],
) -> None:
    """Run one execution until `latest` names a later one, or for about three minutes.

    `now` and `wait_until` share a clock and count seconds since 1970. `invoke` may raise TaskError;
    the definition's Retry and Catch handle it, but sfnx does not wait between attempts.
    """

    def task(call: sfnx.testing.Call) -> object:
        arguments = call.arguments
        assert isinstance(arguments, dict)  # noqa: S101 (sfnx does not type the arguments)
        try:
            match call.resource.partition(":states:::")[2]:
                case "lambda:invoke":
                    invoke(arguments)
                    return {"StatusCode": 202}
                case "aws-sdk:ssm:getParameter":
                    return {"Parameter": {"Value": latest.get()}}
                case "aws-sdk:ssm:putParameter":
                    latest.put(arguments["Value"])
                    return {}
        except TaskError as error:
            raise sfnx.testing.Failure(error.error) from error
        raise NotImplementedError(call.resource)

    def wait(state: sfnx.testing.Wait) -> None:
        assert state.timestamp is not None  # noqa: S101 (the loop only waits for timestamps)
        wait_until(datetime.fromisoformat(state.timestamp).timestamp())

    execution = sfnx.testing.run(
        loop, {}, task, functions={"millis": lambda: int(now() * 1000)}, on_wait=wait
    )
    _ = execution.output  # raises the execution's error


def definition(interval_seconds: int) -> Definition:
    """CheckLoop's definition with the substitutions that CloudFormation makes."""
    loop = _template(TEMPLATE)["Resources"]["CheckLoop"]["Properties"]
    text = (TEMPLATE.parent / loop["DefinitionUri"]).read_text(encoding="utf-8")
    given = {INTERVAL: interval_seconds, "AWS::Partition": "aws"}
    values = {
        name: given.get(value.get("Ref"), name)
        for name, value in loop["DefinitionSubstitutions"].items()
    }
    filled: Definition = yaml.safe_load(Template(text).safe_substitute(values))
    return filled


def default_interval_seconds() -> int:
    """The interval of a deployment that does not set one."""
    return int(_template(TEMPLATE)["Parameters"][INTERVAL]["Default"])


class _Loader(yaml.SafeLoader):
    """A loader for CloudFormation's YAML: `!Ref x` becomes `{"Ref": "x"}`, and so on."""


def _function(loader: _Loader, name: str, node: yaml.Node) -> dict[str, Any]:
    match node:
        case yaml.ScalarNode():
            return {name: loader.construct_scalar(node)}
        case yaml.SequenceNode():
            return {name: loader.construct_sequence(node, deep=True)}
        case yaml.MappingNode():
            return {name: loader.construct_mapping(node, deep=True)}
    raise TypeError(node)


_Loader.add_multi_constructor("!", _function)


@functools.cache
def _template(path: Path) -> dict[str, Any]:
    # The loader is a SafeLoader.
    template: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506
    return template

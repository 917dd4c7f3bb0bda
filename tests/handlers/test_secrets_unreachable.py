"""Secrets Manager that cannot be reached, as in a VPC without a route: an error in time."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from aws_lambda_powertools.utilities.typing import LambdaContext

from core.aws import secrets_manager
from core.errors import SettingsError
from handlers import api, check
from tests.support import event

pytestmark = pytest.mark.slow

ARN = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:billing/api-key-AbCdEf"
# API Gateway waits for 29 s; a cold start and Lambda itself take a few of them.
MAX_SECONDS = 15


@pytest.fixture(params=["refuses connections", "never answers"])
def unreachable(
    environment: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[pytest.MonkeyPatch]:
    """A Secrets Manager that never answers; the timeouts are a tenth of a second here."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))
        if request.param == "refuses connections":
            # The kernel drops what a full backlog cannot hold.
            for _ in range(8):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(listening.getsockname())
        environment.setenv(
            "AWS_ENDPOINT_URL_SECRETS_MANAGER", f"http://127.0.0.1:{listening.getsockname()[1]}"
        )
        environment.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        environment.delenv("APIKEY")
        environment.setenv("APIKEY_SECRET_ARN", ARN)
        environment.setattr(secrets_manager, "CONNECT_SECONDS", 0.1)
        environment.setattr(secrets_manager, "READ_SECONDS", 0.1)
        secrets_manager._manager.cache_clear()
        yield environment
        secrets_manager._manager.cache_clear()


@pytest.mark.usefixtures("unreachable")
def test_a_tick_fails_with_the_likely_cause_and_is_counted(
    context: LambdaContext, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SettingsError) as refused:
        check.handler({}, context)

    assert str(refused.value).startswith(f"APIKEY_SECRET_ARN names the secret {ARN}, which cannot")
    assert str(refused.value).endswith(
        "Secrets Manager cannot be reached: functions in a VPC need a NAT gateway, or an endpoint "
        "for it whose security group lets them in."
    )
    assert f"❌ {refused.value}" in caplog.messages
    [metrics] = [line for line in capsys.readouterr().out.splitlines() if "PassesFailed" in line]
    assert json.loads(metrics)["PassesFailed"] == 1


@pytest.mark.usefixtures("unreachable")
def test_health_is_degraded(context: LambdaContext) -> None:
    answer = api.handler(event("health"), context)

    assert answer["statusCode"] == 503
    assert json.loads(answer["body"])["checks"] == {"settings": "failed"}


def test_both_errors_come_before_the_caller_gives_up() -> None:
    """At most two secrets are read, with a second between the attempts for each."""
    for_one = (
        secrets_manager.ATTEMPTS * (secrets_manager.CONNECT_SECONDS + secrets_manager.READ_SECONDS)
        + 1
    )

    assert secrets_manager.ATTEMPTS * secrets_manager.CONNECT_SECONDS + 1 < 10
    assert for_one < MAX_SECONDS

"""The dashboard's URL is the stack's output."""

import pytest

from handlers.dashboard import dashboard_url
from tests.cloudformation import STACK, Stack


@pytest.mark.parametrize("region", ["eu-central-1", "cn-north-1", "us-gov-west-1"])
def test_the_url_is_that_of_the_output(region: str) -> None:
    stack = Stack(region=region)
    name = stack.properties("Dashboard")["DashboardName"]
    output = stack.outputs["DashboardUrl"].replace("${Dashboard}", name)
    assert dashboard_url({"AWS_REGION": region, "POWERTOOLS_SERVICE_NAME": STACK}) == output


def test_outside_of_lambda_there_is_none() -> None:
    assert dashboard_url({}) is None

"""The address of the stack's dashboard, as the stack's output DashboardUrl has it."""

from collections.abc import Mapping


def dashboard_url(env: Mapping[str, str]) -> str | None:
    """The dashboard's URL from Lambda's variables; None outside of a stack."""
    region, stack = env.get("AWS_REGION"), env.get("POWERTOOLS_SERVICE_NAME")
    if not region or not stack:
        return None
    console = "console.aws.amazon.com"
    if region.startswith("cn-"):
        console = "console.amazonaws.cn"
    elif region.startswith("us-gov-"):
        console = "console.amazonaws-us-gov.com"
    return (
        f"https://{console}/cloudwatch/home?region={region}#dashboards/dashboard/{stack}-{region}"
    )

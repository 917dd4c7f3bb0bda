"""How AWS clients are made: with time-outs of our own, and without a slow import before the need.

boto3 takes a second to import, so it is imported when the first client is made. botocore's own
defaults wait 60 s for a connection and 60 s for an answer, which is longer than a function lives.
"""

from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from botocore.config import Config
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_lambda import LambdaClient


def client_config(*, connect_seconds: float, read_seconds: float, attempts: int = 1) -> "Config":
    from botocore.config import Config  # noqa: PLC0415 (a slow import)

    return Config(
        connect_timeout=connect_seconds,
        read_timeout=read_seconds,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )


@overload
def make_client(
    service: Literal["events"], *, connect_seconds: float, read_seconds: float
) -> "EventBridgeClient": ...
@overload
def make_client(
    service: Literal["lambda"], *, connect_seconds: float, read_seconds: float
) -> "LambdaClient": ...
def make_client(
    service: Literal["events", "lambda"], *, connect_seconds: float, read_seconds: float
) -> Any:  # boto3's client, of the type that the service has
    """Make a client that sends each request once. Raises whatever boto3 raises."""
    import boto3  # noqa: PLC0415 (a slow import)

    config = client_config(connect_seconds=connect_seconds, read_seconds=read_seconds)
    return boto3.client(service, config=config)

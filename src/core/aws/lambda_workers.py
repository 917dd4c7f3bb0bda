"""Starts more workers on Lambda, by invoking the monitor's own function asynchronously."""

import json
import threading
from datetime import datetime
from typing import TYPE_CHECKING

from core.aws.clients import make_client
from core.domain.model import iso
from core.errors import StartWorkerError

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient

# The next tick is the retry.
CONNECT_SECONDS = 1
READ_SECONDS = 2


class LambdaWorkers:
    """Invokes a function with the event that the loop gives it, marked as a helper's.

    A worker of version 0.2.0 ignores the mark.
    """

    def __init__(self, function_name: str) -> None:
        self._function_name = function_name
        self._client: LambdaClient | None = None
        self._lock = threading.Lock()

    def __call__(self, tick: datetime) -> None:
        """Start one helper for the tick; returns as soon as Lambda has queued the invocation.

        Raises:
            StartWorkerError: Lambda did not queue it.
        """
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 (a second)

        try:
            with self._lock:
                self._client = self._client or _client()
            self._client.invoke(
                FunctionName=self._function_name,
                InvocationType="Event",
                Payload=json.dumps({"tick": iso(tick), "helper": True}),
            )
        except (BotoCoreError, ClientError) as error:
            raise StartWorkerError(str(error)) from None


def _client() -> "LambdaClient":
    return make_client("lambda", connect_seconds=CONNECT_SECONDS, read_seconds=READ_SECONDS)

"""Starts more workers on Lambda, by invoking the monitor's own function asynchronously."""

import json
import threading
from datetime import datetime
from typing import TYPE_CHECKING

from core.domain.model import iso
from core.errors import StartWorkerError

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient

# A start is one small call; the next tick is the retry.
CONNECT_SECONDS = 1
READ_SECONDS = 2


class LambdaWorkers:
    """Starts a function once more, for the same tick. boto3 is imported when the first is needed.

    The function is this very one: what it is given is what the loop gives it.
    """

    def __init__(self, function_name: str) -> None:
        self._function_name = function_name
        self._client: LambdaClient | None = None
        self._lock = threading.Lock()

    def __call__(self, tick: datetime) -> None:
        """Start one worker; it comes back as soon as Lambda has queued the start.

        Raises:
            StartWorkerError: Lambda did not.
        """
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 (a second)

        try:
            with self._lock:
                self._client = self._client or _client()
            self._client.invoke(
                FunctionName=self._function_name,
                InvocationType="Event",
                Payload=json.dumps({"tick": iso(tick)}),
            )
        except (BotoCoreError, ClientError) as error:
            raise StartWorkerError(str(error)) from None


def _client() -> "LambdaClient":
    import boto3  # noqa: PLC0415 (it takes a second)
    from botocore.config import Config  # noqa: PLC0415

    return boto3.client(
        "lambda",
        config=Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"total_max_attempts": 1},
        ),
    )

"""A key that is rotated: what is read, how long it may take, and which key is used meanwhile."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import httpx
import pytest

from core.aws import secrets_manager
from core.billing.client import BillingClient
from core.billing.request_headers import KEY_READ_AGAIN_SECONDS
from core.domain.model import Answer, Outcome
from core.errors import SettingsError
from core.settings import Settings
from core.worker import _billing
from tests.support import until

API = "http://billing.example/api"
SHORT = 0.1
LONG = 20.0


class Rotated:
    """A billing service that accepts one key, and a secret that holds one or cannot be read."""

    def __init__(self, key: str) -> None:
        self.accepted = key
        self.held: str | Exception = key
        self.reads = 0
        self.now = 1000.0
        self.sent: list[str] = []
        self.readable = threading.Event()
        self.readable.set()

    def client(
        self,
        read: Callable[[], Mapping[str, str] | None] | None = None,
        *,
        timeout_seconds: float = LONG,
    ) -> BillingClient:
        return BillingClient(
            api_url=API,
            credentials={"APIKEY": self.accepted},
            timeout_seconds=timeout_seconds,
            read_credentials_again=read or self.read,
            transport=httpx.MockTransport(self.answer),
            monotonic=lambda: self.now,
        )

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.sent.append(request.headers["x-api-key"])
        return httpx.Response(200 if self.sent[-1] == self.accepted else 401)

    def read(self) -> Mapping[str, str]:
        self.reads += 1
        self.readable.wait(LONG)
        if isinstance(self.held, Exception):
            raise self.held
        return {"APIKEY": self.held}

    def rotate(self, key: str) -> None:
        self.accepted = self.held = key
        self.later()

    def later(self) -> None:
        self.now += KEY_READ_AGAIN_SECONDS


@contextmanager
def held_up(secret: Rotated) -> Iterator[None]:
    """The secret takes longer to read than a request lasts, until the block ends."""
    secret.readable.clear()
    try:
        yield
    finally:
        secret.readable.set()


async def outcome_of(client: BillingClient) -> Outcome:
    async with asyncio.timeout(LONG):
        return (await client.check("checkout_1")).outcome


async def test_a_secret_that_cannot_be_read_leaves_the_key_of_now(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker's client: key-1 was rotated to key-2, then one 401 and no Secrets Manager."""

    def read_credentials(
        arn: str, names: Mapping[str, bool], *, refresh: bool = False
    ) -> Mapping[str, str]:
        assert (arn, set(names)) == ("the-arn", {"APIKEY"})
        return secret.read()

    secret = Rotated("key-1")
    monkeypatch.setattr(secrets_manager, "read_credentials", read_credentials)
    settings = Settings.from_env(
        {
            "DATABASE_URL": "sqlite:///unused",
            "BILLING_API_URL": API,
            "ALLOW_HTTP": "true",
            "APIKEY_SECRET_ARN": "the-arn",
        }
    )
    client = _billing(settings, httpx.MockTransport(secret.answer))
    assert client is not None
    client._monotonic = lambda: secret.now
    secret.rotate("key-2")
    assert await outcome_of(client) is Outcome.ACTIVE
    secret.later()
    secret.accepted, secret.held = "none", SettingsError("the-arn cannot be read.")
    assert await outcome_of(client) is Outcome.UNAUTHORIZED
    secret.accepted = "key-2"
    assert await outcome_of(client) is Outcome.ACTIVE
    assert secret.sent == ["key-1", "key-2", "key-2", "key-2"]
    assert "the-arn cannot be read." in caplog.text


@pytest.mark.parametrize(
    "error", [OSError("no descriptor"), UnicodeError("what"), RuntimeError("no thread")]
)
async def test_whatever_reading_a_secret_raises_the_check_is_unauthorized(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    secret = Rotated("key-1")
    client = secret.client()
    secret.accepted, secret.held = "key-2", error
    assert await outcome_of(client) is Outcome.UNAUTHORIZED
    assert f"The API key cannot be read again: {type(error).__name__}" in caplog.text
    secret.rotate("key-2")
    assert await outcome_of(client) is Outcome.ACTIVE


async def test_a_key_that_no_header_can_carry_is_not_taken() -> None:
    secret = Rotated("key-1")
    client = secret.client()
    secret.rotate("Schlüssel 🗝")
    assert await outcome_of(client) is Outcome.UNAUTHORIZED
    assert secret.sent == ["key-1"]


async def test_a_secret_slower_than_a_request_is_read_all_the_same() -> None:
    secret = Rotated("key-1")
    client = secret.client(timeout_seconds=SHORT)
    secret.rotate("key-2")
    with held_up(secret):
        assert await outcome_of(client) is Outcome.TIMEOUT
        assert await outcome_of(client) is Outcome.TIMEOUT
    await until(lambda: client._headers._renewal is None)
    assert await outcome_of(client) is Outcome.ACTIVE
    assert secret.sent == ["key-1", "key-1", "key-2"]
    assert secret.reads == 1


def test_a_reading_goes_on_between_two_passes() -> None:
    """A worker's event loop stands still between its passes; the thread does not."""
    secret = Rotated("key-1")
    client = secret.client(timeout_seconds=SHORT)
    secret.rotate("key-2")
    with asyncio.Runner() as runner:
        with held_up(secret):
            assert runner.run(outcome_of(client)) is Outcome.TIMEOUT
        client._timeout_seconds = LONG
        assert runner.run(outcome_of(client)) is Outcome.ACTIVE
        runner.run(client.aclose())
    assert secret.reads == 1


async def test_a_request_that_is_cancelled_does_not_end_the_reading() -> None:
    secret = Rotated("key-1")
    client = secret.client()
    secret.rotate("key-2")
    with held_up(secret):
        first = asyncio.create_task(client.check("checkout_1"))
        await until(lambda: secret.reads == 1)
        second = asyncio.create_task(client.check("checkout_2"))
        await until(lambda: len(secret.sent) == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
    assert (await second).outcome is Outcome.ACTIVE
    assert secret.reads == 1


async def test_a_client_that_is_closed_while_a_secret_is_read_leaks_nothing() -> None:
    secret = Rotated("key-1")
    client = secret.client()
    secret.rotate("key-2")
    tasks = asyncio.all_tasks()
    with held_up(secret):
        check = asyncio.create_task(client.check("checkout_1"))
        await until(lambda: secret.reads == 1)
        async with asyncio.timeout(LONG / 2):
            await client.aclose()
            answer: Answer = await check
    assert answer.outcome is Outcome.UNAUTHORIZED
    assert asyncio.all_tasks() == tasks
    assert client._headers.current["x-api-key"] == "key-1"


async def test_a_client_that_is_closed_just_after_a_reading_began_is_closed() -> None:
    secret = Rotated("key-1")
    client = secret.client()
    client._headers._start(0)
    await client.aclose()
    assert secret.reads == 0

"""OAuth tokens: asked for once, renewed before they expire and after a refusal, never shown."""

import asyncio
import base64
from collections.abc import Mapping

import httpx
import pytest

from core.billing.client import BillingClient
from core.billing.headers import BEARER_TOKEN
from core.billing.request_headers import KEY_READ_AGAIN_SECONDS, NO_TOKEN_SECONDS
from core.billing.status_words import StatusReader
from core.domain.model import Answer, Outcome
from local.billing import running_billing

TOKEN_URL = "http://auth.example/token"
CLIENT = {"BILLING_CLIENT_ID": "the id", "BILLING_CLIENT_SECRET": "hidden+secret"}


class OAuth:
    """A billing service that accepts the newest token, and the endpoint that gives tokens."""

    def __init__(self, secret: str = CLIENT["BILLING_CLIENT_SECRET"]) -> None:
        self.given = 0
        self.asked: list[str] = []
        self.accepted = "token-1"
        self.seconds: object = 600
        self.failing: httpx.Response | Exception | None = None
        self.secret = secret
        self.now = 1000.0
        self.client = BillingClient(
            api_url="http://billing.example/api",
            credentials=CLIENT,
            timeout_seconds=20,
            headers=BEARER_TOKEN,
            token_url=TOKEN_URL,
            read_credentials_again=self._read,
            transport=httpx.MockTransport(self._answer),
            monotonic=lambda: self.now,
        )

    async def outcome(self) -> Outcome:
        return (await self.client.check("checkout_1")).outcome

    def _read(self) -> Mapping[str, str]:
        return {**CLIENT, "BILLING_CLIENT_SECRET": self.secret}

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.url != TOKEN_URL:
            self.asked.append(request.headers["authorization"])
            return httpx.Response(200 if self.asked[-1] == f"Bearer {self.accepted}" else 401)
        if isinstance(self.failing, Exception):
            raise self.failing
        if self.failing is not None:
            return self.failing
        client = f"the+id:{self.secret.replace('+', '%2B')}".encode()
        assert request.content == b"grant_type=client_credentials"
        if request.headers["authorization"] != f"Basic {base64.b64encode(client).decode()}":
            return httpx.Response(401, json={"error": "invalid_client"})
        self.given += 1
        token = {"access_token": f"token-{self.given}", "expires_in": self.seconds}
        return httpx.Response(200, json=token)


async def test_many_checks_share_one_token() -> None:
    oauth = OAuth()
    answers = await asyncio.gather(*(oauth.client.check(f"c{n}") for n in range(50)))
    assert {answer.outcome for answer in answers} == {Outcome.ACTIVE}
    assert (oauth.given, set(oauth.asked)) == (1, {"Bearer token-1"})


@pytest.mark.parametrize(
    ("seconds", "renewed_after"), [(600, 540), (60, 30), ("600", 540), (None, None), (-1, None)]
)
async def test_a_token_is_renewed_before_it_expires(
    seconds: object, renewed_after: float | None
) -> None:
    """A check does not wait for that."""
    oauth = OAuth()
    oauth.seconds = seconds
    assert await oauth.outcome() is Outcome.ACTIVE
    oauth.now += (renewed_after or 1e9) - 1
    assert await oauth.outcome() is Outcome.ACTIVE
    assert oauth.given == 1
    oauth.now += 1
    assert await oauth.outcome() is Outcome.ACTIVE
    assert oauth.asked == ["Bearer token-1"] * 3
    await asyncio.sleep(0)
    assert oauth.given == (1 if renewed_after is None else 2)
    await oauth.client.aclose()


async def test_a_refused_token_is_renewed_once_in_thirty_seconds() -> None:
    oauth = OAuth()
    assert await oauth.outcome() is Outcome.ACTIVE
    oauth.accepted = "token-2"
    assert await oauth.outcome() is Outcome.ACTIVE
    oauth.accepted = "none"
    assert [await oauth.outcome() for _ in range(3)] == [Outcome.UNAUTHORIZED] * 3
    assert oauth.given == 2
    oauth.now += KEY_READ_AGAIN_SECONDS
    assert await oauth.outcome() is Outcome.UNAUTHORIZED
    assert oauth.given == 3


async def test_a_rotated_client_secret_is_read_again() -> None:
    oauth = OAuth(secret="rotated")
    assert await oauth.outcome() is Outcome.ACTIVE
    assert oauth.given == 1


@pytest.mark.parametrize(
    ("failing", "outcome", "why"),
    [
        (httpx.Response(500), Outcome.UNEXPECTED_STATUS, "answers with status 500"),
        (
            httpx.Response(400, json={"error": "invalid_scope"}),
            Outcome.UNAUTHORIZED,
            "answers with status 400 (invalid_scope)",
        ),
        (
            httpx.Response(401, json={"error": "hidden"}),
            Outcome.UNAUTHORIZED,
            "answers with status 401",
        ),
        (
            httpx.Response(200, text="<html>"),
            Outcome.UNEXPECTED_STATUS,
            "answers without a usable access_token",
        ),
        (
            httpx.Response(200, json={"access_token": "hidden\n"}),
            Outcome.UNEXPECTED_STATUS,
            "answers without a usable access_token",
        ),
        (httpx.ReadTimeout(""), Outcome.TIMEOUT, "does not answer in time"),
        (
            httpx.ConnectError("Connection refused"),
            Outcome.NETWORK_ERROR,
            "cannot be reached: Connection refused",
        ),
    ],
)
async def test_without_a_token_each_check_says_why(
    failing: httpx.Response | Exception,
    outcome: Outcome,
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One log line, one request to the endpoint in five seconds, and then it works again."""
    oauth = OAuth()
    oauth.failing = failing
    answers = await asyncio.gather(*(oauth.client.check(f"c{n}") for n in range(3)))
    answers.append(await oauth.client.check("c"))
    code = failing.status_code if isinstance(failing, httpx.Response) else None
    assert set(answers) == {Answer(outcome, code, detail=f"BILLING_TOKEN_URL {why}")}
    assert caplog.messages == [f"❌ BILLING_TOKEN_URL {why}"]
    assert "hidden" not in caplog.text
    assert not oauth.asked
    oauth.failing = None
    oauth.now += NO_TOKEN_SECONDS
    assert await oauth.outcome() is Outcome.ACTIVE


async def test_a_token_is_fetched_over_the_real_transport() -> None:
    with running_billing() as billing:
        client = BillingClient(
            api_url=billing.url,
            credentials=CLIENT,
            timeout_seconds=20,
            headers=BEARER_TOKEN,
            token_url=billing.url.rpartition("/billing/")[0] + "/token",
            status_reader=StatusReader(),
        )
        answer = await client.check("checkout_1")
        await client.aclose()
    assert answer.detail == "BILLING_TOKEN_URL answers with status 404"

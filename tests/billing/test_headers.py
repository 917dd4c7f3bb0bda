"""What is sent by BILLING_HEADERS and BILLING_API_URL, and what status codes and ids mean."""

import httpx
import pytest

from core.billing.client import BillingClient, StatusCodes
from core.billing.headers import API_KEY_HEADER, parse_headers
from core.billing.status_words import StatusReader
from core.domain.model import Outcome
from core.settings import Settings
from core.worker import _billing

ID = "a b/ü?&#%"


async def sent(**env: str) -> httpx.Request:
    """The request of a check with these settings."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200)

    settings = Settings.from_env({"DATABASE_URL": "sqlite:///unused", **env})
    client = _billing(settings, httpx.MockTransport(answer))
    assert client is not None
    assert (await client.check(ID)).outcome is Outcome.ACTIVE
    [request] = requests
    return request


@pytest.mark.parametrize(
    ("text", "env", "headers"),
    [
        (
            '{"Authorization": "Bearer {APIKEY}"}',
            {"APIKEY": "sk_1"},
            {"authorization": "Bearer sk_1"},
        ),
        (
            '{"Authorization": "Basic {APIKEY:base64}", "X-Killbill-ApiKey": "{KB_KEY}"}',
            {"APIKEY": "admin:pass{KB_KEY}", "KB_KEY": "bob"},
            {"authorization": "Basic YWRtaW46cGFzc3tLQl9LRVl9", "x-killbill-apikey": "bob"},
        ),
        (
            '{"Accept": "application/vnd.shop.v2+json", "Shop-Version": "2026-01-15 beta"}',
            {},
            {"accept": "application/vnd.shop.v2+json", "shop-version": "2026-01-15 beta"},
        ),
    ],
)
async def test_headers_are_filled_with_credentials(
    text: str, env: dict[str, str], headers: dict[str, str]
) -> None:
    """A placeholder within a credential is text."""
    request = await sent(BILLING_HEADERS=text, **env)
    common = {"host": "localhost:4000", "accept": "*/*", "user-agent": "csm"}
    assert dict(request.headers) == common | headers


async def test_by_default_the_same_headers_are_sent_in_the_same_order() -> None:
    request = await sent(APIKEY="the-key")
    assert request.headers.multi_items() == [
        ("host", "localhost:4000"),
        ("accept", "*/*"),
        ("user-agent", "csm"),
        ("x-api-key", "the-key"),
    ]
    assert str(API_KEY_HEADER) == "x-api-key"


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("https://b/v1", "https://b/v1/a%20b%2F%C3%BC%3F%26%23%25"),
        ("https://b/o/{billing_checkout_id}", "https://b/o/a%20b%2F%C3%BC%3F%26%23%25"),
        (
            "https://b/o/{billing_checkout_id}/?expand=a&x=%2F",
            "https://b/o/a%20b%2F%C3%BC%3F%26%23%25/?expand=a&x=%2F",
        ),
        ("https://b?ref={billing_checkout_id}", "https://b?ref=a%20b%2F%C3%BC%3F%26%23%25"),
    ],
)
async def test_the_id_takes_its_place_in_the_url(url: str, asked: str) -> None:
    """It is one path segment or one value of a query."""
    request = await sent(APIKEY="the-key", BILLING_API_URL=url)
    assert str(request.url) == str(httpx.URL(asked))
    assert request.headers["host"] == "b"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Bearer x", "is not valid JSON"),
        ('["a"]', "is not a JSON object"),
        ('{"": "a"}', "has a header without a name"),
        ('{"Authorization: secret": "a"}', "has the header name 'Authorization:…', in which"),
        ('{"Schlüssel": "secret"}', r"has the header name 'Schl\\xfc…', in which HTTP"),
        ('{"Host": "secret"}', "sets Host, which only the monitor can set"),
        ('{"A": "secret", "a": "secret"}', "sets a twice"),
        ('{"A": 5}', "has a value for A that is not visible ASCII text"),
        ('{"A": "secret\\nB: secret"}', "has a value for A that is not visible ASCII text"),
        ('{"A": " secret"}', "has a value for A that is not visible ASCII text"),
        ('{"A": "{secret"}', "has a brace in the value for A that is not of a placeholder"),
        ('{"A": "{APIKEY:hex}"}', "has a brace in the value for A that is not of a placeholder"),
    ],
)
def test_unusable_headers_are_refused_without_a_value(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        parse_headers(text)
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(API_KEY_HEADER)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, Outcome.UNEXPECTED_STATUS),
        (202, Outcome.ACTIVE),
        (400, Outcome.NOT_FOUND),
        (404, Outcome.UNEXPECTED_STATUS),
        (401, Outcome.UNAUTHORIZED),
    ],
)
async def test_the_status_codes_that_are_set_decide(status: int, outcome: Outcome) -> None:
    client = BillingClient(
        api_url="http://billing/api",
        credentials={"APIKEY": "key"},
        timeout_seconds=10,
        status_codes=StatusCodes(frozenset((202,)), frozenset((400,))),
        transport=httpx.MockTransport(lambda _: httpx.Response(status)),
    )
    assert (await client.check("checkout_1")).outcome is outcome


async def test_an_answer_about_another_checkout_is_a_mismatch() -> None:
    client = BillingClient(
        api_url="http://billing/api",
        credentials={"APIKEY": "key"},
        timeout_seconds=10,
        status_reader=StatusReader(id_path="data.id", amount_path="amount"),
        transport=httpx.MockTransport(
            lambda _: httpx.Response(200, json={"status": "paid", "data": {"id": 7}, "amount": 5})
        ),
    )
    other, same = await client.check("8"), await client.check("7")
    assert (other.outcome, other.status) == (Outcome.MISMATCH, None)
    assert other.detail == "billing's answer has the id '7' at 'data.id'"
    assert (same.status, same.amount, same.currency) == ("success", 5, None)

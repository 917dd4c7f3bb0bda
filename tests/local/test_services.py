"""The settings for each billing service, against its documented answers."""

import io
import json
import re
from pathlib import Path

import httpx
import pytest
from dotenv import dotenv_values

from core.domain.model import Answer, Outcome, SessionStatus
from core.settings import Settings
from core.worker import _billing
from local.billing import running_billing
from local.services import Service, read_services

SERVICES = read_services()
ANSWERS = [(name, state) for name, service in SERVICES.items() for state in service.states]
PAGE = (Path(__file__).parents[2] / "docs/billing-services.md").read_text(encoding="utf-8")
ORIGIN = "https://billing.example"
STATUSES = {"in_progress": SessionStatus.OPEN}


def settings_of(service: Service, origin: str, **given: str) -> Settings:
    """From the page's text, as it is pasted into .env."""
    section = PAGE.partition(f"\n## {service.title}\n")[2].partition("\n## ")[0]
    [block] = re.findall(r"```ini\n(.*?)```", section, re.DOTALL)
    pasted = {name: value or "" for name, value in dotenv_values(stream=io.StringIO(block)).items()}
    assert pasted == service.settings
    env = {"DATABASE_URL": "sqlite:///unused", "STATUS_UPDATES": "true", **given}
    return Settings.from_env(service.settings_at(origin, pasted | env))


def answered_by(service: Service, state: str) -> httpx.MockTransport:
    """The documented answers, to requests that are documented."""

    def answer(request: httpx.Request) -> httpx.Response:
        target, body = request.url.raw_path.decode(), request.content.decode()
        headers = dict(request.headers)
        if request.method == "POST":
            token = service.token_answer(target, headers, body)
            return httpx.Response(400 if token is None else 200, content=token)
        checkout_id = service.checkout_id(target)
        if not checkout_id or not service.accepts(headers):
            return httpx.Response(401 if checkout_id else 404)
        return httpx.Response(200, content=service.body_of(checkout_id, state))

    return httpx.MockTransport(answer)


@pytest.mark.parametrize(("name", "state"), ANSWERS)
async def test_each_documented_answer_means_what_it_has_to(name: str, state: str) -> None:
    service = SERVICES[name]
    client = _billing(settings_of(service, ORIGIN), answered_by(service, state))
    assert client is not None
    answer = await client.check("a/b?1")
    await client.aclose()
    means = service.states[state].means
    assert answer.outcome is Outcome.ACTIVE, answer
    assert (answer.status, answer.in_progress) == (
        STATUSES.get(means, means),
        means == "in_progress",
    )


@pytest.mark.parametrize("name", SERVICES)
async def test_another_checkout_another_code_or_no_header_closes_nothing(name: str) -> None:
    service = SERVICES[name]

    async def asked(transport: httpx.MockTransport, headers: str | None = None) -> Answer:
        given = {} if headers is None else {"BILLING_HEADERS": headers}
        client = _billing(settings_of(service, ORIGIN, **given), transport)
        assert client is not None
        answer = await client.check("ours")
        await client.aclose()
        return answer

    token = {"access_token": "t"}
    theirs = service.body_of("theirs", "paid")
    other = httpx.MockTransport(
        lambda r: httpx.Response(200, content=json.dumps(token) if r.method == "POST" else theirs)
    )
    assert (await asked(other)).outcome is Outcome.MISMATCH
    unknown = httpx.MockTransport(
        lambda r: httpx.Response(200 if r.method == "POST" else service.unknown, json=token)
    )
    assert (await asked(unknown)).outcome is Outcome.NOT_FOUND
    if service.token_url is None:
        refused = await asked(answered_by(service, "paid"), '{"x-other": "{APIKEY}"}')
        assert refused.outcome is Outcome.UNAUTHORIZED


@pytest.mark.parametrize("name", ["stripe", "paypal", "razorpay"])
async def test_a_simulated_service_behaves_like_it(name: str) -> None:
    """Over real sockets: the place of the id, the headers or the token, the answers, the limit."""
    service = SERVICES[name]
    ids = ["checkout_1", "pending_1", "paid_0", "404_1", "a/b?"]
    with running_billing(service=service, clock=lambda: 1.0) as billing:
        client = _billing(settings_of(service, billing.origin), None)
        assert client is not None
        answers = [await client.check(checkout_id) for checkout_id in ids]
        rest = [await client.check("checkout_1") for _ in range(service.per_second or 0)]
        await client.aclose()
    outcomes = [answer.outcome for answer in answers]
    active = Outcome.ACTIVE
    assert outcomes == [active, active, active, Outcome.NOT_FOUND, active]
    assert [answers[n].status for n in (0, 2)] == ["open", "success"]
    assert answers[1].in_progress
    limited = sum(answer.outcome is Outcome.RATE_LIMITED for answer in rest)
    assert limited == (len(ids) if service.per_second else 0)

"""Settings for Stripe Payment Intents, Basic and Bearer, against localstripe and httpbin."""

import threading
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from aiohttp import web
from werkzeug.serving import make_server

from core.domain.model import Answer, Outcome, SessionStatus
from core.settings import Settings
from core.worker import _billing
from local.services import read_services

# Importing these programs warns, so their fixtures import them.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STRIPE = read_services()["stripe-payment-intents"]
CARD = {
    "type": "card",
    "card": {"number": "4242424242424242", "exp_month": 12, "exp_year": 2050, "cvc": "123"},
}


@pytest.fixture
async def localstripe(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    from localstripe.resources import Store  # noqa: PLC0415 (warns)
    from localstripe.server import app  # noqa: PLC0415 (warns)

    monkeypatch.setattr(Store, "dump_to_disk", lambda _: None)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield f"http://{host}:{port}"
    await runner.cleanup()


@pytest.fixture(scope="module")
def httpbin() -> Iterator[str]:
    from httpbin import app  # noqa: PLC0415 (warns)

    server = make_server("127.0.0.1", 0, app)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # seconds
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()


async def asked(checkout_id: str, **env: str) -> Answer:
    settings = Settings.from_env({"DATABASE_URL": "sqlite:///unused", **env})
    client = _billing(settings, None)
    assert client is not None
    answer = await client.check(checkout_id)
    await client.aclose()
    return answer


async def test_the_settings_for_stripe_understand_localstripe(localstripe: str) -> None:
    env = STRIPE.settings_at(localstripe, {"STATUS_UPDATES": "true", "APIKEY": "sk_test_1"})
    async with httpx.AsyncClient(
        base_url=f"{localstripe}/v1", headers={"Authorization": "Bearer sk_test_1"}
    ) as stripe:

        async def made(path: str, **body: object) -> str:
            answer = await stripe.post(path, json=body)
            return str(answer.raise_for_status().json()["id"])

        card = await made("/payment_methods", **CARD)
        intent = {"amount": 2000, "currency": "eur"}
        paying = intent | {"payment_method": card, "confirm": True}
        new = await made("/payment_intents", **intent)
        paid = await made("/payment_intents", **paying)
        held = await made("/payment_intents", **paying, capture_method="manual")
        canceled = await made("/payment_intents", **intent)
        await made(f"/payment_intents/{canceled}/cancel")
    answers = [await asked(i, **env) for i in (new, paid, held, canceled)]
    found = [(answer.status, answer.in_progress) for answer in answers]
    assert found == [
        (SessionStatus.OPEN, False),
        (SessionStatus.SUCCESS, False),
        (SessionStatus.OPEN, True),
        (SessionStatus.FAILURE, False),
    ]
    assert answers[1].currency == "eur"
    assert (await asked("pi_unknown", **env)).outcome is Outcome.NOT_FOUND
    refused = await asked(new, **{**env, "APIKEY": "pk_test_1"})
    assert refused.outcome is Outcome.UNAUTHORIZED


@pytest.mark.parametrize(
    ("path", "header", "key"),
    [
        ("basic-auth/shop/secret", "Basic {APIKEY:base64}", "shop:secret"),
        ("bearer", "Bearer {APIKEY}", "secret"),
    ],
)
async def test_httpbin_accepts_basic_and_bearer(
    httpbin: str, path: str, header: str, key: str
) -> None:
    url = f"{httpbin}/{path}?id={{billing_checkout_id}}"
    env = {"BILLING_API_URL": url, "APIKEY": key}
    accepted = await asked("c1", BILLING_HEADERS=f'{{"Authorization": "{header}"}}', **env)
    refused = await asked("c1", BILLING_HEADERS='{"x-api-key": "{APIKEY}"}', **env)
    assert (accepted.outcome, refused.outcome) == (Outcome.ACTIVE, Outcome.UNAUTHORIZED)

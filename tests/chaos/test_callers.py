"""The API under hostile requests: documented answers, bounded work, no injection."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis import openapi
from schemathesis.core.result import Ok

from core.settings import Settings
from local.api import running_api
from local.workers import Workers
from testkit.shops import add_sessions
from tests.chaos.conftest import Cases
from tests.chaos.world import KEY, World

SESSIONS = {f"ok-{n}": f"fine-{n}" for n in range(8)}


@pytest.fixture
def api(world: World) -> Iterator[str]:
    """The laptop's API with three workers; its routes are those of the Lambda function."""
    add_sessions(world.shop, SESSIONS)
    world.may_repeat = frozenset(SESSIONS.values())  # manual triggers ignore the interval
    workers = Workers(Settings.from_env(world.environment()), 3)
    try:
        with running_api(0, lambda: workers) as port:
            yield f"http://127.0.0.1:{port}"
    finally:
        workers.close()


def test_api_conforms_to_its_openapi_document(api: str) -> None:
    """Try every operation with valid and invalid requests."""
    schema = openapi.from_url(f"{api}/api/openapi.json")
    requests = 0

    for operation in schema.get_all_operations():
        assert isinstance(operation, Ok)

        @settings(max_examples=25, deadline=None, database=None, derandomize=True)
        @given(case=operation.ok().as_strategy())
        def conforms(case: schemathesis.Case[Any]) -> None:
            nonlocal requests
            requests += 1
            response = case.call(base_url=api)
            assert response.status_code != 500
            case.validate_response(response)

        conforms()
    assert requests >= 50


BODIES = {
    "an empty list": (b"[]", 400),
    "not JSON": (b"{", 400),
    "not UTF-8": (b'{"session_ids": ["\xff"]}', 200),
    "null": (b"null", 400),
    "a number": (b"1", 400),
    "NaN": (b"NaN", 400),
    "JSON 100,000 deep": (b"[" * 100_000, 400),
    "a number of 10,000 digits": (b"9" * 10_000, 400),
    "a megabyte of ids": (json.dumps({"session_ids": ["x" * 255] * 4000}).encode(), 400),
    "an id that is too long": (json.dumps({"session_ids": ["x" * 256]}).encode(), 400),
    "a list of lists": (b'{"session_ids": [["a"]]}', 400),
    "no ids": (b'{"session_ids": []}', 400),
    "another key": (b'{"session_ids": ["a"], "x": 1}', 400),
    "half a surrogate pair": (b'{"session_ids": ["\\ud800"]}', 200),
    "a NUL": (b'{"session_ids": ["\\u0000"]}', 200),
    "an injection": (b'{"session_ids": ["\'; DROP TABLE checkout_session; --"]}', 200),
    "a forged log line": (b'{"session_ids": ["a\\n{\\"level\\": \\"ERROR\\"}\\u001b[31m"]}', 200),
    "the same id 100 times": (json.dumps({"session_ids": ["ok-1"] * 100}).encode(), 200),
    "whitespace": (b" \n\t", 200),
}


def test_any_request_body_gets_a_correct_answer(api: str, world: World, cases: Cases) -> None:
    for name, (content, status) in BODIES.items():
        with cases.case(name):
            answer = httpx.post(f"{api}/api/test/checkout-sessions", content=content, timeout=30)
            assert answer.status_code == status, answer.text[:300]
            assert answer.json()["success"] is (status == 200)
            assert KEY not in answer.text
            assert "Traceback" not in answer.text
            assert len(answer.content) < 5000
            httpx.post(f"{api}/api/test/checkout-sessions", timeout=30)
            world.invariants(recheck=False)  # these workers use a real clock


HEADERS: dict[str, dict[str, str]] = {
    "none": {},
    "a long header": {"X-Y": "z" * 20_000},
    "many headers": {f"X-{n}": "y" for n in range(90)},
    "another host": {"Host": "evil.example"},
    "another type": {"Content-Type": "text/html; charset=utf-7"},
    "another method": {"X-HTTP-Method-Override": "DELETE"},
}


def test_unusual_headers_change_nothing(api: str, cases: Cases) -> None:
    for name, headers in HEADERS.items():
        with cases.case(name):
            answer = httpx.get(f"{api}/api/health", headers=headers, timeout=30)
            assert answer.status_code in (200, 400, 403, 431, 503)
            assert "evil.example" not in answer.text


METHODS = ["GET", "POST", "DELETE", "TRACE"]
UNKNOWN_PATHS = ["/api/%2e%2e/", "/api/health%00", "/api//health", "/%ff", "/x" * 500]


def test_unknown_path_is_refused_without_internal_details(api: str, cases: Cases) -> None:
    for method, path in product(METHODS, UNKNOWN_PATHS):
        with cases.case(f"{method} {path}"):
            answer = httpx.request(method, f"{api}{path}", timeout=30)
            assert answer.status_code in (400, 403, 404, 405)
            assert "Traceback" not in answer.text


def test_fifty_triggers_at_once_share_three_workers(api: str, world: World) -> None:
    """At most three passes run at once, and no two of them check the same session."""
    world.billing.before_answer = lambda _checkout: time.sleep(0.05)
    with ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(
                lambda _: httpx.post(f"{api}/api/test/checkout-sessions", timeout=60), range(50)
            )
        )
    assert {answer.status_code for answer in answers} == {200}
    checked = sum(answer.json()["summary"]["checked"] for answer in answers)
    assert checked == world.billing.requests
    assert all(log.max_in_flight == 1 for log in world.billing.log.values())
    for answer in answers:
        summary = answer.json()["summary"]
        assert summary["checked"] + sum(summary["skipped"].values()) == summary["open"]

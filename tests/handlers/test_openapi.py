"""The served description of the API matches the routes and their answers."""

import json
from typing import Any

import jsonschema
import pytest
from aws_lambda_powertools.utilities.typing import LambdaContext
from samtranslator.yaml_helper import yaml_parse  # type: ignore[import-untyped]

from core.store.session_search import OUTCOMES
from core.store.status_report import read_status
from core.worker import open_database
from handlers import api, check, routes
from local.loop import TEMPLATE
from testkit.clock import FakeClock
from testkit.history import SECOND, History
from testkit.shops import Shop, add_sessions
from tests.support import event

DOCUMENT: dict[str, Any] = json.loads(routes.OPENAPI.read_text(encoding="utf-8"))
OPERATIONS = {
    (method.upper(), path): operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
QUERIES = {"/api/sessions": {"outcome": "active"}}  # of operations that need one


def conforms(answer: dict[str, Any], method: str, path: str) -> Any:  # noqa: ANN401 (JSON)
    """The body, provided that the description allows this answer to this request."""
    responses = OPERATIONS[method, path]["responses"]
    response = responses[str(answer["statusCode"])]
    if name := response.get("$ref", "").removeprefix("#/components/responses/"):
        response = DOCUMENT["components"]["responses"][name]
    [(media_type, content)] = response["content"].items()
    [content_type] = answer["multiValueHeaders"]["Content-Type"]
    assert content_type.split(";")[0] == media_type
    body = json.loads(answer["body"]) if media_type == "application/json" else answer["body"]
    assert answer["multiValueHeaders"]["Cache-Control"] == [
        "no-cache" if path == "/" else "no-store"
    ]
    assert answer["body"].endswith("\n")
    schema = {**content["schema"], "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)
    return body


def request(method: str, path: str, body: str | None = None) -> dict[str, Any]:
    return {
        **event("health"),
        "httpMethod": method,
        "path": path,
        "resource": path,
        "body": body,
        "queryStringParameters": QUERIES.get(path),
    }


def test_every_route_is_described_and_head_is_where_get_is() -> None:
    routes = {(route.method, route.path) for route in api.app._static_routes}
    heads = {("HEAD", path) for method, path in OPERATIONS if method == "GET"}
    assert routes == OPERATIONS.keys() | heads


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_head_is_get_without_a_body_and_other_methods_get_405(
    context: LambdaContext, method: str, path: str
) -> None:
    head = api.handler(request("HEAD", path), context)
    refused = api.handler(request("DELETE", path), context)
    assert head["body"] == ""
    if method == "GET":
        got = api.handler(request("GET", path), context)
        assert (head["statusCode"], head["multiValueHeaders"]) == (
            got["statusCode"],
            got["multiValueHeaders"],
        )
    assert refused["statusCode"] == 405
    assert refused["multiValueHeaders"]["Allow"] == ["GET, HEAD" if method == "GET" else "POST"]
    assert json.loads(refused["body"])["message"].startswith(f"The method of {path} must be ")


def test_an_unknown_path_is_404_in_the_form_of_every_error(context: LambdaContext) -> None:
    answer = api.handler(request("GET", "/api/nothing"), context)
    body = json.loads(answer["body"])
    assert (answer["statusCode"], body["message"]) == (404, "There is no '/api/nothing'.")
    jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/Failure", "components": DOCUMENT["components"]}
    ).validate(body)


def test_every_route_is_deployed_with_the_authentication_described() -> None:
    template = yaml_parse(TEMPLATE.read_text(encoding="utf-8"))
    paths = template["Resources"]["MonitorApi"]["Properties"]["DefinitionBody"]["paths"]
    deployed = {
        (path, settings.get("security", []) != [])
        for path, methods in paths.items()
        for settings in methods.values()
    }
    assert deployed == {
        (path, operation.get("security", DOCUMENT["security"]) != [])
        for (_, path), operation in OPERATIONS.items()
    }


def test_the_trigger_accepts_what_api_gateways_model_accepts() -> None:
    template = yaml_parse(TEMPLATE.read_text(encoding="utf-8"))
    model = template["Resources"]["MonitorApi"]["Properties"]["Models"]["TriggerBody"]
    assert DOCUMENT["components"]["schemas"]["Trigger"] == model


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_a_working_monitor_answers_as_described(
    sqlite_shop: Shop, context: LambdaContext, method: str, path: str
) -> None:
    History(sqlite_shop)
    add_sessions(sqlite_shop, {"a": "checkout_active_1", "b": "checkout_500_2", "c": None})
    answer = api.handler(request(method, path), context)
    assert answer["statusCode"] == 200
    conforms(answer, method, path)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_without_a_database_the_answers_are_as_described(
    sqlite_shop: Shop, context: LambdaContext, method: str, path: str
) -> None:
    sqlite_shop.run("DROP TABLE checkout_session")
    conforms(api.handler(request(method, path), context), method, path)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_with_an_invalid_setting_the_answers_are_as_described(
    environment: pytest.MonkeyPatch, context: LambdaContext, method: str, path: str
) -> None:
    environment.setenv("MAX_CONCURRENCY", "many")
    check.worker.cache_clear()
    conforms(api.handler(request(method, path), context), method, path)


def test_the_described_outcomes_are_those_that_can_be_listed() -> None:
    [outcome, _] = OPERATIONS["GET", "/api/sessions"]["parameters"]
    assert outcome["schema"]["enum"] == list(OUTCOMES)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("path", "query", "message"),
    [
        ("/api/sessions", {}, "outcome is missing; it must be one of active, "),
        ("/api/sessions", {"outcome": "bad"}, "outcome is 'bad'; it must be one of active, "),
        (
            "/api/sessions",
            {"outcome": "timeout", "after": "-1"},
            "after is '-1'; it must be the number that the last answer gave.",
        ),
        ("/api/status", {"session": ""}, "session has 0 characters; it must be a session's id"),
        ("/api/status", {"session": "x" * 256}, "session has 256 characters; it must be"),
    ],
)
def test_a_bad_query_is_refused_with_what_is_allowed(
    context: LambdaContext, path: str, query: dict[str, str], message: str
) -> None:
    answer = api.handler({**request("GET", path), "queryStringParameters": query}, context)
    assert answer["statusCode"] == 400
    assert conforms(answer, "GET", path)["message"].startswith(message)


@pytest.mark.usefixtures("environment")
def test_sessions_are_found_as_described(sqlite_shop: Shop, context: LambdaContext) -> None:
    history = History(sqlite_shop)
    history.failing("a", None)
    history.session("b", "checkout_2")
    history.change("c")
    add_sessions(sqlite_shop, {"c": "checkout_3"}, status="success")
    for session in "abc":
        query = {"queryStringParameters": {"session": session}}
        answer = api.handler({**request("GET", "/api/status"), **query}, context)
        [found] = conforms(answer, "GET", "/api/status")["sessions"]
        assert found["session_id"] == session
    answer = api.handler(request("GET", "/api/sessions"), context)
    [listed] = conforms(answer, "GET", "/api/sessions")["sessions"]
    assert listed["session_id"] == "b"


@pytest.mark.usefixtures("environment")
def test_a_bad_body_is_refused_as_described(context: LambdaContext) -> None:
    path = "/api/test/checkout-sessions"
    answer = api.handler(request("POST", path, "[]"), context)
    assert answer["statusCode"] == 400
    conforms(answer, "POST", path)


def test_a_full_status_report_is_as_described(sqlite_shop: Shop) -> None:
    history = History(sqlite_shop)
    history.passes(10, missed=(3,), row=lambda ago: {"finished_at": None} if ago == 1 else {})
    history.run("manual", history.slot + SECOND)
    history.counted({"active": 3, "timeout": 1, "": 2})
    history.failing("s", None, last_outcome="invalid_session", last_status_code=None)
    history.change("t", billing_checkout_id=None)
    history.set_shared(paused_until=history.now + SECOND)
    settings = history.settings(STATUS_UPDATES="true")
    database = open_database(settings, clock=FakeClock(history.now))
    body = json.loads(json.dumps(read_status(database, settings)))
    database.close()
    schema = {"$ref": "#/components/schemas/Status", "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(body)
    assert body["changes"]

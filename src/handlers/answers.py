"""What all routes have in common: HEAD, 405, one shape of error, no caching, a final newline.

An error is `{"success": false, "message": "one sentence", "timestamp": "…"}`; API Gateway's own
errors have the first two (`GatewayResponses` in template.yaml).
"""

import json
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPMethod, HTTPStatus

from aws_lambda_powertools.event_handler import Response, content_types
from aws_lambda_powertools.event_handler.api_gateway import ApiGatewayResolver

from core.domain.model import JsonObject, iso

type Handler = Callable[[], Response[str]]

NO_STORE = "no-store"


class Routes:
    """Adds routes to an app, and answers the requests that none of them takes."""

    def __init__(self, app: ApiGatewayResolver) -> None:
        self._app = app
        self._methods: defaultdict[str, list[str]] = defaultdict(list)
        app.not_found(lambda _error: self._refused())

    def get(self, path: str) -> Callable[[Handler], None]:
        """Serve GET, and HEAD as the same answer without its body."""

        def add(handler: Handler) -> None:
            self._add(HTTPMethod.GET, path, handler)
            self._add(HTTPMethod.HEAD, path, lambda: _without_body(handler()))

        return add

    def post(self, path: str) -> Callable[[Handler], None]:
        return lambda handler: self._add(HTTPMethod.POST, path, handler)

    def _add(self, method: HTTPMethod, path: str, handler: Handler) -> None:
        self._methods[path].append(method.value)
        self._app.route(path, method=method.value)(handler)

    def _refused(self) -> Response[str]:
        event = self._app.current_event
        methods = self._methods.get(event.path)
        if methods is None:
            answer = failure(HTTPStatus.NOT_FOUND, f"There is no {event.path!r}.")
        else:
            allowed = ", ".join(methods)
            text = f"The method of {event.path} must be {' or '.join(methods)}."
            answer = failure(HTTPStatus.METHOD_NOT_ALLOWED, text)
            answer.headers["Allow"] = allowed
        return _without_body(answer) if event.http_method == HTTPMethod.HEAD else answer


def answer(status: HTTPStatus, body: JsonObject) -> Response[str]:
    return Response(
        status.value,
        content_types.APPLICATION_JSON,
        json.dumps(body, ensure_ascii=False) + "\n",
        headers={"Cache-Control": NO_STORE},
    )


def failure(status: HTTPStatus, message: str) -> Response[str]:
    return answer(
        status, {"success": False, "message": message, "timestamp": iso(datetime.now(UTC))}
    )


def _without_body(found: Response[str]) -> Response[str]:
    found.body = ""
    return found

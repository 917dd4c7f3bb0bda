"""The API's routes: health, status, the page, the trigger; Lambda and the laptop serve them.

`openapi.json` beside this file describes them; the tests compare the two.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

from aws_lambda_powertools.event_handler import Response, content_types
from aws_lambda_powertools.event_handler.api_gateway import ApiGatewayResolver

from core import log
from core.domain.model import JsonObject, Skip, iso
from core.domain.summary import Summary
from core.errors import SettingsError, StoreError
from core.store.health import Health
from core.store.session_search import OUTCOMES
from handlers.answers import NO_STORE, Routes, answer, failure
from handlers.page import Page, operators_page

OPENAPI = Path(__file__).with_name("openapi.json")
GUIDE = Path(__file__).with_name("operate.md")  # a link to docs/operate.md

MAX_IDS = 100
MAX_ID_LENGTH = 255
BODY_FORM = (
    'The body must be empty or a JSON object {"session_ids": [...]} with '
    f"1 to {MAX_IDS} strings of 1 to {MAX_ID_LENGTH} characters, and nothing else"
)


class Monitor(Protocol):
    """What the routes need; see `core.worker.Worker`."""

    def health(self) -> Health: ...
    def status(self) -> JsonObject: ...
    def find_sessions(self, text: str) -> JsonObject: ...
    def sessions_of(self, outcome: str, after: int) -> JsonObject: ...
    def trigger_checkout_session_check(
        self, session_ids: Sequence[str] | None = None
    ) -> Summary: ...


class RequestError(ValueError):
    """A request body or a query that is not accepted."""


def add_routes(
    app: ApiGatewayResolver,
    monitor: Callable[[], Monitor],
    page: Callable[[], Page] = operators_page,
    dashboard: Callable[[], str | None] = lambda: None,
) -> Routes:
    """Make `app` serve the API. Each request calls `monitor`, which may raise SettingsError.

    `dashboard` returns the URL of the stack's dashboard.
    """
    routes = Routes(app)

    _add_files(routes, page)

    @routes.get("/api/status")
    def status() -> Response[str]:
        def read() -> JsonObject:
            text = app.current_event.get_query_string_value("session")
            if text is None:
                return monitor().status() | {"dashboard": dashboard()}
            return monitor().find_sessions(parse_session(text))

        return _answered(read)

    @routes.get("/api/sessions")
    def sessions() -> Response[str]:
        def read() -> JsonObject:
            query = app.current_event.query_string_parameters or {}
            outcome = parse_outcome(query.get("outcome"))
            return monitor().sessions_of(outcome, parse_after(query.get("after")))

        return _answered(read)

    @routes.get("/api/health")
    def health() -> Response[str]:
        try:
            found = monitor().health()
        except SettingsError as error:
            log.logger.error(f"❌ {error}")
            found = Health({"settings": False}, datetime.now(UTC), None)
        return answer(
            HTTPStatus.OK if found.ok else HTTPStatus.SERVICE_UNAVAILABLE, found.as_dict()
        )

    @routes.post("/api/test/checkout-sessions")
    def trigger() -> Response[str]:
        def checked() -> JsonObject:
            session_ids = parse_session_ids(app.current_event.decoded_body)
            summary = monitor().trigger_checkout_session_check(session_ids)
            return {
                "success": True,
                "message": message(summary),
                "timestamp": iso(summary.finished_at),
                "summary": summary.as_dict(),
            }

        return _answered(checked)

    return routes


def _add_files(routes: Routes, page: Callable[[], Page]) -> None:
    @routes.get("/")
    def show_page() -> Response[str]:
        shown = page()
        return Response(
            HTTPStatus.OK.value, "text/html; charset=utf-8", shown.html, headers=dict(shown.headers)
        )

    @routes.get("/api/openapi.json")
    def description() -> Response[str]:
        return _file(OPENAPI, content_types.APPLICATION_JSON)

    @routes.get("/api/operate.md")
    def guide() -> Response[str]:
        # As plain text, so that browsers show it and can go to a heading.
        return _file(GUIDE, "text/plain; charset=utf-8")


def parse_session(text: str) -> str:
    """The id or checkout id to find. Raises RequestError."""
    if not 1 <= len(text) <= MAX_ID_LENGTH:
        raise RequestError(
            f"session has {len(text)} characters; it must be a session's id or checkout id of "
            f"1 to {MAX_ID_LENGTH}."
        )
    return text


def parse_outcome(text: str | None) -> str:
    """The outcome whose sessions are listed. Raises RequestError."""
    if text not in OUTCOMES:
        given = "missing" if text is None else repr(text)
        raise RequestError(f"outcome is {given}; it must be one of {', '.join(OUTCOMES)}.")
    return text


def parse_after(text: str | None) -> int:
    """Where the page of the list begins; 0, which is its beginning, if it is not given.

    Raises:
        RequestError: it is not a whole number.
    """
    if text is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise RequestError(f"after is {text!r}; it must be the number that the last answer gave.")
    return int(text)


def parse_session_ids(body: str | None) -> list[str] | None:
    """The ids to check; None, which means all, if the body is empty or an empty object.

    Raises:
        RequestError: any other body.
    """
    if not body or not body.strip():
        return None
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{BODY_FORM}; it is not valid JSON: {error}.") from None
    if parsed == {}:
        return None
    ids = parsed.get("session_ids") if isinstance(parsed, dict) and len(parsed) == 1 else None
    if (
        not isinstance(ids, list)
        or not 1 <= len(ids) <= MAX_IDS
        or not all(isinstance(i, str) and 1 <= len(i) <= MAX_ID_LENGTH for i in ids)
    ):
        raise RequestError(f"{BODY_FORM}.")
    return ids


def message(summary: Summary) -> str:
    """What a manual pass did, in one sentence."""
    text = f"Checked {summary.checked} of {summary.open} open checkout sessions"
    if skipped := ", ".join(f"{n} {skip.value}" for skip, n in summary.skipped.items()):
        text += f"; skipped: {skipped}"
    if summary.allowed is not None and summary.skipped.get(Skip.RATE_LIMITED):
        text += f"; billing allows about {summary.allowed:.2g} checks a second"
    if summary.paused_until is not None:
        text += f"; billing asked for a pause until {iso(summary.paused_until)}"
    return f"{text}."


def _answered(work: Callable[[], JsonObject]) -> Response[str]:
    """What `work` returns; or if it raises, the error's sentence with its HTTP status."""
    try:
        return answer(HTTPStatus.OK, work())
    except RequestError as error:
        return _failed(HTTPStatus.BAD_REQUEST, error)
    except StoreError as error:
        return _failed(HTTPStatus.SERVICE_UNAVAILABLE, error)
    except SettingsError as error:
        return _failed(HTTPStatus.INTERNAL_SERVER_ERROR, error)


def _failed(status: HTTPStatus, error: Exception) -> Response[str]:
    log.logger.error(f"❌ {error}")
    return failure(status, str(error))


def _file(path: Path, content_type: str) -> Response[str]:
    text = path.read_text(encoding="utf-8")
    return Response(HTTPStatus.OK.value, content_type, text, headers={"Cache-Control": NO_STORE})

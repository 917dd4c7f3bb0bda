"""The API's routes: health, status, the page, the trigger; Lambda and the laptop serve them.

`openapi.json` beside this file describes them; the tests compare the two.
"""

import json
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
from core.worker import Health
from handlers.page import Page, operators_page

OPENAPI = Path(__file__).with_name("openapi.json")

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
    def trigger_checkout_session_check(
        self, session_ids: Sequence[str] | None = None
    ) -> Summary: ...


class BodyError(ValueError):
    """A request body that the trigger does not accept."""


def add_routes(
    app: ApiGatewayResolver,
    monitor: Callable[[], Monitor],
    page: Callable[[], Page] = operators_page,
) -> None:
    """Make `app` serve the API. Each request calls `monitor`, which may raise SettingsError."""

    @app.get("/")
    def show_page() -> Response[str]:
        shown = page()
        return Response(
            HTTPStatus.OK.value, "text/html; charset=utf-8", shown.html, headers=dict(shown.headers)
        )

    @app.get("/api/openapi.json")
    def description() -> Response[str]:
        text = OPENAPI.read_text(encoding="utf-8")
        return Response(HTTPStatus.OK.value, content_types.APPLICATION_JSON, text)

    @app.get("/api/status")
    def status() -> Response[str]:
        return _answered(lambda: monitor().status())

    @app.get("/api/health")
    def health() -> Response[str]:
        try:
            found = monitor().health()
        except SettingsError as error:
            log.logger.error(f"❌ {error}")
            found = Health({"settings": False}, datetime.now(UTC), None)
        status = HTTPStatus.OK if found.ok else HTTPStatus.SERVICE_UNAVAILABLE
        return _answer(status, found.as_dict())

    @app.post("/api/test/checkout-sessions")
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


def parse_session_ids(body: str | None) -> list[str] | None:
    """The ids to check; None, which means all, if the body is empty or an empty object.

    Raises:
        BodyError: any other body.
    """
    if not body or not body.strip():
        return None
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BodyError(f"{BODY_FORM}; it is not valid JSON: {error}.") from None
    if parsed == {}:
        return None
    ids = parsed.get("session_ids") if isinstance(parsed, dict) and len(parsed) == 1 else None
    if (
        not isinstance(ids, list)
        or not 1 <= len(ids) <= MAX_IDS
        or not all(isinstance(i, str) and 1 <= len(i) <= MAX_ID_LENGTH for i in ids)
    ):
        raise BodyError(f"{BODY_FORM}.")
    return ids


def message(summary: Summary) -> str:
    """What a manual pass did, in one sentence."""
    text = f"Checked {summary.checked} of {summary.open} open checkout sessions"
    if skipped := ", ".join(f"{n} {skip.value}" for skip, n in summary.skipped.items()):
        text += f"; skipped: {skipped}"
    if summary.allowed is not None and summary.skipped[Skip.RATE_LIMITED]:
        text += f"; billing allows about {summary.allowed:.2g} checks a second"
    if summary.paused_until is not None:
        text += f"; billing asked for a pause until {iso(summary.paused_until)}"
    return f"{text}."


def _answered(work: Callable[[], JsonObject]) -> Response[str]:
    """What `work` returns; or if it raises, the error's sentence with its HTTP status."""
    try:
        return _answer(HTTPStatus.OK, work())
    except BodyError as error:
        return _failure(HTTPStatus.BAD_REQUEST, error)
    except StoreError as error:
        return _failure(HTTPStatus.SERVICE_UNAVAILABLE, error)
    except SettingsError as error:
        return _failure(HTTPStatus.INTERNAL_SERVER_ERROR, error)


def _failure(status: HTTPStatus, error: Exception) -> Response[str]:
    log.logger.error(f"❌ {error}")
    return _answer(
        status,
        {"success": False, "message": str(error), "timestamp": iso(datetime.now(UTC))},
    )


def _answer(status: HTTPStatus, body: JsonObject) -> Response[str]:
    return Response(
        status.value, content_types.APPLICATION_JSON, json.dumps(body, ensure_ascii=False)
    )

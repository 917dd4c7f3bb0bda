"""The API on this machine: the routes of the Lambda function, served by uvicorn.

With the simulated billing service there is one more route, `/simulate`, for the page's buttons.
Requests from other sites are refused with 403.
"""

import asyncio
import contextlib
import json
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from aws_lambda_powertools.event_handler import HttpResolverLocal, Response, content_types

from core.domain.model import iso
from handlers.page import operators_page
from handlers.routes import Monitor, add_routes
from local.billing import BY_ID, MODES, SimulatedBilling
from local.other_sites import refusal

type Message = MutableMapping[str, Any]
type Receive = Callable[[], Awaitable[Message]]
type Send = Callable[[Message], Awaitable[None]]
type Application = Callable[[Message, Receive, Send], Awaitable[None]]


@contextlib.contextmanager
def running_api(
    port: int, monitor: Callable[[], Monitor], simulated: SimulatedBilling | None = None
) -> Iterator[int]:
    """Serve the API on 127.0.0.1 until the block ends; yields the port (0 asks for a free one).

    Raises:
        OSError: the port is in use or not permitted.
    """
    resolver = HttpResolverLocal()
    add_routes(resolver, monitor, partial(operators_page, simulated=simulated is not None))
    if simulated is not None:
        add_simulate_route(resolver, simulated)
    with socket.create_server(("127.0.0.1", port)) as listening:
        server = uvicorn.Server(
            uvicorn.Config(
                refuse_other_sites(run_in_threads(resolver)),
                lifespan="off",
                log_level="warning",
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listening]}, name="api", daemon=True
        )
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            # A client that is still sending its request is cut off; that is not an error.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            server.should_exit = True
            thread.join()


def add_simulate_route(app: HttpResolverLocal, billing: SimulatedBilling) -> None:
    """Serve /simulate as the simulated billing service does itself."""

    @app.get("/simulate")
    def current_mode() -> Response[str]:
        body = {"mode": billing.mode, "modes": [BY_ID, *MODES]}
        return Response(HTTPStatus.OK.value, content_types.APPLICATION_JSON, json.dumps(body))

    @app.post("/simulate")
    def change_mode() -> Response[str]:
        try:
            billing.simulate(app.current_event.decoded_body or "")
        except ValueError as error:
            return Response(HTTPStatus.BAD_REQUEST.value, content_types.TEXT_PLAIN, str(error))
        return current_mode()


def refuse_other_sites(application: Application) -> Application:
    """Answer requests that come from other sites with 403; pass all others to `application`."""

    async def asgi(scope: Message, receive: Receive, send: Send) -> None:
        def header(name: bytes) -> str | None:
            values = [value for field, value in scope["headers"] if field == name]
            return b", ".join(values).decode("latin-1") if values else None

        why = refusal(scope["method"], header(b"host") or "", header(b"origin"))
        if why is None:
            await application(scope, receive, send)
            return
        answer = {"success": False, "message": why, "timestamp": iso(datetime.now(UTC))}
        body = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        status = HTTPStatus.FORBIDDEN.value
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return asgi


def run_in_threads(application: Application) -> Application:
    """Run each request of `application` in its own thread.

    The routes block, as on Lambda; in one thread a manual pass would delay every other request.
    """

    async def asgi(scope: Message, receive: Receive, send: Send) -> None:
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        # Powertools decodes a body as UTF-8; invalid bytes would raise an error there.
        text = bytes(body).decode(errors="replace").encode()
        answers: list[Message] = []

        async def receive_body() -> Message:
            return {"type": "http.request", "body": text}

        async def keep_answer(answer: Message) -> None:
            answers.append(answer)

        async def request() -> None:
            await application(scope, receive_body, keep_answer)

        await asyncio.to_thread(asyncio.run, request())
        for answer in answers:
            await send(answer)

    return asgi

"""The API on this machine: the routes of the Lambda function, served by uvicorn.

With the simulated billing service there is one more route, `/simulate`, for the page's buttons.
Requests from other sites are refused with 403.
"""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from aws_lambda_powertools.event_handler import HttpResolverLocal, Response

from core.log import logger
from handlers.answers import Routes, answer, failure
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
    routes = add_routes(resolver, monitor, partial(operators_page, simulated=simulated is not None))
    if simulated is not None:
        add_simulate_route(resolver, routes, simulated)
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


def add_simulate_route(app: HttpResolverLocal, routes: Routes, billing: SimulatedBilling) -> None:
    """Serve /simulate as the simulated billing service does itself."""

    def current_mode() -> Response[str]:
        return answer(HTTPStatus.OK, {"mode": billing.mode, "modes": [BY_ID, *MODES]})

    def change_mode() -> Response[str]:
        try:
            billing.simulate(app.current_event.decoded_body or "")
        except ValueError as error:
            return failure(HTTPStatus.BAD_REQUEST, str(error))
        return current_mode()

    routes.get("/simulate")(current_mode)
    routes.post("/simulate")(change_mode)


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
        for message in _messages(failure(HTTPStatus.FORBIDDEN, why)):
            await send(message)

    return asgi


def _messages(response: Response[str]) -> Sequence[Message]:
    """An answer outside of the routes, as ASGI sends it."""
    body = (response.body or "").encode()
    headers = [
        (name.lower().encode(), str(value).encode()) for name, value in response.headers.items()
    ]
    headers.append((b"content-length", b"%d" % len(body)))
    return (
        {"type": "http.response.start", "status": response.status_code, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


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
            try:
                await application(scope, receive_body, keep_answer)
            except Exception:  # noqa: BLE001 (on Lambda, API Gateway answers for it)
                logger.exception("❌ Unexpected error in a request")
                text = "Unexpected error; the log has it."
                answers[:] = _messages(failure(HTTPStatus.INTERNAL_SERVER_ERROR, text))

        await asyncio.to_thread(asyncio.run, request())
        for part in answers:
            await send(part)

    return asgi

"""The API on this machine: the routes of the Lambda function, served by uvicorn.

With the simulated billing service there is one more route, `/simulate`, for the page's buttons.
"""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from aws_lambda_powertools.event_handler import HttpResolverLocal, Response, content_types

from handlers.page import operators_page
from handlers.routes import Monitor, add_routes
from local.billing import BY_ID, MODES, SimulatedBilling

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
                run_in_threads(resolver),
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

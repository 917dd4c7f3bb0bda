"""The API on this machine: the Lambda's own routes, served by uvicorn.

Where the billing service is the simulated one, `simulate` beside them is its control, for the page.
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
        OSError: the port is in use, or may not be used.
    """
    resolver = HttpResolverLocal()
    add_routes(resolver, monitor, partial(operators_page, simulated=simulated is not None))
    if simulated is not None:
        add_control(resolver, simulated)
    with socket.create_server(("127.0.0.1", port)) as listening:
        server = uvicorn.Server(
            uvicorn.Config(
                in_threads(resolver),
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


def add_control(app: HttpResolverLocal, billing: SimulatedBilling) -> None:
    """Make `app` serve what the simulated billing service serves as /simulate itself."""

    @app.get("/simulate")
    def current() -> Response[str]:
        body = {"mode": billing.mode, "modes": [BY_ID, *MODES]}
        return Response(HTTPStatus.OK.value, content_types.APPLICATION_JSON, json.dumps(body))

    @app.post("/simulate")
    def change() -> Response[str]:
        try:
            billing.simulate(app.current_event.decoded_body or "")
        except ValueError as error:
            return Response(HTTPStatus.BAD_REQUEST.value, content_types.TEXT_PLAIN, str(error))
        return current()


def in_threads(application: Application) -> Application:
    """Run each request of `application` in a thread of its own.

    The routes block, as Lambda's do: without this, a manual pass would hold up every other request.
    """

    async def asgi(scope: Message, receive: Receive, send: Send) -> None:
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        # Powertools reads a body as UTF-8 and nothing else; what is not is no JSON either way.
        text = bytes(body).decode(errors="replace").encode()
        answers: list[Message] = []

        async def whole() -> Message:
            return {"type": "http.request", "body": text}

        async def keep(answer: Message) -> None:
            answers.append(answer)

        async def request() -> None:
            await application(scope, whole, keep)

        await asyncio.to_thread(asyncio.run, request())
        for answer in answers:
            await send(answer)

    return asgi

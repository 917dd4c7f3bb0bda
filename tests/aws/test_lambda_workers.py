"""How a leader on Lambda starts helpers; a local HTTP server stands in for Lambda's API."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.aws.lambda_workers import LambdaWorkers
from core.errors import StartWorkerError
from testkit.clock import NOON


class Lambda(BaseHTTPRequestHandler):
    """Records each request and answers with the server's `status`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        assert isinstance(server, Server)
        server.requests.append((self.path, self.headers["X-Amz-Invocation-Type"], body))
        refusal = b'{"message": "User is not authorized to perform: lambda:InvokeFunction"}'
        answer = b"" if server.status == 202 else refusal
        self.send_response(server.status)
        self.send_header("x-amzn-ErrorType", "AccessDeniedException")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name in the base class)
        pass


class Server(ThreadingHTTPServer):
    requests: list[tuple[str, str, bytes]]
    status: int


@pytest.fixture
def lambda_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Lambda) as server:
        server.requests, server.status = [], 202
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # poll interval
        thread.start()
        host, port = str(server.server_address[0]), server.server_address[1]
        monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield server
        server.shutdown()
        thread.join()


def test_a_helper_is_invoked_asynchronously_and_marked_as_one(
    lambda_service: Server,
) -> None:
    start = LambdaWorkers("stack-CheckSessions")
    start(NOON)
    start(NOON)
    path = "/2015-03-31/functions/stack-CheckSessions/invocations"
    event = {"tick": "2026-01-15T12:00:00.000Z", "helper": True}
    assert [
        (p, invocation_type, json.loads(body))
        for p, invocation_type, body in lambda_service.requests
    ] == [(path, "Event", event)] * 2


def test_a_refused_start_is_an_error_with_the_reason(lambda_service: Server) -> None:
    lambda_service.status = 403
    with pytest.raises(StartWorkerError, match="not authorized to perform: lambda:InvokeFunction"):
        LambdaWorkers("stack-CheckSessions")(NOON)
    assert len(lambda_service.requests) == 1  # the next tick is the retry

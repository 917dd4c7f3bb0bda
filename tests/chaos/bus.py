"""A stand-in for EventBridge on a real port: it accepts events, rejects them or fails."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Bus:
    """Keeps each event's detail, in order of arrival.

    While `rejects` is set it throttles every entry; while `fails` is set it answers 500.
    """

    def __init__(self) -> None:
        self.events: list[Mapping[str, Any]] = []
        self.rejects = False
        self.fails = False
        self.url = ""

    def put_events(self, entries: list[Mapping[str, str]]) -> tuple[int, object]:
        if self.fails:
            return 500, {"__type": "InternalFailure"}
        if self.rejects:
            rejected = {"ErrorCode": "ThrottlingException", "ErrorMessage": "Rate exceeded"}
            return 200, {"FailedEntryCount": len(entries), "Entries": [rejected] * len(entries)}
        self.events += [json.loads(entry["Detail"]) for entry in entries]
        return 200, {"FailedEntryCount": 0, "Entries": [{"EventId": "1"}] * len(entries)}


@contextmanager
def running_bus() -> Iterator[Bus]:
    bus = Bus()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            status, answer = bus.put_events(json.loads(self.rfile.read(length))["Entries"])
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        bus.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield bus
        finally:
            server.shutdown()
            thread.join()

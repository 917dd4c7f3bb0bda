"""The API on this machine answers like the Lambda function, and errors of its own alike."""

from collections.abc import Iterator

import httpx
import pytest

from local.api import running_api
from local.billing import running_billing


class BrokenMonitor:
    """Raises what nobody expects."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"a secret of {name}")


@pytest.fixture(scope="module")
def api() -> Iterator[httpx.Client]:
    with (
        running_billing() as billing,
        running_api(0, BrokenMonitor, billing) as port,  # type: ignore[arg-type]
        httpx.Client(base_url=f"http://localhost:{port}") as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/api/status", 500, "Unexpected error; the log has it."),
        ("GET", "/nothing", 404, "There is no '/nothing'."),
        ("GET", "/api/status/", 404, "There is no '/api/status/'."),
        ("PUT", "/simulate", 405, "The method of /simulate must be GET or HEAD or POST."),
        ("POST", "/simulate", 400, ""),
    ],
)
def test_every_error_has_one_form(
    api: httpx.Client, method: str, path: str, status: int, message: str
) -> None:
    answer = api.request(method, path, content=b"no such mode")
    body = answer.json()
    assert answer.status_code == status
    assert set(body) == {"success", "message", "timestamp"}
    assert body["message"].startswith(message)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers.get("allow") == ("GET, HEAD, POST" if status == 405 else None)
    assert answer.text.endswith("\n")


@pytest.mark.parametrize("path", ["/", "/simulate", "/api/operate.md"])
def test_head_is_get_without_a_body(api: httpx.Client, path: str) -> None:
    head, get = api.head(path), api.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert get.content
    assert head.headers["content-type"] == get.headers["content-type"]

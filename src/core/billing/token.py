"""OAuth 2.0 client credentials (RFC 6749, section 4.4): BILLING_TOKEN_URL gives a token."""

import base64
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote_plus

import httpx

from core.billing.headers import USER_AGENT
from core.billing.request_headers import Token, TokenError
from core.domain.model import Answer, Outcome

CLIENT_ID, CLIENT_SECRET = "BILLING_CLIENT_ID", "BILLING_CLIENT_SECRET"

OK = 200
_REFUSED = frozenset((400, 401, 403))
# RFC 6749, section 5.2. Other texts of the answer are not shown: they may repeat what was sent.
_ERRORS = frozenset(
    (
        "invalid_request", "invalid_client", "invalid_grant", "unauthorized_client",
        "unsupported_grant_type", "invalid_scope",
    )
)  # fmt: skip


type Send = Callable[[httpx.Request], Awaitable[tuple[int, bytes | None]]]
"""Gives the answer's status code and body; a body that is None is too long."""


async def fetch_token(send: Send, url: str, credentials: Mapping[str, str]) -> Token:
    """Ask for a token.

    Raises:
        TokenError: there is none.
    """
    try:
        status_code, body = await send(_request(url, credentials))
    except httpx.TimeoutException:
        raise _no_token("does not answer in time", Answer(Outcome.TIMEOUT)) from None
    except httpx.TransportError as error:
        raise _no_token(f"cannot be reached: {error}", Answer(Outcome.NETWORK_ERROR)) from None
    return _read_token(status_code, body)


def _request(url: str, credentials: Mapping[str, str]) -> httpx.Request:
    """The request for a token; the client authenticates as RFC 6749 requires (section 2.3.1)."""
    client = f"{quote_plus(credentials[CLIENT_ID])}:{quote_plus(credentials[CLIENT_SECRET])}"
    headers = {
        "accept": "application/json",
        "user-agent": USER_AGENT,
        "authorization": f"Basic {base64.b64encode(client.encode()).decode('ascii')}",
    }
    return httpx.Request("POST", url, headers=headers, data={"grant_type": "client_credentials"})


def _read_token(status_code: int, body: bytes | None) -> Token:
    parsed = _parsed(body)
    if status_code != OK:
        error = parsed.get("error")
        known = f" ({error})" if isinstance(error, str) and error in _ERRORS else ""
        outcome = Outcome.UNAUTHORIZED if status_code in _REFUSED else Outcome.UNEXPECTED_STATUS
        raise _no_token(f"answers with status {status_code}{known}", Answer(outcome, status_code))
    text = parsed.get("access_token")
    if not isinstance(text, str) or not text or not all("!" <= c <= "~" for c in text):
        answer = Answer(Outcome.UNEXPECTED_STATUS, status_code)
        raise _no_token("answers without a usable access_token", answer)
    try:
        seconds = float(str(parsed.get("expires_in")))
    except ValueError:  # it may be left out
        seconds = math.inf
    return Token(text, seconds if seconds > 0 else math.inf)


def _no_token(why: str, answer: Answer) -> TokenError:
    return TokenError(answer._replace(detail=f"BILLING_TOKEN_URL {why}"))


def _parsed(body: bytes | None) -> dict[str, object]:
    try:
        parsed = json.loads(body or b"")
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}

"""The billing client: one GET for each check; every result or failure becomes an `Answer`."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import cast
from urllib.parse import quote

import httpx

from core.billing.status_words import StatusReader
from core.billing.transport import Get, ReqwestTransport
from core.domain.model import Answer, Outcome
from core.log import logger

# More than any session's answer needs; a longer body is not read.
MAX_BODY_BYTES = 64 * 1024

# A longer pause is cut to this: by then the service may have recovered, and customers are waiting.
MAX_RETRY_AFTER_SECONDS = 300.0

USER_AGENT = "csm"  # checkout session monitor

RATE_LIMITING = frozenset((429, 503))
UNAUTHORIZED = frozenset((401, 403))
# A refused key may have been rotated, so the secret is read again. A revoked key is refused for
# every session; the secret must not be read once for each of them.
KEY_READ_AGAIN_SECONDS = 30.0

# Every URL parser resolves these segments, also percent-encoded (RFC 3986 section 5.2.4; WHATWG
# URL, "double-dot path segment"), so no URL can carry them as ids.
_DOT_SEGMENTS = frozenset((".", ".."))


class BillingClient:
    """Asks the billing service about sessions, each within a total time, over kept connections.

    With a `status_reader`, the body of a 200 gives the session's status. `read_key_again`, if the
    key can change, is called in a thread after a 401 or 403, and returns None where it cannot be
    read; if it returns another key, the request is sent once more. A client belongs to the event
    loop it is used on.

    `transport` itself ends each request within `timeout_seconds`: a timer of the event loop for
    each request would add a tenth to the cost of a check.
    """

    def __init__(
        self,
        *,
        api_url: str,
        api_key: str,
        timeout_seconds: float,
        status_reader: StatusReader | None = None,
        read_key_again: Callable[[], str | None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        monotonic: Callable[[], float] = time.perf_counter,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        self._prefix = f"{api_url}/"
        # The transport is called without an httpx.AsyncClient: nothing that a client adds
        # (redirects, cookies, authentication, hooks) is wanted here, and it costs more time than
        # the request. A client would also set the Host header.
        host = httpx.URL(api_url).netloc.decode("ascii")
        # These bytes are sent with every check, half a billion times a month for 1,000 sessions.
        self._headers = httpx.Headers(
            {
                "host": host,
                "accept": "application/json"
                if status_reader
                else "*/*",  # the body is read, or not
                "user-agent": USER_AGENT,
                "x-api-key": api_key,
            }
        )
        self._status_reader = status_reader
        self._read_key_again = read_key_again
        self._key_read_at = -KEY_READ_AGAIN_SECONDS
        self._reading_key: asyncio.Task[None] | None = None
        self._timeout_seconds = timeout_seconds
        self._transport = transport or ReqwestTransport(timeout_seconds)
        self._monotonic = monotonic
        self._now = now or partial(datetime.now, UTC)

    async def aclose(self) -> None:
        if self._reading_key is not None:
            self._reading_key.cancel()  # its thread ends on its own, and changes nothing any more
            await asyncio.wait([self._reading_key])
        await self._transport.aclose()

    async def check(self, billing_checkout_id: str | None) -> Answer:
        """Ask about one session. Every failure of billing or of the network is an `Answer` too."""
        if not billing_checkout_id:
            return Answer(Outcome.INVALID_SESSION, detail="it has no billing_checkout_id")
        segment = path_segment(billing_checkout_id)
        if segment is None:
            return Answer(
                Outcome.INVALID_SESSION, detail="its billing_checkout_id cannot be part of a URL"
            )
        url = self._prefix + segment
        started = self._monotonic()
        try:
            headers = self._headers
            response, body = await self._get(url, headers)
            if response.status_code in UNAUTHORIZED and self._read_key_again is not None:
                async with asyncio.timeout(started + self._timeout_seconds - self._monotonic()):
                    if await self._key_rotated(headers, self._read_key_again):
                        response, body = await self._get(url, self._headers)
        except (TimeoutError, httpx.TimeoutException):
            return Answer(Outcome.TIMEOUT, seconds=self._monotonic() - started)
        except httpx.TransportError as error:
            return Answer(
                Outcome.NETWORK_ERROR, seconds=self._monotonic() - started, detail=str(error)
            )
        return self._answer(response, body, self._monotonic() - started)

    def _answer(self, response: httpx.Response, body: bytes | None, seconds: float) -> Answer:
        code = response.status_code
        retry_after = None
        if code in RATE_LIMITING:
            retry_after = parse_retry_after(response.headers.get("retry-after", ""), self._now())
        outcome = classify(code, asks_to_retry=retry_after is not None)
        if outcome is Outcome.RATE_LIMITED:
            return Answer(outcome, code, seconds, retry_after=retry_after)
        if outcome is not Outcome.ACTIVE or self._status_reader is None:
            return Answer(outcome, code, seconds)
        reading = self._status_reader.read(body)
        if reading.status is None:
            return Answer(Outcome.UNKNOWN_STATUS, code, seconds, detail=reading.seen)
        return Answer(outcome, code, seconds, status=reading.status, billing_status=reading.seen)

    async def _get(self, url: str, headers: httpx.Headers) -> tuple[httpx.Response, bytes | None]:
        response = await self._transport.handle_async_request(Get(url, headers))
        return response, await _read(response)

    async def _key_rotated(
        self, refused: httpx.Headers, read_key: Callable[[], str | None]
    ) -> bool:
        """Whether there is another key than the refused one, after a rotation.

        All requests that are refused meanwhile share one reading. It may take longer than they do:
        then the next request has the new key.
        """
        if self._headers is not refused:
            return True  # another check has found the new key
        if self._reading_key is None:
            if self._monotonic() - self._key_read_at < KEY_READ_AGAIN_SECONDS:
                return False
            self._key_read_at = self._monotonic()
            self._reading_key = asyncio.create_task(self._read_key(read_key))
        await asyncio.wait([self._reading_key])  # a request that gives up does not cancel it
        return self._headers is not refused

    async def _read_key(self, read_key: Callable[[], str | None]) -> None:
        """Read the key; one that cannot be read, or be sent, leaves the client with its key."""
        try:
            key = await asyncio.to_thread(read_key)
            if key is not None and key != self._headers["x-api-key"]:
                headers = self._headers.copy()
                headers["x-api-key"] = key
                self._headers = headers
        except Exception as error:  # noqa: BLE001 (whoever waits goes on with the key that it has)
            logger.error(f"❌ The API key cannot be read again: {type(error).__name__}")
        finally:
            self._reading_key = None


def path_segment(billing_checkout_id: str) -> str | None:
    """The id as one path segment of a URL, or None if no URL can carry it.

    Everything but RFC 3986's unreserved characters is percent-encoded, so an id can neither leave
    its segment nor add a query.
    """
    if billing_checkout_id in _DOT_SEGMENTS:
        return None
    try:
        return quote(billing_checkout_id, safe="")
    except UnicodeEncodeError:  # half of a surrogate pair is not a character
        return None


def classify(status_code: int, *, asks_to_retry: bool) -> Outcome:
    """The outcome that an answer's status code stands for."""
    match status_code:
        case 200:
            return Outcome.ACTIVE
        case 404 | 410:
            return Outcome.NOT_FOUND
        case _ if status_code in UNAUTHORIZED:
            return Outcome.UNAUTHORIZED
        case 429:
            return Outcome.RATE_LIMITED
        case 503 if asks_to_retry:
            return Outcome.RATE_LIMITED
        case _:
            return Outcome.UNEXPECTED_STATUS


def parse_retry_after(text: str, now: datetime) -> float | None:
    """Seconds to wait, up to MAX_RETRY_AFTER_SECONDS; None if the header cannot be used.

    The header is a whole number of seconds or an HTTP date (RFC 9110, section 10.2.3).
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        seconds = float(text)
    else:
        try:
            date = parsedate_to_datetime(text)
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
        except Exception:  # noqa: BLE001 (its text is the service's, e.g. the year 99999999999)
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)


async def _read(response: httpx.Response) -> bytes | None:
    """The body, read to its end so that the connection can be reused; None beyond the limit."""
    body = b""
    try:
        # Not response.aiter_raw(): that refuses a response which a mock transport has read before.
        async for chunk in cast("httpx.AsyncByteStream", response.stream):
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return None
        return body
    finally:
        await response.aclose()

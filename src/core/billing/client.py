"""The billing client: one GET for each check; every result or failure becomes an `Answer`."""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast
from urllib.parse import quote

import httpx

from core.billing.headers import API_KEY_HEADER, USER_AGENT, HeaderTemplates
from core.billing.limits import is_used_up, limit_ends_in, parse_retry_after, says_remaining
from core.billing.request_headers import RequestHeaders, TokenError
from core.billing.transport import Get, ReqwestTransport
from core.domain.model import Answer, Outcome, SessionStatus

if TYPE_CHECKING:
    from core.billing.status_words import StatusReader

# More than any session's answer needs; a longer body is not read.
MAX_BODY_BYTES = 64 * 1024

RATE_LIMITING = frozenset((429, 503))
UNAUTHORIZED = frozenset((401, 403))
# To read the headers of an answer takes a tenth of a check's processor time. Where they do not say
# how many requests are left, only those of every so many answers are read.
LOOK_AT_HEADERS_EVERY = 50

# What is sent there does not leave this machine.
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

# Where BILLING_API_URL has it, the id takes its place; otherwise the id is the last path segment.
CHECKOUT_ID = "{billing_checkout_id}"

# How nearly every other body begins, if it has one.
_NO_HTML = (b"{", b"")
# How an HTML page begins, maybe with a byte order mark.
_HTML = rb"(?i)(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+)?html\b"

# Every URL parser resolves these segments, also percent-encoded (RFC 3986 section 5.2.4; WHATWG
# URL, "double-dot path segment"), so no URL can carry them as ids.
_DOT_SEGMENTS = frozenset((".", ".."))
_is_unreserved = re.compile(r"[A-Za-z0-9._~-]+").fullmatch


class StatusCodes(NamedTuple):
    """Which status codes of an answer mean that billing knows the checkout, or does not."""

    ok: frozenset[int] = frozenset((200,))
    not_found: frozenset[int] = frozenset((404, 410))


STATUS_CODES = StatusCodes()


class BillingClient:
    """Asks the billing service about sessions, each within a total time, over kept connections.

    With a `status_reader`, the body of a 200 gives the session's status. `read_credentials_again`,
    if they can change, is called in a thread after a 401 or 403, and returns None where they cannot
    be read; if it returns others, the request is sent once more. With a `token_url`, a token is
    fetched before the first request, before it expires and after a 401 or 403. A client belongs to
    the event loop it is used on.

    `transport` itself ends each request within `timeout_seconds`: a timer of the event loop for
    each request would add a tenth to the cost of a check.
    """

    def __init__(
        self,
        *,
        api_url: str,
        credentials: Mapping[str, str],
        timeout_seconds: float,
        headers: HeaderTemplates = API_KEY_HEADER,
        token_url: str | None = None,
        status_codes: StatusCodes = STATUS_CODES,
        status_reader: "StatusReader | None" = None,
        read_credentials_again: Callable[[], Mapping[str, str] | None] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        monotonic: Callable[[], float] = time.perf_counter,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        before, placeholder, after = api_url.partition(CHECKOUT_ID)
        self._before_id, self._after_id = (before if placeholder else f"{api_url}/"), after
        url = httpx.URL(before)
        # The transport is called without an httpx.AsyncClient: nothing that a client adds
        # (redirects, cookies, authentication, hooks) is wanted here, and it costs more time than
        # the request. A client would also set the Host header.
        # These bytes are sent with every check, half a billion times a month for 1,000 sessions.
        fixed = {
            "host": url.netloc.decode("ascii"),
            "accept": "application/json" if status_reader else "*/*",  # the body is read, or not
            "user-agent": USER_AGENT,
        }

        def transport_to(host: str) -> httpx.AsyncBaseTransport:
            uses_proxy = host not in LOCAL_HOSTS
            return transport or ReqwestTransport(timeout_seconds, uses_proxy=uses_proxy)

        self._transport = transport_to(url.host)
        self._transports = {self._transport}
        fetch = None
        if token_url is not None:
            from core.billing.token import fetch_token  # noqa: PLC0415 (only if set)

            token_transport = transport_to(httpx.URL(token_url).host)
            self._transports.add(token_transport)
            fetch = partial(fetch_token, partial(_send, token_transport), token_url)
        self._headers = RequestHeaders(
            fixed,
            headers,
            credentials,
            read_again=read_credentials_again,
            fetch_token=fetch,
        )
        self._status_codes = status_codes
        self._status_reader = status_reader
        self._says_remaining = False
        self._answers = 0
        self._timeout_seconds = timeout_seconds
        self._monotonic = monotonic
        self._now = now or partial(datetime.now, UTC)

    async def aclose(self) -> None:
        await self._headers.aclose()
        for transport in self._transports:
            await transport.aclose()

    async def check(self, billing_checkout_id: str | None) -> Answer:
        """Ask about one session. Every failure of billing or of the network is an `Answer` too."""
        if not billing_checkout_id:
            return Answer(Outcome.INVALID_SESSION, detail="it has no billing_checkout_id")
        segment = path_segment(billing_checkout_id)
        if segment is None:
            return Answer(
                Outcome.INVALID_SESSION, detail="its billing_checkout_id cannot be part of a URL"
            )
        url = f"{self._before_id}{segment}{self._after_id}"
        started = self._monotonic()
        try:
            headers = self._headers.current
            if started < self._headers.renew_at:
                response = await self._transport.handle_async_request(Get(url, headers))
            else:
                async with asyncio.timeout(self._timeout_seconds):
                    headers = await self._headers.ready(started)
                    response = await self._transport.handle_async_request(Get(url, headers))
            if response.status_code in UNAUTHORIZED and self._headers.can_change:
                async with asyncio.timeout(started + self._timeout_seconds - self._monotonic()):
                    if await self._headers.changed(headers, self._monotonic()):
                        await _read(response)
                        again = Get(url, self._headers.current)
                        response = await self._transport.handle_async_request(again)
            body = await _read(response)
        except TokenError as error:
            return error.answer
        except (TimeoutError, httpx.TimeoutException):
            return Answer(Outcome.TIMEOUT, seconds=self._monotonic() - started)
        except httpx.TransportError as error:
            return Answer(
                Outcome.NETWORK_ERROR, seconds=self._monotonic() - started, detail=str(error)
            )
        return self._answer(billing_checkout_id, response, body, self._monotonic() - started)

    def _answer(self, asked: str, response: httpx.Response, body: bytes, seconds: float) -> Answer:
        code = response.status_code
        retry_after = None
        if code in RATE_LIMITING:
            retry_after = parse_retry_after(response.headers.get("retry-after", ""), self._now())
        outcome = classify(code, self._status_codes, asks_to_retry=retry_after is not None)
        if outcome is Outcome.RATE_LIMITED:
            if retry_after is None:
                retry_after = limit_ends_in(response.headers, self._now())
            return Answer(outcome, code, seconds, retry_after=retry_after)
        if outcome is not Outcome.ACTIVE:
            return Answer(outcome, code, seconds)
        used_up = self._is_used_up(response)
        if self._status_reader is None:
            answer = Answer(outcome, code, seconds, used_up=used_up)
            if is_html(body):  # a maintenance page, or a login
                answer = answer._replace(outcome=Outcome.UNKNOWN_STATUS, detail="an HTML page")
            return answer
        reading = self._status_reader.read(_usable(body), asked)
        if reading.status is None:
            unusable = Outcome.MISMATCH if reading.mismatch else Outcome.UNKNOWN_STATUS
            return Answer(unusable, code, seconds, detail=reading.seen, used_up=used_up)
        answer = Answer(
            outcome,
            code,
            seconds,
            status=reading.status,
            billing_status=reading.seen,
            used_up=used_up,
        )
        if reading.status is SessionStatus.OPEN and not reading.in_progress:  # nearly all
            return answer
        return answer._replace(
            in_progress=reading.in_progress, amount=reading.amount, currency=reading.currency
        )

    def _is_used_up(self, response: httpx.Response) -> bool:
        """Whether the next request would be limited, as far as the answer says."""
        self._answers += 1
        if not self._says_remaining and self._answers % LOOK_AT_HEADERS_EVERY != 1:
            return False
        self._says_remaining = says_remaining(response.headers)
        return self._says_remaining and is_used_up(response.headers)


async def _send(
    transport: httpx.AsyncBaseTransport, request: httpx.Request
) -> tuple[int, bytes | None]:
    response = await transport.handle_async_request(request)
    return response.status_code, _usable(await _read(response))


def is_html(body: bytes) -> bool:
    """Whether a body is a page for people. Other bodies say nothing without a status reader."""
    return body[:1] not in _NO_HTML and bool(re.match(_HTML, body))


def path_segment(billing_checkout_id: str) -> str | None:
    """The id as one path segment of a URL, or None if no URL can carry it.

    Everything but RFC 3986's unreserved characters is percent-encoded, so an id can neither leave
    its segment nor add a query.
    """
    if _is_unreserved(billing_checkout_id):  # nearly every id
        return None if billing_checkout_id in _DOT_SEGMENTS else billing_checkout_id
    try:
        return quote(billing_checkout_id, safe="")
    except UnicodeEncodeError:  # half of a surrogate pair is not a character
        return None


def classify(status_code: int, codes: StatusCodes, *, asks_to_retry: bool) -> Outcome:
    """The outcome that an answer's status code stands for."""
    match status_code:
        case _ if status_code in codes.ok:
            return Outcome.ACTIVE
        case _ if status_code in codes.not_found:
            return Outcome.NOT_FOUND
        case _ if status_code in UNAUTHORIZED:
            return Outcome.UNAUTHORIZED
        case 429:
            return Outcome.RATE_LIMITED
        case 503 if asks_to_retry:
            return Outcome.RATE_LIMITED
        case _:
            return Outcome.UNEXPECTED_STATUS


def _usable(body: bytes) -> bytes | None:
    return body if len(body) <= MAX_BODY_BYTES else None


async def _read(response: httpx.Response) -> bytes:
    """The body, read to its end so that the connection can be reused, or until it is too long."""
    if response.is_closed:  # the transport has read it
        return response.content
    body = b""
    try:
        # Not response.aiter_raw(): that refuses a response which a mock transport has read before.
        async for chunk in cast("httpx.AsyncByteStream", response.stream):
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                break
        return body
    finally:
        await response.aclose()

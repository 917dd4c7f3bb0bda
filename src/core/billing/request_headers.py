"""The headers of all requests: built once, and again for a rotated key or a new token."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import httpx

from core.billing.headers import TOKEN, HeaderTemplates
from core.domain.model import Answer, Outcome
from core.log import logger

type Credentials = Mapping[str, str]

# A refused key may have been rotated, so the secret is read again. A revoked key is refused for
# every session; the secret must not be read, or a token fetched, once for each of them.
KEY_READ_AGAIN_SECONDS = 30.0
# Where no token could be fetched, all checks share that answer for this long.
NO_TOKEN_SECONDS = 5.0
# A token is renewed this long before it expires, or when half of its time is over.
RENEW_BEFORE_SECONDS = 60.0


class Token(NamedTuple):
    """A token, and for how many seconds after it was asked for; infinity: until it is refused."""

    text: str
    seconds: float

    @property
    def renew_after_seconds(self) -> float:
        return max(self.seconds / 2, self.seconds - RENEW_BEFORE_SECONDS)


class TokenError(Exception):
    """There is no token; `answer` is what a check without one comes to, and says why."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.detail)
        self.answer = answer


class RequestHeaders:
    """`current` are the headers in use: one object that many requests share, until they change.

    `read_again`, if credentials can change, is called in a thread and returns None where they
    cannot be read. `fetch_token`, if the headers need a token, raises TokenError. `now` is a time
    in seconds of one monotonic clock.
    """

    def __init__(
        self,
        fixed: Mapping[str, str],
        templates: HeaderTemplates,
        credentials: Credentials,
        *,
        read_again: Callable[[], Credentials | None] | None = None,
        fetch_token: Callable[[Credentials], Awaitable[Token]] | None = None,
    ) -> None:
        self._fixed = fixed
        self._templates = templates
        self._credentials = credentials
        self._read_again = read_again
        self._fetch_token = fetch_token
        self._no_token: Answer | None = None  # what came of the last attempt to fetch one
        self._expires_at = self._failed_at = self._refused_at = self._read_at = -math.inf
        self._renewal: asyncio.Task[None] | None = None
        # From then on, `ready` has to be called before a request.
        self.renew_at = math.inf if fetch_token is None else -math.inf
        self.current = httpx.Headers() if fetch_token else self._built(credentials)

    @property
    def can_change(self) -> bool:
        """Whether other headers may follow those that billing refuses."""
        return self._read_again is not None or self._fetch_token is not None

    async def aclose(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()  # its thread ends on its own, and changes nothing any more
            await asyncio.wait([self._renewal])

    async def ready(self, now: float) -> httpx.Headers:
        """The headers with a token. All that wait for one share the request for it.

        Raises:
            TokenError: there is none.
        """
        if self._renewal is None and now >= self._failed_at + NO_TOKEN_SECONDS:
            self._start(now)
        if now < self._expires_at:  # it is renewed meanwhile
            return self.current
        if self._renewal is not None:
            await asyncio.wait([self._renewal])  # a request that gives up does not cancel it
        if self._no_token is not None:
            raise TokenError(self._no_token)
        return self.current

    async def changed(self, refused: httpx.Headers, now: float) -> bool:
        """Whether there are other headers than the refused ones: a rotated key, a new token.

        All requests that are refused meanwhile share one reading. It may take longer than they do:
        then the next request has the new headers.
        """
        if self.current is not refused:
            return True  # another check has found them
        if self._renewal is None:
            if now - self._refused_at < KEY_READ_AGAIN_SECONDS:
                return False
            self._refused_at = now
            self._start(now, refused=True)
        if self._renewal is not None:
            await asyncio.wait([self._renewal])  # a request that gives up does not cancel it
        return self.current is not refused

    def _start(self, now: float, *, refused: bool = False) -> None:
        self._renewal = asyncio.create_task(self._renew(now, refused=refused))

    async def _renew(self, now: float, *, refused: bool) -> None:
        """Whatever fails leaves the headers as they are."""
        try:
            if self._fetch_token is None:
                await self._read_credentials(now)
            else:
                await self._renew_token(self._fetch_token, now, refused=refused)
        except TokenError as error:
            self._no_token, self._failed_at = error.answer, now
            logger.error(f"❌ {error}")
        except Exception as error:  # noqa: BLE001 (whoever waits goes on with the key that it has)
            answer = Answer(Outcome.INTERNAL_ERROR, detail="no token can be fetched")
            self._no_token, self._failed_at = answer, now
            logger.error(f"❌ The API key cannot be read again: {type(error).__name__}")
        finally:
            self._renewal = None

    async def _renew_token(
        self, fetch: Callable[[Credentials], Awaitable[Token]], now: float, *, refused: bool
    ) -> None:
        if refused:
            await self._read_credentials(now)
        try:
            token = await fetch(self._credentials)
        except TokenError as error:
            client_refused = error.answer.outcome is Outcome.UNAUTHORIZED
            if not client_refused or not await self._read_credentials(now):
                raise
            token = await fetch(self._credentials)
        self.current = self._built({**self._credentials, TOKEN: token.text})
        self.renew_at = now + token.renew_after_seconds
        self._expires_at = now + token.seconds
        self._no_token = None

    async def _read_credentials(self, now: float) -> bool:
        """Read the secret again; returns whether it has changed."""
        if self._read_again is None or now - self._read_at < KEY_READ_AGAIN_SECONDS:
            return False
        self._read_at = now
        found = await asyncio.to_thread(self._read_again)
        if found is None or found == self._credentials:
            return False
        if self._fetch_token is None:
            self.current = self._built(found)
        self._credentials = found
        return True

    def _built(self, credentials: Credentials) -> httpx.Headers:
        return httpx.Headers({**self._fixed, **self._templates.fill(credentials)})

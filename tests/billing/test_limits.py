"""What an answer's headers say about billing's rate limit."""

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.billing.client import LOOK_AT_HEADERS_EVERY, BillingClient
from core.billing.limits import (
    COMBINED_HEADER,
    MAX_RETRY_AFTER_SECONDS,
    RESET_HEADERS,
    is_used_up,
    limit_ends_in,
    says_remaining,
)
from testkit.clock import NOON

AT_NOON = NOON.timestamp()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"RateLimit-Reset": "30"}, 30),
        ({"X-RateLimit-Reset": "1.5"}, 1.5),
        ({"X-RateLimit-Reset": f"{AT_NOON + 20:.0f}"}, 20),
        ({"X-RateLimit-Reset": f"{(AT_NOON + 20) * 1000:.0f}"}, 20),
        ({"X-RateLimit-Reset": "2026-01-15T12:00:20Z"}, 20),
        ({"X-Rate-Limit-Reset": "Thu, 15 Jan 2026 12:00:20 GMT"}, 20),
        ({"X-RateLimit-Reset-After": "0.25"}, 0.25),
        ({"x-ratelimit-retry": "7"}, 7),
        ({"X-RateLimit-Retry-After": "8"}, 8),
        ({"RateLimit": '"default";r=0;t=9'}, 9),
        ({"RateLimit": "limit=100, remaining=0, reset=9"}, 9),
        ({"RateLimit": '"burst, short";r=10;t=1, "daily";r=0;t=120, "hourly";r=0;t=60'}, 120),
        ({"RateLimit": '"burst";r=1;t=2, "daily";r=100;t=80000'}, 2),
        ({"RateLimit-Reset": "30, 30"}, 30),
        ({"RateLimit-Reset": "soon", "X-RateLimit-Reset": "4"}, 4),
        ({"RateLimit-Reset": "86400"}, MAX_RETRY_AFTER_SECONDS),
        ({"X-RateLimit-Reset": f"{AT_NOON - 20:.0f}"}, None),
        ({"RateLimit-Reset": "0"}, None),
        ({"RateLimit-Reset": "-1"}, None),
        ({"RateLimit": '"default";r=0'}, None),
        ({}, None),
    ],
)
def test_a_reset_is_seconds_or_a_time_and_capped(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert limit_ends_in(httpx.Headers(headers), NOON) == seconds


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.sampled_from((*RESET_HEADERS, COMBINED_HEADER)), st.text("0123456789.-:;=tr TZ"))
def test_any_reset_gives_a_bounded_pause(name: str, text: str) -> None:
    seconds = limit_ends_in({name: text}, NOON)
    assert seconds is None or 0 < seconds <= MAX_RETRY_AFTER_SECONDS


@pytest.mark.parametrize(
    ("headers", "says", "used_up"),
    [
        ({"RateLimit-Remaining": "0"}, True, True),
        ({"X-RateLimit-Remaining": "1"}, True, False),
        ({"X-Rate-Limit-Remaining": "none"}, True, False),
        ({"RateLimit": '"default";r=0;t=9'}, True, True),
        ({"RateLimit": "limit=100, remaining=12, reset=9"}, True, False),
        ({"RateLimit": '"burst";r=10;t=1, "daily";r=0;t=120'}, True, True),
        ({"RateLimit": '"burst";r=10;t=1, "daily";r=1;t=120'}, True, False),
        ({"X-RateLimit-Remaining": "5, 0"}, True, True),
        ({"X-RateLimit-Limit": "100, 100;w=60", "X-RateLimit-Remaining": "0"}, True, True),
        ({"RateLimit-Limit": "100"}, False, False),
        # A gateway's way to say that there is no limit.
        ({"X-RateLimit-Limit": "0", "X-RateLimit-Remaining": "0"}, True, False),
    ],
)
def test_an_answer_says_how_many_requests_are_left(
    headers: dict[str, str], *, says: bool, used_up: bool
) -> None:
    assert says_remaining(httpx.Headers(headers)) is says
    assert is_used_up(httpx.Headers(headers)) is used_up


async def test_headers_that_say_what_is_left_are_read_of_every_answer() -> None:
    """And of one in so many where the service does not send them."""
    left: str | None = None

    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"RateLimit-Remaining": left} if left else {})

    client = BillingClient(
        api_url="http://billing/api",
        credentials={"APIKEY": "key"},
        timeout_seconds=10,
        transport=httpx.MockTransport(answer),
    )

    async def used_up(count: int) -> list[bool]:
        return [(await client.check("checkout_1")).used_up for _ in range(count)]

    assert not any(await used_up(1))
    left = "0"
    assert sum(await used_up(LOOK_AT_HEADERS_EVERY)) == 1
    assert all(await used_up(3))

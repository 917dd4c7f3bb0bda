"""What an answer's headers say about billing's rate limit."""

import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

# A longer pause is cut to this: by then the service may have recovered, and customers are waiting.
MAX_RETRY_AFTER_SECONDS = 300.0

# Without Retry-After, the first of these that can be read says when a limit ends. Some services
# send seconds, as the drafts of draft-ietf-httpapi-ratelimit-headers do, and some a time.
RESET_HEADERS = (
    "ratelimit-reset",
    "x-ratelimit-reset",
    "x-rate-limit-reset",
    "x-ratelimit-reset-after",
    "x-ratelimit-retry",
    "x-ratelimit-retry-after",
    "x-ratelimit-retryafter",
)
REMAINING_HEADERS = ("ratelimit-remaining", "x-ratelimit-remaining", "x-rate-limit-remaining")
LIMIT_HEADERS = ("ratelimit-limit", "x-ratelimit-limit", "x-rate-limit-limit")
# A later version of the draft has one header for both, with a part for each of several limits:
# `"burst";r=10;t=1, "daily";r=0;t=30`. Before, it was `limit=100, remaining=0, reset=30`.
COMBINED_HEADER = "ratelimit"
_PART = re.compile(r'(?:"[^"]*"|[^,"])+')
_PARTS_BEGIN = re.compile(r'\s*"')
_REMAINING = re.compile(r"\b(?:r|remaining)\s*=\s*([0-9]{1,20})\b")
_RESET = re.compile(r"\b(?:t|reset)\s*=\s*([0-9]{1,20})\b")

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
# A number from here on is a time since 1970, in seconds or milliseconds; a limit of thirty years
# does not exist.
_FIRST_TIME, _FIRST_MILLISECONDS = 1e9, 1e11


class _Limit(NamedTuple):
    """One of the limits in a combined header."""

    remaining: float | None  # None: it does not say
    reset: float  # seconds; 0: it does not say


def parse_retry_after(text: str, now: datetime) -> float | None:
    """Seconds to wait, up to MAX_RETRY_AFTER_SECONDS; None if the header cannot be used.

    The header is a number of seconds or an HTTP date (RFC 9110, section 10.2.3). Some services
    send a fraction, and some proxies add a second header.
    """
    numbers = _numbers(text)
    seconds = max(numbers) if numbers else _seconds_until(text.strip(), now)
    return None if seconds is None else min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)


def limit_ends_in(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds until the limit ends, up to MAX_RETRY_AFTER_SECONDS; None if no header says it.

    A reset that has passed already says nothing about how long to wait. Of several limits, those
    count that are used up, and of these the one that ends last.
    """
    for text in _values(headers, RESET_HEADERS):
        seconds = _seconds_until_reset(text, now)
        if seconds is not None and seconds > 0:
            return min(seconds, MAX_RETRY_AFTER_SECONDS)
    limits = [limit for limit in _combined(headers) if limit.reset]
    used_up = [limit.reset for limit in limits if limit.remaining == 0]
    ends = max(used_up) if used_up else min((limit.reset for limit in limits), default=None)
    return None if ends is None else min(ends, MAX_RETRY_AFTER_SECONDS)


def says_remaining(headers: Mapping[str, str]) -> bool:
    """Whether the answer says how many requests are left."""
    named = next(_values(headers, REMAINING_HEADERS), None)
    return named is not None or any(limit.remaining is not None for limit in _combined(headers))


def is_used_up(headers: Mapping[str, str]) -> bool:
    """Whether the answer says that no request is left of a limit.

    Some gateways say 0 of 0 where there is no limit.
    """
    named = next(_values(headers, REMAINING_HEADERS), None)
    if named is None:
        none_left = any(limit.remaining == 0 for limit in _combined(headers))
    else:
        none_left = 0 in _numbers(named)
    return none_left and all(0 not in _numbers(text) for text in _values(headers, LIMIT_HEADERS))


def _values(headers: Mapping[str, str], names: tuple[str, ...]) -> Iterator[str]:
    return (value.strip() for name in names if (value := headers.get(name)) is not None)


def _combined(headers: Mapping[str, str]) -> list[_Limit]:
    text = headers.get(COMBINED_HEADER, "")
    parts = _PART.findall(text) if _PARTS_BEGIN.match(text) else [text]
    return [_Limit(_number_of(_REMAINING, part), _number_of(_RESET, part) or 0.0) for part in parts]


def _number_of(pattern: re.Pattern[str], part: str) -> float | None:
    found = pattern.search(part)
    return float(found[1]) if found else None


def _numbers(text: str) -> list[float]:
    """The numbers of a header, which may have come several times; none if it has anything else."""
    parts = [part.strip() for part in text.split(",")]
    return [float(part) for part in parts] if all(map(_NUMBER.fullmatch, parts)) else []


def _seconds_until_reset(text: str, now: datetime) -> float | None:
    numbers = _numbers(text)
    if not numbers:
        return _seconds_until(text, now)
    number = max(numbers)
    if number < _FIRST_TIME:
        return number
    return (number / 1000 if number >= _FIRST_MILLISECONDS else number) - now.timestamp()


def _seconds_until(text: str, now: datetime) -> float | None:
    """Seconds until an HTTP date, or a time as in ISO 8601; None for any other text."""
    for parse in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            date = parse(text)
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
        except Exception:  # noqa: BLE001, S112 (its text is the service's, e.g. the year 99999999999)
            continue
        if math.isfinite(seconds):
            return seconds
    return None

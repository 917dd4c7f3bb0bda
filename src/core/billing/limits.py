"""What an answer's headers say about billing's rate limit."""

import math
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

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
# A later version of the draft has one header for both: `"default";r=0;t=30`, before it
# `limit=100, remaining=0, reset=30`.
COMBINED_HEADER = "ratelimit"
_REMAINING_PART = r"\b(?:r|remaining)\s*=\s*(\d{1,20})\b"
_RESET_PART = r"\b(?:t|reset)\s*=\s*(\d{1,20})\b"

_NUMBER = r"\d{1,20}(?:\.\d{1,20})?"
# A number from here on is a time since 1970, in seconds or milliseconds; a limit of thirty years
# does not exist.
_FIRST_TIME, _FIRST_MILLISECONDS = 1e9, 1e11


def parse_retry_after(text: str, now: datetime) -> float | None:
    """Seconds to wait, up to MAX_RETRY_AFTER_SECONDS; None if the header cannot be used.

    The header is a whole number of seconds or an HTTP date (RFC 9110, section 10.2.3).
    """
    text = text.strip()
    seconds = float(text) if text.isascii() and text.isdigit() else _seconds_until(text, now)
    return None if seconds is None else min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)


def limit_ends_in(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds until the limit ends, up to MAX_RETRY_AFTER_SECONDS; None if no header says it.

    A reset that has passed already says nothing about how long to wait.
    """
    for text in _values(headers, RESET_HEADERS, _RESET_PART):
        seconds = _seconds_until_reset(text, now)
        if seconds is not None and seconds > 0:
            return min(seconds, MAX_RETRY_AFTER_SECONDS)
    return None


def says_remaining(headers: Mapping[str, str]) -> bool:
    """Whether the answer says how many requests are left."""
    return next(_values(headers, REMAINING_HEADERS, _REMAINING_PART), None) is not None


def is_used_up(headers: Mapping[str, str]) -> bool:
    """Whether the answer says that no request is left."""
    left = next(_values(headers, REMAINING_HEADERS, _REMAINING_PART), "")
    return re.fullmatch(_NUMBER, left) is not None and float(left) == 0


def _values(headers: Mapping[str, str], names: tuple[str, ...], part: str) -> Iterator[str]:
    for name in names:
        if (value := headers.get(name)) is not None:
            yield value.strip()
    if found := re.search(part, headers.get(COMBINED_HEADER, "")):
        yield found[1]


def _seconds_until_reset(text: str, now: datetime) -> float | None:
    if not re.fullmatch(_NUMBER, text):
        return _seconds_until(text, now)
    number = float(text)
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

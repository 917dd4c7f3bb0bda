"""Types of command-line arguments."""

from argparse import ArgumentTypeError

from core.domain.cadence import Cadence, parse_duration


def count(text: str) -> int:
    """A whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def amount(text: str) -> float:
    """A number greater than 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number greater than 0")
    return number


def cadence(text: str) -> str:
    """A CHECK_CADENCE; empty for every session at every tick."""
    try:
        if text:
            Cadence.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(f"in {text!r}, {error}") from None
    return text


def duration(text: str) -> int:
    """A duration such as 24h, in seconds."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{error}; e.g. 24h") from None

"""What the body of an answer says about a session: billing's word, and its meaning to the shop."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jmespath
from jmespath.parser import ParsedResult

from core.domain.model import SessionStatus

PATH = "status"
# Words that mean the same at every billing service. Left out on purpose: "complete", which some
# services use while the payment is still under way, and "authorized".
WORDS: Mapping[str, SessionStatus] = {
    **dict.fromkeys(("open", "pending", "active", "created", "processing"), SessionStatus.OPEN),
    **dict.fromkeys(("success", "succeeded", "paid", "captured"), SessionStatus.SUCCESS),
    **dict.fromkeys(
        ("failure", "failed", "declined", "rejected", "canceled", "cancelled", "voided"),
        SessionStatus.FAILURE,
    ),
    **dict.fromkeys(("timeout", "timed_out", "expired", "abandoned"), SessionStatus.TIMEOUT),
}
WORDS_FORM = (
    'a JSON object from billing\'s words to open, success, failure or timeout, e.g. {"paid": '
    '"success", "unpaid": "open"}'
)

_MAX_WORD_LENGTH = 60  # an unknown word is shown up to this length


class StatusReading(NamedTuple):
    """A status and billing's word for it; or no status, and what was found instead."""

    status: SessionStatus | None
    seen: str


@dataclass(frozen=True, slots=True)
class StatusReader:
    """Finds billing's word for a session's status in an answer, and what it means to the shop."""

    path: str = PATH  # JMESPath
    words: Mapping[str, SessionStatus] = field(default_factory=lambda: WORDS)  # in lower case
    _search: ParsedResult = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compile the path.

        Raises:
            JMESPathError: it is not a JMESPath expression.
        """
        object.__setattr__(self, "_search", jmespath.compile(self.path))

    def read(self, body: bytes | None) -> StatusReading:
        """Read one body; None stands for a body that is too long."""
        if body is None:
            return StatusReading(None, "a body that is too long")
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return StatusReading(None, "a body that is not valid JSON")
        try:
            found = self._search.search(parsed)
            word = found if isinstance(found, str) else json.dumps(found)
        # JMESPathError if a function in the path gets a value of a wrong type; but also TypeError
        # if a number is compared with a text, OverflowError for infinity, RecursionError, …
        except Exception:  # noqa: BLE001 (an answer cannot end a pass)
            return StatusReading(None, f"nothing that {self.path!r} can be applied to")
        if found is None:
            return StatusReading(None, f"nothing at {self.path!r}")
        status = self.words.get(word.lower())
        if status is None and len(word) > _MAX_WORD_LENGTH:
            word = f"{word[:_MAX_WORD_LENGTH]}…"
        return StatusReading(status, word if status else repr(word))


def parse_words(text: str) -> Mapping[str, SessionStatus]:
    """Parse a `BILLING_STATUS_MAP`; billing's words are not case-sensitive.

    Raises:
        ValueError: the text has another form; the message says what is wrong.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    if not isinstance(given, dict) or not given:
        raise ValueError("it is not a JSON object with at least one word")
    words: dict[str, SessionStatus] = {}
    for word, status in given.items():
        if status not in list(SessionStatus):
            raise ValueError(f"{word!r} is mapped to {status!r}, which is not a status")
        if word.lower() in words:
            raise ValueError(f"{word!r} is mapped twice")
        words[word.lower()] = SessionStatus(status)
    return words

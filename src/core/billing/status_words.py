"""What the body of a billing answer says of a session, in the shop's words."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jmespath
from jmespath.exceptions import JMESPathError
from jmespath.parser import ParsedResult

from core.domain.model import SessionStatus

PATH = "status"
# Words that mean the same wherever they are used. Left out on purpose: "complete", which at some
# services is said of a session whose payment is still on its way, and "authorized".
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

_LONGEST_WORD = 60  # characters of an unknown word that are shown


class Reading(NamedTuple):
    """What was found: a status and billing's word for it, or no status and what stood there."""

    status: SessionStatus | None
    seen: str


@dataclass(frozen=True, slots=True)
class StatusReader:
    """Finds billing's word for a session's state in an answer, and what it means to the shop."""

    path: str = PATH  # JMESPath
    words: Mapping[str, SessionStatus] = field(default_factory=lambda: WORDS)  # in lower case
    _search: ParsedResult = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Compile the path.

        Raises:
            JMESPathError: it is none.
        """
        object.__setattr__(self, "_search", jmespath.compile(self.path))

    def read(self, body: bytes | None) -> Reading:
        """Read one body; None stands for one that is too long to be read."""
        if body is None:
            return Reading(None, "a body that is too long")
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return Reading(None, "a body that is no JSON")
        try:
            found = self._search.search(parsed)
        except JMESPathError:  # a function of the path was given a value that it cannot take
            return Reading(None, f"nothing that {self.path!r} can be applied to")
        if found is None:
            return Reading(None, f"nothing at {self.path!r}")
        word = found if isinstance(found, str) else json.dumps(found)
        status = self.words.get(word.lower())
        if status is None and len(word) > _LONGEST_WORD:
            word = f"{word[:_LONGEST_WORD]}…"
        return Reading(status, word if status else repr(word))


def parse_words(text: str) -> Mapping[str, SessionStatus]:
    """A `BILLING_STATUS_MAP`; upper and lower case are the same in billing's words.

    Raises:
        ValueError: another form, with what is wrong about it.
    """
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if not isinstance(given, dict) or not given:
        raise ValueError("it is no JSON object with at least one word")
    words: dict[str, SessionStatus] = {}
    for word, status in given.items():
        if status not in list(SessionStatus):
            raise ValueError(f"{word!r} is mapped to {status!r}, which the table does not know")
        if word.lower() in words:
            raise ValueError(f"{word!r} is mapped twice")
        words[word.lower()] = SessionStatus(status)
    return words

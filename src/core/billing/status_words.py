"""What the body of an answer says about a session: billing's word, and its meaning to the shop."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jmespath

from core.domain.model import Amount, Meaning, SessionStatus

PATH = "status"
# Words that mean the same at every billing service. Left out on purpose: "complete", which some
# services use while the payment is still under way, and "authorized".
WORDS: Mapping[str, Meaning] = {
    **dict.fromkeys(("open", "pending", "active", "created"), Meaning.OPEN),
    **dict.fromkeys(("processing", "in_progress", "requires_capture"), Meaning.IN_PROGRESS),
    **dict.fromkeys(("success", "succeeded", "paid", "captured"), Meaning.SUCCESS),
    **dict.fromkeys(
        ("failure", "failed", "declined", "rejected", "canceled", "cancelled", "voided"),
        Meaning.FAILURE,
    ),
    **dict.fromkeys(("timeout", "timed_out", "expired", "abandoned"), Meaning.TIMEOUT),
}
WORDS_FORM = (
    "a JSON object from billing's words to open, in_progress, success, failure or timeout, e.g. "
    '{"paid": "success", "unpaid": "open"}'
)

# A nested `status` with such a number is about a request, e.g. in `"error": {"status": 402}`.
_STATUS_CODES = range(100, 600)
# With one of these below, an open session may be paid.
_PAYMENT = (Meaning.IN_PROGRESS, Meaning.SUCCESS)
_MAX_WORD_LENGTH = 60  # an unknown word is shown up to this length


class StatusReading(NamedTuple):
    """A status and billing's word for it; or no status, and what was found instead.

    `in_progress`: a payment is, or may be, so the session must not expire.
    `mismatch`: the answer is about another checkout, or gives two statuses.
    """

    status: SessionStatus | None
    seen: str
    in_progress: bool = False
    mismatch: bool = False
    amount: Amount | None = None
    currency: str | None = None


class StatusReader:
    """Finds billing's word for a session's status in an answer, and what it means to the shop.

    With `id_path`, the answer must have the checkout's id there. `amount_path` and `currency_path`
    are where a closing answer has an amount and its currency; it may lack both.

    Raises:
        JMESPathError: a path is not a JMESPath expression.
    """

    def __init__(
        self,
        path: str = PATH,
        words: Mapping[str, Meaning] = WORDS,  # in lower case
        id_path: str | None = None,
        amount_path: str | None = None,
        currency_path: str | None = None,
    ) -> None:
        self.path = path
        self.words = words
        self.id_path = id_path
        self.amount_path = amount_path
        self.currency_path = currency_path
        paths = (path, id_path, amount_path, currency_path)
        self._compiled = {path: jmespath.compile(path) for path in paths if path is not None}

    def read(self, body: bytes | None, billing_checkout_id: str) -> StatusReading:
        """Read the answer about a checkout; None stands for a body that is too long."""
        if body is None:
            return StatusReading(None, "a body that is too long")
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return StatusReading(None, "a body that is not valid JSON")
        if self.id_path is not None:
            found = self._text_at(self.id_path, parsed)
            if found != billing_checkout_id:
                seen = "no id" if found is None else f"the id {_shortened(found)!r}"
                return _mismatch(f"billing's answer has {seen} at {self.id_path!r}")
        # Nearly all answers have one status, which is quickly seen where no name can be escaped.
        several = body.count(b'"status"') != 1 or b"\\" in body
        return self._read_status(parsed, several=several)

    def _read_status(self, parsed: object, *, several: bool) -> StatusReading:
        try:
            found = self._compiled[self.path].search(parsed)
            word = _word(found)
        # JMESPathError if a function in the path gets a value of a wrong type; but also TypeError
        # if a number is compared with a text, OverflowError for infinity, RecursionError, …
        except Exception:  # noqa: BLE001 (an answer cannot end a pass)
            return StatusReading(None, f"nothing that {self.path!r} can be applied to")
        if found is None:
            return StatusReading(None, f"nothing at {self.path!r}")
        meaning = self.words.get(word.lower())
        if meaning is None:
            return StatusReading(None, repr(_shortened(word)))
        if meaning is Meaning.OPEN:
            may_be_paid = several and self.path == PATH and self._has_payment(parsed)
            return StatusReading(SessionStatus.OPEN, word, in_progress=may_be_paid)
        if meaning is Meaning.IN_PROGRESS:
            return StatusReading(SessionStatus.OPEN, word, in_progress=True)
        return self._read_closing(parsed, word, meaning)

    def _read_closing(self, parsed: object, word: str, meaning: Meaning) -> StatusReading:
        if self.path == PATH and (other := self._contradiction(parsed, meaning)):
            return _mismatch(f"billing's answer says {_shortened(word)!r} at 'status', but {other}")
        amount = self._value_at(self.amount_path, parsed)
        currency = self._text_at(self.currency_path, parsed)
        is_amount = isinstance(amount, str | int | float) and not isinstance(amount, bool)
        return StatusReading(
            meaning.status,
            word,
            amount=amount if is_amount and _is_json(amount) else None,
            currency=currency if _is_json(currency) else None,
        )

    def _contradiction(self, parsed: object, meaning: Meaning) -> str | None:
        """A nested `status` that says otherwise, e.g. in an envelope; None if there is none."""
        for place, found in _nested_statuses(parsed):
            if self._meaning_of(found) is meaning or found in _STATUS_CODES:
                continue
            match found:
                case str():
                    shown = repr(_shortened(found))
                case dict() | list():
                    shown = "no text"
                case _:
                    shown = _word(found)
            return (
                f"{shown} at {_shortened(place.path)!r}; set BILLING_STATUS_PATH to the one "
                "that counts (@.status is the first)"
            )
        return None

    def _has_payment(self, parsed: object) -> bool:
        """Whether a nested `status` is of a payment that is made or under way."""
        return any(self._meaning_of(found) in _PAYMENT for _, found in _nested_statuses(parsed))

    def _meaning_of(self, found: object) -> Meaning | None:
        """What a nested `status` means; None for an unknown word, and for what is no word."""
        return None if isinstance(found, dict | list) else self.words.get(_word(found).lower())

    def _text_at(self, path: str | None, parsed: object) -> str | None:
        found = self._value_at(path, parsed)
        return str(found) if isinstance(found, str | int) else None

    def _value_at(self, path: str | None, parsed: object) -> Any:  # noqa: ANN401 (JSON)
        try:
            return self._compiled[path].search(parsed) if path is not None else None
        except Exception:  # noqa: BLE001 (an answer cannot end a pass)
            return None


class _Place(NamedTuple):
    """Where a value is within an answer. A path for each value could take gigabytes."""

    parent: "_Place | None"  # None: in the outermost value
    name: str | int

    @property
    def path(self) -> str:
        parts, place = list[str](), self
        while True:
            parts.append(f"[{place.name}]" if isinstance(place.name, int) else f".{place.name}")
            if place.parent is None:
                return "".join(reversed(parts)).removeprefix(".")
            place = place.parent


def _nested_statuses(parsed: object) -> Iterator[tuple[_Place, object]]:
    """Everything named `status` below the outermost object, and where it is."""
    inside: list[tuple[_Place | None, object]] = [(None, parsed)]
    while inside:
        place, value = inside.pop()
        if place and place.parent and place.name == "status":
            yield place, value
        match value:
            case dict():
                inside += [(_Place(place, name), v) for name, v in value.items()]
            case list():
                inside += [(_Place(place, n), v) for n, v in enumerate(value)]


def _word(found: object) -> str:
    """A status as BILLING_STATUS_MAP has it: numbers and the like as in JSON."""
    return found if isinstance(found, str) else json.dumps(found)


def _is_json(value: object) -> bool:
    """Whether an event can have it: not NaN, infinity or half of a character, as Python's JSON."""
    try:
        return bool(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except ValueError:
        return False


def _mismatch(why: str) -> StatusReading:
    return StatusReading(None, why, mismatch=True)


def _shortened(word: str) -> str:
    return word if len(word) <= _MAX_WORD_LENGTH else f"{word[:_MAX_WORD_LENGTH]}…"


def parse_words(text: str) -> Mapping[str, Meaning]:
    """Parse a `BILLING_STATUS_MAP`; billing's words are not case-sensitive.

    Raises:
        ValueError: the text has another form; the message says what is wrong.
    """
    try:
        given = json.loads(text, object_pairs_hook=tuple)  # which keeps a word that comes twice
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    if not isinstance(given, tuple) or not given:
        raise ValueError("it is not a JSON object with at least one word")
    words: dict[str, Meaning] = {}
    for word, status in given:
        if status not in list(Meaning):
            raise ValueError(f"{word!r} is mapped to {status!r}, which is not a status")
        if word.lower() in words:
            raise ValueError(f"{word!r} is mapped twice")
        words[word.lower()] = Meaning(status)
    return words

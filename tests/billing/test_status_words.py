"""The status in the body of a billing answer, and the map from billing's words to ours."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.billing.status_words import WORDS, StatusReader, StatusReading, parse_words
from core.domain.model import SessionStatus


@pytest.mark.parametrize(("word", "status"), WORDS.items())
def test_the_default_map_is_case_insensitive(word: str, status: SessionStatus) -> None:
    for spelling in (word, word.upper(), word.title()):
        body = json.dumps({"id": "checkout_1", "status": spelling}).encode()
        assert StatusReader().read(body) == StatusReading(status, spelling)


def test_the_path_and_the_map_can_be_set() -> None:
    reader = StatusReader("data.payment[0].paid", parse_words('{"true": "success"}'))
    body = b'{"data": {"payment": [{"paid": true}]}}'
    assert reader.read(body) == StatusReading(SessionStatus.SUCCESS, "true")


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (b'{"status": "refunded"}', "'refunded'"),
        (b'{"status": 3}', "'3'"),
        (b'{"status": {"a": 1}}', "'{\"a\": 1}'"),
        (b'{"status": "a\\u001b[2Jb\\nc"}', r"'a\x1b[2Jb\nc'"),
        (b'{"status": "' + b"x" * 90 + b'"}', f"'{'x' * 60}…'"),
        (b'{"status": null}', "nothing at 'status'"),
        (b'{"state": "paid"}', "nothing at 'status'"),
        (b'["paid"]', "nothing at 'status'"),
        (b"paid", "a body that is not valid JSON"),
        (b"", "a body that is not valid JSON"),
        (b"\xff\xfe\x00", "a body that is not valid JSON"),
        (b"[" * 60_000, "a body that is not valid JSON"),
        (None, "a body that is too long"),
    ],
)
def test_an_unknown_status_is_shown_shortened_and_escaped(body: bytes | None, seen: str) -> None:
    assert StatusReader().read(body) == StatusReading(None, seen)


def test_a_path_that_cannot_be_applied_gives_no_status() -> None:
    reading = StatusReader("length(status)").read(b'{"status": 1}')
    assert reading == StatusReading(None, "nothing that 'length(status)' can be applied to")


@settings(max_examples=50)
@given(st.binary() | st.recursive(st.none() | st.booleans() | st.text(), st.lists).map(json.dumps))
def test_any_body_can_be_read(body: bytes | str) -> None:
    raw = body.encode() if isinstance(body, str) else body
    reading = StatusReader("@").read(raw)
    assert reading.seen.isprintable()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("paid", "it is not valid JSON"),
        ('["paid"]', "it is not a JSON object with at least one word"),
        ("{}", "it is not a JSON object with at least one word"),
        ('{"paid": "verified"}', "'paid' is mapped to 'verified', which is not a status"),
        ('{"paid": ["success"]}', r"'paid' is mapped to \['success'\]"),
        ('{"paid": "success", "PAID": "failure"}', "'PAID' is mapped twice"),
    ],
)
def test_an_unusable_map_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_words(text)

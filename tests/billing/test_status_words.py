"""The status in the body of a billing answer, and the map from billing's words to ours."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.billing.status_words import WORDS, StatusReader, StatusReading, parse_words
from core.domain.model import Meaning, SessionStatus


@pytest.mark.parametrize(("word", "meaning"), WORDS.items())
def test_the_default_map_is_case_insensitive(word: str, meaning: Meaning) -> None:
    for spelling in (word, word.upper(), word.title()):
        body = json.dumps({"id": "checkout_1", "status": spelling}).encode()
        assert StatusReader().read(body, "checkout_1") == StatusReading(
            meaning.status, spelling, in_progress=meaning is Meaning.IN_PROGRESS
        )


def test_the_path_and_the_map_can_be_set() -> None:
    reader = StatusReader("data.payment[0].paid", parse_words('{"true": "success"}'))
    body = b'{"data": {"payment": [{"paid": true}]}}'
    assert reader.read(body, "checkout_1") == StatusReading(SessionStatus.SUCCESS, "true")


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
    assert StatusReader().read(body, "checkout_1") == StatusReading(None, seen)


def test_a_path_that_cannot_be_applied_gives_no_status() -> None:
    reading = StatusReader("length(status)").read(b'{"status": 1}', "checkout_1")
    assert reading == StatusReading(None, "nothing that 'length(status)' can be applied to")


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        ({"status": "success", "data": {"status": "pending"}}, "'pending' at 'data.status'"),
        ({"status": "success", "data": {"status": "new"}}, "'new' at 'data.status'"),
        ({"status": "paid", "p": [{}, {"q": {"status": "failed"}}]}, "'failed' at 'p[1].q.status'"),
        ({"status": "success", "data": {"status": 0}}, "0 at 'data.status'"),
        ({"status": "success", "data": {"status": None}}, "null at 'data.status'"),
        ({"status": "success", "data": {"status": {"code": "new"}}}, "no text at 'data.status'"),
        ({"status": "success", "d" * 99: {"status": "new"}}, f"'new' at '{'d' * 60}…'"),
    ],
)
def test_a_closing_status_with_another_one_inside_is_a_mismatch(
    answer: dict[str, object], other: str
) -> None:
    """Only where nobody has said which one counts."""
    body = json.dumps(answer).encode()
    reading = StatusReader().read(body, "c")
    assert (reading.status, reading.mismatch) == (None, True)
    assert reading.seen.startswith(f"billing's answer says {answer['status']!r} at 'status', but ")
    assert f"but {other}; set BILLING_STATUS_PATH to the one that counts" in reading.seen
    assert StatusReader("@.status").read(body, "c").status is SessionStatus.SUCCESS


@pytest.mark.parametrize(
    "answer",
    [
        {"status": "success", "data": {"status": "Paid", "error": {"status": 402}}},
        {"status": "paid", "status_url": "x", "data": {"state": "pending"}, "list": ["status"]},
        {"status": "open", "data": {"status": "failed"}, "customer": {"status": "verified"}},
    ],
)
def test_nested_statuses_that_agree_or_close_nothing_do_not_matter(
    answer: dict[str, object],
) -> None:
    reading = StatusReader().read(json.dumps(answer).encode(), "c")
    assert (reading.seen, reading.in_progress) == (answer["status"], False)


def test_an_answer_takes_little_memory_whatever_it_contains() -> None:
    """A path for each of the 16,000 values below would take 512 MB."""
    body = json.dumps({"status": "paid", "k" * 32_000: [1] * 16_000}).encode()
    tracemalloc.start()
    reading = StatusReader().read(body, "c")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reading.status is SessionStatus.SUCCESS
    assert peak < 20e6


@pytest.mark.parametrize("path", ["status", "@.status"])
@pytest.mark.parametrize("nested", ["paid", "Processing"])
def test_an_open_session_with_a_payment_below_does_not_expire(path: str, nested: str) -> None:
    """Unless the setting says that the first status counts."""
    body = json.dumps({"status": "open", "payments": [{"status": "failed"}, {"status": nested}]})
    reading = StatusReader(path).read(body.encode(), "c")
    assert reading.status is SessionStatus.OPEN
    assert reading.in_progress == (path == "status")


@pytest.mark.parametrize(
    "body",
    [
        b'{"status": 1, "payment": {"status": 3}}',
        b'{"status": 1, "payment": {"status": "3"}}',
        b'{"status": 1, "payment": {"st\\u0061tus": 2}}',
        '{"status": 1, "payment": {"status": 3}}'.encode("utf-16"),
    ],
)
def test_statuses_below_may_be_numbers_and_written_in_any_way(body: bytes) -> None:
    words = {"1": Meaning.OPEN, "2": Meaning.IN_PROGRESS, "3": Meaning.SUCCESS}
    assert StatusReader(words=words).read(body, "c").in_progress
    closing = b'{"status": 3, "payment": {"status": 3}, "error": {"status": 402}}'
    assert StatusReader(words=words).read(closing, "c").status is SessionStatus.SUCCESS


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        ({"status": "paid", "id": "other"}, "the id 'other'"),
        ({"status": "paid", "id": ["c"]}, "no id"),
        ({"status": "paid"}, "no id"),
        ({"status": "open", "id": "C"}, "the id 'C'"),
        ([], "no id"),
    ],
)
def test_an_answer_without_the_id_that_was_asked_is_a_mismatch(body: object, seen: str) -> None:
    reading = StatusReader(id_path="id").read(json.dumps(body).encode(), "c")
    assert reading == StatusReading(None, f"billing's answer has {seen} at 'id'", mismatch=True)


@pytest.mark.parametrize(
    ("amount", "currency", "read"),
    [
        ("10.00", "EUR", ("10.00", "EUR")),
        (1000, "eur", (1000, "eur")),
        (True, None, (None, None)),
        ({"value": 1}, ["EUR"], (None, None)),
        (float("nan"), "\ud800", (None, None)),
        (float("inf"), "EUR", (None, "EUR")),
    ],
)
def test_a_closing_answer_gives_its_amount(
    amount: object, currency: object, read: tuple[object, object]
) -> None:
    reader = StatusReader(amount_path="a", currency_path="b")
    reading = reader.read(json.dumps({"status": "paid", "a": amount, "b": currency}).encode(), "c")
    assert (reading.amount, reading.currency) == read


@settings(max_examples=50)
@given(st.binary() | st.recursive(st.none() | st.booleans() | st.text(), st.lists).map(json.dumps))
def test_any_body_can_be_read(body: bytes | str) -> None:
    raw = body.encode() if isinstance(body, str) else body
    reading = StatusReader("@").read(raw, "checkout_1")
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

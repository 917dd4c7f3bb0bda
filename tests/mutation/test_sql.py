import pytest

from tests.mutation.sql import rewrites


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            " WHERE claimed_until = %s AND rowid IN {listed(some)}",
            {
                " WHERE %s IS NOT NULL AND rowid IN {listed(some)}",
                " WHERE claimed_until = %s AND TRUE",
            },
        ),
        (
            "(claimed_until IS NULL OR claimed_until <= %s)",
            {
                "(TRUE OR claimed_until <= %s)",
                "(FALSE OR claimed_until <= %s)",
                "(claimed_until IS NULL OR %s IS NOT NULL)",
                "(claimed_until IS NULL OR %s IS NULL)",
            },
        ),
        ("COALESCE(status, '') = 'open' -- SELECT", {"TRUE -- SELECT"}),
        (
            " SET attempts = attempts + 1, checked_at = %s WHERE id = 1",
            {
                " SET attempts = attempts, checked_at = %s WHERE id = 1",
                (
                    " SET attempts = attempts + 1,"
                    " checked_at = CASE WHEN %s IS NULL THEN checked_at ELSE checked_at END"
                    " WHERE id = 1"
                ),
                " SET attempts = attempts + 1, checked_at = %s WHERE TRUE",
            },
        ),
        (
            "SELECT 1 FROM t {database.hint} ORDER BY id DESC LIMIT {limit:d} {database.lock_rows}",
            {
                "SELECT 1 FROM t {database.hint} LIMIT {limit:d} {database.lock_rows}",
                "SELECT 1 FROM t {database.hint} ORDER BY id DESC {database.lock_rows}",
                "SELECT 1 FROM t {database.hint} ORDER BY id DESC LIMIT {limit:d}",
            },
        ),
        ("FOR UPDATE SKIP LOCKED", {"", "FOR UPDATE"}),
        ("INSERT OR IGNORE", {"INSERT"}),
        (" WHERE {OPEN} AND {FREE}", {" WHERE {FREE}", " WHERE {OPEN}"}),
        ("{name}: the limit = {limit}", set[str]()),
    ],
)
def test_each_guard_of_a_statement_is_left_out_once(text: str, expected: set[str]) -> None:
    assert set(rewrites("", text)) == expected


def test_a_literal_is_read_with_those_beside_it() -> None:
    assert list(rewrites("UPDATE t SET a = 1,", " b = 2", " WHERE c = 3")) == [" b = b"]

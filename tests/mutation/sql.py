"""Leaves one guard out of a piece of SQL: a condition, an assignment, an order, a limit, a lock.

It reads the text of one string literal and needs no parser. A rewrite that is not valid SQL fails
the first test that runs it, so it only costs a few seconds.
"""

import re
from collections.abc import Iterator

_SQL = re.compile(r"%s|\b(?:SELECT|UPDATE|DELETE|INSERT|FROM|WHERE|SET|FOR UPDATE|IS NULL)\b")
_CLAUSE = re.compile(r"\b(SET|WHERE|ON|WHEN|HAVING|AND|OR)\b")
_VALUE = r"(?:%s|'[^']*'|\{[^{}]*\}|\([^()]*\)|[\w.]+)"
_CONDITION = re.compile(
    r"(?:COALESCE\([^()]*\)|\{[^{}]*\}|[\w.]+)"
    rf" (?:(?:[<>=]+|(?:NOT )?(?:LIKE|IN)) {_VALUE}|IS (?:NOT )?NULL)"
)
_ASSIGNMENT = re.compile(r"(\w+) = (?:[^,()]|\([^()]*\))+?(?=,| WHERE\b|$)")
_CUTS = (
    (re.compile(r" ORDER BY .+?(?= LIMIT|\)|$)"), ""),
    (re.compile(r" LIMIT (?:\d+|\{[^{}]*\})"), ""),
    (re.compile(r"FOR UPDATE(?: SKIP LOCKED)?"), ""),
    (re.compile(r" SKIP LOCKED"), ""),
    (re.compile(r" (?:OR )?IGNORE"), ""),
    (re.compile(r"SET SESSION .+"), "DO 0"),
    (re.compile(r"\{\w+\} AND "), ""),  # a condition that has a name
    (re.compile(r" AND \{\w+\}"), ""),
)
# What an engine adds at a statement's end is a lock. Elsewhere it is an index hint: speed only.
_LOCK = re.compile(r" \{\w+(?:\.\w+)+\}$")


def rewrites(before: str, text: str, after: str = "") -> Iterator[str]:
    """The text without one of its guards; `before` and `after` are the literals beside it.

    The statement keeps its parameters: a condition on one becomes true for every value.
    """
    if not _SQL.search(before + text + after):
        return
    for found in _CONDITION.finditer(text):
        clauses = _CLAUSE.findall(before + text[: found.start()])
        if clauses and clauses[-1] == "SET":
            continue
        is_parameter = "%s" in found[0]
        yield _replaced(text, found, "%s IS NOT NULL" if is_parameter else "TRUE")
        beside = (before + text[: found.start()])[-3:] + (text[found.end() :] + after)[:4]
        if "OR " in beside:  # an alternative: leave only the other one
            yield _replaced(text, found, "%s IS NULL" if is_parameter else "FALSE")
    for found in _ASSIGNMENT.finditer(text):
        clauses = _CLAUSE.findall(before + text[: found.start()])
        if clauses and clauses[-1] == "SET":
            name = found[1]
            kept = f"CASE WHEN %s IS NULL THEN {name} ELSE {name} END"
            yield _replaced(text, found, f"{name} = {kept if '%s' in found[0] else name}")
    for pattern, instead in (*_CUTS, (_LOCK, "")) if not after else _CUTS:
        for found in pattern.finditer(text):
            yield _replaced(text, found, instead)


def _replaced(text: str, found: re.Match[str], by: str) -> str:
    return text[: found.start()] + by + text[found.end() :]

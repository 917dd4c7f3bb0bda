"""What a claim reads about its sessions: the columns, and the claims that are made of them."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from operator import itemgetter
from typing import NamedTuple

from core.database.port import Database, Value, as_datetime, as_text
from core.domain.model import Claim
from core.errors import StoreError

# The checkout id of an open session, '' if the shop has none, NULL if there is no open session. A
# join would lock the shop's rows too (MariaDB has no FOR UPDATE OF); a subquery reads without a
# lock on every engine. The status is tested in the SELECT list and not in WHERE, so that the shop's
# row can only be found by its key, whatever the statistics of an index on status are. MAX is for a
# table whose ids are not unique: of its rows, an open one counts.
_CHECKOUT_ID = (
    "(SELECT MAX(CASE WHEN s.status = 'open' THEN {checkout_id} END)"
    " FROM checkout_session s WHERE s.id = c.session_id)"
)
# What most sessions of a batch have in common is one text, of which the claims share the values.
_COMMON = (
    "c.first_seen_at",
    "c.consecutive_failures",
    "COALESCE(c.last_outcome, '')",
    "COALESCE(c.last_status_code, '')",
    "COALESCE(c.next_check_at, '')",
)

# What `session_array` makes of a row: the common text, its number, and the exact ids.
type Session = tuple[str, int, str, str | None]


class ClaimedBatch(NamedTuple):
    """A batch that is claimed, as it was before."""

    id: int
    due_at: datetime
    checked_at: datetime | None


class Claimable(NamedTuple):
    """Claims on open sessions, and the numbers of the rows whose sessions are not open."""

    claims: list[Claim]
    closed: list[int]


def session_array(database: Database, last_check: str) -> str:
    """An expression: a row c as a JSON array for `read_claims`; `last_check` is an expression.

    A claim reads the arrays of a batch as one value, because PyMySQL takes 2 us for a row of three
    columns, and Python's JSON a tenth of that.
    """
    common = database.joined([*_COMMON, f"COALESCE({last_check}, '')"])
    session_id = database.exact(database.session_id)
    checkout_id = database.exact("COALESCE(s.billing_checkout_id, '')")
    checkout_id = _CHECKOUT_ID.format(checkout_id=checkout_id)
    return f"JSON_ARRAY({common}, c.rowid, {session_id}, {checkout_id})"


def sessions_in(array: Value) -> list[Session]:
    """The sessions of a batch, from their array, in the order of their rows: an array has none.

    Raises:
        StoreError: the array is larger than the server's max_allowed_packet (16 MB by default).
    """
    try:
        sessions: list[Session] = json.loads(as_text(array))
    except ValueError as error:  # MariaDB cuts it, MySQL returns NULL
        raise StoreError(
            "The sessions of one batch cannot be read: their billing_checkout_ids are longer than "
            "max_allowed_packet together. Raise it, or shorten them."
        ) from error
    return sorted(sessions, key=itemgetter(1))


def read_claims(
    sessions: Iterable[Session],
    claimed_at: datetime,
    claimed_until: datetime,
    batch: ClaimedBatch | None = None,
) -> Claimable:
    """The claims on a batch's sessions; without one, they are on the sessions' own rows."""
    claims, closed, read = list[Claim](), list[int](), dict[str, Sequence[object]]()
    for common, rowid, session_id, checkout_id in sessions:
        if checkout_id is None:
            closed.append(rowid)
            continue
        if common not in read:
            read[common] = _common(common, claimed_at, claimed_until, batch)
        ids = rowid, _text(session_id), _text(checkout_id) or None
        claims.append(Claim._make((*ids, *read[common])))
    return Claimable(claims, closed)


def _text(exact: str) -> str:
    """The text of an exact id. Bytes that are not UTF-8 become lone surrogates, as in `as_text`."""
    if exact[0] == "t":  # nearly all
        return exact[1:]
    return bytes.fromhex(exact[1:]).decode(errors="surrogateescape")


def _common(
    text: str, claimed_at: datetime, claimed_until: datetime, batch: ClaimedBatch | None
) -> Sequence[object]:
    """The fields of a claim after its three ids."""
    first_seen, failures, outcome, code, next_check, last_check = text.split("|")
    next_check_at = as_datetime(next_check) if next_check else None
    last_checked_at = as_datetime(last_check) if last_check else None
    claim = Claim(
        rowid=0,
        session_id="",
        billing_checkout_id=None,
        first_seen_at=as_datetime(first_seen),
        consecutive_failures=int(failures),
        claimed_at=claimed_at,
        claimed_until=claimed_until,
        batch_id=batch.id if batch else None,
        last_outcome=outcome or None,
        last_status_code=int(code) if code else None,
        has_due_time=next_check_at is not None,
        last_checked_at=last_checked_at or (batch.checked_at if batch else None),
        due_at=next_check_at or (batch.due_at if batch else None),
    )
    return claim[3:]

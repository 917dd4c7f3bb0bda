"""What a claim reads about its sessions: the columns, and the claims that are made of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from core.database.port import Database, Row, as_datetime, as_text
from core.domain.model import Claim

# The checkout id of an open session, '' if the shop has none, NULL if there is no open session. A
# join would lock the shop's rows too (MariaDB has no FOR UPDATE OF); a subquery reads without a
# lock on every engine. The status is tested in the SELECT list and not in WHERE, so that the shop's
# row can only be found by its key, whatever the statistics of an index on status are. MAX is for a
# table whose ids are not unique: of its rows, an open one counts.
_CHECKOUT_ID = (
    "(SELECT MAX(CASE WHEN s.status = 'open' THEN COALESCE(s.billing_checkout_id, '') END)"
    " FROM checkout_session s WHERE s.id = c.session_id)"
)
# What most sessions of a batch have in common is one text, which is read once: PyMySQL takes half a
# microsecond for each column of a row, which is a tenth of what else a claim costs.
_COMMON = (
    "c.batch_id",
    "c.first_seen_at",
    "c.consecutive_failures",
    "COALESCE(c.last_outcome, '')",
    "COALESCE(c.last_status_code, '')",
    "COALESCE(c.next_check_at, '')",
)


def session_columns(database: Database) -> str:
    """The columns that `read_claims` reads, of a row c."""
    return f"c.session_id, {_CHECKOUT_ID}, {database.joined(['c.rowid', *_COMMON])}"


def read_claims(
    rows: Iterable[Row],
    claimed_at: datetime,
    claimed_until: datetime,
    of_batch: Mapping[int, tuple[datetime, datetime | None]],
    *,
    on_rows: bool = False,
) -> Iterator[tuple[int, int, Claim | None]]:
    """For each row: the batch, the row's number, and the claim; None if no session is open.

    `of_batch` are the due time and the last check of the batches. The claims are on these, or
    `on_rows` of their own.
    """
    read: dict[str, tuple[int, Sequence[object]]] = {}
    for session_id, checkout_id, text in rows:
        number, _, common_text = as_text(text).partition("|")
        rowid = int(number)
        if common_text not in read:
            batch_id, claim = _claim(common_text, claimed_at, claimed_until, of_batch)
            if on_rows:
                claim = claim._replace(batch_id=None)
            read[common_text] = batch_id, claim[3:]
        batch_id, common = read[common_text]
        if checkout_id is None:
            yield batch_id, rowid, None
        else:
            ids = (rowid, as_text(session_id), as_text(checkout_id) or None)
            yield batch_id, rowid, Claim._make((*ids, *common))


def _claim(
    text: str,
    claimed_at: datetime,
    claimed_until: datetime,
    of_batch: Mapping[int, tuple[datetime, datetime | None]],
) -> tuple[int, Claim]:
    """The batch, and a claim with the fields that its sessions share: all but the three ids."""
    number, first_seen, failures, outcome, code, next_check = text.split("|")
    batch_id = int(number)
    due_at, checked_at = of_batch[batch_id]
    claim = Claim(
        rowid=0,
        session_id="",
        billing_checkout_id=None,
        first_seen_at=as_datetime(first_seen),
        consecutive_failures=int(failures),
        claimed_at=claimed_at,
        claimed_until=claimed_until,
        batch_id=batch_id,
        last_outcome=outcome or None,
        last_status_code=int(code) if code else None,
        has_due_time=bool(next_check),
        last_checked_at=checked_at,
        due_at=as_datetime(next_check) if next_check else due_at,
    )
    return batch_id, claim

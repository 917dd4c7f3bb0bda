"""`checkout_session_run`, the history of passes: one row for each, kept for a day.

The newest row is the monitor's heartbeat, and rows without an end show which passes are under way.
"""

import json
import random
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from core.database.port import Connection, Database, Row, Value, as_datetime, as_int, placeholders
from core.domain.model import Outcome, Reason, Skip
from core.domain.summary import Summary
from core.store.old_rows import delete_some

KEEP_PASSES = timedelta(days=1)

# A pass under way writes its progress every second. One that has been silent for this long was
# killed or is frozen: nobody has to wait for it.
ALIVE_SECONDS = 5.0

# Words of billing that a pass keeps, and characters of each. JSON has up to twelve for one of these
# (an emoji), and has to fit into the column's 2,000.
MAX_WORDS, MAX_WORD_LENGTH, MAX_WORD_IN_JSON = 3, 100, 660

# The starts of this many ticks are compared with their ticks, if they are not older than this.
RECENT_TICKS = 12
RECENT = timedelta(minutes=5)


class PassHistory:
    """Writes and reads the history. Every method raises StoreError.

    `made_by` is the text of the monitor that makes the passes; None leaves it out.
    """

    def __init__(self, database: Database, made_by: str | None = None) -> None:
        self._database = database
        self._made_by = made_by
        self._last_id = 0
        self._without_end = set[int]()  # passes of this worker whose end is not recorded

    def prepare(self) -> None:
        """Record when the monitor was installed, so that a new one does not count as late."""
        if self._newest_start("TRUE") is None:
            now = self._database.run(lambda connection: connection.now())
            summary = Summary(Reason.START, now)
            self.end(self.begin(summary), summary)

    def begin(self, summary: Summary) -> int:
        """Add the row of a pass that begins, and return its id.

        The id is made here, from the time: a statement that is sent again after a broken connection
        does not add a second row.
        """
        nanoseconds = id_at(summary.started_at)
        pass_id = nanoseconds + random.randrange(1_000_000)  # noqa: S311 (no secret)
        if nanoseconds <= self._last_id < nanoseconds + 1_000_000:  # in the same ms
            pass_id = max(pass_id, self._last_id + 1)
        self._last_id = pass_id
        row: dict[str, Value] = {
            "id": pass_id,
            "reason": summary.reason.value,
            "tick": summary.tick,
            "started_at": summary.started_at,
            "settings": self._made_by,
            **_columns(summary),
        }

        def insert(connection: Connection) -> None:
            connection.execute(
                f"INSERT INTO checkout_session_run ({', '.join(row)}) VALUES {placeholders(row)}"
                f" {self._database.skip_duplicates.format(key='id')}",
                tuple(row.values()),
            )

        self._without_end.add(pass_id)
        self._database.run(insert)
        return pass_id

    def update_progress(self, pass_id: int, *, seconds: float, checked: int, errors: int) -> None:
        """Record that the pass is under way, and how many checks it has made."""
        duration_ms = round(seconds * 1000)
        self._update(pass_id, {"duration_ms": duration_ms, "checked": checked, "errors": errors})

    def end(self, pass_id: int, summary: Summary) -> None:
        self._update(pass_id, {"finished_at": summary.finished_at, **_columns(summary)})
        self._without_end.discard(pass_id)

    def forget_old(self) -> bool:
        """Delete rows that are over a day old; returns whether more are left."""
        day_ago = self._database.run(lambda connection: connection.now()) - KEEP_PASSES
        table, without_end = "checkout_session_run", "finished_at IS NULL AND started_at < %s"
        more = delete_some(self._database, table, "finished_at < %s", (day_ago,))
        return delete_some(self._database, table, without_end, (day_ago,)) or more

    def count_under_way(self) -> int:
        """Count the ticks' passes that have begun, not ended, and are alive.

        Call it between passes: one of this worker is over then, although the database may have been
        away when it ended.
        """

        def count(connection: Connection) -> int:
            now = connection.now()
            rows = connection.query(
                "SELECT id, started_at, duration_ms FROM checkout_session_run"
                " WHERE finished_at IS NULL AND reason = %s",
                (Reason.TICK.value,),
            )
            self._without_end &= {as_int(pass_id) for pass_id, _, _ in rows}
            return sum(
                is_alive(as_datetime(started_at), as_int(so_far), now)
                for pass_id, started_at, so_far in rows
                if pass_id not in self._without_end
            )

        return self._database.run(count)

    def last_start(self) -> datetime | None:
        """When the newest tick's pass began, or the monitor was installed; None before both."""
        return self._newest_start(f"reason <> '{Reason.MANUAL}'")

    def _newest_start(self, condition: str) -> datetime | None:
        def newest(connection: Connection) -> Sequence[Row]:
            # Ids are made from the time. A later one is of a clock that was ahead.
            return connection.query(
                f"SELECT started_at FROM checkout_session_run WHERE {condition} AND id < %s"
                " ORDER BY id DESC LIMIT 1",
                (id_at(connection.now() + timedelta(seconds=ALIVE_SECONDS)),),
            )

        rows = self._database.run(newest)
        return as_datetime(rows[0][0]) if rows else None

    def start_delays(self) -> list[float]:
        """See the function of this name."""
        return self._database.run(lambda connection: start_delays(connection, connection.now()))

    def _update(self, pass_id: int, row: dict[str, Value]) -> None:
        columns = ", ".join(f"{name} = %s" for name in row)

        def update(connection: Connection) -> None:
            connection.execute(
                f"UPDATE checkout_session_run SET {columns} WHERE id = %s",
                (*row.values(), pass_id),
            )

        self._database.run(update)


def start_delays(connection: Connection, now: datetime) -> list[float]:
    """Seconds from each recent tick to the start of its first pass, the newest tick first.

    Helpers start later than the first, and manual passes have no tick.
    """
    rows = connection.query(
        "SELECT tick, MIN(started_at) FROM checkout_session_run WHERE tick > %s AND tick <= %s"
        f" GROUP BY tick ORDER BY tick DESC LIMIT {RECENT_TICKS:d}",
        (now - RECENT, now),
    )
    return [(as_datetime(began) - as_datetime(tick)).total_seconds() for tick, began in rows]


def is_alive(started_at: datetime, so_far_ms: int, now: datetime) -> bool:
    """Whether a pass without an end has recorded its progress recently.

    One that did so in the future is of a clock that was ahead, and was killed.
    """
    silent = now - started_at - timedelta(milliseconds=so_far_ms)
    return abs(silent) <= timedelta(seconds=ALIVE_SECONDS)


def id_at(time: datetime) -> int:
    """The first id of a millisecond: its nanoseconds since 1970."""
    return round(time.timestamp() * 1000) * 1_000_000


def unknown_words(connection: Connection, now: datetime) -> list[str]:
    """What billing said lately that BILLING_STATUS_MAP does not have; the newest first."""
    rows = connection.query(
        "SELECT unknown_words FROM checkout_session_run"
        " WHERE tick > %s AND tick <= %s AND unknown_words IS NOT NULL"
        f" ORDER BY tick DESC LIMIT {RECENT_TICKS:d}",
        (now - RECENT, now + timedelta(seconds=ALIVE_SECONDS)),
    )
    found = [str(word) for (words,) in rows for word in json.loads(str(words))]
    return list(dict.fromkeys(found))[:MAX_WORDS]


def _columns(summary: Summary) -> dict[str, Value]:
    latency = summary.latency_ms
    return {
        "duration_ms": round(summary.duration_seconds * 1000),
        "open_sessions": summary.open,
        "checked": summary.checked,
        "errors": summary.errors,
        "status_changes": summary.status_changes,
        "outcomes": _json(summary.outcomes),
        "skipped": _json(summary.skipped),
        "overdue_ms": round(summary.overdue_seconds * 1000),
        "unknown_words": _words(summary.unknown_words),
        "latency_p50_ms": latency.get("p50"),
        "latency_p95_ms": latency.get("p95"),
        "latency_p99_ms": latency.get("p99"),
        "latency_max_ms": latency.get("max"),
    }


def _words(words: Sequence[str]) -> str | None:
    """As JSON; None: there are none."""
    shown = [_cut(word) for word in words[:MAX_WORDS]]
    return json.dumps(shown) if shown else None


def _cut(word: str) -> str:
    """The beginning of a word that may be kept."""
    word = word[:MAX_WORD_LENGTH]
    while len(json.dumps(word)) > MAX_WORD_IN_JSON:
        word = word[:-1]
    return word


def _json(counts: Mapping[Outcome, int] | Mapping[Skip, int]) -> str:
    return json.dumps({name.value: count for name, count in counts.items()})

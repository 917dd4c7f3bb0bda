"""Which monitors have made passes lately; each pass records its monitor in `settings`."""

import json
import zlib
from datetime import datetime, timedelta

from core.billing.settings import listed
from core.database.port import Connection, Database, as_datetime
from core.domain.model import Reason
from core.domain.other_monitors import (
    COMPARED,
    Monitor,
    OtherMonitor,
    Seen,
    SettingValue,
    differences,
    others_at_work,
)
from core.domain.summary import Summary
from core.settings import Settings
from core.store.pass_history import ALIVE_SECONDS, PassHistory, id_at

# A value that is longer in JSON is recorded as its beginning and a checksum, so that all of them
# fit into the column.
MAX_VALUE_LENGTH, BEGINNING = 80, 50
# A monitor whose ticks are all led by others records a pass this often, so that it is seen.
SHOW_EVERY = timedelta(minutes=1)


def monitor_of(settings: Settings, name: str) -> Monitor:
    """The monitor that these settings make. MAX_CONCURRENCY and others may differ between two."""
    late = settings.late_payments_for
    reader, codes = settings.status_reader, settings.billing_status_codes
    values: dict[str, SettingValue] = {
        "BILLING_API_URL": settings.billing_api_url,
        "BILLING_HEADERS": str(settings.billing_headers),
        "BILLING_TOKEN_URL": settings.billing_token_url,
        "BILLING_OK": listed(codes.ok),
        "BILLING_NOT_FOUND": listed(codes.not_found),
        "CHECK_INTERVAL_SECONDS": settings.interval_seconds,
        "CHECK_CADENCE": str(settings.cadence),
        "STATUS_UPDATES": reader is not None,
        "SESSION_EXPIRES_AFTER": settings.expires_after_seconds,
        "EVENT_BUS_NAME": settings.event_bus_name,
    }
    if reader is not None:  # otherwise they are not used, and do not differ
        words = json.dumps(dict(reader.words), sort_keys=True)
        values["BILLING_STATUS_PATH"] = reader.path
        values["BILLING_STATUS_MAP"] = f"#{_checksum(words)}"
        values["LATE_PAYMENTS_FOR"] = int(late.total_seconds()) if late else None
        values["LATE_STATUS_UPDATES"] = settings.late_status_updates
        values["BILLING_ID_PATH"] = reader.id_path
        values["BILLING_AMOUNT_PATH"] = reader.amount_path
        values["BILLING_CURRENCY_PATH"] = reader.currency_path
    shortened = {setting: _shortened(value) for setting, value in values.items()}
    return Monitor(str(_shortened(name)), shortened)


def monitors_seen(connection: Connection, now: datetime) -> list[Seen]:
    """The monitors that made passes within COMPARED; passes before version 0.3.0 have no name."""
    rows = connection.query(
        "SELECT settings, MIN(started_at), MAX(started_at) FROM checkout_session_run"
        " WHERE id >= %s AND id < %s AND settings IS NOT NULL AND reason <> %s GROUP BY settings",
        (id_at(now - COMPARED), _after(now), Reason.START.value),
    )
    return [
        Seen(Monitor.from_text(str(text)), as_datetime(first), as_datetime(last))
        for text, first, last in rows
    ]


def newest_settings(database: Database) -> str:
    """An expression: the `settings` of the newest tick's last pass, or NULL.

    A tick further ahead than a minute is of a clock that was wrong.
    """
    return (
        "(SELECT settings FROM checkout_session_run"
        f" WHERE tick <= {database.now_sql(plus_seconds=60)} ORDER BY tick DESC, id DESC LIMIT 1)"
    )


class OtherMonitors:
    """Finds monitors with other settings on the same tables. Methods raise StoreError."""

    def __init__(self, database: Database, history: PassHistory, this: Monitor | None) -> None:
        self._database = database
        self._history = history
        self._this = this

    def find(self) -> list[OtherMonitor]:
        if self._this is None:
            return []
        here = self._this.settings

        def find(connection: Connection) -> list[OtherMonitor]:
            now = connection.now()
            return others_at_work(here, monitors_seen(connection, now), now)

        return self._database.run(find)

    def differ(self, newest: str | None) -> bool:
        """Whether the monitor of the newest pass has other settings than this one."""
        if newest is None or self._this is None:
            return False
        return bool(differences(self._this.settings, Monitor.from_text(newest).settings))

    def show_this(self, summary: Summary) -> bool:
        """Record a pass that others left nothing to do, unless this monitor is seen anyway.

        Returns whether it was recorded.
        """

        def is_seen(connection: Connection) -> bool:
            now = connection.now()
            since = id_at(now - SHOW_EVERY + timedelta(seconds=ALIVE_SECONDS))
            rows = connection.query(
                "SELECT DISTINCT settings FROM checkout_session_run"
                " WHERE id > %s AND id < %s AND settings IS NOT NULL",
                (since, _after(now)),
            )
            return not all(self.differ(str(text)) for (text,) in rows)

        if self._database.run(is_seen):
            return False
        self._history.end(self._history.begin(summary), summary)
        return True


def _after(now: datetime) -> int:
    """The first id that only a clock that was ahead can have made."""
    return id_at(now + timedelta(seconds=ALIVE_SECONDS))


def _shortened(value: SettingValue) -> SettingValue:
    if not isinstance(value, str) or len(json.dumps(value)) <= MAX_VALUE_LENGTH:
        return value
    beginning = value[:BEGINNING].encode("ascii", "replace").decode()
    return f"{beginning}…#{_checksum(value)}"


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode(errors='surrogateescape')):08x}"

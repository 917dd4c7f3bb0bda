"""The monitor's checks of itself, as `GET /api/health` answers them."""

from datetime import UTC, datetime
from typing import NamedTuple

from core.domain.model import JsonObject, iso
from core.domain.verdict import FRESH_INTERVALS, starts_late_by
from core.settings import Settings
from core.store.store import Store


class Health(NamedTuple):
    """The checks by name; no detail that would help an attacker."""

    checks: dict[str, bool]
    at: datetime
    last_pass_at: datetime | None

    @property
    def ok(self) -> bool:
        return all(self.checks.values())

    def as_dict(self) -> JsonObject:
        return {
            "status": "ok" if self.ok else "degraded",
            "timestamp": iso(self.at),
            "checks": {name: "ok" if ok else "failed" for name, ok in self.checks.items()},
            "last_pass_at": iso(self.last_pass_at) if self.last_pass_at else None,
        }


def read_health(store: Store, settings: Settings, *, has_api_key: bool) -> Health:
    """Check the passes, the key, billing's answers and other monitors. Raises StoreError."""
    counts = store.state.last_counts()
    waiting = store.read_waiting(settings.check_rules(), counts)
    last_pass_at = store.history.last_start()
    age = (waiting.now - last_pass_at).total_seconds() if last_pass_at else float("inf")
    checks = without_database(has_api_key=has_api_key).checks | {
        "database": True,
        "last_pass": age <= FRESH_INTERVALS * settings.interval_seconds,
        "starts_on_time": starts_late_by(store.history.start_delays()) is None,
        # Billing says something usable, about some of the open sessions.
        "answers": not waiting.is_blind(counts.open),
        # No monitor with other settings works against this one.
        "other_monitors": not store.others.find(),
    }
    return Health(checks, waiting.now, last_pass_at)


def without_database(*, has_api_key: bool) -> Health:
    """What is known where the database cannot be read."""
    checks = {
        "database": False,
        "last_pass": False,
        "starts_on_time": True,
        "api_key": has_api_key,
        "answers": True,
        "other_monitors": True,
    }
    return Health(checks, datetime.now(UTC), None)

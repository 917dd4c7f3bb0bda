"""Monitors that share the tables, and whether they have the same settings.

Monitors with equal settings may share a database, for example from two regions: whoever claims a
session asks and writes the same. With other settings, one of them undoes what the other is for.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

type SettingValue = str | int | bool | None

# A deployment leaves workers with old and with new settings side by side, for a minute or so.
# Monitors work together once the times of their passes have overlapped for this long, and as long
# as both have begun a pass within this time. The interval is a minute at most.
TOGETHER = timedelta(minutes=2)
# Passes that began within this time are compared.
COMPARED = timedelta(minutes=5)

OTHER_MONITOR = "Another monitor with other settings works on the same sessions"


class Monitor(NamedTuple):
    """Who makes passes: a name, and the settings that decide what is asked and written."""

    name: str
    settings: Mapping[str, SettingValue]  # by variable, without any secret

    def as_text(self) -> str:
        return json.dumps({"name": self.name, **self.settings})

    @classmethod
    def from_text(cls, text: str) -> "Monitor":
        settings = json.loads(text)
        return cls(str(settings.pop("name")), settings)


class Seen(NamedTuple):
    """A monitor's passes on record, of the time that is compared."""

    monitor: Monitor
    first_began: datetime
    last_began: datetime


class Difference(NamedTuple):
    """One setting that differs."""

    setting: str
    here: SettingValue
    there: SettingValue

    def __str__(self) -> str:
        return f"{self.setting} is {_shown(self.there)} there and {_shown(self.here)} here"


class OtherMonitor(NamedTuple):
    """A monitor with other settings that works on the same sessions as this one."""

    name: str
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        return f"{self.name} ({'; '.join(map(str, self.differences))})"


def differences(
    here: Mapping[str, SettingValue], there: Mapping[str, SettingValue]
) -> tuple[Difference, ...]:
    """The settings that differ; those that only one of two versions knows do not count."""
    return tuple(
        Difference(setting, value, there[setting])
        for setting, value in here.items()
        if setting in there and there[setting] != value
    )


def others_at_work(
    here: Mapping[str, SettingValue], seen: Sequence[Seen], now: datetime
) -> list[OtherMonitor]:
    """The monitors with other settings than `here` that work together with this one (TOGETHER)."""
    by_differences: dict[tuple[Difference, ...], list[Seen]] = {}
    for one in seen:
        by_differences.setdefault(differences(here, one.monitor.settings), []).append(one)
    ours = by_differences.pop((), None)
    if ours is None:
        return []
    first, last = _first_and_last(ours)
    others = []
    for differ, theirs in by_differences.items():
        their_first, their_last = _first_and_last(theirs)
        both_last = min(last, their_last)
        if both_last - max(first, their_first) >= TOGETHER and now - both_last <= TOGETHER:
            newest = max(theirs, key=lambda one: one.last_began)
            others.append(OtherMonitor(newest.monitor.name, differ))
    return sorted(others)


def _first_and_last(seen: Sequence[Seen]) -> tuple[datetime, datetime]:
    return min(one.first_began for one in seen), max(one.last_began for one in seen)


def _shown(value: SettingValue) -> str:
    match value:
        case None:
            return "not set"
        case bool():
            return str(value).lower()
        case _:
            return str(value)

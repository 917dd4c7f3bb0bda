"""Whether another monitor works on the tables that `make run` is about to use."""

import os
import re
import socket

from core.database.port import Connection
from core.domain.other_monitors import TOGETHER, Seen
from core.domain.verdict import duration
from core.errors import StoreError
from core.settings import Settings
from core.store.other_monitors import monitors_seen
from core.worker import open_database

SHARE = "--share-database"

_NAME = re.compile(r"make run \((.+), process (\d+)\)")


def name() -> str:
    """What other monitors call this process; two on one machine have different names."""
    return f"make run ({socket.gethostname()}, process {os.getpid()})"


def refusal(settings: Settings) -> str | None:
    """Why the monitor should not start, in one sentence; None: no other monitor is at work.

    None too if the database cannot be used: each pass will say why.
    """
    database = open_database(settings)
    try:
        others = database.run(_others_at_work)
    except StoreError:  # also for a new database, and one of a version without names
        return None
    finally:
        database.close()
    if not others:
        return None
    (seconds, who), *_ = sorted(others)
    return (
        f"Another monitor, {who}, works on the tables of this database: its last pass began "
        f"{duration(seconds)} ago. Two monitors share one queue, and each session is checked by "
        "the settings of whichever claims it. Stop the other one, or use another DATABASE_URL, or "
        f'start anyway with make run ARGS="{SHARE}".'
    )


def _others_at_work(connection: Connection) -> list[tuple[float, str]]:
    """How many seconds ago each other monitor began its last pass, and its name."""
    now = connection.now()
    return [
        (max(0.0, (now - seen.last_began).total_seconds()), seen.monitor.name)
        for seen in monitors_seen(connection, now)
        if now - seen.last_began <= TOGETHER and not _has_ended(seen)
    ]


def _has_ended(seen: Seen) -> bool:
    """Whether it was a `make run` on this machine that has ended, or had this process's number."""
    match = _NAME.fullmatch(seen.monitor.name)
    if match is None or match[1] != socket.gethostname():
        return False
    process = int(match[2])
    if process == os.getpid():
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it runs, as another user
        pass
    return False

"""`make run`: the whole monitor on this machine, without a cloud account and without a server.

The loop of template.yaml keeps time, workers check sessions, uvicorn serves the API on port 3001.
A simulated billing service on port 4000 and an SQLite file with sample sessions stand in for what
.env does not name. Ctrl-C ends it.
"""

import argparse
import contextlib
import errno
import io
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values

from core import log
from core.database.address import SQLitePath
from core.errors import SettingsError
from core.settings import Settings
from local import billing, loop, terminal
from local.api import running_api
from local.samples import SAMPLES, make_samples
from local.workers import Workers

API_PORT = 3001
DATABASE = Path(".local/checkout.db")

# At one second an interval, passes that hang for their whole time overlap this much.
WORKERS = 25


class StartError(Exception):
    """Why the monitor cannot start here, in one sentence."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make run", description="Run the monitor here.")
    parser.add_argument("--api-port", type=int, default=API_PORT, metavar="PORT")
    parser.add_argument("--billing-port", type=int, default=billing.PORT, metavar="PORT")
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know the emoji
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    log.use_plain_text()
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    dotenv = {name: value or "" for name, value in dotenv_values(".env").items()}
    try:
        with contextlib.ExitStack() as stack:
            ready = prepared(dotenv | os.environ, arguments.billing_port, stack)
            terminal.show_news_only(debug=ready.settings.debug)
            workers = stack.enter_context(contextlib.closing(Workers(ready.settings, WORKERS)))
            with on_port(arguments.api_port, "--api-port"):
                port = stack.enter_context(
                    running_api(arguments.api_port, lambda: workers, ready.simulated)
                )
            print(f"The monitor's page: http://localhost:{port}/")
            print(*ready.told, f"API: http://localhost:{port}/api/health", sep="\n", flush=True)
            loop.run(workers.start_check, ready.settings.interval_seconds, stopping)
            terminal.end_newest_line()
            print("Stopping: open claims are given back.", flush=True)
    except (StartError, SettingsError) as error:
        print(f"❌ {error}", file=sys.stderr)
        return 1
    return 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the monitor runs on here, and the lines that say so."""

    settings: Settings
    simulated: billing.SimulatedBilling | None  # None: a billing service of the user's
    told: Sequence[str]


def prepared(env: Mapping[str, str], billing_port: int, stack: contextlib.ExitStack) -> Prepared:
    """The settings, with what they leave open provided here: database, billing service, interval.

    Raises:
        SettingsError: a setting cannot be used.
        StartError: a port is in use, or the SQLite file cannot be.
    """
    given = {name: value for name, value in env.items() if value.strip()}
    given.setdefault("DATABASE_URL", f"sqlite:///{DATABASE}")
    given.setdefault("CHECK_INTERVAL_SECONDS", str(loop.default_interval_seconds()))
    given.setdefault("LOG_LINES_ACTIVE", str(log.LINES_PER_OUTCOME))
    simulated = None
    if "BILLING_API_URL" not in given:
        with on_port(billing_port, "--billing-port"):
            simulated = stack.enter_context(billing.running_billing(port=billing_port))
        given["BILLING_API_URL"] = simulated.url
    settings = Settings.from_env(given)
    log.set_level(debug=settings.debug)
    told = [f"{'Simulated b' if simulated else 'B'}illing service: {settings.billing_api_url}"]
    if isinstance(settings.database, SQLitePath):
        path = settings.database.path
        try:
            made = make_samples(path)
        except (OSError, sqlite3.Error) as error:
            raise StartError(f"The database file {path} cannot be used: {error}.") from None
        samples = f", made with {len(SAMPLES)} sample sessions" if made else ""
        told.append(f"Database: {path}{samples}")
    return Prepared(settings, simulated, told)


@contextlib.contextmanager
def on_port(port: int, option: str) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "is in use by another program" if in_use else f"cannot be used: {error}"
        raise StartError(
            f"Port {port} {why}. End that program, or choose another port with {option}, "
            f'e.g. make run ARGS="{option} {port + 1}".'
        ) from None


if __name__ == "__main__":
    sys.exit(main())

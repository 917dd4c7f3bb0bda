"""`make run`: the whole monitor on this machine, without a cloud account or a database server.

The stack's loop starts the ticks, workers check the sessions, and uvicorn serves the API
on port 3001. Unless .env names others, billing is simulated on port 4000 and the database is an
SQLite file with sample sessions. It starts on tables that another monitor works on only with
--share-database. Ctrl-C stops it, and so does the end of a pipe's reader.
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
from core.errors import SettingsError
from core.settings import Settings
from local import billing, loop, output, sharing, terminal
from local.api import running_api
from local.samples import SAMPLES, create_samples
from local.services import Service, read_services
from local.workers import Workers

API_PORT = 3001
DATABASE = Path(".local/checkout.db")

# With an interval of 1 s, this many passes overlap if each takes its maximum of 25 s.
MAX_WORKERS = 25


class StartError(Exception):
    """The monitor cannot start; the message says why in one sentence."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make run", description="Run the monitor here.")
    parser.add_argument("--api-port", type=billing.port, default=API_PORT, metavar="PORT")
    parser.add_argument("--billing-port", type=billing.port, default=billing.PORT, metavar="PORT")
    parser.add_argument(
        sharing.SHARE, action="store_true", help="start although another monitor uses the database"
    )
    services = read_services()
    parser.add_argument(
        "--service", choices=services, help="simulate that billing service, with its settings"
    )
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack the emoji
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    log.use_plain_text()
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    output.stop_without_reader(stopping)
    try:
        dotenv = read_dotenv()
        with contextlib.ExitStack() as stack:
            service = services.get(arguments.service)
            setup = prepare(dotenv | os.environ, arguments.billing_port, stack, service)
            if setup.simulated:
                refuse_one_port(arguments.api_port, arguments.billing_port)
            if not arguments.share_database:
                refuse_to_share(setup.settings)
            terminal.show_changes_only(debug=setup.settings.debug)
            workers = stack.enter_context(
                contextlib.closing(Workers(setup.settings, MAX_WORKERS, sharing.name()))
            )
            with explain_port_errors(arguments.api_port, "--api-port"):
                port = stack.enter_context(
                    running_api(arguments.api_port, lambda: workers, setup.simulated)
                )
            stack.callback(workers.stop)  # before the API, which waits for its requests to end
            print(f"The monitor's page: http://localhost:{port}/")
            print(*setup.lines, f"API: http://localhost:{port}/api/health", sep="\n", flush=True)
            loop.run(workers.start_check, setup.settings.interval_seconds, stopping)
            terminal.end_last_line()
            print("Stopping: releasing open claims.", flush=True)
    except (StartError, SettingsError) as error:
        print(f"❌ {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # of a print
        output.discard()
    return 0


def read_dotenv() -> Mapping[str, str]:
    """The variables in `.env`. Raises StartError."""
    try:
        return {name: value or "" for name, value in dotenv_values(".env").items()}
    except UnicodeDecodeError:
        raise StartError(".env is not text in UTF-8; save it as UTF-8.") from None


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings, the servers started for them, and the lines to print about both."""

    settings: Settings
    simulated: billing.SimulatedBilling | None  # None where the settings name a billing service
    lines: Sequence[str]


def prepare(
    env: Mapping[str, str],
    billing_port: int,
    stack: contextlib.ExitStack,
    service: Service | None = None,
) -> Setup:
    """Read the settings, and provide the database, billing service and interval that they omit.

    With a `service`, that one is simulated at the path of the settings' billing service.

    Raises:
        SettingsError: a setting is invalid.
        StartError: a port is in use, the SQLite file cannot be used, or the answers of a simulated
            billing service would close the sessions of a shop's database.
    """
    given = {name: value for name, value in env.items() if value.strip()}
    given.setdefault("DATABASE_URL", f"sqlite:///{DATABASE}")
    given.setdefault("CHECK_INTERVAL_SECONDS", str(loop.default_interval_seconds()))
    given.setdefault("LOG_LINES_ACTIVE", str(log.LINES_PER_OUTCOME))
    simulated = None
    if service is not None or "BILLING_API_URL" not in given:
        with explain_port_errors(billing_port, "--billing-port"):
            simulated = stack.enter_context(
                billing.running_billing(port=billing_port, service=service)
            )
        if service is not None:
            given = {"STATUS_UPDATES": "true"} | service.settings_at(simulated.origin, given)
        else:
            given["BILLING_API_URL"] = simulated.url
    settings = Settings.from_env(given)
    if simulated and settings.status_reader and not isinstance(settings.database, Path):
        raise StartError(
            "Billing is simulated, and with STATUS_UPDATES its answers would close sessions in the "
            "database that DATABASE_URL names; set BILLING_API_URL and leave out --service, or set "
            "STATUS_UPDATES=false, or leave DATABASE_URL out."
        )
    log.set_level(debug=settings.debug)
    kind = "Simulated billing service" if simulated else "Billing service"
    lines = [f"{kind}: {settings.billing_api_url}"]
    if service is not None:
        lines.append(f"Simulating {service.title}; its settings are in docs/billing-services.md")
    if isinstance(settings.database, Path):
        path = settings.database
        try:
            created = create_samples(path)
        except (OSError, sqlite3.Error) as error:
            raise StartError(f"The database file {path} cannot be used: {error}.") from None
        samples = f", created with {len(SAMPLES)} sample sessions" if created else ""
        lines.append(f"Database: {path}{samples}")
    return Setup(settings, simulated, lines)


def refuse_to_share(settings: Settings) -> None:
    if why := sharing.refusal(settings):
        raise StartError(why)


def refuse_one_port(api_port: int, billing_port: int) -> None:
    if 0 != api_port == billing_port:
        raise StartError(f"--api-port and --billing-port are both {api_port}; choose two ports.")


@contextlib.contextmanager
def explain_port_errors(port: int, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        other = port + 1 if port < billing.MAX_PORT else port - 1
        choose = f'choose another port with {option}, e.g. make run ARGS="{option} {other}".'
        if error.errno == errno.EADDRINUSE:
            why = f"is in use by another program. Stop that program, or {choose}"
        else:
            why = f"cannot be used: {str(error).rstrip('.')}; {choose}"
        raise StartError(f"Port {port} {why}") from None


if __name__ == "__main__":
    sys.exit(main())

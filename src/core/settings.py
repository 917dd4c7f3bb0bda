"""What the operator configures: read once from the environment, refused with one clear sentence."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
from jmespath.exceptions import JMESPathError
from pyreqwest.http import Url

from core.billing import status_words
from core.billing.status_words import StatusReader
from core.database.address import DATABASE_URL_FORM, DatabaseAddress, parse_database_url
from core.domain import cadence
from core.domain.cadence import Cadence, parse_duration
from core.errors import SettingsError

BILLING_API_URL = "http://localhost:4000/billing/api/v1/paysession"


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, with its default. `from_env` is the only place that reads the environment."""

    database: DatabaseAddress | None  # None: database_secret_arn is set
    api_key: str | None = field(default=None, repr=False)
    api_key_secret_arn: str | None = None
    database_secret_arn: str | None = None
    billing_api_url: str = BILLING_API_URL
    interval_seconds: int = 5
    cadence: Cadence = field(default_factory=lambda: Cadence.parse("5s"))
    backoff_max_seconds: int = 60
    request_timeout_seconds: float = 10.0
    max_concurrency: int = 100
    max_workers: int = 10
    status_reader: StatusReader | None = None  # None: no status is written
    expires_after_seconds: int | None = None
    event_bus_name: str | None = None
    log_lines_active: int | None = 5  # of one pass; None: all of them
    debug: bool = False

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Settings":
        """Read the settings; a variable that is empty counts as not set.

        Raises:
            SettingsError: the first variable that cannot be used.
        """
        given = {name: value.strip() for name, value in env.items() if value.strip()}
        status_updates = _boolean(given, "STATUS_UPDATES")
        for name in ("SESSION_EXPIRES_AFTER", "EVENT_BUS_NAME"):
            if name in given and not status_updates:
                raise SettingsError(
                    f"{name} is {given[name]!r}, but no status is ever written without "
                    "STATUS_UPDATES; set STATUS_UPDATES=true, or leave it out."
                )
        debug = _boolean(given, "DEBUG")
        log_lines = _number(given, "LOG_LINES_ACTIVE", int, 5, least=0, most=10_000)
        api_key = given.get("APIKEY")
        database_url = given.get("DATABASE_URL")
        database_secret_arn = given.get("DATABASE_SECRET_ARN")
        if database_url is None and database_secret_arn is None:
            raise SettingsError(
                f"DATABASE_URL is not set; it must be {DATABASE_URL_FORM}, "
                "or DATABASE_SECRET_ARN must name a secret."
            )
        interval = _number(given, "CHECK_INTERVAL_SECONDS", int, 5, least=1, most=60)
        return cls(
            database=parse_database_url(database_url) if database_url else None,
            api_key=checked_api_key("APIKEY", api_key) if api_key else None,
            api_key_secret_arn=None if api_key else given.get("APIKEY_SECRET_ARN"),
            database_secret_arn=None if database_url else database_secret_arn,
            billing_api_url=_billing_api_url(given.get("BILLING_API_URL", BILLING_API_URL)),
            interval_seconds=interval,
            cadence=_cadence(given.get("CHECK_CADENCE", f"{interval}s")),
            backoff_max_seconds=_number(
                given, "CHECK_BACKOFF_MAX_SECONDS", int, 60, least=0, most=86_400
            ),
            request_timeout_seconds=_number(
                given, "REQUEST_TIMEOUT_SECONDS", float, 10, least=0.1, most=30
            ),
            max_concurrency=_number(given, "MAX_CONCURRENCY", int, 100, least=1, most=1000),
            max_workers=_number(given, "MAX_WORKERS", int, 10, least=1, most=1000),
            status_reader=_status_reader(given) if status_updates else None,
            expires_after_seconds=_expires_after(given.get("SESSION_EXPIRES_AFTER")),
            event_bus_name=_event_bus_name(given.get("EVENT_BUS_NAME")),
            log_lines_active=None if debug else log_lines,
            debug=debug,
        )


def checked_api_key(source: str, key: str) -> str:
    """The key, when an HTTP header can carry it. `source` is where it comes from.

    Raises:
        SettingsError: it cannot. The message does not show the key.
    """
    if not all("!" <= character <= "~" for character in key):
        raise SettingsError(
            f"{source} holds a space, a control character or a character outside ASCII (not shown "
            "here); it must be visible ASCII characters only, as an HTTP header can carry them."
        )
    return key


def _billing_api_url(text: str) -> str:
    allowed = "an http:// or https:// URL without user, query and fragment"
    try:
        url = urlsplit(text)
        httpx.URL(text)
        usable = (
            url.port != 0
            and url.scheme in ("http", "https")
            and bool(url.hostname)
            and not any(character in text for character in "?#")
            and all("!" <= character <= "~" for character in text)
            and Url.is_valid(text)  # by the rules of the client that sends the requests
        )
        authority = url.netloc if usable else text
    except (ValueError, httpx.InvalidURL):
        usable = False
        authority = text
    if "@" in authority:
        raise SettingsError(
            f"BILLING_API_URL holds a user or a password (not shown here); it must be {allowed}."
        )
    if not usable:
        raise SettingsError(f"BILLING_API_URL is {text!r}; it must be {allowed}.")
    return text.rstrip("/")


def _cadence(text: str) -> Cadence:
    try:
        return Cadence.parse(text)
    except ValueError as error:
        raise SettingsError(
            f"CHECK_CADENCE is {text!r}: {error}; it must be {cadence.FORM}."
        ) from None


def _status_reader(given: Mapping[str, str]) -> StatusReader:
    path = given.get("BILLING_STATUS_PATH", status_words.PATH)
    words = given.get("BILLING_STATUS_MAP")
    try:
        meanings = status_words.parse_words(words) if words else status_words.WORDS
    except ValueError as error:
        raise SettingsError(
            f"BILLING_STATUS_MAP is {words!r}: {error}; it must be {status_words.WORDS_FORM}."
        ) from None
    try:
        return StatusReader(path, meanings)
    except JMESPathError:
        raise SettingsError(
            f"BILLING_STATUS_PATH is {path!r}; it must be a JMESPath expression, e.g. status or "
            "data.payment.state."
        ) from None


def _expires_after(text: str | None) -> int | None:
    try:
        return parse_duration(text) if text else None
    except ValueError:
        raise SettingsError(
            f"SESSION_EXPIRES_AFTER is {text!r}; it must be a number with s, m, h or d, e.g. 24h."
        ) from None


def _event_bus_name(text: str | None) -> str | None:
    # PutEvents takes a name, or an ARN, of up to 1,600 characters.
    if text is not None and not re.fullmatch(r"[/.\-_A-Za-z0-9:]{1,1600}", text):
        raise SettingsError(
            f"EVENT_BUS_NAME is {text!r}; it must be the name or the ARN of an EventBridge bus."
        )
    return text


def _number[N: (int, float)](
    given: Mapping[str, str], name: str, read: Callable[[str], N], default: N, *, least: N, most: N
) -> N:
    text = given.get(name)
    if text is None:
        return default
    kind = "a whole number" if read is int else "a number"
    try:
        value = read(text)
    except ValueError:
        value = None
    # The comparison is written so that NaN is refused too.
    if value is None or not least <= value <= most:
        raise SettingsError(f"{name} is {text!r}; it must be {kind} from {least} to {most}.")
    return value


def _boolean(given: Mapping[str, str], name: str) -> bool:
    text = given.get(name, "false")
    if text.lower() not in ("true", "false"):
        raise SettingsError(f"{name} is {text!r}; it must be true or false.")
    return text.lower() == "true"

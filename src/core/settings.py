"""What the operator configures, read once from the environment; errors are one clear sentence."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from core.billing.client import StatusCodes
from core.billing.headers import API_KEY_HEADER, HeaderTemplates
from core.billing.settings import (
    credential_names,
    read_api_url,
    read_credentials,
    read_headers,
    read_status_codes,
    read_status_reader,
    read_token_url,
)
from core.database.address import (
    DATABASE_URL_FORM,
    USER_ARN,
    USER_ARN_FORM,
    Auth,
    DatabaseAddress,
    DatabaseSecret,
    IamDatabase,
    Tls,
    parse_database_url,
)
from core.domain import cadence
from core.domain.cadence import Cadence, parse_duration
from core.domain.decision import CheckRules
from core.errors import SettingsError

if TYPE_CHECKING:
    from core.billing.status_words import StatusReader


class Settings(NamedTuple):
    """Every setting; `from_env` reads them, with their defaults, from the environment."""

    database: DatabaseAddress
    # By the names that `credential_names` gives; None: they are in the secret, or not set.
    credentials: Mapping[str, str] | None
    api_key_secret_arn: str | None  # None: the secret is not needed
    billing_api_url: str
    allow_http: bool
    billing_headers: HeaderTemplates
    billing_token_url: str | None
    billing_status_codes: StatusCodes
    interval_seconds: int
    cadence: Cadence
    backoff_max_seconds: int
    request_timeout_seconds: float
    max_concurrency: int
    max_workers: int
    billing_max_per_second: int | None  # None: no limit is known
    status_reader: "StatusReader | None"  # None: no status is written
    expires_after_seconds: int | None
    late_payments_for: timedelta | None  # None: expired sessions are not looked at again
    late_status_updates: bool
    event_bus_name: str | None
    log_lines_active: int | None  # in one pass; None: no limit
    debug: bool

    def __repr__(self) -> str:
        """Shows no setting: some are secret."""
        return "Settings(…)"

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
        # Read in any case, so that a trial without STATUS_UPDATES finds what cannot be used.
        status_reader, looks_for = read_status_reader(given), _late_payments_for(given)
        late_payments_for = looks_for if status_updates else None
        allow_http = _boolean(given, "ALLOW_HTTP")
        debug = _boolean(given, "DEBUG")
        log_lines = _number(given, "LOG_LINES_ACTIVE", int, 5, min_value=0, max_value=10_000)
        templates = read_headers(given)
        token_url = read_token_url(given, templates, allow_http=allow_http)
        credentials = read_credentials(given, credential_names(templates, token_url))
        interval = _number(given, "CHECK_INTERVAL_SECONDS", int, 5, min_value=1, max_value=60)
        return cls(
            database=_database(given),
            credentials=credentials,
            api_key_secret_arn=given.get("APIKEY_SECRET_ARN") if credentials is None else None,
            billing_api_url=read_api_url(given, allow_http=allow_http),
            allow_http=allow_http,
            billing_headers=templates,
            billing_token_url=token_url,
            billing_status_codes=read_status_codes(given),
            interval_seconds=interval,
            cadence=_cadence(given.get("CHECK_CADENCE", f"{interval}s")),
            backoff_max_seconds=_number(
                given, "CHECK_BACKOFF_MAX_SECONDS", int, 60, min_value=0, max_value=86_400
            ),
            request_timeout_seconds=_number(
                given, "REQUEST_TIMEOUT_SECONDS", float, 10, min_value=0.1, max_value=30
            ),
            max_concurrency=_number(
                given, "MAX_CONCURRENCY", int, 100, min_value=1, max_value=1000
            ),
            max_workers=_number(given, "MAX_WORKERS", int, 10, min_value=1, max_value=1000),
            billing_max_per_second=_number(
                given, "BILLING_MAX_PER_SECOND", int, 0, min_value=1, max_value=100_000
            )
            or None,
            status_reader=status_reader if status_updates else None,
            expires_after_seconds=_expires_after(given.get("SESSION_EXPIRES_AFTER")),
            late_payments_for=late_payments_for,
            late_status_updates=_late_status_updates(given, late_payments_for),
            event_bus_name=_event_bus_name(given.get("EVENT_BUS_NAME")),
            log_lines_active=None if debug else log_lines,
            debug=debug,
        )

    @property
    def has_api_key(self) -> bool:
        """Whether there is one, or a secret that should hold it."""
        return self.credentials is not None or self.api_key_secret_arn is not None

    @property
    def credential_names(self) -> Mapping[str, bool]:
        return credential_names(self.billing_headers, self.billing_token_url)

    @property
    def headers_to_name(self) -> str:
        """What a refusal names: the headers of BILLING_HEADERS, or nothing by default."""
        return "" if self.billing_headers == API_KEY_HEADER else str(self.billing_headers)

    def check_rules(self) -> CheckRules:
        return CheckRules(
            self.interval_seconds,
            self.cadence,
            self.backoff_max_seconds,
            self.expires_after_seconds,
        )


def _database(given: Mapping[str, str]) -> DatabaseAddress:
    tls = Tls(_word(given, "DATABASE_TLS", [*Tls], Tls.PREFER))
    auth = _word(given, "DATABASE_AUTH", [*Auth], Auth.SECRET)
    host, name = given.get("DATABASE_HOST"), given.get("DATABASE_NAME")
    port = _number(given, "DATABASE_PORT", int, 3306, min_value=1, max_value=65_535)
    if url := given.get("DATABASE_URL"):
        return parse_database_url(url, tls=tls)
    if auth == Auth.IAM:
        user_arn = given.get("DATABASE_USER_ARN", "")
        if not re.fullmatch(USER_ARN, user_arn):
            raise SettingsError(
                f"DATABASE_USER_ARN is {user_arn!r}; with DATABASE_AUTH=IAM it must be "
                f"{USER_ARN_FORM}."
            )
        if not (host and name):
            raise SettingsError(
                "DATABASE_AUTH is 'IAM', which needs DATABASE_HOST and DATABASE_NAME too; set both."
            )
        if tls is not Tls.VERIFY:
            raise SettingsError(
                f"DATABASE_TLS is {tls.value!r}; with DATABASE_AUTH=IAM it must be VERIFY, because "
                "the token is sent to whoever answers."
            )
        return IamDatabase(user_arn, host, port, name)
    if arn := given.get("DATABASE_SECRET_ARN"):
        return DatabaseSecret(arn, tls, host, port, name)
    raise SettingsError(
        f"DATABASE_URL is not set; it must be {DATABASE_URL_FORM}, "
        "or DATABASE_SECRET_ARN must name a secret."
    )


def _cadence(text: str) -> Cadence:
    try:
        return Cadence.parse(text)
    except ValueError as error:
        raise SettingsError(
            f"CHECK_CADENCE is {text!r}: {error}; it must be {cadence.FORM}."
        ) from None


def _expires_after(text: str | None) -> int | None:
    try:
        return parse_duration(text) if text else None
    except ValueError:
        raise SettingsError(
            f"SESSION_EXPIRES_AFTER is {text!r}; it must be a number with s, m, h or d, e.g. 24h."
        ) from None


def _late_payments_for(given: Mapping[str, str]) -> timedelta | None:
    text = given.get("LATE_PAYMENTS_FOR", "7d")
    try:
        looked_for = timedelta(seconds=parse_duration(text) if text != "0" else 0)
    except ValueError:
        looked_for = None
    if looked_for is None or looked_for > timedelta(days=cadence.MAX_DAYS):
        raise SettingsError(
            f"LATE_PAYMENTS_FOR is {text!r}; it must be a number with s, m, h or d, e.g. 7d, up to "
            f"{cadence.MAX_DAYS}d, or 0."
        )
    return looked_for or None


def _late_status_updates(given: Mapping[str, str], late_payments_for: timedelta | None) -> bool:
    updates = _boolean(given, "LATE_STATUS_UPDATES")
    if updates and late_payments_for is None:
        raise SettingsError(
            f"LATE_STATUS_UPDATES is {given['LATE_STATUS_UPDATES']!r}, but no late payment is "
            "looked for; set STATUS_UPDATES=true and LATE_PAYMENTS_FOR, or leave it out."
        )
    return updates


def _event_bus_name(text: str | None) -> str | None:
    # PutEvents takes a name, or an ARN, of up to 1,600 characters.
    if text is not None and not re.fullmatch(r"[/.\-_A-Za-z0-9:]{1,1600}", text):
        raise SettingsError(
            f"EVENT_BUS_NAME is {text!r}; it must be the name or the ARN of an EventBridge bus."
        )
    return text


def _number[N: (int, float)](
    given: Mapping[str, str],
    name: str,
    read: Callable[[str], N],
    default: N,
    *,
    min_value: N,
    max_value: N,
) -> N:
    text = given.get(name)
    if text is None:
        return default
    kind = "a whole number" if read is int else "a number"
    try:
        value = read(text)
    except ValueError:
        value = None
    # This comparison refuses NaN too.
    if value is None or not min_value <= value <= max_value:
        raise SettingsError(
            f"{name} is {text!r}; it must be {kind} from {min_value} to {max_value}."
        )
    return value


def _word(given: Mapping[str, str], name: str, words: Sequence[str], default: str) -> str:
    text = given.get(name, default)
    if text not in words:
        raise SettingsError(
            f"{name} is {text!r}; it must be {', '.join(words[:-1])} or {words[-1]}."
        )
    return text


def _boolean(given: Mapping[str, str], name: str) -> bool:
    text = given.get(name, "false")
    if text.lower() not in ("true", "false"):
        raise SettingsError(f"{name} is {text!r}; it must be true or false.")
    return text.lower() == "true"

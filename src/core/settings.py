"""What the operator configures, read once from the environment; errors are one clear sentence."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit

import httpx
import jmespath
from jmespath.exceptions import JMESPathError
from pyreqwest.http import Url

from core.billing import headers, status_words
from core.billing.client import CHECKOUT_ID, STATUS_CODES, StatusCodes
from core.billing.headers import TOKEN, HeaderTemplates
from core.billing.status_words import StatusReader
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

# Status codes whose meaning is fixed: a refused key, a limited rate.
RESERVED = (401, 403, 429, 503)
# A variable each, or a field of the billing secret; headers may name further ones.
CREDENTIALS = ("APIKEY", "BILLING_CLIENT_ID", "BILLING_CLIENT_SECRET")
BILLING_API_URL = "http://localhost:4000/billing/api/v1/paysession"


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting; `from_env` reads them, with their defaults, from the environment."""

    database: DatabaseAddress
    # By the names that `credential_names` gives; None: they are in the secret, or not set.
    credentials: Mapping[str, str] | None = field(repr=False)
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
    status_reader: StatusReader | None  # None: no status is written
    expires_after_seconds: int | None
    late_payments_for: timedelta | None  # None: expired sessions are not looked at again
    late_status_updates: bool
    event_bus_name: str | None
    log_lines_active: int | None  # in one pass; None: no limit
    debug: bool

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
        late_payments_for = _late_payments_for(given) if status_updates else None
        allow_http = _boolean(given, "ALLOW_HTTP")
        debug = _boolean(given, "DEBUG")
        log_lines = _number(given, "LOG_LINES_ACTIVE", int, 5, min_value=0, max_value=10_000)
        templates = _billing_headers(given)
        token_url = _token_url(given, templates)
        credentials = _credentials(given, credential_names(templates, token_url))
        interval = _number(given, "CHECK_INTERVAL_SECONDS", int, 5, min_value=1, max_value=60)
        return cls(
            database=_database(given),
            credentials=credentials,
            api_key_secret_arn=given.get("APIKEY_SECRET_ARN") if credentials is None else None,
            billing_api_url=_encrypted(
                _billing_api_url(given.get("BILLING_API_URL", BILLING_API_URL)),
                allow_http=allow_http,
            ),
            allow_http=allow_http,
            billing_headers=templates,
            billing_token_url=token_url,
            billing_status_codes=_status_codes(given),
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
            status_reader=_status_reader(given) if status_updates else None,
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
    def credential_names(self) -> frozenset[str]:
        return credential_names(self.billing_headers, self.billing_token_url)

    @property
    def headers_to_name(self) -> str:
        """What a refusal names: the headers of BILLING_HEADERS, or nothing by default."""
        return "" if self.billing_headers == headers.API_KEY_HEADER else str(self.billing_headers)

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
        if not USER_ARN.fullmatch(user_arn):
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


def checked_api_key(source: str, key: str) -> str:
    """Return the key, if an HTTP header can carry it. `source` names where it comes from.

    Raises:
        SettingsError: a header cannot carry it. The message does not show the key.
    """
    if not all("!" <= character <= "~" for character in key):
        raise SettingsError(
            f"{source} contains a space, a control character or a character outside ASCII (not "
            "shown here); it must be visible ASCII characters only, as HTTP headers require."
        )
    return key


def credential_names(templates: HeaderTemplates, token_url: str | None) -> frozenset[str]:
    """The credentials that requests to billing and for a token need."""
    client = () if token_url is None else CREDENTIALS[1:]
    return frozenset((*(templates.placeholders - {TOKEN}), *client))


def _billing_headers(given: Mapping[str, str]) -> HeaderTemplates:
    text = given.get("BILLING_HEADERS")
    if text is None:
        has_token = "BILLING_TOKEN_URL" in given
        return headers.BEARER_TOKEN if has_token else headers.API_KEY_HEADER
    try:
        return headers.parse_headers(text)
    except ValueError as error:
        raise SettingsError(
            f"BILLING_HEADERS (not shown here) {error}; it must be {headers.FORM}."
        ) from None


def _token_url(given: Mapping[str, str], templates: HeaderTemplates) -> str | None:
    url = given.get("BILLING_TOKEN_URL")
    uses_token = TOKEN in templates.placeholders
    if url is None:
        if uses_token:
            raise SettingsError(
                f"BILLING_HEADERS has {{{TOKEN}}}, but BILLING_TOKEN_URL is not set; set it, or "
                "use another placeholder."
            )
        return None
    if not uses_token:
        raise SettingsError(
            f"BILLING_TOKEN_URL is set, but BILLING_HEADERS does not have {{{TOKEN}}}; put it into "
            "a value, or leave BILLING_HEADERS out."
        )
    allowed = "an http:// or https:// URL without user and fragment"
    _check_url("BILLING_TOKEN_URL", url, allowed, forbidden="#{}")
    return url


def _credentials(given: Mapping[str, str], names: Collection[str]) -> Mapping[str, str] | None:
    """The credentials by name; None if they are in the secret, or there is no APIKEY."""
    missing = sorted(name for name in names if name not in given)
    if not missing:
        return {name: checked_api_key(name, given[name]) for name in sorted(names)}
    if "APIKEY_SECRET_ARN" in given or missing == ["APIKEY"]:
        return None
    needs = "BILLING_TOKEN_URL" if {*missing} & {*CREDENTIALS[1:]} else "BILLING_HEADERS"
    raise SettingsError(
        f"{needs} needs {' and '.join(missing)}, not set here; set variables of these names, or "
        "APIKEY_SECRET_ARN to a secret with them."
    )


def listed(codes: Collection[int]) -> str:
    """The form in which status codes are set."""
    return ",".join(map(str, sorted(codes)))


def _status_codes(given: Mapping[str, str]) -> StatusCodes:
    ok = _codes(given, "BILLING_OK", STATUS_CODES.ok)
    not_found = _codes(given, "BILLING_NOT_FOUND", STATUS_CODES.not_found)
    if both := ok & not_found:
        raise SettingsError(
            f"BILLING_NOT_FOUND and BILLING_OK both have {min(both)}; leave it out of one of them."
        )
    return StatusCodes(ok, not_found)


def _codes(given: Mapping[str, str], name: str, default: frozenset[int]) -> frozenset[int]:
    text = given.get(name)
    if text is None:
        return default
    codes = [code.strip() for code in text.split(",")]
    if not all(re.fullmatch("[2-5][0-9]{2}", code) and int(code) not in RESERVED for code in codes):
        raise SettingsError(
            f"{name} is {text!r}; it must be status codes from 200 to 599, separated by commas, "
            f"other than {', '.join(map(str, RESERVED))}."
        )
    return frozenset(map(int, codes))


def _billing_api_url(text: str) -> str:
    allowed = (
        "an http:// or https:// URL without user, query and fragment, or one with "
        f"{CHECKOUT_ID} once, in its path or query"
    )
    before, *after = text.split(CHECKOUT_ID)
    if not after:
        _check_url("BILLING_API_URL", text, allowed, forbidden="?#{}")
        return text.rstrip("/")
    # With the id in its place it has to be a URL, and so does the part before it.
    _check_url("BILLING_API_URL", text.replace(CHECKOUT_ID, "id"), allowed, "#{}", shown=text)
    if len(after) > 1 or not re.match("https?://[^/?]+[/?]", before):
        raise SettingsError(f"BILLING_API_URL is {text!r}; it must be {allowed}.")
    return text


def _check_url(
    name: str, text: str, allowed: str, forbidden: str, *, shown: str | None = None
) -> None:
    """Refuse what is not a URL, or has a forbidden character; `shown` stands for it in the error.

    Raises:
        SettingsError: it cannot be used. The message does not show a user or a password.
    """
    try:
        url = urlsplit(text)
        httpx.URL(text)
        usable = (
            url.port != 0
            and url.scheme in ("http", "https")
            and bool(url.hostname)
            and not any(character in text for character in forbidden)
            and all("!" <= character <= "~" for character in text)
            and Url.is_valid(text)  # by the rules of the client that sends the requests
        )
        authority = url.netloc if usable else text
    except (ValueError, httpx.InvalidURL):
        usable = False
        authority = text
    if "@" in authority:
        raise SettingsError(
            f"{name} contains a user or a password (not shown here); it must be {allowed}."
        )
    if not usable:
        raise SettingsError(f"{name} is {shown or text!r}; it must be {allowed}.")


def _encrypted(url: str, *, allow_http: bool) -> str:
    """Return billing's URL, if the API key does not leave this machine unencrypted."""
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    if scheme == "http" and not allow_http and host not in ("localhost", "127.0.0.1", "::1"):
        raise SettingsError(
            f"BILLING_API_URL is {url!r}, which would send the API key unencrypted; it must be an "
            "https:// URL, or ALLOW_HTTP must be true."
        )
    return url


def _cadence(text: str) -> Cadence:
    try:
        return Cadence.parse(text)
    except ValueError as error:
        raise SettingsError(
            f"CHECK_CADENCE is {text!r}: {error}; it must be {cadence.FORM}."
        ) from None


def _status_reader(given: Mapping[str, str]) -> StatusReader:
    words = given.get("BILLING_STATUS_MAP")
    try:
        meanings = status_words.parse_words(words) if words else status_words.WORDS
    except ValueError as error:
        raise SettingsError(
            f"BILLING_STATUS_MAP is {words!r}: {error}; it must be {status_words.WORDS_FORM}."
        ) from None
    return StatusReader(
        _path(given, "BILLING_STATUS_PATH", "status or data.payment.state") or status_words.PATH,
        meanings,
        _path(given, "BILLING_ID_PATH", "id or data.id"),
        _path(given, "BILLING_AMOUNT_PATH", "amount or data.amount.value"),
        _path(given, "BILLING_CURRENCY_PATH", "currency or data.amount.currency"),
    )


def _path(given: Mapping[str, str], name: str, examples: str) -> str | None:
    path = given.get(name)
    try:
        if path is not None:
            jmespath.compile(path)
    except JMESPathError:
        raise SettingsError(
            f"{name} is {path!r}; it must be a JMESPath expression, e.g. {examples}."
        ) from None
    return path


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
        return timedelta(seconds=parse_duration(text)) if text != "0" else None
    except ValueError:
        raise SettingsError(
            f"LATE_PAYMENTS_FOR is {text!r}; it must be a number with s, m, h or d, e.g. 7d, or 0."
        ) from None


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

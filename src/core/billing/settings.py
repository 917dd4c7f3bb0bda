"""The settings of the billing service, read from the environment; errors are one clear sentence.

Each function raises SettingsError for a variable that cannot be used.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import jmespath
from jmespath.exceptions import JMESPathError
from jmespath.functions import Functions
from pyreqwest.http import Url

from core.billing import headers, status_words
from core.billing.client import CHECKOUT_ID, LOCAL_HOSTS, STATUS_CODES, StatusCodes
from core.billing.headers import TOKEN, HeaderTemplates
from core.billing.status_words import StatusReader
from core.errors import SettingsError

# Status codes whose meaning is fixed: a refused key, a limited rate.
RESERVED = (401, 403, 429, 503)
# A variable each, or a field of the billing secret; headers may name further ones.
CREDENTIALS = ("APIKEY", "BILLING_CLIENT_ID", "BILLING_CLIENT_SECRET")
BILLING_API_URL = "http://localhost:4000/billing/api/v1/paysession"


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


def checked_credential(source: str, credential: str, *, is_plain: bool) -> str:
    """Return the credential, if a header can carry it: as it is, or only in base64.

    Raises:
        SettingsError: a header cannot carry it. The message does not show the credential.
    """
    if is_plain:
        return checked_api_key(source, credential)
    try:
        credential.encode()
    except UnicodeEncodeError:
        raise SettingsError(
            f"{source} contains half of a character (not shown here); it must be text."
        ) from None
    return credential


def credential_names(templates: HeaderTemplates, token_url: str | None) -> Mapping[str, bool]:
    """The credentials that requests to billing and for a token need, in the order of their names.

    False: they are sent in base64 only, so they may have any characters.
    """
    in_client = () if token_url is None else CREDENTIALS[1:]
    names = {**dict.fromkeys(in_client, False), **templates.placeholders}
    return {name: names[name] for name in sorted(names) if name != TOKEN}


def read_headers(given: Mapping[str, str]) -> HeaderTemplates:
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


def read_token_url(
    given: Mapping[str, str], templates: HeaderTemplates, *, allow_http: bool
) -> str | None:
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
    _check_encrypted("BILLING_TOKEN_URL", url, "BILLING_CLIENT_SECRET", allow_http=allow_http)
    return url


def read_credentials(
    given: Mapping[str, str], names: Mapping[str, bool]
) -> Mapping[str, str] | None:
    """The credentials by name; None if they are in the secret, or there is no APIKEY.

    `names` are those of `credential_names`.
    """
    missing = [name for name in names if name not in given]
    if not missing:
        return {
            name: checked_credential(name, given[name], is_plain=is_plain)
            for name, is_plain in names.items()
        }
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


def read_status_codes(given: Mapping[str, str]) -> StatusCodes:
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


def read_api_url(given: Mapping[str, str], *, allow_http: bool) -> str:
    text = given.get("BILLING_API_URL", BILLING_API_URL)
    allowed = (
        "an http:// or https:// URL without user, query and fragment, or one with "
        f"{CHECKOUT_ID} once, in its path or query"
    )
    before, *after = text.split(CHECKOUT_ID)
    if not after:
        _check_url("BILLING_API_URL", text, allowed, forbidden="?#{}")
        text = text.rstrip("/")
    else:
        # With the id in its place it has to be a URL, and so does the part before it.
        _check_url("BILLING_API_URL", text.replace(CHECKOUT_ID, "id"), allowed, "#{}", shown=text)
        if len(after) > 1 or not re.match("(?i)https?://[^/?]+[/?]", before):
            raise SettingsError(f"BILLING_API_URL is {text!r}; it must be {allowed}.")
    _check_encrypted("BILLING_API_URL", text, "the API key", allow_http=allow_http)
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


def _check_encrypted(name: str, url: str, secret: str, *, allow_http: bool) -> None:
    """Refuse a URL with which the secret leaves this machine unencrypted. Raises SettingsError."""
    scheme, host = urlsplit(url).scheme, urlsplit(url).hostname
    if scheme == "http" and not allow_http and host not in LOCAL_HOSTS:
        raise SettingsError(
            f"{name} is {url!r}, which would send {secret} unencrypted; it must be an https:// "
            "URL, or ALLOW_HTTP must be true."
        )


def read_status_reader(given: Mapping[str, str]) -> StatusReader:
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
    if path is None:
        return None
    must = f"it must be a JMESPath expression, e.g. {examples}."
    try:
        parsed = jmespath.compile(path).parsed
    # ValueError, for example for an index of 5,000 digits, which Python does not convert.
    except (JMESPathError, ValueError, RecursionError):
        raise SettingsError(f"{name} is {path!r}; {must}") from None
    # JMESPath itself finds these when an answer comes.
    if wrong := _wrong_call(parsed):
        raise SettingsError(f"{name} is {path!r}, in which {wrong}; {must}")
    return path


def _wrong_call(parsed: Any) -> str | None:  # noqa: ANN401 (JMESPath has no type for its tree)
    """What is wrong with a function call in a JMESPath expression; None if nothing is."""
    inside = [parsed]
    while inside:
        node = inside.pop()
        if node["type"] == "slice":  # of three numbers
            continue
        inside += node["children"]
        if node["type"] != "function_expression":
            continue
        function = Functions.FUNCTION_TABLE.get(node["value"])
        if function is None:
            return f"{node['value']} is not a function of JMESPath"
        signature, given = function["signature"], len(node["children"])
        variadic = any(argument.get("variadic") for argument in signature)
        if given < len(signature) or (given > len(signature) and not variadic):
            return f"the function {node['value']} has {given} arguments"
    return None

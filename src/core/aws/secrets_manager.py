"""Secrets from AWS Secrets Manager, kept for an hour, read again when one is refused.

Powertools' parameters import boto3, which takes a second: they are imported with the first secret.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Never

from core.aws.clients import client_config
from core.billing.headers import API_KEY
from core.billing.settings import checked_credential
from core.database.address import PEM, RDS, DatabaseSecret, MySQLAddress, Tls, is_ca
from core.errors import SettingsError
from core.log import logger

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.parameters import SecretsProvider

# A refused secret is read again at once. If the old one and the new one are both accepted after a
# rotation, the old one is used for at most this long.
KEEP_SECONDS = 3600

CONNECT_SECONDS = 2.0
READ_SECONDS = 3.0
ATTEMPTS = 2

MAX_PORT = 65_535
DATABASE_KEYS = ("username", "password", "host", "dbname")


def read_credentials(
    arn: str, names: Mapping[str, bool], *, refresh: bool = False
) -> Mapping[str, str]:
    """The billing credentials of these names: fields of the secret, which is a JSON object.

    A secret of another form is the `APIKEY` itself. `names` are those of `credential_names`.

    Raises:
        SettingsError: the secret cannot be read, or lacks one of them, or has an unusable one.
    """
    text = _read("APIKEY_SECRET_ARN", arn, refresh=refresh)
    parsed = _parsed(text)
    # A JSON text is a key in quotes, as Terraform's jsonencode writes it; a list is no key.
    key = parsed if isinstance(parsed, str | list) else text
    fields = parsed if isinstance(parsed, dict) else {API_KEY: key}
    found = {name: fields.get(name) for name in names}
    credentials = {n: v.strip() for n, v in found.items() if isinstance(v, str) and v.strip()}
    if missing := [name for name in found if name not in credentials]:
        lacks, form = f"lacks {', '.join(missing)}", f"a JSON object with {', '.join(found)}"
        if list(found) == [API_KEY]:
            lacks = "does not contain a key"
            form = 'the key itself or a JSON object {"APIKEY": "..."}'
        raise SettingsError(
            f"APIKEY_SECRET_ARN names the secret {arn}, which {lacks}; it must be {form}."
        )
    for name, value in credentials.items():
        field = "" if name == API_KEY else f": {name}"
        checked_credential(f"APIKEY_SECRET_ARN{field}", value, is_plain=names[name])
    return credentials


def read_credentials_again(arn: str, names: Mapping[str, bool]) -> Mapping[str, str] | None:
    """The secret as it is now; None, with the reason in the log, where it cannot be used."""
    try:
        return read_credentials(arn, names, refresh=True)
    except SettingsError as error:
        logger.error(f"❌ {error}")
        return None


def read_database(secret: DatabaseSecret, *, refresh: bool = False) -> MySQLAddress:
    """The address in a secret of the form that RDS makes; `port`, `ssl`, `ssl_ca` are optional.

    Raises:
        SettingsError: the secret cannot be read, or has another form. No value is shown: it may be
            another field's, such as the password.
    """
    parsed = _parsed(_read("DATABASE_SECRET_ARN", secret.arn, refresh=refresh))
    if not isinstance(parsed, dict):
        parsed = {}
    parsed = {"host": secret.host, "port": secret.port, "dbname": secret.name} | {
        key: value for key, value in parsed.items() if value not in (None, "")
    }

    def refuse(what: str) -> Never:
        raise SettingsError(
            f"DATABASE_SECRET_ARN names the secret {secret.arn}, which {what}; it must be a JSON "
            f"object with {', '.join(DATABASE_KEYS)}, and port if it is not 3306 (DATABASE_HOST, "
            "DATABASE_PORT and DATABASE_NAME stand in for what it lacks); for verified TLS, ssl_ca "
            f"with a CA in PEM format, the path of its file, or {RDS}, or ssl with true for the "
            "system's CAs."
        )

    if missing := [key for key in DATABASE_KEYS if not parsed.get(key)]:
        refuse(f"lacks {', '.join(missing)}")
    port = str(parsed["port"])
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= MAX_PORT:
        refuse(f"has a port that is not a number from 1 to {MAX_PORT}")
    ssl_ca = parsed.get("ssl_ca") or None
    if ssl_ca is not None and not (isinstance(ssl_ca, str) and (PEM in ssl_ca or is_ca(ssl_ca))):
        refuse("has an ssl_ca that is neither a certificate nor a file here")
    ssl = str(parsed.get("ssl", ssl_ca is not None)).lower()
    if ssl not in ("true", "false"):
        refuse("has an ssl that is neither true nor false")
    if ssl == "false" and ssl_ca is not None:
        refuse("has an ssl_ca, but false for ssl")
    return MySQLAddress(
        host=str(parsed["host"]),
        port=int(port),
        user=str(parsed["username"]),
        password=str(parsed["password"]),
        database=str(parsed["dbname"]),
        ssl_ca=ssl_ca,
        tls=Tls.VERIFY if ssl == "true" else secret.tls,
    )


def _parsed(text: str) -> Any:  # noqa: ANN401 (JSON)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read(variable: str, arn: str, *, refresh: bool) -> str:
    # Slow imports, because of boto3.
    from aws_lambda_powertools.utilities.parameters import exceptions  # noqa: PLC0415
    from botocore import exceptions as boto  # noqa: PLC0415

    try:
        value = _manager().get(arn, max_age=KEEP_SECONDS, force_fetch=refresh)
    except (exceptions.GetParameterError, boto.BotoCoreError) as error:
        why = f"{error}".rstrip(".")
        if isinstance(error.__context__, boto.ConnectionError | boto.HTTPClientError):
            why += (
                "; Secrets Manager cannot be reached: functions in a VPC need a NAT gateway, or an "
                "endpoint for it whose security group lets them in"
            )
        raise SettingsError(
            f"{variable} names the secret {arn}, which cannot be read: {why}."
        ) from None
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise SettingsError(f"{variable} names the secret {arn}, which is not text.") from None


@functools.cache
def _manager() -> "SecretsProvider":
    from aws_lambda_powertools.utilities.parameters import SecretsProvider  # noqa: PLC0415

    return SecretsProvider(
        boto_config=client_config(
            connect_seconds=CONNECT_SECONDS, read_seconds=READ_SECONDS, attempts=ATTEMPTS
        )
    )

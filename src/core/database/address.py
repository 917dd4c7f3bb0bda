"""Where the database is: the forms that `DATABASE_URL` may have."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Never
from urllib.parse import parse_qsl, unquote, urlsplit

from core.errors import SettingsError

DATABASE_URL_FORM = (
    "mysql://user:password@host:3306/database (optional: ?ssl_ca=/path/to/ca.pem or ?ssl=true) "
    "or sqlite:///path/to/file"
)


@dataclass(frozen=True, slots=True)
class MySQLAddress:
    """A MySQL or MariaDB server, and the user that connects to it."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    ssl_ca: str | None = None  # a private CA's file
    ssl: bool = False  # TLS required, certificate verified by ssl_ca or the system's CAs


class SQLitePath(NamedTuple):
    """The file of the embedded database."""

    path: Path


class DatabaseSecret(NamedTuple):
    """The Secrets Manager secret that holds the address of a MySQL server."""

    arn: str


type DatabaseAddress = MySQLAddress | SQLitePath | DatabaseSecret


def parse_database_url(text: str) -> MySQLAddress | SQLitePath:
    """Parse a `DATABASE_URL`. Percent-encoding in user, password and database is decoded.

    Raises:
        SettingsError: another form. The message shows only the scheme of the text, because the
            rest may contain the password.
    """
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        url = None
    if url is None:  # outside the except clause: that error's text may contain the password
        _refuse_database_url(text, "is not a valid URL")
    if "#" in text:
        _refuse_database_url(text, "contains a '#'; encode it as %23")
    if url.scheme == "sqlite":
        path = unquote(url.path.removeprefix("/"))
        if url.netloc or not path or "?" in text:
            _refuse_database_url(text, "does not name a file")
        return SQLitePath(Path(path))
    if url.scheme != "mysql":
        _refuse_database_url(text, "has an unsupported scheme")
    database = unquote(url.path.removeprefix("/"))
    if not (url.hostname and url.username and database) or "/" in database or port == 0:
        _refuse_database_url(text, "must name a user, a host and one database")
    options = dict(parse_qsl(url.query, keep_blank_values=True))
    ssl_ca = options.pop("ssl_ca", None)
    ssl = options.pop("ssl", "true" if ssl_ca else "false")
    if options or ssl not in ("true", "false") or ssl_ca == "" or (ssl_ca and ssl == "false"):
        _refuse_database_url(text, "has an option other than ssl_ca=<file> or ssl=true|false")
    if ssl_ca is not None and not Path(ssl_ca).is_file():
        raise SettingsError(
            f"DATABASE_URL names the CA file {ssl_ca!r} in ssl_ca, which does not exist; "
            "it must be the path of a file in PEM format."
        )
    return MySQLAddress(
        host=url.hostname,
        port=port or 3306,
        user=unquote(url.username),
        password=unquote(url.password or ""),
        database=database,
        ssl_ca=ssl_ca,
        ssl=ssl == "true",
    )


def _refuse_database_url(text: str, why: str) -> Never:
    scheme, separator, _ = text.partition("://")
    # Text before '://' is a scheme only in this form (RFC 3986); otherwise it may be a password.
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*", scheme):
        scheme = "…"
    shown = f"{scheme}://…" if separator else "a text without '://'"
    raise SettingsError(f"DATABASE_URL ({shown}) {why}; it must be {DATABASE_URL_FORM}.")

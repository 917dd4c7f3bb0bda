"""Where the database is, and how a connection to it is encrypted."""

import re
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, Never
from urllib.parse import parse_qsl, unquote, urlsplit

from core.errors import SettingsError

DATABASE_URL_FORM = (
    "mysql://user:password@host:3306/database (optional: ?ssl_ca=/path/to/ca.pem or ?ssl=true) "
    "or sqlite:///path/to/file"
)

RDS = "rds"  # as the name of a CA: the CAs of Amazon RDS, and no other
PEM = "-----BEGIN CERTIFICATE-----"


class Tls(StrEnum):
    """How a connection is encrypted, at least."""

    PREFER = "PREFER"  # if the server offers it; nothing is verified
    REQUIRE = "REQUIRE"  # always; nothing is verified
    VERIFY = "VERIFY"  # always, and the certificate is for this host, from a CA that is trusted


class Auth(StrEnum):
    """How the user signs in to a server whose address is not in DATABASE_URL."""

    SECRET = "SECRET"  # noqa: S105 (no password: it says where one is)
    IAM = "IAM"  # with a token of the function's role


class MySQLAddress(NamedTuple):
    """A MySQL or MariaDB server, and the user that connects to it."""

    host: str
    port: int
    user: str
    password: str
    database: str
    ssl_ca: str | None = None  # a private CA's file or its PEM, or RDS; None: the system's CAs
    tls: Tls = Tls.PREFER

    def __repr__(self) -> str:
        """Without the password."""
        return f"MySQLAddress({self.user!r} at {self.host!r}, {self.port}, {self.database!r})"


class DatabaseSecret(NamedTuple):
    """The Secrets Manager secret that holds the address of a MySQL server.

    `host`, `port` and `name` stand in for what it lacks: a secret that RDS manages has only the
    user and the password.
    """

    arn: str
    tls: Tls = Tls.PREFER
    host: str | None = None
    port: int = 3306
    name: str | None = None


class IamDatabase(NamedTuple):
    """An RDS database whose user has no password, but signs in with the function's role."""

    user_arn: str  # USER_ARN_FORM
    host: str
    port: int
    name: str

    @property
    def user(self) -> str:
        return self.user_arn.partition("/")[2]

    @property
    def region(self) -> str:
        return self.user_arn.split(":")[3]


USER_ARN_FORM = "arn:aws:rds-db:<region>:<account>:dbuser:<resource id>/<user>"
USER_ARN = r"arn:aws[a-z-]*:rds-db:[a-z0-9-]+:\d{12}:dbuser:[\w-]+/[!-~]{1,32}"

type DatabaseAddress = MySQLAddress | Path | DatabaseSecret | IamDatabase  # a path: SQLite's file


def is_ca(text: str) -> bool:
    """Whether `ssl_ca` may be this: RDS, or a file that exists."""
    try:
        return text == RDS or Path(text).is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def parse_database_url(text: str, *, tls: Tls = Tls.PREFER) -> MySQLAddress | Path:
    """Parse a `DATABASE_URL`. Percent-encoding in user, password and database is decoded.

    `ssl=true` and `ssl_ca` raise `tls` to VERIFY.

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
        return Path(path)
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
    if ssl_ca is not None and not is_ca(ssl_ca):
        raise SettingsError(
            f"DATABASE_URL names the CA file {ssl_ca!r} in ssl_ca, which does not exist; "
            f"it must be the path of a file in PEM format, or {RDS}."
        )
    return MySQLAddress(
        host=url.hostname,
        port=port or 3306,
        user=unquote(url.username),
        password=unquote(url.password or ""),
        database=database,
        ssl_ca=ssl_ca,
        tls=Tls.VERIFY if ssl == "true" else tls,
    )


def _refuse_database_url(text: str, why: str) -> Never:
    scheme, separator, _ = text.partition("://")
    # Text before '://' is a scheme only in this form (RFC 3986); otherwise it may be a password.
    if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9+.-]*", scheme):
        scheme = "…"
    shown = f"{scheme}://…" if separator else "a text without '://'"
    raise SettingsError(f"DATABASE_URL ({shown}) {why}; it must be {DATABASE_URL_FORM}.")

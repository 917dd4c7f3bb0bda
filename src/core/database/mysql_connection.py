"""How a connection to a MySQL or MariaDB server is opened: time-outs, TLS, session settings.

PyMySQL raises a MySQLError for errors of the server or the network. Any other error on the way to a
connection becomes a StoreError here, in one sentence.
"""

import ssl
from datetime import UTC, datetime
from typing import Any

import pymysql
from pymysql import converters
from pymysql.connections import Connection
from pymysql.constants import FIELD_TYPE

from core.database.address import MySQLAddress
from core.errors import StoreError

CONNECT_SECONDS = 5
STATEMENT_SECONDS = 10
LOCK_WAIT_SECONDS = 5


def connect(address: MySQLAddress) -> Connection:
    """Open a connection.

    Raises:
        pymysql.MySQLError: the server cannot be reached, or refuses us.
        StoreError: any other error, for example an address that cannot be used.
    """
    try:
        return _connection(address)
    except pymysql.MySQLError:
        raise
    except RuntimeError as error:  # PyMySQL misses the cryptography package
        raise StoreError(
            f"The database {where(address)} wants the password encrypted, as "
            "caching_sha2_password does, but offers no TLS to encrypt it; turn on TLS there."
        ) from error
    except UnicodeError as error:  # whose text may hold the password
        raise StoreError(
            f"The database {where(address)} cannot be used: its host name is not valid, or the "
            "user, password or database name contains half of a surrogate pair."
        ) from error
    except Exception as error:
        raise StoreError(f"The database {where(address)} cannot be used: {error}.") from error


def where(address: MySQLAddress) -> str:
    return f"{address.host}:{address.port}/{address.database}"


def _connection(address: MySQLAddress) -> Connection:
    connection = pymysql.connect(
        host=address.host,
        port=address.port,
        user=address.user,
        password=address.password.encode(),  # PyMySQL encodes a text in Latin-1, servers in UTF-8
        database=address.database,
        charset="utf8mb4",
        autocommit=True,
        connect_timeout=CONNECT_SECONDS,
        read_timeout=STATEMENT_SECONDS,
        write_timeout=STATEMENT_SECONDS,
        conv=_CONVERSIONS,
        # A statement sees what is committed, and locks rows, not the gaps between them. With the
        # default level, two passes that claim and adopt at once block each other's gaps.
        init_command="SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
        # Without it PyMySQL uses TLS where the server offers it, and verifies nothing.
        ssl=_verifying(address.ssl_ca) if address.ssl else None,
    )
    with connection.cursor() as cursor:
        cursor.execute(f"SET SESSION innodb_lock_wait_timeout = {LOCK_WAIT_SECONDS}")
    return connection


def _verifying(ca_file: str | None) -> ssl.SSLContext:
    """TLS that accepts only a certificate for that host, from that CA or from the system's CAs.

    It needs a context of its own, because PyMySQL does not check the host's name without a CA file.
    """
    context = ssl.create_default_context(cafile=ca_file)
    # Python requires extensions that are missing in the CA which a MySQL server makes for itself.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


_CONVERSIONS: dict[Any, Any] = {**converters.conversions, FIELD_TYPE.DATETIME: _utc}

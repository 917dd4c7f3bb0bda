"""How a connection to a MySQL or MariaDB server is opened: time-outs, TLS, session settings.

PyMySQL raises a MySQLError for errors of the server or the network. Any other error on the way to a
connection becomes a StoreError here, in one sentence.
"""

import re
import ssl
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pymysql
from pymysql import converters
from pymysql.connections import Connection
from pymysql.constants import FIELD_TYPE

from core.database.address import PEM, RDS, MySQLAddress, Tls
from core.errors import StoreError

CONNECT_SECONDS = 5
# The client waits a little longer than the server works, so that the server ends a statement first.
STATEMENT_SECONDS = 10
SERVER_STATEMENT_SECONDS = 8
# The CAs of Amazon RDS are not public ones, so the system does not have them. A region's CA that is
# missing here can be given in ssl_ca.
RDS_CAS = Path(__file__).with_name("rds-ca.pem")
_RDS_HOST = r"(?i)[\w.-]+\.rds\.amazonaws\.com(\.cn)?"

# For rows, and for tables that an ALTER or a LOCK TABLES holds (the default is a year).
LOCK_WAIT_SECONDS = 3


def connect(address: MySQLAddress, *, time_limit: bool = True) -> Connection:
    """Open a connection; `time_limit=False` is for statements that may take minutes.

    Raises:
        pymysql.MySQLError: the server cannot be reached, or refuses us.
        StoreError: any other error, for example an address that cannot be used.
    """
    try:
        return _connection(address, time_limit=time_limit)
    except pymysql.MySQLError:
        raise
    except RuntimeError as error:  # PyMySQL misses a package that is not part of ours
        raise StoreError(
            f"The database {where(address)} asks for an authentication that is not supported here "
            f"(PyMySQL: {error}). Let the user have caching_sha2_password and use TLS, or let it "
            "have mysql_native_password."
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


def _connection(address: MySQLAddress, *, time_limit: bool) -> Connection:
    connection = pymysql.connect(
        host=address.host,
        port=address.port,
        user=address.user,
        password=address.password.encode(),  # PyMySQL encodes a text in Latin-1, servers in UTF-8
        database=address.database,
        charset="utf8mb4",
        autocommit=None,  # _set_session sets it
        connect_timeout=CONNECT_SECONDS,
        read_timeout=STATEMENT_SECONDS if time_limit else None,
        write_timeout=STATEMENT_SECONDS,
        conv=_CONVERSIONS,
        # Without it PyMySQL uses TLS where the server offers it, and verifies nothing.
        ssl=_context(address),
    )
    try:
        _set_session(connection, time_limit=time_limit)
    except BaseException:
        connection.close()
        raise
    return connection


def _set_session(connection: Connection, *, time_limit: bool) -> None:
    """Set everything that the monitor depends on, whatever the server's defaults are."""
    is_mariadb = "MariaDB" in connection.server_version  # type: ignore[attr-defined]
    seconds = SERVER_STATEMENT_SECONDS if time_limit else 0
    variables = {
        # Values that do not fit are refused, not cut; and no mode changes what '' or CHAR means.
        "sql_mode": "'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'",
        "autocommit": "1",
        "completion_type": "'NO_CHAIN'",
        # A statement sees what is committed, and locks rows, not the gaps between them. With the
        # default level, two passes that claim and adopt at once block each other's gaps.
        "tx_isolation" if is_mariadb else "transaction_isolation": "'READ-COMMITTED'",
        "innodb_lock_wait_timeout": str(LOCK_WAIT_SECONDS),
        "lock_wait_timeout": str(LOCK_WAIT_SECONDS),
        # MySQL's limit is for SELECT only; what else runs too long is ended by a KILL.
        **(
            {"max_statement_time": str(seconds)}
            if is_mariadb
            else {"max_execution_time": str(seconds * 1000)}
        ),
        "sql_select_limit": str(2**64 - 1),
        "sql_safe_updates": "0",
        "sql_big_selects": "1",  # whatever max_join_size is
    }
    settings = ", ".join(f"SESSION {name} = {value}" for name, value in variables.items())
    with connection.cursor() as cursor:
        cursor.execute(f"SET {settings}")


def _context(address: MySQLAddress) -> ssl.SSLContext | None:
    match address.tls:
        case Tls.PREFER:
            return None
        case Tls.REQUIRE:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context
        case Tls.VERIFY:
            return _verifying(address.ssl_ca, is_rds=bool(re.fullmatch(_RDS_HOST, address.host)))


def _verifying(ca: str | None, *, is_rds: bool) -> ssl.SSLContext:
    """TLS that accepts only a certificate for that host, from that CA or from the system's CAs.

    It needs a context of its own, because PyMySQL does not check the host's name without a CA file.
    """
    if ca is None:
        context = ssl.create_default_context()
        if is_rds:
            context.load_verify_locations(RDS_CAS)
    elif ca == RDS:
        context = ssl.create_default_context(cafile=RDS_CAS)
    elif PEM in ca:
        context = ssl.create_default_context(cadata=ca)
    else:
        context = ssl.create_default_context(cafile=ca)
    # Python requires extensions that are missing in the CA which a MySQL server makes for itself.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


@lru_cache(maxsize=1024)  # the sessions of a batch were first seen together
def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


_CONVERSIONS: dict[Any, Any] = {**converters.conversions, FIELD_TYPE.DATETIME: _utc}

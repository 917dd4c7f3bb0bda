"""Signs in to RDS with the function's role: a token in place of a password.

A token is valid for 15 minutes and only needed to open a connection, so each connection gets a new
one and a pass on an open connection signs nothing. boto3's client for RDS would do the same, but
reads the description of all of RDS first.
"""

import functools
from typing import TYPE_CHECKING, Any

from core.database.address import IamDatabase, MySQLAddress, Tls
from core.errors import SettingsError

if TYPE_CHECKING:
    from boto3 import Session

TOKEN_SECONDS = 900  # the longest that RDS accepts

SCHEME = "https://"  # needed for signing, and no part of a token


def sign_in(database: IamDatabase, *, refresh: bool = False) -> MySQLAddress:  # noqa: ARG001
    """The address with a new token as the password. TLS is verified: the token is sent as it is.

    Raises:
        SettingsError: there are no credentials.
    """
    return MySQLAddress(
        host=database.host,
        port=database.port,
        user=database.user,
        password=_token(database),
        database=database.name,
        tls=Tls.VERIFY,
    )


def _token(database: IamDatabase) -> str:
    # Slow imports.
    from botocore.awsrequest import prepare_request_dict  # noqa: PLC0415
    from botocore.exceptions import BotoCoreError, NoCredentialsError  # noqa: PLC0415
    from botocore.model import ServiceId  # noqa: PLC0415
    from botocore.signers import RequestSigner  # noqa: PLC0415

    session = _session()
    request: dict[str, Any] = {
        "url_path": "/",
        "query_string": "",
        "headers": {},
        "body": {"Action": "connect", "DBUser": database.user},
        "method": "GET",
    }
    prepare_request_dict(request, f"{SCHEME}{database.host}:{database.port}")
    credentials = session.get_credentials()
    try:
        if credentials is None:
            raise NoCredentialsError
        signer = RequestSigner(
            ServiceId("rds-db"), database.region, "rds-db", "v4", credentials, session.events
        )
        url: str = signer.generate_presigned_url(
            request, operation_name="connect", expires_in=TOKEN_SECONDS
        )
    except BotoCoreError as error:
        raise SettingsError(
            f"DATABASE_AUTH is 'IAM', but no token can be signed: {f'{error}'.rstrip('.')}; it "
            "needs the credentials of a role that may use rds-db:connect, as a function has them."
        ) from None
    return url.removeprefix(SCHEME)


@functools.cache
def _session() -> "Session":
    import boto3  # noqa: PLC0415 (a slow import)

    return boto3.Session()

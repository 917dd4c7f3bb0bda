"""Tokens of RDS: those that boto3 signs, sent only after the certificate is verified."""

import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import trustme

from core.aws import rds_token
from core.database.address import IamDatabase
from core.database.mysql import MySQLDatabase
from core.errors import SettingsError, StoreError
from core.settings import Settings
from core.worker import open_database

USER_ARN = "arn:aws:rds-db:eu-west-1:123456789012:dbuser:db-ABC/monitor"
DATABASE = IamDatabase(USER_ARN, "shop.abc.eu-west-1.rds.amazonaws.com", 3306, "shop")
KEY = "hidden-secret-key"


@pytest.fixture(autouse=True)
def role(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function's credentials. Lambda's own region is not the database's."""
    rds_token._session.cache_clear()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "session-token")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def unsigned(token: str) -> str:
    """A token without the two parts that depend on the second in which it is signed."""
    parts = token.replace("?", "&").split("&")
    return "&".join(part for part in parts if not part.startswith(("X-Amz-Date=", "X-Amz-Signat")))


def test_the_token_is_the_one_that_boto3_makes() -> None:
    address = rds_token.sign_in(DATABASE)
    client = boto3.Session().client("rds", region_name="eu-west-1")
    expected = client.generate_db_auth_token(DATABASE.host, 3306, "monitor")
    assert unsigned(address.password) == unsigned(expected)
    assert "eu-west-1%2Frds-db%2Faws4_request" in address.password
    assert (address.user, address.database) == ("monitor", "shop")
    assert KEY not in address.password
    assert address.password not in repr(address)


def test_without_credentials_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(SettingsError, match="DATABASE_AUTH is 'IAM', but no token can be signed"):
        rds_token.sign_in(DATABASE)


class Rds(threading.Thread):
    """As much of an RDS server as asks for a token in clear text, inside TLS, and refuses it."""

    CAPABILITIES = 0x00000001 | 0x00000008 | 0x00000200 | 0x00000800 | 0x00008000 | 0x00080000

    def __init__(self, certificate: trustme.LeafCert) -> None:
        super().__init__(daemon=True)
        self.tokens: list[bytes] = []
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self._tls)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]

    def run(self) -> None:
        while True:
            try:
                plain, _ = self._listening.accept()
            except OSError:
                return
            with plain:
                try:
                    self._serve(plain)
                except (OSError, IndexError):  # the client does not trust the certificate
                    continue

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.join()

    def _serve(self, plain: socket.socket) -> None:
        low, high = self.CAPABILITIES & 0xFFFF, self.CAPABILITIES >> 16
        greeting = b"\x0a8.0.39\0" + struct.pack("<I", 1) + b"12345678\0"
        greeting += struct.pack("<HBHHB", low, 45, 2, high, 21) + bytes(10) + b"123456789012\0"
        _send(plain, 0, greeting + b"mysql_native_password\0")
        _receive(plain)  # the request for TLS
        with self._tls.wrap_socket(plain, server_side=True) as secure:
            _receive(secure)
            _send(secure, 3, b"\xfemysql_clear_password\0")
            self.tokens.append(_receive(secure))
            _send(secure, 5, b"\xff" + struct.pack("<H", 1045) + b"#28000Access denied")


def _send(connection: socket.socket, number: int, packet: bytes) -> None:
    connection.sendall(struct.pack("<I", len(packet))[:3] + bytes([number]) + packet)


def _receive(connection: socket.socket) -> bytes:
    header = connection.recv(4)
    size = header[0] | header[1] << 8 | header[2] << 16
    packet = b""
    while len(packet) < size:
        packet += connection.recv(size - len(packet)) or _closed()
    return packet


def _closed() -> bytes:
    raise ConnectionError


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server(ca: trustme.CA) -> Iterator[Rds]:
    server = Rds(ca.issue_cert("localhost"))
    server.start()
    yield server
    server.close()


def refusal(port: int) -> str:
    """The error when a monitor with IAM connects."""
    settings = Settings.from_env(
        {
            "DATABASE_AUTH": "IAM",
            "DATABASE_USER_ARN": USER_ARN,
            "DATABASE_HOST": "localhost",
            "DATABASE_PORT": str(port),
            "DATABASE_NAME": "shop",
            "DATABASE_TLS": "VERIFY",
        }
    )
    database = open_database(settings)
    assert isinstance(database, MySQLDatabase)
    with pytest.raises(StoreError) as refused:
        database.run(lambda connection: connection.query("SELECT 1"))
    return str(refused.value)


def test_a_token_is_sent_to_a_verified_server_and_shown_nowhere(
    server: Rds, ca: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv(ssl.get_default_verify_paths().openssl_cafile_env, str(tmp_path / "ca.pem"))
    message = refusal(server.port)
    token = server.tokens[0].decode()
    assert token.startswith(f"localhost:{server.port}/?Action=connect&DBUser=monitor&X-Amz-")
    assert token.endswith("\0")
    assert "Access denied" in message
    assert "X-Amz" not in message


def test_no_token_is_sent_to_a_server_that_is_not_verified(server: Rds) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(server.port)
    assert server.tokens == []

"""Connections to MySQL and MariaDB: failover, TLS, and errors before the first statement."""

import socket
import ssl
import threading
from collections.abc import Iterator
from copy import replace
from pathlib import Path

import pymysql
import pytest
import trustme

from core.database.address import MySQLAddress, Tls
from core.database.mysql import ATTEMPTS, MySQLDatabase
from core.database.mysql_connection import _context
from core.database.port import Transaction
from core.errors import StoreError
from core.worker import Worker
from local.mariadb import mariadb_server
from testkit.shops import MySQLShop, settings_for
from tests.conftest import PLACES, without_a_server


def address_of(shop: MySQLShop) -> MySQLAddress:
    address = settings_for(shop).database
    assert isinstance(address, MySQLAddress)
    return address


@pytest.fixture
def address(mariadb_shop: MySQLShop) -> MySQLAddress:
    return address_of(mariadb_shop)


@pytest.fixture
def database(address: MySQLAddress) -> Iterator[MySQLDatabase]:
    database = MySQLDatabase(lambda *, refresh: address)
    yield database
    database.close()


def connection_id(database: MySQLDatabase) -> object:
    """The id of the connection in use."""
    return database.run(lambda connection: connection.query("SELECT CONNECTION_ID()"))


def test_a_read_only_server_makes_a_write_reconnect(
    database: MySQLDatabase, mariadb_shop: MySQLShop
) -> None:
    database.run(
        lambda connection: connection.execute("SET SESSION TRANSACTION READ ONLY")
    )  # error 1792
    sql = "INSERT INTO checkout_session (id, status) VALUES ('a', 'open')"
    database.transaction(lambda connection: connection.execute(sql))
    assert mariadb_shop.run("SELECT id FROM checkout_session") == [("a",)]


@pytest.mark.parametrize("code", [1290, 1792, 1836, 1047, 2006, 2013, 1927, 1053, 4031])
def test_after_a_failover_one_fresh_connection_is_tried(database: MySQLDatabase, code: int) -> None:
    ids: list[object] = []

    def work(transaction: Transaction) -> None:
        ids.append(transaction.query("SELECT CONNECTION_ID()"))
        raise pymysql.OperationalError(code, "as after a failover")

    kept = connection_id(database)
    with pytest.raises(StoreError, match="as after a failover"):
        database.transaction(work)
    assert ids[0] == kept
    assert len(ids) == 2
    assert ids[1] != kept
    assert connection_id(database) not in ids  # the second one is not kept either


def test_a_connection_is_not_reused_after_an_error(database: MySQLDatabase) -> None:
    kept = connection_id(database)
    with pytest.raises(StoreError, match=r"\(1064\)"):
        database.run(lambda connection: connection.query("SELECT FROM"))
    assert connection_id(database) != kept


def test_a_deadlock_is_retried_on_the_same_connection(database: MySQLDatabase) -> None:
    ids: list[object] = []

    def work(transaction: Transaction) -> None:
        ids.append(transaction.query("SELECT CONNECTION_ID()"))
        raise pymysql.OperationalError(1213, "Deadlock found")

    with pytest.raises(StoreError, match="Deadlock"):
        database.transaction(work)
    assert len(ids) == ATTEMPTS
    assert ids == [ids[0]] * ATTEMPTS


def test_connections_are_read_committed_with_a_lock_wait_of_3_s(
    database: MySQLDatabase,
) -> None:
    isolation, wait = (
        database.run(lambda connection, n=name: connection.query(f"SELECT @@SESSION.{n}"))  # type: ignore[misc]
        for name in ("tx_isolation", "innodb_lock_wait_timeout")
    )
    assert (isolation, wait) == ((("READ-COMMITTED",),), ((3,),))


def failure(address: MySQLAddress) -> str:
    """The error when the database is prepared: one sentence that does not show the password."""
    database = MySQLDatabase(lambda *, refresh: address)
    with pytest.raises(StoreError) as failed:
        database.prepare()
    message = str(failed.value)
    assert message.endswith(".")
    assert address.password not in message
    return message


@pytest.mark.parametrize(
    "host", ["x" * 64, "a..b", "a\0b", ".", "ä" * 63, "-", "no such host", "nowhere.invalid"]
)
def test_an_impossible_host_gives_a_one_sentence_error(address: MySQLAddress, host: str) -> None:
    failure(replace(address, host=host, password="hidden-pass"))


@pytest.mark.parametrize("port", [0, 65_536, 2**40])
def test_an_impossible_port_gives_a_one_sentence_error(address: MySQLAddress, port: int) -> None:
    failure(replace(address, port=port, password="hidden-pass"))


@pytest.mark.parametrize("text", [None, "no certificate", "-----BEGIN CERTIFICATE-----\nx\n"])
def test_an_unusable_ca_file_gives_a_one_sentence_error(
    address: MySQLAddress, text: str | None, tmp_path: Path
) -> None:
    ca_file = tmp_path / "ca.pem"
    if text is not None:
        ca_file.write_text(text)
    failure(replace(address, tls=Tls.VERIFY, ssl_ca=str(ca_file), password="hidden-pass"))


def test_a_password_that_cannot_be_encoded_is_not_shown(address: MySQLAddress) -> None:
    message = failure(replace(address, password="hidden-\ud83d"))
    assert "half of a surrogate pair" in message
    assert "hidden" not in message


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0", b"\1\0\0\0\x0a", b"\xff" * 500]
)
def test_a_server_that_is_not_mysql_gives_a_one_sentence_error(
    address: MySQLAddress, greeting: bytes
) -> None:
    def answer() -> None:
        connection, _ = listening.accept()
        connection.sendall(greeting)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer)
        thread.start()
        port = listening.getsockname()[1]
        failure(replace(address, port=port, password="hidden-pass"))
        thread.join()


@pytest.mark.parametrize("password", ["größe", "€uro", "😀", "% '\"\\"])
def test_a_password_may_contain_any_character(
    mariadb_shop: MySQLShop, address: MySQLAddress, password: str
) -> None:
    user = f"u{mariadb_shop.database[-12:]}"
    for place in PLACES:
        mariadb_shop.run(
            f"CREATE USER {user}@{place.replace('%', '%%')} IDENTIFIED BY %s", (password,)
        )
        mariadb_shop.run(f"GRANT ALL ON {mariadb_shop.database}.* TO {user}@{place}")
    theirs = replace(address, user=user, password=password)
    database = MySQLDatabase(lambda *, refresh: theirs)
    try:
        connection_id(database)
    finally:
        database.close()
        for place in PLACES:
            mariadb_shop.run(f"DROP USER {user}@{place}")


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def tls_server(
    ca: trustme.CA, mariadb: str | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MySQLAddress]:
    """A MariaDB whose certificate is for localhost, not for 127.0.0.1."""
    if mariadb is None:
        without_a_server()
    directory = tmp_path_factory.mktemp("tls")
    certificate = ca.issue_cert("localhost")
    key, chain = directory / "key.pem", directory / "chain.pem"
    certificate.private_key_pem.write_to_path(key)
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(chain, append=True)
    key.chmod(0o644)
    with mariadb_server(directory, f"--ssl-cert={chain}", f"--ssl-key={key}") as url:
        shop = MySQLShop(url, "mysql")
        yield replace(address_of(shop), host="localhost", database="mysql", tls=Tls.VERIFY)


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return str(path)


def cipher(address: MySQLAddress) -> object:
    database = MySQLDatabase(lambda *, refresh: address)
    [(_, name)] = database.run(lambda connection: connection.query("SHOW STATUS LIKE 'Ssl_cipher'"))
    database.close()
    return name


def test_tls_is_verified_with_a_private_ca(tls_server: MySQLAddress, ca_file: str) -> None:
    assert cipher(replace(tls_server, ssl_ca=ca_file))


def test_tls_is_verified_with_a_ca_in_the_address(tls_server: MySQLAddress, ca_file: str) -> None:
    assert cipher(replace(tls_server, ssl_ca=Path(ca_file).read_text()))
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        cipher(replace(tls_server, ssl_ca="rds"))


def test_tls_can_be_required_without_verifying(
    tls_server: MySQLAddress, address: MySQLAddress
) -> None:
    assert cipher(replace(tls_server, host="127.0.0.1", tls=Tls.REQUIRE))
    with pytest.raises(StoreError, match="SSL is required but the server doesn't support it"):
        cipher(replace(address, tls=Tls.REQUIRE))


@pytest.mark.parametrize(
    ("host", "trusted"),
    [
        ("shop.abc.eu-central-1.rds.amazonaws.com", True),
        ("SHOP.CLUSTER-abc.us-east-1.RDS.amazonaws.com", True),
        ("db.internal", False),
        ("shop.rds.amazonaws.com.evil.example", False),
        ("rds.amazonaws.com", False),
    ],
)
def test_the_cas_of_rds_are_trusted_for_its_hosts_only(host: str, trusted: bool) -> None:
    context = _context(MySQLAddress(host, 3306, "u", "p", "d", None, Tls.VERIFY))
    assert context is not None
    names = {str(ca["subject"]) for ca in context.get_ca_certs()}
    assert any("Amazon RDS eu-central-1 Root CA" in name for name in names) == trusted
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_the_cas_of_rds_are_valid_for_decades() -> None:
    context = _context(MySQLAddress("h", 3306, "u", "p", "d", "rds", Tls.VERIFY))
    assert context is not None
    cas = context.get_ca_certs()
    assert len(cas) == 81
    assert all("Amazon RDS" in str(ca["subject"]) for ca in cas)
    assert min(ssl.cert_time_to_seconds(str(ca["notAfter"])) for ca in cas) > 2_800_000_000


def test_tls_is_verified_with_the_systems_cas(
    tls_server: MySQLAddress, ca_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        cipher(tls_server)
    monkeypatch.setenv(ssl.get_default_verify_paths().openssl_cafile_env, ca_file)
    assert cipher(tls_server)


@pytest.mark.parametrize("by", ["a private CA", "the system's CAs"])
def test_a_certificate_for_another_host_is_refused(
    tls_server: MySQLAddress, ca_file: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = by == "a private CA"
    if not private:
        monkeypatch.setenv(ssl.get_default_verify_paths().openssl_cafile_env, ca_file)
    other_host = replace(tls_server, host="127.0.0.1", ssl_ca=ca_file if private else None)
    with pytest.raises(StoreError, match="IP address mismatch"):
        cipher(other_host)


def test_a_certificate_of_another_ca_is_refused(tls_server: MySQLAddress, tmp_path: Path) -> None:
    another = tmp_path / "another.pem"
    trustme.CA().cert_pem.write_to_path(another)
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        cipher(replace(tls_server, ssl_ca=str(another)))


def test_a_server_without_tls_is_refused_if_tls_is_required(address: MySQLAddress) -> None:
    with pytest.raises(StoreError, match="SSL is required but the server doesn't support it"):
        cipher(replace(address, tls=Tls.VERIFY))


def test_health_reports_an_unusable_database_without_raising(
    mariadb_shop: MySQLShop, tmp_path: Path
) -> None:
    settings = settings_for(mariadb_shop)
    assert isinstance(settings.database, MySQLAddress)
    gone = replace(settings.database, tls=Tls.VERIFY, ssl_ca=str(tmp_path / "deleted.pem"))
    worker = Worker(replace(settings, database=gone))
    health = worker.health()
    worker.close()
    assert health.checks == {
        "database": False,
        "last_pass": False,
        "starts_on_time": True,
        "answers": True,
        "api_key": True,
        "other_monitors": True,
    }


def test_caching_sha2_without_tls_names_the_remedy(
    address: MySQLAddress,
) -> None:
    """The package does not contain cryptography: 17 MB that only servers without TLS need."""
    refused = RuntimeError("'cryptography' package is required")

    def connect(**_: object) -> None:
        raise refused

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pymysql, "connect", connect)
        message = failure(replace(address, password="hidden-pass"))
    assert "caching_sha2_password and use TLS" in message

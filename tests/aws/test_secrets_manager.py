"""Secrets in Secrets Manager: both forms, their errors, and rotation without a failed check."""

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import boto3
import pytest
from moto import mock_aws

from core.aws import secrets_manager
from core.database.address import DatabaseSecret, MySQLAddress, Tls
from core.domain.model import Outcome
from core.errors import SettingsError
from core.settings import Settings
from core.worker import Worker
from local.billing import running_billing
from testkit.shops import Shop, add_sessions

SRC = Path(__file__).parents[2] / "src"


class Manager:
    """Secrets Manager as an operator uses it."""

    def __init__(self) -> None:
        self._client = boto3.client("secretsmanager")

    def put(self, text: str) -> str:
        """Create a secret; returns its ARN."""
        arn: str = self._client.create_secret(Name=uuid.uuid4().hex, SecretString=text)["ARN"]
        return arn

    def rotate(self, arn: str, text: str) -> None:
        self._client.put_secret_value(SecretId=arn, SecretString=text)

    def delete(self, arn: str) -> None:
        self._client.delete_secret(SecretId=arn, ForceDeleteWithoutRecovery=True)


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    """One for the module: a boto3 client takes a tenth of a second to make."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        secrets_manager._manager.cache_clear()
        yield Manager()
    secrets_manager._manager.cache_clear()


def read_database(arn: str) -> MySQLAddress:
    return secrets_manager.read_database(DatabaseSecret(arn))


RDS = {"username": "u", "password": "p@ss", "host": "db", "port": 3307, "dbname": "shop"}


def read_key(arn: str, *, refresh: bool = False) -> str:
    return secrets_manager.read_credentials(arn, {"APIKEY": True}, refresh=refresh)["APIKEY"]


@pytest.mark.parametrize("text", ["the-key", '{"APIKEY": "the-key"}', " the-key\n"])
def test_the_api_key_is_the_secrets_text_or_its_apikey_field(manager: Manager, text: str) -> None:
    assert read_key(manager.put(text)) == "the-key"


def test_one_secret_may_hold_the_api_key_and_the_database_address(manager: Manager) -> None:
    arn = manager.put(json.dumps(RDS | {"APIKEY": "the-key"}))
    assert read_key(arn) == "the-key"
    assert read_database(arn).host == "db"


@pytest.mark.parametrize("text", ['{"OTHER": "hidden-key"}', '{"APIKEY": 5}', "{}", "hidden key"])
def test_a_secret_without_a_usable_key_is_refused_without_showing_it(
    manager: Manager, text: str
) -> None:
    with pytest.raises(SettingsError, match="APIKEY_SECRET_ARN") as refused:
        read_key(manager.put(text))
    assert "hidden" not in str(refused.value)


def test_a_secret_may_hold_the_key_in_quotes(manager: Manager) -> None:
    """So Terraform's jsonencode writes it."""
    assert read_key(manager.put('"the-key"')) == "the-key"


def test_a_credential_that_is_sent_in_base64_only_may_be_any_text(manager: Manager) -> None:
    arn = manager.put('{"APIKEY": "user:päss word"}')
    read = secrets_manager.read_credentials(arn, {"APIKEY": False})
    assert read == {"APIKEY": "user:päss word"}


def test_a_secret_may_hold_further_credentials(manager: Manager) -> None:
    arn = manager.put('{"APIKEY": "key", "KB_KEY": " bob ", "OTHER": "x"}')
    assert secrets_manager.read_credentials(arn, {"APIKEY": True, "KB_KEY": True}) == {
        "APIKEY": "key",
        "KB_KEY": "bob",
    }
    with pytest.raises(SettingsError) as refused:
        secrets_manager.read_credentials(arn, {"KB_KEY": True, "KB_SECRET": True})
    assert str(refused.value) == (
        f"APIKEY_SECRET_ARN names the secret {arn}, which lacks KB_SECRET; it must be a JSON "
        "object with KB_KEY, KB_SECRET."
    )


def test_a_missing_secret_is_named_in_the_error(manager: Manager) -> None:
    with pytest.raises(SettingsError, match=r"APIKEY_SECRET_ARN names the secret nowhere, which"):
        read_key("nowhere")


def test_the_database_address_is_read_from_a_secret_in_rds_form(manager: Manager) -> None:
    found = read_database(manager.put(json.dumps(RDS)))
    assert found == MySQLAddress("db", 3307, "u", "p@ss", "shop")


@pytest.mark.parametrize("missing", ["username", "password", "host", "dbname"])
def test_an_incomplete_database_secret_is_refused_with_what_is_missing(
    manager: Manager, missing: str
) -> None:
    text = json.dumps({key: value for key, value in RDS.items() if key != missing})
    with pytest.raises(SettingsError, match=f"which lacks {missing}; it must be") as refused:
        read_database(manager.put(text))
    assert "p@ss" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "tls"),
    [
        ({"ssl": True}, Tls.VERIFY),
        ({"ssl": "true"}, Tls.VERIFY),
        ({"ssl": False}, Tls.PREFER),
        ({}, Tls.PREFER),
    ],
)
def test_a_database_secret_can_ask_for_the_systems_certificates(
    manager: Manager, more: dict[str, object], tls: Tls
) -> None:
    found = read_database(manager.put(json.dumps(RDS | more)))
    assert (found.tls, found.ssl_ca) == (tls, None)


def test_a_database_secret_can_name_a_private_ca(manager: Manager, tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text("a certificate")
    found = read_database(manager.put(json.dumps(RDS | {"ssl_ca": str(ca_file)})))
    assert (found.tls, found.ssl_ca) == (Tls.VERIFY, str(ca_file))


def test_a_secret_that_rds_manages_is_completed_by_settings(manager: Manager) -> None:
    arn = manager.put('{"username": "u", "password": "p@ss"}')
    with pytest.raises(SettingsError, match="which lacks host, dbname; it must be"):
        read_database(arn)
    secret = DatabaseSecret(arn, Tls.VERIFY, "db", 3307, "shop")
    found = secrets_manager.read_database(secret)
    assert found == MySQLAddress("db", 3307, "u", "p@ss", "shop", None, Tls.VERIFY)
    full = secret._replace(arn=manager.put(json.dumps(RDS | {"port": 3308, "host": "own"})))
    found = secrets_manager.read_database(full)
    assert (found.host, found.port) == ("own", 3308)  # the secret's own values come first
    empty = secret._replace(arn=manager.put(json.dumps(RDS | {"port": "", "host": ""})))
    found = secrets_manager.read_database(empty)
    assert (found.host, found.port) == ("db", 3307)


@pytest.mark.parametrize("ca", ["rds", "-----BEGIN CERTIFICATE-----\nx"])
def test_a_database_secret_can_contain_a_ca(manager: Manager, ca: str) -> None:
    found = read_database(manager.put(json.dumps(RDS | {"ssl_ca": ca})))
    assert (found.tls, found.ssl_ca) == (Tls.VERIFY, ca)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (
            {"ssl_ca": "/nowhere/ca.pem"},
            "has an ssl_ca that is neither a certificate nor a file here; it must be",
        ),
        ({"ssl_ca": ["a"]}, "has an ssl_ca that"),
        ({"ssl_ca": "p@ss" * 5000}, "has an ssl_ca that"),
        ({"ssl_ca": "-----BEGIN PRIVATE KEY-----\np@ss"}, "has an ssl_ca that"),
        ({"ssl": "p@ss"}, "has an ssl that is neither true nor false"),
        ({"ssl": False, "ssl_ca": "rds"}, "has an ssl_ca, but false for ssl"),
        ({"port": 0}, "has a port that is not a number from 1 to 65535"),
        ({"port": 65_536}, "has a port that"),
        ({"port": "²"}, "has a port that"),
        ({"port": "p@ss"}, "has a port that"),
    ],
)
def test_an_unusable_database_secret_is_refused_with_the_reason(
    manager: Manager, more: dict[str, object], what: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        read_database(manager.put(json.dumps(RDS | more)))
    assert f"which {what}" in str(refused.value)
    assert "p@ss" not in str(refused.value)


def test_secrets_are_read_once_and_again_on_refresh(manager: Manager) -> None:
    arn = manager.put("old")
    assert read_key(arn) == "old"
    manager.rotate(arn, "new")
    assert read_key(arn) == "old"
    assert read_key(arn, refresh=True) == "new"
    assert read_key(arn) == "new"


def worker(shop: Shop, billing_url: str, arn: str) -> Worker:
    return Worker(
        Settings.from_env(
            {
                "DATABASE_URL": shop.url,
                "BILLING_API_URL": billing_url,
                "APIKEY_SECRET_ARN": arn,
            }
        )
    )


def test_a_rotated_api_key_is_picked_up_within_the_pass(
    manager: Manager, sqlite_shop: Shop
) -> None:
    """No check of that pass fails."""
    add_sessions(sqlite_shop, {f"s{n}": f"checkout_active_{n}" for n in range(20)})
    arn = manager.put("old")
    with running_billing(api_key="new") as billing:
        monitor = worker(sqlite_shop, billing.url, arn)
        manager.rotate(arn, "new")
        summary = monitor.check_open_checkout_sessions()
        monitor.close()
    assert summary.outcomes == {Outcome.ACTIVE: 20}


def test_a_revoked_api_key_is_read_again_once_per_pass(
    manager: Manager, sqlite_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_sessions(sqlite_shop, {f"s{n}": f"checkout_active_{n}" for n in range(20)})
    arn = manager.put("revoked")
    with running_billing(api_key="another") as billing:
        monitor = worker(sqlite_shop, billing.url, arn)
        reads = 0

        def counting(arn: str, names: Mapping[str, bool], *, refresh: bool) -> Mapping[str, str]:
            nonlocal reads
            reads += 1
            return read_credentials(arn, names, refresh=refresh)

        read_credentials = secrets_manager.read_credentials
        monkeypatch.setattr(secrets_manager, "read_credentials", counting)
        summary = monitor.check_open_checkout_sessions()
        monitor.close()
    assert summary.outcomes == {Outcome.UNAUTHORIZED: 20}
    assert reads == 1


def test_a_deleted_secret_leaves_the_old_key_in_use(
    manager: Manager, sqlite_shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged; the pass goes on."""
    add_sessions(sqlite_shop, {"s": "checkout_active_1"})
    arn = manager.put("old")
    with running_billing(api_key="new") as billing:
        monitor = worker(sqlite_shop, billing.url, arn)
        manager.delete(arn)
        summary = monitor.check_open_checkout_sessions()
        monitor.close()
    assert summary.outcomes == {Outcome.UNAUTHORIZED: 1}
    assert any(m.startswith("❌ APIKEY_SECRET_ARN names the secret") for m in caplog.messages)


@pytest.mark.slow
def test_importing_the_check_handler_does_not_import_boto3() -> None:
    program = "import sys, handlers.check; sys.exit('boto3' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=SRC, check=False)
    assert ran.returncode == 0

"""A secret of any content is a key, an address, or one sentence that says why not."""

import pytest

from core.aws import secrets_manager
from core.database.address import DatabaseSecret
from core.errors import SettingsError


class Manager:
    def __init__(self, value: str | bytes) -> None:
        self._value = value

    def get(self, _arn: str, **_: object) -> str | bytes:
        return self._value


@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize(
    "value", [b"\xff\xfe", '{"APIKEY": "\\ud800"}', "", "[]", '["a"]', '""', '" "']
)
def test_a_secret_without_a_key_is_one_sentence(
    value: str | bytes, is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets_manager, "_manager", lambda: Manager(value))
    with pytest.raises(SettingsError, match="APIKEY_SECRET_ARN") as refused:
        secrets_manager.read_credentials("the-arn", {"APIKEY": is_plain})
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("value", [b"\xff\xfe", "[" * 100_000, "", "null"])
def test_a_secret_without_an_address_is_one_sentence(
    value: str | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets_manager, "_manager", lambda: Manager(value))
    with pytest.raises(SettingsError, match="DATABASE_SECRET_ARN names the secret the-arn"):
        secrets_manager.read_database(DatabaseSecret("the-arn"))

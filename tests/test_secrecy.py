"""No output and no answer contains the API key or the database password."""

import base64
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from local.billing import running_billing
from testkit.shops import MySQLShop, add_sessions, numbered

ROOT = Path(__file__).parents[1]

KEY = "key-that-nobody-may-see"
PASSWORD = "pass%w@rd/that#nobody&may?see"

# Calls everything that the functions offer, and prints every answer and error.
PROGRAM = """
import json, traceback
from types import SimpleNamespace
from handlers import api, check

context = SimpleNamespace(get_remaining_time_in_millis=lambda: 60_000)
for event in ("tick", "helper", "no-tick"):
    try:
        print(check.handler(json.load(open(f"events/{event}.json")), context))
    except Exception:
        traceback.print_exc()
for event in ("health", "status", "trigger", "trigger-with-ids", "trigger-bad-body"):
    print(api.handler(json.load(open(f"events/{event}.json")), context))
if check.worker.cache_info().currsize:
    print(vars(check.worker()), check.worker()._settings)
"""


def output_of_all_calls(env: Mapping[str, str]) -> str:
    ran = subprocess.run(
        [sys.executable, "-X", "dev", "-c", PROGRAM],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": "src",
            "APIKEY": KEY,
            "DEBUG": "true",
            **env,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.stdout + ran.stderr


@pytest.fixture
def database_url(mariadb_shop: MySQLShop) -> str:
    """The URL of a user whose password has every character that a URL must encode."""
    user = f"u{mariadb_shop.database[-12:]}"
    for place in ("'%%'", "localhost"):
        mariadb_shop.run(f"CREATE OR REPLACE USER {user}@{place} IDENTIFIED BY %s", (PASSWORD,))
        mariadb_shop.run(
            f"GRANT ALL ON {mariadb_shop.database}.* TO {user}@{place.replace('%%', '%')}"
        )
    add_sessions(mariadb_shop, numbered(2) | numbered(2, "reset"))
    host = urlsplit(mariadb_shop.server)
    return (
        f"mysql://{user}:{quote(PASSWORD, safe='')}@{host.hostname}:{host.port}"
        f"/{mariadb_shop.database}"
    )


CASES: dict[str, dict[str, str | tuple[str, str]]] = {
    "nothing is wrong": {},
    "billing is unreachable": {"BILLING_API_URL": "http://127.0.0.1:1/x"},
    "billing speaks no TLS": {"BILLING_API_URL": "https://127.0.0.1:1/x"},
    "the password is wrong": {"DATABASE_URL": ("/monitor_test", "x/monitor_test")},
    "the password is refused": {"DATABASE_URL": (":pass", ":wrong-pass")},
    "the database is unreachable": {"DATABASE_URL": ("@127.0.0.1:", "@127.0.0.1:1")},
    "the host does not exist": {"DATABASE_URL": ("@127.0.0.1", "@nowhere.invalid")},
    "the database URL is wrong": {"DATABASE_URL": ("mysql:", "mysql2:")},
    "the port is wrong": {"DATABASE_URL": ("@127.0.0.1:", "@127.0.0.1:99999")},
    "an option is wrong": {"DATABASE_URL": ("/monitor_test", "/monitor_test?x=")},
    "the key cannot be sent": {"APIKEY": f"{KEY}\u00e9"},
    "the headers have a key and a text": {
        "BILLING_HEADERS": f'{{"Authorization": "Basic {{APIKEY:base64}}", "X-Key": "{KEY}"}}'
    },
    "billing's URL has a password": {"BILLING_API_URL": f"http://u:{KEY}@localhost/x"},
}


@pytest.mark.parametrize("case", CASES)
def test_no_secret_is_printed(database_url: str, case: str) -> None:
    with running_billing() as billing:
        env = {"APIKEY": KEY, "DATABASE_URL": database_url, "BILLING_API_URL": billing.url}
        for name, change in CASES[case].items():
            if isinstance(change, tuple):
                assert change[0] in env[name]
                env[name] = env[name].replace(*change)
            else:
                env[name] = change
        printed = output_of_all_calls(env)
    assert "'statusCode': 400" in printed
    encoded = base64.b64encode(KEY.encode()).decode()
    for secret in (KEY, encoded, PASSWORD, quote(PASSWORD, safe=""), quote(PASSWORD), PASSWORD[5:]):
        assert secret not in printed

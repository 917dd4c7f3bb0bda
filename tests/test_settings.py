"""Every setting: its default, the values it accepts, and the error for any other."""

import re
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.database.address import DatabaseSecret, IamDatabase, MySQLAddress, Tls
from core.domain.cadence import Cadence
from core.errors import SettingsError
from core.settings import Settings

DATABASE = {"DATABASE_URL": "sqlite:///shop.db"}
FORMS = (
    "it must be mysql://user:password@host:3306/database (optional: ?ssl_ca=/path/to/ca.pem or "
    "?ssl=true) or sqlite:///path/to/file."
)
URL = (
    "it must be an http:// or https:// URL without user, query and fragment, or one with "
    "{billing_checkout_id} once, in its path or query."
)
OPTIONAL = (
    "CHECK_INTERVAL_SECONDS",
    "CHECK_CADENCE",
    "CHECK_BACKOFF_MAX_SECONDS",
    "REQUEST_TIMEOUT_SECONDS",
    "MAX_CONCURRENCY",
    "BILLING_MAX_PER_SECOND",
    "BILLING_API_URL",
    "BILLING_HEADERS",
    "BILLING_TOKEN_URL",
    "BILLING_CLIENT_ID",
    "BILLING_CLIENT_SECRET",
    "BILLING_OK",
    "BILLING_NOT_FOUND",
    "BILLING_ID_PATH",
    "BILLING_AMOUNT_PATH",
    "BILLING_CURRENCY_PATH",
    "APIKEY",
    "APIKEY_SECRET_ARN",
    "DATABASE_SECRET_ARN",
    "DATABASE_HOST",
    "DATABASE_PORT",
    "DATABASE_NAME",
    "DATABASE_TLS",
    "DATABASE_AUTH",
    "DATABASE_USER_ARN",
    "ALLOW_HTTP",
    "STATUS_UPDATES",
    "BILLING_STATUS_PATH",
    "BILLING_STATUS_MAP",
    "SESSION_EXPIRES_AFTER",
    "LATE_PAYMENTS_FOR",
    "LATE_STATUS_UPDATES",
    "EVENT_BUS_NAME",
    "LOG_LINES_ACTIVE",
    "DEBUG",
)


def read(**env: str) -> Settings:
    return Settings.from_env(DATABASE | env)


def refusal(**env: str) -> str:
    """The error for an invalid variable, which is one sentence."""
    with pytest.raises(SettingsError) as refused:
        read(**env)
    sentence = str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None or refused.value.__suppress_context__
    assert sentence.startswith(tuple(env))
    assert sentence.endswith(".")
    assert not re.search(r"[\n\r]|[.!?] [A-Z]", sentence)
    return sentence


def test_only_a_database_has_to_be_set() -> None:
    found = read()
    assert found.database == Path("shop.db")
    assert (found.credentials, found.api_key_secret_arn) == (None, None)
    assert found.billing_api_url == "http://localhost:4000/billing/api/v1/paysession"
    assert found.cadence == Cadence.parse("5s")
    assert (found.interval_seconds, found.backoff_max_seconds) == (5, 60)
    assert (found.request_timeout_seconds, found.max_concurrency) == (10, 100)
    assert (found.status_reader, found.expires_after_seconds, found.event_bus_name) == (None,) * 3
    assert (found.log_lines_active, found.debug) == (5, False)
    assert found.billing_max_per_second is None


@pytest.mark.parametrize("empty", ["", " ", "\t\n"])
def test_an_empty_variable_counts_as_not_set(empty: str) -> None:
    assert read(**dict.fromkeys(OPTIONAL, empty)) == read()


@pytest.mark.parametrize("env", [{}, {"DATABASE_URL": " ", "DATABASE_SECRET_ARN": ""}])
def test_without_a_database_the_error_says_what_to_set(env: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.from_env(env)
    assert str(refused.value) == (
        f"DATABASE_URL is not set; {FORMS.rstrip('.')}, or DATABASE_SECRET_ARN must name a secret."
    )


@pytest.mark.parametrize(
    ("name", "text", "attribute", "value"),
    [
        ("CHECK_INTERVAL_SECONDS", "1", "interval_seconds", 1),
        ("CHECK_INTERVAL_SECONDS", " 60 ", "interval_seconds", 60),
        ("CHECK_BACKOFF_MAX_SECONDS", "0", "backoff_max_seconds", 0),
        ("CHECK_BACKOFF_MAX_SECONDS", "86400", "backoff_max_seconds", 86_400),
        ("REQUEST_TIMEOUT_SECONDS", "0.1", "request_timeout_seconds", 0.1),
        ("REQUEST_TIMEOUT_SECONDS", "30", "request_timeout_seconds", 30),
        ("MAX_CONCURRENCY", "1", "max_concurrency", 1),
        ("MAX_CONCURRENCY", "1000", "max_concurrency", 1000),
        ("BILLING_MAX_PER_SECOND", "1", "billing_max_per_second", 1),
        ("BILLING_MAX_PER_SECOND", "100000", "billing_max_per_second", 100_000),
        ("CHECK_CADENCE", "5s until 1h, 1m", "cadence", Cadence.parse("5s until 1h, 1m")),
        ("CHECK_CADENCE", "5s-until-1h,1m", "cadence", Cadence.parse("5s until 1h, 1m")),
        ("LOG_LINES_ACTIVE", "0", "log_lines_active", 0),
        ("LOG_LINES_ACTIVE", "10000", "log_lines_active", 10_000),
        ("DEBUG", "true", "debug", True),
        ("DEBUG", "True", "debug", True),
        ("DEBUG", "FALSE", "debug", False),
        ("APIKEY", " !key~ ", "credentials", {"APIKEY": "!key~"}),
        ("APIKEY_SECRET_ARN", "arn:a", "api_key_secret_arn", "arn:a"),
        ("BILLING_API_URL", "https://billing/a/", "billing_api_url", "https://billing/a"),
        ("BILLING_API_URL", "http://[::1]:4000", "billing_api_url", "http://[::1]:4000"),
    ],
)
def test_a_variable_is_accepted_up_to_its_limits(
    name: str, text: str, attribute: str, value: object
) -> None:
    assert getattr(read(**{name: text}), attribute) == value


def test_with_debug_all_lines_of_active_sessions_are_logged() -> None:
    assert read(DEBUG="true", LOG_LINES_ACTIVE="5").log_lines_active is None


INVALID = {
    ("CHECK_INTERVAL_SECONDS", "it must be a whole number from 1 to 60."): (
        "0", "61", "-5", "5.0", "five", "5s", "nan", "5\n6", "9" * 30,
    ),
    ("CHECK_BACKOFF_MAX_SECONDS", "it must be a whole number from 0 to 86400."): (
        "-1", "86401", "1.5", "1m", "none", "inf",
    ),
    ("REQUEST_TIMEOUT_SECONDS", "it must be a number from 0.1 to 30."): (
        "0", "0.09", "30.1", "-1", "10s", "nan", "inf", "1,5",
    ),
    ("MAX_CONCURRENCY", "it must be a whole number from 1 to 1000."): (
        "0", "1001", "2.5", "many", "1e2",
    ),
    ("BILLING_MAX_PER_SECOND", "it must be a whole number from 1 to 100000."): (
        "0", "-1", "2.5", "100001", "off",
    ),
    ("LOG_LINES_ACTIVE", "it must be a whole number from 0 to 10000."): ("-1", "10001", "all"),
    ("CHECK_CADENCE", "it must be a number with s, m, h or d, e.g. '5s', or steps that grow"): (
        "5", "often", "0s", "5s,", "5s until 10m", "30s until 1h, 5s",
        "5s until 1h, 30s until 10m, 5m",
    ),
    ("DEBUG", "it must be true or false."): ("yes", "1", "on", "truee"),
    ("ALLOW_HTTP", "it must be true or false."): ("yes",),
    ("DATABASE_TLS", "it must be PREFER, REQUIRE or VERIFY."): ("verify", "true", "TLS"),
    ("DATABASE_AUTH", "it must be SECRET or IAM."): ("iam", "PASSWORD"),
    ("DATABASE_PORT", "it must be a whole number from 1 to 65535."): ("0", "65536", "mysql"),
    ("STATUS_UPDATES", "it must be true or false."): ("maybe", "1"),
    ("SESSION_EXPIRES_AFTER", "set STATUS_UPDATES=true, or leave it out."): ("24h",),
    ("EVENT_BUS_NAME", "set STATUS_UPDATES=true, or leave it out."): ("shop",),
    ("LATE_STATUS_UPDATES", "it must be true or false."): ("1",),
    ("LATE_STATUS_UPDATES", "set STATUS_UPDATES=true and LATE_PAYMENTS_FOR, or"): ("true",),
    ("BILLING_API_URL", URL): (
        "billing", "localhost:4000/x", "//billing/x", "ftp://billing/x", "http:billing", "http://",
        "http:///x", "http://:80/x", "http://billing/x?y=z", "http://billing/x?",
        "http://billing/x#y", "http://bill ing/x", "http://bücher/x", "http://billing/\nx",
        "http://billing:port/x", "http://billing:65536/x", "http://[::1/x",
        "http://billing/{id}", "http://billing/{billing_checkout_id}/{billing_checkout_id}",
        "http://{billing_checkout_id}/x", "http://a{billing_checkout_id}.b/x",
        "http://billing:{billing_checkout_id}/x", "http://billing/{billing_checkout_id}#x",
        "http://billing/{billing_checkout_id}/{x}", "{billing_checkout_id}",
        "http://billing:0/x", "http://256.1.1.1/x", "http://%zz/x", "http://bil|ling/x", "http://xn--/x",
    ),
    ("BILLING_TOKEN_URL", "it must be an http:// or https:// URL without user and fragment."): (
        "auth", "ftp://auth/x", "https://auth/x#y",
    ),
    ("BILLING_OK", "it must be status codes from 200 to 599, separated by commas, other than"): (
        "OK", "99", "600", "200,", "200 201", "401", "200,503",
    ),
    ("BILLING_NOT_FOUND", "other than 401, 403, 429, 503."): ("403", "404;410", "2e2"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [(name, text, allowed) for (name, allowed), texts in INVALID.items() for text in texts],
)
def test_an_invalid_variable_is_refused_with_what_is_allowed(
    name: str, text: str, allowed: str
) -> None:
    sentence = refusal(**{name: text})
    assert sentence.startswith(f"{name} is {text!r}")
    assert allowed in sentence


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("BILLING_STATUS_PATH", "a b", "it must be a JMESPath expression, e.g. status or"),
        ("BILLING_STATUS_PATH", "[", "it must be a JMESPath expression"),
        ("BILLING_STATUS_MAP", "paid", "it must be a JSON object from billing's words"),
        ("BILLING_STATUS_MAP", "{}", '"success", "unpaid": "open"}.'),
        (
            "BILLING_STATUS_MAP",
            '{"paid": "verified"}',
            "which is not a status; it must be",
        ),
        ("SESSION_EXPIRES_AFTER", "soon", "it must be a number with s, m, h or d, e.g. 24h."),
        ("SESSION_EXPIRES_AFTER", "0h", "it must be a number with s, m, h or d, e.g. 24h."),
        ("BILLING_ID_PATH", "[", "it must be a JMESPath expression, e.g. id or data.id."),
        ("BILLING_AMOUNT_PATH", "[", "it must be a JMESPath expression"),
        ("BILLING_CURRENCY_PATH", "[", "it must be a JMESPath expression"),
        (
            "BILLING_STATUS_PATH",
            "a || lower(status)",
            ", in which lower is not a function of JMESPath; it must be a JMESPath expression",
        ),
        (
            "BILLING_ID_PATH",
            "items[].length(@, id)",
            "in which the function length has 2 arguments",
        ),
        ("BILLING_ID_PATH", "not_null()", "in which the function not_null has 0 arguments"),
        ("BILLING_ID_PATH", f"a[{'9' * 5000}]", "it must be a JMESPath expression, e.g. id or"),
        (
            "LATE_PAYMENTS_FOR",
            "a week",
            "it must be a number with s, m, h or d, e.g. 7d, up to 3650d, or 0.",
        ),
        ("LATE_PAYMENTS_FOR", "999999d", "e.g. 7d, up to 3650d, or 0."),
        ("EVENT_BUS_NAME", "my bus", "it must be the name or the ARN of an EventBridge bus."),
    ],
)
def test_the_variables_of_status_updates_are_refused_the_same_way(
    name: str, text: str, allowed: str
) -> None:
    sentence = refusal(**{name: text, "STATUS_UPDATES": "true"})
    assert sentence.startswith(f"{name} is {text!r}")
    assert allowed in sentence
    if name not in ("SESSION_EXPIRES_AFTER", "EVENT_BUS_NAME"):  # these need it
        assert refusal(**{name: text}) == sentence


def test_functions_of_jmespath_may_be_used() -> None:
    path = "not_null(a, b, join('/', items[?contains(id, 'x')].status), sort_by(c[-1:], &d)[0])"
    reader = read(STATUS_UPDATES="true", BILLING_STATUS_PATH=path).status_reader
    assert reader is not None
    assert reader.path == path


@pytest.mark.parametrize(
    ("env", "why"),
    [
        (
            {"BILLING_HEADERS": '{"A": "{hidden"}'},
            (
                "BILLING_HEADERS (not shown here) has a brace in the value for A that is not of a "
                "placeholder; it must be a JSON object from header names to values, e.g. "
                '{"Authorization": "Bearer {APIKEY}"}, in which {NAME} and {NAME:base64} stand for '
                "credentials."
            ),
        ),
        (
            {"BILLING_HEADERS": '{"A": "{APIKEY}{B}{C}"}', "APIKEY": "hidden", "C": "c"},
            (
                "BILLING_HEADERS needs B, not set here; set variables of these names, or "
                "APIKEY_SECRET_ARN to a secret with them."
            ),
        ),
        (
            {"BILLING_HEADERS": '{"A": "{B}"}', "B": "hidden\tkey"},
            (
                "B contains a space, a control character or a character outside ASCII (not shown "
                "here); it must be visible ASCII characters only, as HTTP headers require."
            ),
        ),
        (
            {"BILLING_HEADERS": '{"A": "{TOKEN}"}'},
            (
                "BILLING_HEADERS has {TOKEN}, but BILLING_TOKEN_URL is not set; set it, or use "
                "another placeholder."
            ),
        ),
        (
            {"BILLING_TOKEN_URL": "https://auth/x", "BILLING_HEADERS": '{"A": "{APIKEY}"}'},
            (
                "BILLING_TOKEN_URL is set, but BILLING_HEADERS does not have {TOKEN}; put it into "
                "a value, or leave BILLING_HEADERS out."
            ),
        ),
        (
            {"BILLING_TOKEN_URL": "https://auth/x", "APIKEY": "hidden"},
            (
                "BILLING_TOKEN_URL needs BILLING_CLIENT_ID and BILLING_CLIENT_SECRET, not set "
                "here; set variables of these names, or APIKEY_SECRET_ARN to a secret with them."
            ),
        ),
        (
            {"BILLING_TOKEN_URL": "https://u:hidden@auth/x"},
            (
                "BILLING_TOKEN_URL contains a user or a password (not shown here); it must be an "
                "http:// or https:// URL without user and fragment."
            ),
        ),
        (
            {"BILLING_TOKEN_URL": "http://auth.internal/x"},
            (
                "BILLING_TOKEN_URL is 'http://auth.internal/x', which would send "
                "BILLING_CLIENT_SECRET unencrypted; it must be an https:// URL, or ALLOW_HTTP must "
                "be true."
            ),
        ),
        (
            {"BILLING_OK": "200,404", "BILLING_NOT_FOUND": "404"},
            "BILLING_NOT_FOUND and BILLING_OK both have 404; leave it out of one of them.",
        ),
    ],
)
def test_unusable_credentials_are_refused_without_showing_one(
    env: dict[str, str], why: str
) -> None:
    assert refusal(**env) == why
    assert "hidden" not in why


@pytest.mark.parametrize(
    "env",
    [
        {"BILLING_HEADERS": '{"Authorization": "Basic {A:base64}"}', "A": "user:päss word"},
        {
            "BILLING_TOKEN_URL": "https://auth/x",
            "BILLING_CLIENT_ID": "the id",
            "BILLING_CLIENT_SECRET": "a secret",
        },
    ],
)
def test_credentials_that_are_sent_in_base64_only_may_be_any_text(env: dict[str, str]) -> None:
    credentials = read(**env).credentials
    assert credentials
    assert credentials.items() <= env.items()


def test_late_payments_are_looked_for_a_week_with_status_updates() -> None:
    week = timedelta(days=7)
    assert read().late_payments_for is None
    assert read(STATUS_UPDATES="true").late_payments_for == week
    assert read(STATUS_UPDATES="true", LATE_PAYMENTS_FOR="0").late_payments_for is None
    assert not read(STATUS_UPDATES="true").late_status_updates
    assert read(STATUS_UPDATES="true", LATE_STATUS_UPDATES="true").late_status_updates
    refused = refusal(LATE_STATUS_UPDATES="true", STATUS_UPDATES="true", LATE_PAYMENTS_FOR="0")
    assert "LATE_PAYMENTS_FOR" in refused


def test_headers_and_a_token_need_only_what_they_name() -> None:
    token = {"BILLING_TOKEN_URL": "https://auth/x"}
    client = {"BILLING_CLIENT_ID": "i", "BILLING_CLIENT_SECRET": "s"}
    assert read(APIKEY="k", **token, **client).credentials == client
    assert read(BILLING_HEADERS="{}", APIKEY_SECRET_ARN="arn:a").credentials == {}
    found = read(**token, APIKEY_SECRET_ARN="arn:a", APIKEY="k")
    assert (found.credentials, found.api_key_secret_arn) == (None, "arn:a")
    assert found.headers_to_name == "authorization"


@pytest.mark.parametrize(
    "key", ["hidden key", "hidden\nkey", "hidden\x7f", "hidden\x00", "clé-hidden", "hidden🔑"]
)
def test_an_api_key_that_is_not_ascii_is_refused_without_showing_it(key: str) -> None:
    sentence = refusal(APIKEY=key)
    assert "it must be visible ASCII characters only" in sentence
    assert "hidden" not in sentence


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hidden@billing/x",
        "https://hidden@billing",
        "http://:hidden@billing",
        "ftp://user:hidden@billing/x?y",
        "//user:hidden@billing",
        "user:hidden@billing/x",
        "http:/user:hidden@billing",
        "http://user:hidden@billing:port/x",
        "http://user:hidden@billing:65536/x",
        "http://user:hidden@[::1/x",
    ],
)
def test_credentials_in_billings_url_are_refused_without_showing_them(url: str) -> None:
    assert refusal(BILLING_API_URL=url) == (
        f"BILLING_API_URL contains a user or a password (not shown here); {URL}"
    )


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("hidden", "(a text without '://') has an unsupported scheme"),
        ("mysql:u:hidden@h/d", "(a text without '://') must name a user, a host and one database"),
        ("postgres://u:hidden@h/d", "(postgres://…) has an unsupported scheme"),
        ("mysqls://u:hidden@h/d", "(mysqls://…) has an unsupported scheme"),
        ("mysql://u:hidden@h", "(mysql://…) must name a user, a host and one database"),
        ("mysql://u:hidden@h/", "(mysql://…) must name a user, a host and one database"),
        ("mysql://u:hidden@h/d/e", "(mysql://…) must name a user, a host and one database"),
        ("mysql://u:hidden@h/d%2Fe", "(mysql://…) must name a user, a host and one database"),
        ("mysql://u:hidden@/d", "(mysql://…) must name a user, a host and one database"),
        ("mysql://:hidden@h/d", "(mysql://…) must name a user, a host and one database"),
        ("mysql://h/hidden", "(mysql://…) must name a user, a host and one database"),
        ("mysql://u:hidden@h:port/d", "(mysql://…) is not a valid URL"),
        ("mysql://u:hidden@h:65536/d", "(mysql://…) is not a valid URL"),
        ("mysql://u:hidden@[h/d", "(mysql://…) is not a valid URL"),
        ("mysql://u:hidden/@h/d", "(mysql://…) is not a valid URL"),
        ("mysql://u:hidden#@h/d", "(mysql://…) is not a valid URL"),
        ("mysql://u:hidden℀@h/d", "(mysql://…) is not a valid URL"),
        ("mysql://u:hidden?@h/d", "(mysql://…) is not a valid URL"),
        ("mysql://u:hidden@h/d?tls=true", "(mysql://…) has an option other than ssl_ca=<file> or"),
        ("mysql://u:hidden@h/d?ssl=1", "(mysql://…) has an option other than ssl_ca=<file> or"),
        ("mysql://u:hidden@h/d?ssl_ca=", "(mysql://…) has an option other than ssl_ca=<file> or"),
        ("mysql://u:hidden@h/d?ssl", "(mysql://…) has an option other than ssl_ca=<file> or"),
        ("mysql://u:hidden@h:0/d", "(mysql://…) must name a user, a host and one database"),
        ("mysql://u:hidden@h/d#x", "(mysql://…) contains a '#'; encode it as %23"),
        ("mysql://u:hidden@h/d?ssl_ca=/&ssl=false", "(mysql://…) has an option other than"),
        ("root:hidden@mysql://h/d", "(…://…) has an unsupported scheme"),
        ("sqlite:///hidden#.db", "(sqlite://…) contains a '#'; encode it as %23"),
        ("sqlite:///hidden?.db", "(sqlite://…) does not name a file"),
        ("sqlite://", "(sqlite://…) does not name a file"),
        ("sqlite:///", "(sqlite://…) does not name a file"),
        ("sqlite://hidden.db", "(sqlite://…) does not name a file"),
        ("sqlite://hidden/shop.db", "(sqlite://…) does not name a file"),
    ],
)
def test_an_invalid_database_url_is_refused_showing_only_its_scheme(url: str, why: str) -> None:
    sentence = refusal(DATABASE_URL=url)
    assert sentence.startswith(f"DATABASE_URL {why}")
    assert sentence.endswith(f"; {FORMS}")
    assert "hidden" not in sentence


@settings(deadline=None)
@given(st.text())
def test_a_password_that_is_not_percent_encoded_is_not_shown(password: str) -> None:
    try:
        shown = repr(read(DATABASE_URL=f"mysql://u:Zq{password}Zq@h/d"))
    except SettingsError as error:
        shown = str(error)
    assert "Zq" not in shown


def test_a_missing_ca_file_is_refused(tmp_path: Path) -> None:
    path = f"{tmp_path}/ca.pem"
    assert refusal(DATABASE_URL=f"mysql://u:hidden@h/d?ssl_ca={path}") == (
        f"DATABASE_URL names the CA file {path!r} in ssl_ca, which does not exist; "
        "it must be the path of a file in PEM format, or rds."
    )


CA = quote(__file__, safe="")  # an existing file


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mysql://u:p@h/d", MySQLAddress("h", 3306, "u", "p", "d")),
        ("mysql://u@h/d", MySQLAddress("h", 3306, "u", "", "d")),
        ("MySQL://u:p@db.example:3307/d", MySQLAddress("db.example", 3307, "u", "p", "d")),
        ("mysql://u:p@[::1]:3307/d", MySQLAddress("::1", 3307, "u", "p", "d")),
        ("mysql://u:a:b@h/d", MySQLAddress("h", 3306, "u", "a:b", "d")),
        ("mysql://u:p%40%2F%3A%23%3F%25+@h/d", MySQLAddress("h", 3306, "u", "p@/:#?%+", "d")),
        ("mysql://u:p@h/d?ssl=true", MySQLAddress("h", 3306, "u", "p", "d", None, Tls.VERIFY)),
        ("mysql://u:p@h/d?ssl=false", MySQLAddress("h", 3306, "u", "p", "d", None, Tls.PREFER)),
        (
            f"mysql://u:p@h/d?ssl_ca={CA}",
            MySQLAddress("h", 3306, "u", "p", "d", __file__, Tls.VERIFY),
        ),
        (
            f"mysql://u:p@h/d?ssl=true&ssl_ca={CA}",
            MySQLAddress("h", 3306, "u", "p", "d", __file__, Tls.VERIFY),
        ),
        ("sqlite:///shop.db", Path("shop.db")),
        ("sqlite:///.local/shop.db", Path(".local/shop.db")),
        ("sqlite:////var/lib/shop.db", Path("/var/lib/shop.db")),
        ("sqlite:///my%20shop%23%3F.db", Path("my shop#?.db")),
    ],
)
def test_a_database_url_is_parsed(url: str, address: MySQLAddress | Path) -> None:
    assert read(DATABASE_URL=url).database == address


@settings(deadline=None)
@given(st.text(min_size=1), st.text(), st.text(min_size=1).filter(lambda name: "/" not in name))
def test_any_user_password_and_database_can_be_percent_encoded(
    user: str, password: str, database: str
) -> None:
    u, p, d = (quote(text, safe="") for text in (user, password, database))
    expected = MySQLAddress("h", 3306, user, password, database)
    assert read(DATABASE_URL=f"mysql://{u}:{p}@h/{d}").database == expected


KEYS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1)


@settings(deadline=None)
@given(password=st.text(), key=KEYS)
def test_the_repr_of_settings_does_not_depend_on_secrets(password: str, key: str) -> None:
    def shown(password: str, key: str) -> tuple[str, str]:
        found = read(DATABASE_URL=f"mysql://u:{quote(password, safe='')}@h/d", APIKEY=key)
        return repr(found), str(found)

    assert shown(password, key) == shown("another", "another")


def test_apikey_takes_precedence_over_its_secret() -> None:
    found = read(APIKEY="key", APIKEY_SECRET_ARN="arn:a")
    assert (found.credentials, found.api_key_secret_arn) == ({"APIKEY": "key"}, None)


def test_database_url_takes_precedence_over_its_secret() -> None:
    found = read(DATABASE_SECRET_ARN="arn:d")
    assert found.database == Path("shop.db")


def test_a_database_secret_replaces_the_url() -> None:
    found = read(DATABASE_URL="", DATABASE_SECRET_ARN="arn:d")
    assert found.database == DatabaseSecret("arn:d")


def test_what_a_database_secret_lacks_can_be_set() -> None:
    found = read(
        DATABASE_URL="",
        DATABASE_SECRET_ARN="arn:d",
        DATABASE_HOST="db",
        DATABASE_PORT="3307",
        DATABASE_NAME="shop",
        DATABASE_TLS="VERIFY",
    )
    assert found.database == DatabaseSecret("arn:d", Tls.VERIFY, "db", 3307, "shop")


@pytest.mark.parametrize("url", ["mysql://u:p@h/d", "mysql://u:p@h/d?ssl=false"])
def test_tls_of_a_database_url_is_at_least_the_setting(url: str) -> None:
    for tls in Tls:
        found = read(DATABASE_URL=url, DATABASE_TLS=tls)
        assert found.database == MySQLAddress("h", 3306, "u", "p", "d", None, tls)
    found = read(DATABASE_URL="mysql://u:p@h/d?ssl_ca=rds", DATABASE_TLS="REQUIRE")
    assert found.database == MySQLAddress("h", 3306, "u", "p", "d", "rds", Tls.VERIFY)


USER_ARN = "arn:aws:rds-db:eu-central-1:123456789012:dbuser:cluster-ABC/monitor"
IAM = {
    "DATABASE_URL": "",
    "DATABASE_AUTH": "IAM",
    "DATABASE_USER_ARN": USER_ARN,
    "DATABASE_HOST": "db",
    "DATABASE_NAME": "shop",
    "DATABASE_TLS": "VERIFY",
}


def test_iam_needs_no_secret_of_the_database() -> None:
    database = read(**IAM).database
    assert database == IamDatabase(USER_ARN, "db", 3306, "shop")
    assert (database.user, database.region) == ("monitor", "eu-central-1")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("DATABASE_USER_ARN", "monitor", "DATABASE_USER_ARN is 'monitor'; with DATABASE_AUTH=IAM"),
        ("DATABASE_USER_ARN", "", "DATABASE_USER_ARN is ''; with DATABASE_AUTH=IAM it must be arn"),
        ("DATABASE_HOST", "", "DATABASE_AUTH is 'IAM', which needs DATABASE_HOST and"),
        ("DATABASE_NAME", "", "DATABASE_AUTH is 'IAM', which needs DATABASE_HOST and"),
        ("DATABASE_TLS", "REQUIRE", "DATABASE_TLS is 'REQUIRE'; with DATABASE_AUTH=IAM it must be"),
    ],
)
def test_iam_without_what_it_needs_is_refused(name: str, text: str, sentence: str) -> None:
    assert refusal(**IAM | {name: text}).startswith(sentence)


def test_billing_without_tls_needs_allow_http() -> None:
    url = "http://billing.internal/api"
    sentence = refusal(BILLING_API_URL=url)
    assert sentence == (
        f"BILLING_API_URL is {url!r}, which would send the API key unencrypted; it must be an "
        "https:// URL, or ALLOW_HTTP must be true."
    )
    assert read(BILLING_API_URL=url, ALLOW_HTTP="true").billing_api_url == url
    for local in ("http://localhost:4000/x", "http://127.0.0.1", "http://[::1]:1"):
        assert read(BILLING_API_URL=local).billing_api_url == local


@pytest.mark.parametrize("seconds", [1, 30])
def test_without_a_cadence_every_session_is_checked_at_every_tick(seconds: int) -> None:
    assert read(CHECK_INTERVAL_SECONDS=str(seconds)).cadence.every_seconds(0) == seconds

"""The headers of BILLING_HEADERS: templates whose placeholders stand for credentials."""

import base64
import json
import re
from collections.abc import Mapping
from typing import NamedTuple

USER_AGENT = "csm"  # checkout session monitor

API_KEY = "APIKEY"
TOKEN = "TOKEN"  # noqa: S105 (the placeholder's name)

FORM = (
    'a JSON object from header names to values, e.g. {"Authorization": "Bearer {APIKEY}"}, in '
    "which {NAME} and {NAME:base64} stand for credentials"
)

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(:base64)?\}")
# RFC 9110, sections 5.1 and 5.5.
_NO_NAME = r"[^!#$%&'*+.^_`|~0-9A-Za-z-]"
_VALUE = r"[!-~](?:[\t -~]*[!-~])?"
# The URL, the connection and the client determine these. A compressed body would not be read.
_RESERVED = frozenset(
    (
        "accept-encoding", "connection", "content-length", "expect", "host", "keep-alive",
        "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
    )
)  # fmt: skip


class HeaderTemplates(NamedTuple):
    """Header names in lower case, each with its value, in which placeholders stand.

    A value may contain a secret where the operator wrote one, so none is ever shown.
    """

    values: Mapping[str, str]

    @property
    def placeholders(self) -> Mapping[str, bool]:
        """The names of all placeholders, `TOKEN` included; False: it is sent in base64 only."""
        values = self.values.values()
        found = [match.groups() for value in values for match in _PLACEHOLDER.finditer(value)]
        return {name: (name, None) in found for name, _ in found}

    def fill(self, credentials: Mapping[str, str]) -> dict[str, str]:
        """The headers with these credentials. Raises KeyError for a placeholder without one."""

        def credential(match: re.Match[str]) -> str:
            text = credentials[match[1]]
            return base64.b64encode(text.encode()).decode("ascii") if match[2] else text

        return {name: _PLACEHOLDER.sub(credential, value) for name, value in self.values.items()}

    def __str__(self) -> str:
        """The names of the headers."""
        return ", ".join(self.values)

    def __repr__(self) -> str:
        return f"HeaderTemplates({self})"


API_KEY_HEADER = HeaderTemplates({"x-api-key": "{APIKEY}"})
BEARER_TOKEN = HeaderTemplates({"authorization": "Bearer {TOKEN}"})


def parse_headers(text: str) -> HeaderTemplates:
    """Parse BILLING_HEADERS.

    Raises:
        ValueError: the text has another form; the message says what is wrong, without any value.
    """
    try:
        given = json.loads(text, object_pairs_hook=tuple)  # which keeps a name that comes twice
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None
    if not isinstance(given, tuple):
        raise ValueError("is not a JSON object")  # noqa: TRY004 (of a text)
    values: dict[str, str] = {}
    for name, value in given:
        header = name.lower()
        if not name:
            raise ValueError("has a header without a name")
        if wrong := re.search(_NO_NAME, name):
            # The rest is not shown: it may be the header's value.
            raise ValueError(
                f"has the header name '{ascii(name[: wrong.end()])[1:-1]}…', in which "
                "HTTP forbids the last character"
            )
        if header in _RESERVED:
            raise ValueError(f"sets {name}, which only the monitor can set")
        if header in values:
            raise ValueError(f"sets {name} twice")
        if not isinstance(value, str) or not re.fullmatch(_VALUE, value):
            raise ValueError(f"has a value for {name} that is not visible ASCII text")
        if re.search("[{}]", _PLACEHOLDER.sub("", value)):
            raise ValueError(f"has a brace in the value for {name} that is not of a placeholder")
        values[header] = value
    return HeaderTemplates(values)

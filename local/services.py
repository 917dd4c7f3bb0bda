"""Billing services to simulate, by the settings and the documented answers of `services.toml`."""

import base64
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from core.billing.client import CHECKOUT_ID
from core.billing.headers import (
    API_KEY_HEADER,
    BEARER_TOKEN,
    TOKEN,
    HeaderTemplates,
    parse_headers,
)
from core.billing.token import CLIENT_ID, CLIENT_SECRET

FILE = Path(__file__).with_name("services.toml")
LIFETIME_SECONDS = 600  # of a token
_TOKEN = "simulated-token"  # noqa: S105 (nobody else accepts it)


@dataclass(frozen=True, slots=True)
class State:
    """One documented answer, and what the settings have to make of it."""

    means: str
    body: str

    def body_of(self, checkout_id: str) -> bytes:
        return self.body.replace('"ID"', json.dumps(checkout_id)).encode()


@dataclass(frozen=True, slots=True)
class Service:
    """A billing service as its documentation describes it."""

    name: str
    title: str
    settings: Mapping[str, str]  # as docs/billing-services.md has them
    states: Mapping[str, State]  # by the word in an id
    per_second: int | None  # the documented limit
    unknown: int  # the status code about an id that it does not know

    @property
    def url(self) -> str:
        """`BILLING_API_URL`, with the id in its place."""
        url = self.settings["BILLING_API_URL"]
        return url if CHECKOUT_ID in url else f"{url}/{CHECKOUT_ID}"

    @property
    def token_url(self) -> str | None:
        return self.settings.get("BILLING_TOKEN_URL")

    def checkout_id(self, target: str) -> str:
        """The id in a request's path and query; empty if it asks about none."""
        before, _, after = _target(self.url).partition(CHECKOUT_ID)
        fits = re.fullmatch(f"{re.escape(before)}([^/?&]+){re.escape(after)}", target)
        return unquote(fits[1], errors="replace") if fits else ""

    def accepts(self, headers: Mapping[str, str]) -> bool:
        """Whether a request has every header of `BILLING_HEADERS`, filled with something."""
        return all(
            re.fullmatch(_filled(value), headers.get(name, ""))
            for name, value in self._templates().values.items()
        )

    def body_of(self, checkout_id: str, state: str) -> bytes:
        """The answer about an id; a state that the service does not have is `open`."""
        return self.states.get(state, self.states["open"]).body_of(checkout_id)

    def token_answer(self, target: str, headers: Mapping[str, str], body: str) -> bytes | None:
        """The answer to a request for a token; None if it is not one that RFC 6749 describes."""
        scheme, _, client = headers.get("authorization", "").partition(" ")
        try:
            named = b":" in base64.b64decode(client, validate=True)
        except ValueError:
            named = False
        asked = target == _target(self.token_url or "") and "client_credentials" in body
        if not (asked and scheme == "Basic" and named):
            return None
        token = {"access_token": _TOKEN, "token_type": "Bearer", "expires_in": LIFETIME_SECONDS}
        return json.dumps(token).encode()

    def settings_at(self, origin: str, given: Mapping[str, str]) -> dict[str, str]:
        """The service's settings below those given, with this origin instead of its own.

        Credentials that are not given are made up: the simulated service accepts any.
        """
        settings = {**self.settings, **given}
        for name in ("BILLING_API_URL", "BILLING_TOKEN_URL"):
            if name in settings:
                settings[name] = origin + _target(settings[name])
        names = {*self._templates().placeholders, CLIENT_ID, CLIENT_SECRET} - {TOKEN}
        return {name: f"simulated-{name.lower()}" for name in names} | settings

    def _templates(self) -> HeaderTemplates:
        if "BILLING_HEADERS" in self.settings:
            return parse_headers(self.settings["BILLING_HEADERS"])
        return BEARER_TOKEN if self.token_url else API_KEY_HEADER


def read_services() -> dict[str, Service]:
    """Every service, by the name that `--service` takes."""
    return {
        name: Service(
            name,
            about["title"],
            about["settings"],
            {word: State(**state) for word, state in about["answers"].items()},
            about.get("per_second"),
            about.get("unknown", 404),
        )
        for name, about in tomllib.loads(FILE.read_text(encoding="utf-8")).items()
    }


def _target(url: str) -> str:
    """The path and the query of a URL."""
    return urlunsplit(urlsplit(url)._replace(scheme="", netloc=""))


def _filled(template: str) -> str:
    """A pattern for what a header's template becomes."""
    pieces = re.split(r"\{([A-Za-z_]\w*)(?::base64)?\}", template)
    return "".join(
        re.escape(piece) if n % 2 == 0 else (_TOKEN if piece == TOKEN else r"\S+")
        for n, piece in enumerate(pieces)
    )

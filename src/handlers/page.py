"""`GET /`: the operator's page, one file that loads nothing from elsewhere."""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("page.html")


class Page(NamedTuple):
    """What the browser gets."""

    html: str
    headers: Mapping[str, str]


@functools.cache
def operators_page(*, simulated: bool = False) -> Page:
    """The page, and a policy by which nothing runs or loads but its own script and style.

    `simulated`: the API beside it serves `simulate`, the control of the simulated billing service.
    """
    html = FILE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; "
        f"script-src {_hash(html, 'script')}; style-src {_hash(html, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    return Page(
        html.replace("<body>", "<body data-simulated>") if simulated else html,
        {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


def _hash(html: str, element: str) -> str:
    """What a Content-Security-Policy calls the page's one element of this name."""
    [content] = re.findall(f"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

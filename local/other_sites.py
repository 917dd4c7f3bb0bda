"""Recognises requests that web pages of other sites send to a server on this machine.

Any page can make its visitor's browser send a request to localhost. The browser names the page's
site in `Origin`, except for plain reads, whose answers the page cannot see. But if the name of the
page's site resolves to 127.0.0.1 (DNS rebinding), the page and this server are one site for the
browser, and the page sees every answer. `Host` then holds that name.
"""

import re
from collections.abc import Collection

LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))
_FOREIGN_HOST = (
    "The request's Host header does not name this machine; use localhost, 127.0.0.1 or [::1]."
)
_FOREIGN_ORIGIN = (
    "The request's Origin header names another site, which may not change anything here."
)
_READS = frozenset(("GET", "HEAD", "OPTIONS"))
_HOST = r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(?::[0-9]*)?"
_HOST_HEADER = re.compile(_HOST, re.ASCII)
_ORIGIN_HEADER = re.compile(f"https?://{_HOST}", re.ASCII)


def refusal(
    method: str, host: str, origin: str | None, *, other_hosts: Collection[str] = ()
) -> str | None:
    """Why the request is refused, in one sentence; None if it may be answered.

    `host` and `origin` are the headers' values; the host is empty if there is none. `other_hosts`
    are names of this machine besides localhost, without a port.
    """
    hosts = LOCAL_HOSTS.union(other_hosts)
    if not _names(_HOST_HEADER, host, hosts):
        return _FOREIGN_HOST
    if method not in _READS and origin is not None and not _names(_ORIGIN_HEADER, origin, hosts):
        return _FOREIGN_ORIGIN
    return None


def _names(header: re.Pattern[str], value: str, hosts: Collection[str]) -> bool:
    match = header.fullmatch(value.strip().lower())
    return match is not None and match[1] in hosts

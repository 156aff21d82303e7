"""BrowserGuard: refuse what a web page in a local browser may send to an open server on loopback.

A page may post to any address, as a form or as text, and a page whose name suddenly means
127.0.0.1 may also read the answers. The first cannot be JSON without the server's consent, and the
second carries the page's own name as its Host.
"""

from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import Scope

from deployments.config import is_loopback
from deployments.ingress.http_errors import ApiError, misdirected, not_json


class BrowserGuard:
    """`hosts` are names by which the server may be asked besides those of loopback."""

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)

    def refusal(self, scope: Scope) -> ApiError | None:
        """Check one HTTP request. None if it may pass."""
        headers = Headers(scope=scope)
        host = headers.get("host")
        if host is not None and not self._is_ours(_name_in(host)):
            return misdirected(host)
        media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and media_type != "application/json":
            return not_json()
        return None

    def _is_ours(self, name: str) -> bool:
        return name in self._hosts or is_loopback(name)


def _name_in(host: str) -> str:
    """Return the host without its port and, for IPv6, its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()

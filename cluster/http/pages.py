"""Keeps web pages away from a service that needs no secret: any page in a browser on this machine reaches loopback.

A page of another site says so in `Origin`. One whose name was made to point at this machine says its name in `Host`.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorafleet.cluster.errors import Forbidden
from lorafleet.cluster.http.auth import is_loopback


class Pages:
    """ASGI middleware: refuses what a browser sends for a page that is not this service's. Raises Forbidden."""

    def __init__(self, app: ASGIApp, origins: Collection[str] = ()) -> None:
        """origins: of other pages that may call, as in `http.cors_origins`; `*` does not open the admin plane."""
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            self._check(headers.get("host"), headers.get("origin"), is_admin=_is_admin(scope["path"]))
        await self._app(scope, receive, send)

    def _check(self, host: str | None, origin: str | None, *, is_admin: bool) -> None:
        if host is not None and not is_loopback(_name_of(f"//{host}")):
            raise Forbidden(
                f"host {host[:128]!a} is not this machine: call 127.0.0.1 or localhost, or set a token for the service"
            )
        if origin is None or origin in self._origins or ("*" in self._origins and not is_admin):
            return
        if host is None or origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            raise Forbidden(
                f"pages of {origin[:128]!a} may not call a service without a token: set one, or name the origin in "
                "http.cors_origins"
            )


def _is_admin(path: str) -> bool:
    """Return True for a path of the admin plane, which includes vLLM's and SGLang's routes for adapters."""
    return path.startswith("/admin/") or "lora_adapter" in path


def _name_of(url: str) -> str:
    """The host in a URL, without its port; empty where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""

"""The outermost middleware: notes of each request what its traces and its event stream need from the server."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorafleet.cluster.http.request_ids import HEADER
from lorafleet.cluster.http.sse import OUTERMOST_SEND
from lorafleet.cluster.tracing import caller_ids

ID_HEADERS = (HEADER, "traceparent", "tracestate")


class Entry:
    """ASGI middleware that changes nothing of a request or a reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            scope[OUTERMOST_SEND] = send
            headers = Headers(scope=scope)
            caller_ids.set({name: headers[name] for name in ID_HEADERS if name in headers})
        await self._app(scope, receive, send)

"""Request ids as vLLM has them: a client's own `x-request-id` names its reply, and every reply says its id."""

from __future__ import annotations

import re
import uuid

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_GIVEN = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(request: Request) -> str | None:
    """The id that the client gave; None where it gave none that a reply can carry."""
    given = request.headers.get(HEADER, "")
    return given if _GIVEN.fullmatch(given) else None


class RequestIds:
    """ASGI middleware: every reply carries the request's id, the client's own or a new one.

    For an application without Serve's proxy, which names all requests and replies itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Request(scope)) or uuid.uuid4().hex

        async def naming_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, naming_send)

"""Our part of Serve's proxy, which runs it where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `prepare`.

Bounds headers, and reads short bodies before an ingress hears of a request. A request whose ingress is lost is sent to
another one if nothing of its answer has come. Otherwise its stream ends with an error event instead of a cut. Proxies
start without torch: this imports little.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafleet.cluster.http.heads import bound_heads

MAX_ATTEMPTS = 3
RETRY_PAUSE_S = 0.1
MAX_KEPT_BYTES = 2**18
"""Of a body that is read ahead, and kept in order to be sent again. A longer one is handed on as it comes."""
BODY_S = 60.0
"""How long such a body may take to come."""
REPEATED = ("/completions", "/embeddings", "/messages", "/count_tokens", "/responses", "tokenize", "/generate")
"""Ends of the paths whose calls change nothing, so that they may be made again, beside those of GET."""

_BROKEN = {
    "message": "the ingress was lost in the middle of the answer",
    "type": "server_error",
    "param": None,
    "code": "stream_broken",
}
_LOST = {
    "message": "the ingress was lost before it answered; a change that was under way may have been made",
    "type": "server_error",
    "param": None,
    "code": "ingress_lost",
}
_LATE = {
    "message": f"the body has not come within {BODY_S:g} s",
    "type": "invalid_request_error",
    "param": None,
    "code": "body_too_slow",
}


def prepare() -> list[Middleware]:
    """Serve calls this in each process that serves HTTP, before it listens. Returns its middlewares."""
    bound_heads()
    return [Middleware(LostIngress)]


class LostIngress:
    """ASGI middleware around Serve's proxy, which returns without a whole answer when a replica dies."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _KeptBody(receive)
        try:
            async with asyncio.timeout(BODY_S):
                await body.read_ahead()
        except TimeoutError:
            await _Answer(send).refuse(408, _LATE, closes=True)
            return
        if body.is_client_gone:
            return
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answer = _Answer(send)
            await self._app({**scope, "headers": list(scope["headers"])}, body.reader(), answer.send)
            if answer.is_whole or body.is_client_gone:
                return
            if answer.status is not None:
                await answer.end_broken(scope["path"])
                return
            if not (body.is_kept and _may_repeat(scope)):
                break
            await asyncio.sleep(RETRY_PAUSE_S * attempt)
        await answer.refuse(503, _LOST)


class _KeptBody:
    """A request's body. One of at most `MAX_KEPT_BYTES` is kept, and may be read again."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: list[Message] = []
        self._num_bytes = 0
        self.is_kept = True
        self.is_client_gone = False

    async def read_ahead(self) -> None:
        """Read to the end of the body, or to the bound."""
        is_more = True
        while is_more and self.is_kept and not self.is_client_gone:
            message = await self._receive()
            self.is_client_gone = message["type"] != "http.request"
            self._messages.append(message)
            self._num_bytes += len(message.get("body", b""))
            self.is_kept = self._num_bytes <= MAX_KEPT_BYTES
            is_more = message.get("more_body", False)

    def reader(self) -> Receive:
        """The body from its beginning; may be asked for again if it `is_kept`."""
        kept = iter(tuple(self._messages))
        if not self.is_kept:
            self._messages.clear()

        async def receive() -> Message:
            for message in kept:
                return message
            message = await self._receive()
            self.is_client_gone = message["type"] != "http.request"
            return message

        return receive


class _Answer:
    """One attempt's answer on its way to the client."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.is_whole = False
        self._is_event_stream = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.body":
            self.is_whole = not message.get("more_body", False)
        elif message["type"] == "http.response.start":
            self.status = message["status"]
            self._is_event_stream = any(
                name == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message.get("headers", ())
            )
        await self._send(message)

    async def end_broken(self, path: str) -> None:
        """End a stream with an error event. Another answer stays cut, so that nobody takes it for whole."""
        if self._is_event_stream:
            await self._send({"type": "http.response.body", "body": broken_event(path)})

    async def refuse(self, status: int, error: dict[str, Any], *, closes: bool = False) -> None:
        """Say that there is no answer, and why. `closes`: what else the client sends is not read."""
        content = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"retry-after", b"1"),
        ]
        if closes:
            headers.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": content})


def broken_event(path: str) -> bytes:
    """The error event of a route, in the form that its clients know."""
    named: dict[str, Any] | None = None
    if path.endswith("/messages"):
        named = {"type": "error", "error": {**_BROKEN, "type": "api_error"}}
    elif path.endswith("/responses"):
        named = {"type": "error", "code": _BROKEN["code"], "message": _BROKEN["message"], "param": None}
    if named is not None:
        return b"event: error\ndata: " + json.dumps(named).encode() + b"\n\n"
    return b"data: " + json.dumps({"error": _BROKEN}).encode() + b"\n\n"


def _may_repeat(scope: Scope) -> bool:
    return scope["method"] in ("GET", "HEAD") or (scope["method"] == "POST" and scope["path"].endswith(REPEATED))

"""Bounds of what comes in, judged while it comes: bytes, JSON values, and how long it may take.

A body is counted in the pieces in which it arrives, so a large one holds up nobody else's stream. One that is over a
bound is refused before it is parsed. Every route has the bounds, also those whose bodies are read before their checks.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafleet.cluster.errors import BodyTooLarge, BodyTooSlow

MAX_BODY_BYTES = 16 * 2**20

_REST_OF_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of one body."""

    max_bytes: int = MAX_BODY_BYTES
    max_values: int = 1 << 20
    """JSON values: entries of lists and of objects."""
    pause_s: float = 30.0
    """Longest time without a byte."""
    whole_s: float = 300.0
    """Longest time for all of it."""


BOUNDS = Bounds()


class ValueCounter:
    """Counts the values of a JSON text that comes in pieces, without parsing it; what is no JSON is counted somehow."""

    def __init__(self) -> None:
        self.count = 0
        self._in_string = False
        self._is_escaped = False
        """Whether the last piece ended with a backslash in a string."""

    def feed(self, piece: bytes) -> int:
        """Count on; the number of values so far, or one more for each list and object."""
        start = 0
        if self._is_escaped and piece:
            start, self._is_escaped = 1, False
        while start < len(piece):
            if self._in_string:
                match = _REST_OF_STRING.match(piece, start)
                assert match is not None
                start = match.end()
                if start < len(piece):
                    self._is_escaped = piece[start] == 0x5C  # then it is the last byte
                    self._in_string = self._is_escaped
                    start += 1
            else:
                end = piece.find(b'"', start)
                self._in_string = end >= 0
                end = len(piece) if end < 0 else end
                self.count += piece.count(b",", start, end) + piece.count(b"[", start, end)
                self.count += piece.count(b"{", start, end)
                start = end + 1
        return self.count


class BoundedBodies:
    """ASGI middleware: reading a body raises BodyTooLarge or BodyTooSlow as soon as it is over a bound."""

    def __init__(self, app: ASGIApp, bounds: Bounds) -> None:
        self._app = app
        self._bounds = bounds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            receive = _Incoming(receive, self._bounds, dict(scope["headers"]).get(b"content-length", b"")).receive
        await self._app(scope, receive, send)


class _Incoming:
    """One request's body on its way in."""

    def __init__(self, receive: Receive, bounds: Bounds, declared: bytes) -> None:
        self._receive = receive
        self._bounds = bounds
        self._declared = int(declared) if declared.isdigit() and len(declared) < 20 else 0
        self._num_bytes = 0
        self._values = ValueCounter()
        self._ends_s: float | None = None
        self._is_whole = False

    async def receive(self) -> Message:
        """The next message; after the body's last one there is no bound any more."""
        if self._is_whole:
            return await self._receive()
        bounds = self._bounds
        now_s = asyncio.get_running_loop().time()
        if self._ends_s is None:
            self._ends_s = now_s + bounds.whole_s
            self._check(self._declared, 0)
        try:
            async with asyncio.timeout(min(bounds.pause_s, self._ends_s - now_s)):
                message = await self._receive()
        except TimeoutError:
            raise BodyTooSlow(
                f"the body has not come within {bounds.whole_s:g} s, or nothing of it within {bounds.pause_s:g} s"
            ) from None
        piece = message.get("body", b"")
        self._num_bytes += len(piece)
        self._check(self._num_bytes, 0)
        self._check(0, self._values.feed(piece))
        self._is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    def _check(self, num_bytes: int, num_values: int) -> None:
        if num_bytes > self._bounds.max_bytes:
            raise BodyTooLarge(f"the body is over {self._bounds.max_bytes} bytes")
        if num_values > self._bounds.max_values:
            raise BodyTooLarge(f"the body has over {self._bounds.max_values} values")

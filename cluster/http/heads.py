"""Bounds of a request's line, headers and trailers, in the process that reads them: Serve's proxy, or an ingress behind
HAProxy.

uvicorn's parser joins the pieces of a header as they come, without a bound: one client without a key could hold up
every stream for a minute. It takes the trailers behind a body for headers, too. `proxy.prepare` has these bounds used.
"""

from __future__ import annotations

import asyncio
import json

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10
HEAD_S = 30.0
"""How long the line and the headers of a request may take to come."""


def bound_heads() -> None:
    """Let servers that this process starts from now on have the bounds."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:BoundedHeads"


class BoundedHeads(HttpToolsProtocol):
    """One connection. Answers 431 to a head that is over a bound and 408 to one that is late, and closes.

    Trailers have the same bound, and are dropped.
    """

    _num_bytes = 0
    """Since the parser last told of a whole head, or of a piece of a body, which has bounds of its own."""
    _timer: asyncio.TimerHandle | None = None
    """Runs while a head is waited for."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has left."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse no more of a head, or of trailers, than the bound."""
        while data and not self.transport.is_closing():
            piece = data[: MAX_HEAD_BYTES + 1 - self._num_bytes]
            data = data[len(piece) :]
            self._num_bytes += len(piece)
            super().data_received(piece)
            if self._num_bytes > MAX_HEAD_BYTES:
                self._refuse("431 Request Header Fields Too Large", f"the headers are over {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        """The parser has found the first byte of a request."""
        super().on_message_begin()
        if self._timer is None:  # a further request of the connection
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser has a header, or a trailer."""
        if self._timer is not None:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The parser has all headers."""
        self._end_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """The parser has a piece of a body."""
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The parser has a whole request."""
        self._num_bytes = 0
        super().on_message_complete()

    def _await_head(self) -> None:
        self._num_bytes = 0
        self._timer = self.loop.call_later(HEAD_S, self._be_late)

    def _end_head(self) -> None:
        self._num_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _be_late(self) -> None:
        if not self._num_bytes:  # it has only connected
            self._end_head()
            self.transport.close()
            return
        self._refuse("408 Request Timeout", f"the headers have not come within {HEAD_S:g} s")

    def _refuse(self, status: str, message: str) -> None:
        self._end_head()
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "headers_refused"}
        body = json.dumps({"error": error}).encode()
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

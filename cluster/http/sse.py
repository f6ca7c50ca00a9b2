"""Server-sent events as an ASGI response, and work that ends when its client goes away.

Ray Serve tells of a client that left by cancelling the request, a plain ASGI server by a message: both stop the work.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

OUTERMOST_SEND = "lorafleet.outermost_send"
"""In an ASGI scope: the server's `send`. The wrappers of our middleware look at a response's start only."""


class ClientGone(Exception):  # noqa: N818
    """The client hung up before the work was done."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and has ended, when this raises ClientGone or is cancelled itself.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await working


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come, one ASGI message each. The generator is closed however the stream ends.

    While the generator is waited for, `write` sends an event that does not come from it, without waking a task.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: Mapping[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._events = events
        self._send: Send | None = None
        self._late: asyncio.Task[None] | None = None
        """Sends an event that the server did not take at once, as its client reads slowly."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, then end the response."""
        # No middleware looks at a body's messages, and a token is one.
        self._send = scope.get(OUTERMOST_SEND, send)
        with contextlib.suppress(ClientGone):
            await while_connected(receive, self._send_all(send))

    @property
    def may_write(self) -> bool:
        """Return True if the server takes a further event now. Ask only while the generator is waited for."""
        return self._send is not None and (self._late is None or self._late.done())

    def write(self, event: bytes) -> None:
        """Send an event now. The caller has asked `may_write`."""
        assert self._send is not None
        steps = self._send({"type": "http.response.body", "body": event, "more_body": True}).__await__()
        try:
            waits_for = next(steps)
        except StopIteration:
            return
        self._late = asyncio.ensure_future(_Rest(waits_for, steps).wait())

    async def _send_all(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._events):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for event in self._events:
                    await self._send_body(event)
                await self._send_body(b"", more_body=False)
        finally:
            if self._late is not None:
                self._late.cancel()

    async def _send_body(self, event: bytes, *, more_body: bool = True) -> None:
        assert self._send is not None
        if self._late is not None:
            await self._late
            self._late = None
        await self._send({"type": "http.response.body", "body": event, "more_body": more_body})


class _Rest:
    """The rest of an awaitable that was begun outside of any task, and waits for something."""

    def __init__(self, waits_for: Any, steps: Generator[Any, Any, None]) -> None:
        self._waits_for = waits_for
        self._steps = steps

    async def wait(self) -> None:
        """Wait until all is done."""
        await self

    def __await__(self) -> Generator[Any, Any, None]:
        try:
            yield self._waits_for
        except BaseException:
            self._steps.close()
            raise
        yield from self._steps

"""Looks up the versions of names over a connection of an ingress to the store: a call through Serve takes much longer.

Each question is a frame with names, each answer one with their versions, in the order of the questions.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from lorafleet.cluster.errors import StoreUnavailable
from lorafleet.cluster.wire import Address, Found, Lookup, frame, read_found, read_lookup

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
"""How long a connection may take to be there."""
PAUSE_S = 1.0
"""After a connection was lost or did not come about, until the next try."""


async def answer(known: Callable[[Lookup], Found], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The store's side of a connection. Raises what ends it."""
    while True:
        writer.write(frame(known(await read_lookup(reader))))
        await writer.drain()


class Lookups:
    """An ingress's side: one connection, which is made at the first question and after it was lost."""

    def __init__(self, address: Callable[[], Awaitable[Address]]) -> None:
        """address: asks the store for it; may raise anything."""
        self._address = address
        self._writer: asyncio.StreamWriter | None = None
        self._asked: deque[asyncio.Future[Found]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, names: Lookup) -> Found | None:
        """Return the versions of names, None while there is no connection. Raises StoreUnavailable if it is lost.

        A question that is given up ends the connection.
        """
        if self._task is None or self._task.done():
            # In a context of its own: Serve ends the calls that a request made with the request.
            self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())
        if self._writer is None:
            return None
        asked: asyncio.Future[Found] = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        writer = self._writer
        writer.write(frame(names))
        try:
            return await asked
        except asyncio.CancelledError:
            writer.transport.abort()  # no answer in time: the store's node may be gone without a word
            raise

    async def _run(self) -> None:
        """Connect, and hand out the answers until the connection ends."""
        try:
            async with asyncio.timeout(CONNECT_S):
                address = await self._address()
                reader, writer = await asyncio.open_connection(address.host, address.port)
        except Exception as error:
            logger.debug("there is no connection to the adapter store: %s", error)
            await asyncio.sleep(PAUSE_S)
            return
        try:
            writer.write(address.key)
            self._writer = writer
            while True:
                found = await read_found(reader)
                asked = self._asked.popleft()
                if not asked.done():
                    asked.set_result(found)
        except Exception as error:
            logger.info("the connection to the adapter store is lost: %s", error)
        finally:
            self._writer = None
            writer.close()
            while self._asked:
                asked = self._asked.popleft()
                if not asked.done():
                    asked.set_exception(StoreUnavailable("the adapter store is away", None, 2.0))
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        await asyncio.sleep(PAUSE_S)

"""Listens for connections of other processes of the service, on a free port. Whoever has no key is not heard.

The key comes with the address, by a call through Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable

from lorafleet.cluster.wire import KEY_BYTES, Address

logger = logging.getLogger(__name__)

GREETING_S = 10.0
"""How long a connection may take to send the key, and to say whose it is."""

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Serves one connection behind the key, until it ends. May raise what the connection raises."""


class Listener:
    """Listens from the first question for its address on. One event loop uses it."""

    def __init__(self, host: str, talk: Talk) -> None:
        self._host = host
        self._talk = talk
        self._key = secrets.token_bytes(KEY_BYTES)
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()
        self._writers: set[asyncio.StreamWriter] = set()

    async def address(self) -> Address:
        """Return the address for another process."""
        async with self._starting:
            if self._server is None:
                self._server = await asyncio.start_server(self._greet, self._host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return Address(self._host, port, self._key)

    def close(self) -> None:
        """Listen no more, and end the connections."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            async with asyncio.timeout(GREETING_S):
                key = await reader.readexactly(KEY_BYTES)
            if hmac.compare_digest(key, self._key):
                await self._talk(reader, writer)
        except (TimeoutError, OSError, EOFError):
            pass  # it has left, or was a stranger
        except Exception:
            logger.exception("a connection of another process is lost")  # say, one of another build
        finally:
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

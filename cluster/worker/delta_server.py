"""Hands the outboxes of one worker to ingresses over TCP, a frame a step.

An ingress gets the address by a call through Serve. The call stays open as long as the ingress reads, so a worker that
leaves waits for it. Whoever has no key from that call reads nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets

from lorafleet.cluster.wire import OUTBOX_ID_BYTES, OUTBOX_KEY_BYTES, OutboxAddress, batch_frame
from lorafleet.cluster.worker.outbox import Outbox, Outboxes

GREETING_S = 10.0
"""How long a connection may take to say what it wants."""


class DeltaServer:
    """Listens on a free port of one address from the first question for it. One event loop uses it."""

    def __init__(self, outboxes: Outboxes, host: str) -> None:
        self._outboxes = outboxes
        self._host = host
        self._key = secrets.token_bytes(OUTBOX_KEY_BYTES)
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()

    async def address(self) -> OutboxAddress:
        """Return the address at which an ingress reads its outbox."""
        async with self._starting:
            if self._server is None:
                self._server = await asyncio.start_server(self._serve, self._host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return OutboxAddress(self._host, port, self._key)

    def close(self) -> None:
        """Listen no more. Connections end with the process, or when their ingress leaves."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(GREETING_S):
                key = await reader.readexactly(OUTBOX_KEY_BYTES)
                outbox_id = (await reader.readexactly(OUTBOX_ID_BYTES)).decode("ascii")
            if not hmac.compare_digest(key, self._key):
                return
            with self._outboxes.using(outbox_id) as outbox:
                sending = asyncio.ensure_future(self._send(outbox, writer))
                leaving = asyncio.ensure_future(reader.read(1))
                try:
                    await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (sending, leaving):
                        task.cancel()
                    await asyncio.gather(sending, leaving, return_exceptions=True)
        except (TimeoutError, OSError, EOFError, UnicodeDecodeError):
            pass  # it has left, or was no ingress
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    @staticmethod
    async def _send(outbox: Outbox, writer: asyncio.StreamWriter) -> None:
        """Send an outbox's frames. Deltas for a slow ingress stay in the outbox, where they become one frame."""
        async for batch in outbox.batches():
            writer.write(batch_frame(batch))
            await writer.drain()

"""Takes the requests of ingresses over TCP and sends their deltas back, a frame a step.

An ingress gets the address by a call through Serve. That call stays open as long as the ingress may send or waits for
an answer, so a worker that leaves the service waits for it. Whoever has no key from that call is not heard. What runs
for a connection ends with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from lorafleet.cluster.listener import GREETING_S, Listener
from lorafleet.cluster.wire import (
    EXPECTED,
    INGRESS_ID_BYTES,
    Address,
    Order,
    frame,
    packed_error,
    read_order,
    unpacked_request,
)
from lorafleet.cluster.worker.outbox import Outbox
from lorafleet.cluster.worker.race import until_one_ends
from lorafleet.workers.request import EngineRequest, GenerateDelta
from lorafleet.workers.worker import Take

logger = logging.getLogger(__name__)

Begin = Callable[[EngineRequest, Take], Callable[[], None]]
"""Begins a sequence, whose deltas or error the second argument takes. Returns what aborts it. May raise."""


class Desk:
    """The sequences of one connection, and their outbox."""

    def __init__(self, begin: Begin, outbox: Outbox) -> None:
        self._begin = begin
        self._outbox = outbox
        self._aborts: dict[str, Callable[[], None]] = {}

    @property
    def num_answers(self) -> int:
        """Sequences under way, running and waiting."""
        return len(self._aborts)

    def take(self, order: Order) -> None:
        """Begin a sequence, or abort one; to abort what is over does nothing."""
        request_id, packed = order
        if packed is not None:
            self._answer(request_id, packed)
        elif (abort := self._aborts.pop(request_id, None)) is not None:
            abort()

    def close(self) -> None:
        """Abort all."""
        while self._aborts:
            self._aborts.popitem()[1]()

    def _answer(self, request_id: str, packed: bytes) -> None:
        def put(item: GenerateDelta | Exception) -> None:
            if isinstance(item, GenerateDelta):
                if item.finish_reason is not None:
                    self._aborts.pop(request_id, None)
                self._outbox.put(request_id, item)
            else:
                self._aborts.pop(request_id, None)
                self._outbox.put(request_id, _packed(item))

        try:
            self._aborts[request_id] = self._begin(unpacked_request(packed), put)
        except Exception as error:
            put(error)


def _packed(error: Exception) -> bytes:
    """An error for the ingress. One that nobody expects stays here, in the log: it may not survive the way."""
    if isinstance(error, EXPECTED):
        return packed_error(error)
    logger.error("a sequence failed", exc_info=error)
    return packed_error(RuntimeError(f"a worker failed with {type(error).__name__}; its log says more"))


class AnswerServer:
    """Listens at one address. One event loop uses it."""

    def __init__(self, begin: Begin, host: str, *, is_alive: Callable[[], bool] = lambda: True) -> None:
        """is_alive: see `Outbox`."""
        self._begin = begin
        self._is_alive = is_alive
        self._listener = Listener(host, self._talk)
        self._desks: dict[Desk, str] = {}
        """And the ids of their ingresses."""

    async def address(self) -> Address:
        """Return the address for an ingress."""
        return await self._listener.address()

    def loads(self) -> tuple[tuple[str, int], ...]:
        """Ids of ingresses, sorted, and how many answers each has under way, if any."""
        counts: Counter[str] = Counter()
        for desk, ingress_id in self._desks.items():
            counts[ingress_id] += desk.num_answers
        return tuple(sorted((ingress_id, count) for ingress_id, count in counts.items() if count))

    def close(self) -> None:
        """Listen no more, and end the connections."""
        self._listener.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(GREETING_S):
            ingress_id = (await reader.readexactly(INGRESS_ID_BYTES)).decode("ascii")
        outbox = Outbox(self._is_alive)
        desk = Desk(self._begin, outbox)
        self._desks[desk] = ingress_id
        try:
            await until_one_ends(_send(outbox, writer), _receive(desk, reader))
        finally:
            del self._desks[desk]
            desk.close()


async def _receive(desk: Desk, reader: asyncio.StreamReader) -> None:
    """Take orders until the connection ends."""
    while True:
        desk.take(await read_order(reader))


async def _send(outbox: Outbox, writer: asyncio.StreamWriter) -> None:
    """Send an outbox's frames. Deltas for a slow ingress stay in the outbox, where they become one frame."""
    async for batch in outbox.batches():
        writer.write(frame(batch))
        await writer.drain()

"""What a worker's answers say, on its way to an ingress: one message a step, however many answers are under way.

Ray Serve takes half a millisecond and more for each message between processes, which is more than a token is worth; so
the answers that one ingress asked for share one stream of batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from lorafleet.workers.request import GenerateDelta

Batch = list[tuple[str, GenerateDelta]]
"""Request ids and deltas, in the order in which they were made."""


class Outbox:
    """Deltas for one ingress, kept until they are fetched."""

    def __init__(self) -> None:
        self.num_users = 0
        """Answers that write into it, and readers."""
        self._batch: Batch = []
        self._changed = asyncio.Event()
        self._last_reader = 0

    def put(self, request_id: str, delta: GenerateDelta) -> None:
        """Add a delta."""
        self._batch.append((request_id, delta))
        self._changed.set()

    async def batches(self) -> AsyncIterator[Batch]:
        """Everything that is put, as often as there is something. A later reader takes over, and ends this one."""
        self._last_reader += 1
        reader = self._last_reader
        self._changed.set()
        while True:
            await self._changed.wait()
            if reader != self._last_reader:
                return
            self._changed.clear()
            if self._batch:
                batch, self._batch = self._batch, []
                yield batch


class Outboxes:
    """The outboxes of one worker, one for each ingress; there while they are used."""

    def __init__(self) -> None:
        self._outboxes: dict[str, Outbox] = {}

    @contextmanager
    def using(self, outbox_id: str) -> Iterator[Outbox]:
        """The outbox of that id, which is made if need be."""
        outbox = self._outboxes.setdefault(outbox_id, Outbox())
        outbox.num_users += 1
        try:
            yield outbox
        finally:
            outbox.num_users -= 1
            if outbox.num_users == 0:
                del self._outboxes[outbox_id]

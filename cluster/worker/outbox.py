"""Collects a worker's deltas for each ingress: one message a step, however many answers run.

Ray Serve takes half a millisecond and more for each message between processes, which is too long for one token. So all
answers for one ingress share one stream of batches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

from lorafleet.cluster.wire import Batch
from lorafleet.workers.request import GenerateDelta

BEAT_S = 1.0
"""How often a reader hears of a worker that has nothing to say."""
KEEP_S = 60.0
"""How long what nobody has fetched is kept for a reader that may be on its way."""


class Outbox:
    """Deltas for one ingress, kept until they are fetched."""

    def __init__(self, is_alive: Callable[[], bool] = lambda: True) -> None:
        """is_alive: whether readers are to hear that the worker lives when it has nothing to say."""
        self._is_alive = is_alive
        self.num_users = 0
        """Answers that write into it, and readers."""
        self.num_answers = 0
        self.used_s = 0.0
        """When the last of them left."""
        self._batch: Batch = []
        self._changed = asyncio.Event()
        self._last_reader = 0

    @property
    def is_empty(self) -> bool:
        return not self._batch

    def put(self, request_id: str, delta: GenerateDelta) -> None:
        """Add a delta."""
        self._batch.append((request_id, delta))
        self._changed.set()

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Everything that is put, as often as there is something, and nothing every `BEAT_S` otherwise.

        A later reader takes over, and ends this one.
        """
        self._last_reader += 1
        reader = self._last_reader
        self._changed.set()
        while True:
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._changed.wait()
            except TimeoutError:
                if self._is_alive():
                    yield []
                continue
            if reader != self._last_reader:
                return
            self._changed.clear()
            if self._batch:
                batch, self._batch = self._batch, []
                yield batch


class Outboxes:
    """The outboxes of one worker, one for each ingress; there while they are used, and until they are fetched."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, is_alive: Callable[[], bool] = lambda: True
    ) -> None:
        """is_alive: see `Outbox`."""
        self._clock = clock
        self._is_alive = is_alive
        self._outboxes: dict[str, Outbox] = {}

    @contextmanager
    def using(self, outbox_id: str) -> Iterator[Outbox]:
        """The outbox of that id, which is made if need be."""
        outbox = self._outboxes.setdefault(outbox_id, Outbox(self._is_alive))
        outbox.num_users += 1
        try:
            yield outbox
        finally:
            outbox.num_users -= 1
            outbox.used_s = self._clock()
            self._drop_unused()

    @contextmanager
    def answering(self, outbox_id: str) -> Iterator[Outbox]:
        """The outbox, used by one more answer."""
        with self.using(outbox_id) as outbox:
            outbox.num_answers += 1
            try:
                yield outbox
            finally:
                outbox.num_answers -= 1

    def loads(self) -> tuple[tuple[str, int], ...]:
        """Ids of outboxes, sorted, and how many answers each has under way, if any."""
        return tuple(sorted((key, outbox.num_answers) for key, outbox in self._outboxes.items() if outbox.num_answers))

    def _drop_unused(self) -> None:
        """An ingress may have died; one whose answers were all short may just not have begun to read."""
        now = self._clock()
        for outbox_id, outbox in list(self._outboxes.items()):
            if outbox.num_users == 0 and (outbox.is_empty or now - outbox.used_s > KEEP_S):
                del self._outboxes[outbox_id]

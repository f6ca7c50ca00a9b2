"""Collects a worker's deltas for one ingress: one message a step, however many answers run.

A message between processes costs more than a token is worth. So all answers for one ingress share a stream of batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from lorafleet.cluster.wire import Batch
from lorafleet.workers.request import GenerateDelta

BEAT_S = 1.0
"""How often a reader hears of a worker that has nothing to say."""


class Outbox:
    """Deltas for one ingress, kept until they are fetched by one reader."""

    def __init__(self, is_alive: Callable[[], bool] = lambda: True) -> None:
        """is_alive: whether the reader is to hear that the worker lives when it has nothing to say."""
        self._is_alive = is_alive
        self._batch: Batch = []
        self._changed = asyncio.Event()

    def put(self, request_id: str, item: GenerateDelta | bytes) -> None:
        """Add a delta, or a packed error."""
        self._batch.append((request_id, item))
        self._changed.set()

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Everything that is put, as often as there is something, and nothing every `BEAT_S` otherwise."""
        while True:
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._changed.wait()
            except TimeoutError:
                if self._is_alive():
                    yield []
                continue
            self._changed.clear()
            batch, self._batch = self._batch, []
            yield batch

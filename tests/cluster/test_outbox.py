"""A reader hears of a worker that has nothing to say, unless the worker stands still."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from lorafleet.cluster.worker import outbox as outbox_module
from lorafleet.cluster.worker.outbox import Outbox


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "BEAT_S", 0.01)


async def test_beats_come_while_there_is_nothing_else() -> None:
    async with aclosing(Outbox().batches()) as batches:
        assert [await anext(batches) for _ in range(3)] == [[], [], []]


async def test_a_worker_that_stands_still_is_silent() -> None:
    is_alive = True
    async with aclosing(Outbox(lambda: is_alive).batches()) as batches:
        assert await anext(batches) == []
        is_alive = False
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(batches)

"""A worker follows the store, goes on while it is away, and asks after a hint, not before."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

import pytest

from lorafleet.adapter_store.errors import UnknownWorker
from lorafleet.adapter_store.names import VersionsToKeep
from lorafleet.cluster.errors import StoreUnavailable
from lorafleet.cluster.worker.reconciler import Reconciler


class Follower:
    """A worker that holds what it was last told to."""

    def __init__(self) -> None:
        self.told: list[Mapping[str, bool]] = []
        self.asked: list[Collection[str]] = []

    async def held_versions(self) -> tuple[str, ...]:
        return ("held",)

    async def reconcile(self, named: Mapping[str, bool], asked: Collection[str]) -> None:
        self.told.append(named)
        self.asked.append(asked)


async def test_passes_on_what_the_store_says() -> None:
    worker, asked = Follower(), []

    async def ask(held: tuple[str, ...] | None, since: int) -> VersionsToKeep:
        asked.append(held)
        return VersionsToKeep(1, {"held": True})

    await Reconciler(worker, ask).once()
    assert asked == [("held",)]
    assert worker.told == [{"held": True}]
    assert worker.asked == [{"held"}], "what comes to it meanwhile has lost no name"


async def test_a_question_is_put_after_the_call() -> None:
    """A pass that is under way may not know of what has just changed."""
    worker, answers = Follower(), [asyncio.Event(), asyncio.Event()]
    generation = 0

    async def ask(held: tuple[str, ...] | None, since: int) -> VersionsToKeep:
        asked_at = generation
        await answers[asked_at].wait()
        return VersionsToKeep(asked_at, {f"v{asked_at}": False})

    reconciler = Reconciler(worker, ask)
    first = asyncio.create_task(reconciler.once())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    generation = 1
    second = asyncio.create_task(reconciler.once())
    answers[0].set()
    answers[1].set()
    await asyncio.gather(first, second)
    assert worker.told == [{"v0": False}, {"v1": False}]


async def test_goes_on_while_the_store_is_away() -> None:
    worker = Follower()
    replies: list[Exception | VersionsToKeep] = [
        StoreUnavailable("away"),
        RuntimeError("odd"),
        VersionsToKeep(1, {}),
        VersionsToKeep(2, {}),
    ]

    async def ask(held: tuple[str, ...] | None, since: int) -> VersionsToKeep:
        reply = replies.pop(0) if replies else VersionsToKeep(9, {})
        if isinstance(reply, Exception):
            raise reply
        return reply

    reconciler = Reconciler(worker, ask, period_s=0.0)
    with pytest.raises(StoreUnavailable):
        await reconciler.once()
    assert not await reconciler.await_first(0.0)
    task = asyncio.create_task(reconciler.run())
    assert await reconciler.await_first(5.0)
    async with asyncio.timeout(5):
        while len(worker.told) < 2:
            await asyncio.sleep(0)
    task.cancel()


async def test_what_both_sides_know_is_not_sent_again() -> None:
    worker, asked = Follower(), []
    is_known = True

    async def ask(held: tuple[str, ...] | None, since: int) -> VersionsToKeep | None:
        asked.append((held, since))
        if held is None and not is_known:
            raise UnknownWorker("unknown_worker", "who?")
        return None if held is None and since == 3 else VersionsToKeep(3, {"held": False})

    reconciler = Reconciler(worker, ask)
    for _ in range(3):
        await reconciler.once()
    assert asked == [(("held",), -1), (None, 3), (None, 3)]
    assert worker.told == [{"held": False}] * 3
    asked.clear()
    is_known = False  # another store has taken over
    await reconciler.once()
    assert asked == [(None, 3), (("held",), -1)]

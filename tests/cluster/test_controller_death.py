"""A controller that dies in the midst of a roll-out leaves the old version or the new one, and no hold for good."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.errors import RolloutFailed
from tests.cluster.fleets import DictFleet, DictStore, manifest_of

OLD, NEW = manifest_of("old"), manifest_of("new")


class Mortal:
    """Passes calls on until call number `last`, in which its caller dies: nothing of it goes on, not even clean-up."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.calls: list[str] = []
        self.died = asyncio.Event()
        self.buried = asyncio.Event()
        """Set at the end of a test, so that nothing of it waits any longer."""

    def serving(self, target: Any) -> Any:
        mortal = self

        class Proxy:
            def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
                async def call(*args: Any, **kwargs: Any) -> Any:
                    mortal.calls.append(method)
                    if len(mortal.calls) > mortal.last:
                        mortal.died.set()
                        await mortal.buried.wait()
                        raise ConnectionError("dead")
                    return await getattr(target, method)(*args, **kwargs)

                return call

        return Proxy()


async def put_with(store: DictStore, fleet: DictFleet, last: int) -> tuple[Mortal, asyncio.Task[Any]]:
    """Replace `shout` with a controller that dies in call number `last`; also the task that it leaves hanging."""
    mortal = Mortal(last)
    rollout = Rollout(mortal.serving(store), mortal.serving(fleet))
    change = asyncio.create_task(rollout.put("shout", source="demo", key="new", warm="all"))
    dying = asyncio.create_task(mortal.died.wait())
    await asyncio.wait({change, dying}, return_when=asyncio.FIRST_COMPLETED)
    dying.cancel()
    return mortal, change


async def world() -> tuple[DictStore, DictFleet]:
    store = DictStore(keys={"old": OLD, "new": NEW})
    fleet = DictFleet(store)
    await Rollout(store, fleet).put("shout", source="demo", key="old", warm="all")
    return store, fleet


async def test_the_steps_of_a_rollout() -> None:
    mortal, change = await put_with(*await world(), last=1000)
    await change
    calls = mortal.calls
    assert len(calls) == NUM_CALLS
    assert [call for call in dict.fromkeys(calls) if call != "worker_ids"] == [
        "publish",
        "named",
        "state",
        "make_resident",
        "flip",
        "reconcile",
        "release_hold",
    ]


NUM_CALLS = 20


@pytest.mark.parametrize("last", range(NUM_CALLS))
async def test_a_death_at_any_step_leaves_the_old_version_or_the_new_one(last: int) -> None:
    store, fleet = await world()
    mortal, change = await put_with(store, fleet, last)
    # What workers do by themselves: holds run out, and the store decides.
    for worker in fleet.workers.values():
        worker.holds.clear()
        await fleet.reconcile(worker.worker_id)
    named = store.names["shout"].version
    assert named == (NEW.version if "flip" in mortal.calls[:last] else OLD.version)
    served = NEW if named == NEW.version else OLD
    assert fleet.holders(served) == set(fleet.workers)
    assert fleet.holders(OLD if served is NEW else NEW) == set()
    # The next controller can make the same change.
    await Rollout(store, fleet).put("shout", source="demo", key="new", warm="all")
    assert fleet.holders(NEW) == set(fleet.workers)
    assert fleet.holds() == 0
    mortal.buried.set()
    with contextlib.suppress(ConnectionError, RolloutFailed):
        await change

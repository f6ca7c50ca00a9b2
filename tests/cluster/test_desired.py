"""Configuration's adapters: loaded, replaced and deleted in the background; what others brought is left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lorafleet.adapter_store.names import NameRecord
from lorafleet.cluster.admin.desired import DesiredSet
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.config import DesiredAdapter, UserConfig
from tests.cluster.fleets import DictFleet, DictStore, manifest_of


@dataclass(slots=True)
class World:
    store: DictStore
    fleet: DictFleet
    rollout: Rollout

    def start(self, *preload: DesiredAdapter) -> DesiredSet:
        return DesiredSet(self.rollout, preload, store=self.store, num_workers=len(self.fleet.workers))

    @property
    def names(self) -> dict[str, str]:
        return {name: adapter.key for name, adapter in self.store.names.items()}


@pytest.fixture
def world() -> World:
    store = DictStore(keys={key: manifest_of(key) for key in "abc"})
    fleet = DictFleet(store, ["w0", "w1"])
    return World(store, fleet, Rollout(store, fleet))


def wanted(name: str, key: str, *, pinned: bool = False) -> DesiredAdapter:
    return DesiredAdapter(name=name, source="demo", key=key, pinned=pinned)


def user(*adapters: DesiredAdapter) -> UserConfig:
    return UserConfig(adapters=adapters)


async def test_preload_makes_ready(world: World) -> None:
    desired = world.start(wanted("x", "a"), wanted("y", "b", pinned=True))
    assert await desired.not_ready() == "adapters are being loaded"
    await desired.apply()
    assert await desired.not_ready() is None
    assert world.names == {"x": "a", "y": "b"}
    assert len(world.fleet.holders(world.store.keys["b"])) == 2


async def test_a_preload_that_fails_says_why_and_is_tried_again(world: World) -> None:
    desired = world.start(wanted("x", "nowhere"), wanted("y", "b"))
    await desired.apply()
    assert world.names == {"y": "b"}
    assert "adapter 'x'" in (await desired.not_ready() or "")
    assert "key_not_found" in (await desired.not_ready() or "")
    world.store.keys["nowhere"] = manifest_of("late")
    await desired.apply()
    assert await desired.not_ready() is None


async def test_not_ready_without_workers(world: World) -> None:
    desired = world.start()
    await desired.apply()
    world.fleet.workers.clear()
    assert await desired.not_ready() == "no worker is up; if one cannot start, `serve status` says why"


async def test_user_config_adds_replaces_and_deletes_its_own(world: World) -> None:
    desired = world.start(wanted("pre", "a"))
    desired.set_user_config(user(wanted("x", "a"), wanted("y", "b")))
    await desired.apply()
    await world.rollout.put("mine", source="demo", key="c")
    assert world.names == {"pre": "a", "x": "a", "y": "b", "mine": "c"}
    desired.set_user_config(user(wanted("x", "c"), wanted("z", "b")))
    await desired.apply()
    assert world.names == {"pre": "a", "x": "c", "z": "b", "mine": "c"}
    desired.set_user_config(user())
    await desired.apply()
    assert world.names == {"pre": "a", "mine": "c"}


async def test_what_is_in_place_is_not_staged_again_but_made_resident(world: World) -> None:
    await world.start(wanted("x", "a")).apply()
    num_published = world.store.num_published
    for worker in world.fleet.workers.values():
        worker.resident.clear()
    await world.start(wanted("x", "a")).apply()
    assert world.store.num_published == num_published
    assert len(world.fleet.holders(world.store.keys["a"])) == 1


async def test_an_admins_replacement_survives_a_restart(world: World) -> None:
    desired = world.start(wanted("x", "a"))
    desired.set_user_config(user(wanted("y", "b")))
    await desired.apply()
    for name in "xy":
        await world.rollout.put(name, source="demo", key="c")
    restarted = world.start(wanted("x", "a"))
    restarted.set_user_config(user(wanted("y", "b")))
    await restarted.apply()
    assert world.names == {"x": "c", "y": "c"}
    restarted.set_user_config(user(wanted("y", "a")))
    await restarted.apply()
    assert world.names == {"x": "c", "y": "a"}


async def test_what_an_admin_deleted_or_pinned_since_stays_so(world: World) -> None:
    desired = world.start(wanted("x", "a"), wanted("y", "b"))
    await desired.apply()
    await world.rollout.delete("x")
    await world.rollout.set_pinned("y", True)
    await desired.apply()
    assert world.names == {"y": "b"}
    assert world.store.names["y"].pinned
    desired.set_user_config(user(wanted("x", "c")))
    await desired.apply()
    assert world.names == {"x": "c", "y": "b"}


async def test_what_an_admin_deleted_stays_so_when_the_controller_dies(world: World) -> None:
    desired = world.start(wanted("x", "a"))
    desired.set_user_config(user(wanted("y", "b"), wanted("z", "c")))
    await desired.apply()
    for name in "xy":
        await world.rollout.delete(name)
    desired.set_user_config(user(wanted("y", "b")))
    await desired.apply()
    restarted = world.start(wanted("x", "a"))
    restarted.set_user_config(user(wanted("y", "b"), wanted("z", "c")))
    await restarted.apply()
    assert world.names == {"z": "c"}, "z had only left the configuration"
    assert await restarted.not_ready() is None
    restarted.set_user_config(user(wanted("y", "a"), wanted("z", "c")))
    await restarted.apply()
    assert world.names == {"y": "a", "z": "c"}


async def under_way(world: World, change: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A change that loads an adapter, until `may_publish` is set."""
    world.store.may_publish = asyncio.Event()
    num_published = world.store.num_published
    task = asyncio.create_task(change)
    while world.store.num_published == num_published:
        await asyncio.sleep(0)
    return task


async def settle(*tasks: asyncio.Task[Any]) -> None:
    for _ in range(20):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


async def test_a_user_config_that_comes_during_a_round_is_applied(world: World) -> None:
    desired = world.start()
    await desired.apply()
    await world.rollout.put("y", source="demo", key="c")
    desired.set_user_config(user(wanted("x", "b")))
    applying = await under_way(world, desired.apply())
    desired.set_user_config(user(wanted("x", "b"), wanted("y", "a")))
    assert world.store.may_publish is not None
    world.store.may_publish.set()
    await applying
    await desired.apply()
    assert world.names == {"x": "b", "y": "a"}


@pytest.mark.parametrize("wants", [user(), user(wanted("x", "b"))], ids=["deletes it", "replaces it"])
async def test_what_an_admin_loads_during_a_round_stays(world: World, wants: UserConfig) -> None:
    """The change is judged while the admin's is under way, and waits for it."""
    desired = world.start()
    desired.set_user_config(user(wanted("x", "a")))
    await desired.apply()
    loading = await under_way(world, world.rollout.put("x", source="demo", key="c"))
    desired.set_user_config(wants)
    applying = asyncio.create_task(desired.apply())
    await settle(applying, loading)
    assert world.store.may_publish is not None
    world.store.may_publish.set()
    await asyncio.gather(loading, applying)
    assert world.names == {"x": "c"}
    await desired.apply()
    assert world.names == {"x": "c"}


async def test_what_a_dead_worker_had_is_made_resident_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.cluster.admin.desired.POLL_S", 0.0)
    task = asyncio.create_task(world.start(wanted("x", "a")).run())
    try:
        async with asyncio.timeout(5):
            while not world.fleet.holders(world.store.keys["a"]):
                await asyncio.sleep(0)
            (holder,) = world.fleet.holders(world.store.keys["a"])
            del world.fleet.workers[holder]
            while not world.fleet.holders(world.store.keys["a"]):
                await asyncio.sleep(0)
    finally:
        task.cancel()


async def test_the_loop_follows_changes(world: World) -> None:
    desired = world.start()
    task = asyncio.create_task(desired.run())
    try:
        for key in "ab":
            desired.set_user_config(user(wanted("x", key)))
            async with asyncio.timeout(5):
                while world.names.get("x") != key:
                    await asyncio.sleep(0)
    finally:
        task.cancel()


async def test_a_user_config_that_is_refused_changes_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    desired = world.start()
    await desired.take_user_config(10, {"adapters": [wanted("x", "a").model_dump()]})
    await desired.apply()
    broken: list[object] = [{"adapters": [{"name": "x", "bogus": 1}]}, {"adaptors": []}, [], {"adapters": "x"}]
    for refused in broken:
        await desired.take_user_config(desired.generation + 1, refused)
        await desired.apply()
        assert world.names == {"x": "a"}
        assert await desired.not_ready() is None
        assert "user_config is refused" in caplog.messages[-1]
    await desired.take_user_config(20, {})
    await desired.apply()
    assert world.names == {}


async def test_the_first_user_config_of_all_is_refused(world: World) -> None:
    desired = world.start(wanted("y", "b"))
    await desired.take_user_config(40, {"adapters": "x"})
    await desired.apply()
    assert world.names == {"y": "b"}
    assert (await desired.not_ready() or "").startswith("user_config is refused: adapters")
    await desired.take_user_config(50, {"adapters": []})
    assert await desired.not_ready() is None
    assert desired.refusal is None


async def test_a_service_that_starts_with_a_refused_user_config_keeps_the_former_one(world: World) -> None:
    former = world.start()
    await former.take_user_config(30, {"adapters": [wanted("x", "a").model_dump()]})
    await former.apply()
    desired = world.start(wanted("y", "b"))
    await desired.take_user_config(40, {"adapters": [{"name": "x", "source": "demo", "key": "a", "pined": True}]})
    await desired.apply()
    assert world.names == {"x": "a", "y": "b"}
    assert await desired.not_ready() is None
    assert desired.refusal == "adapters.0.pined is not a known field"
    assert desired.generation == 40
    await desired.take_user_config(50, {"adapters": []})
    await desired.apply()
    assert world.names == {"y": "b"}
    assert await desired.not_ready() is None


async def test_an_older_user_config_is_refused_by_the_store_and_deletes_nothing(world: World) -> None:
    """An ingress that is on its way out tells a controller that has just taken over."""
    first = world.start()
    await first.take_user_config(1, {"adapters": [wanted("old", "a").model_dump()]})
    await first.apply()
    await first.take_user_config(2, {"adapters": [wanted("new", "b").model_dump()]})
    await first.apply()
    assert world.names == {"new": "b"}
    successor = world.start()
    await successor.take_user_config(1, {"adapters": [wanted("old", "a").model_dump()]})
    await successor.apply()
    assert world.names == {"new": "b"}
    assert successor.generation == 2


async def test_a_controller_that_takes_over_goes_on_from_the_store(world: World) -> None:
    assert not await world.start().resume()
    await world.start().take_user_config(5, {"adapters": [wanted("x", "a").model_dump()]})
    successor = world.start()
    assert await successor.resume()
    assert successor.generation == 5
    await successor.apply()
    assert world.names == {"x": "a"}
    await successor.take_user_config(6, {})
    await successor.apply()
    assert world.names == {}


async def test_nothing_is_deleted_because_a_damaged_entry_is_missing(world: World) -> None:
    first = world.start()
    await first.take_user_config(1, {"adapters": [wanted("x", "a").model_dump(), wanted("y", "b").model_dump()]})
    await first.apply()
    world.store.wanted = replace(world.store.wanted, adapters=world.store.wanted.adapters[:1], is_complete=False)
    successor = world.start()
    await successor.resume()
    await successor.apply()
    assert world.names == {"x": "a", "y": "b"}
    await successor.take_user_config(2, {"adapters": [wanted("x", "a").model_dump()]})
    await successor.apply()
    assert world.names == {"x": "a"}


async def test_ten_thousand_that_are_in_place_are_judged_at_once(world: World) -> None:
    """No name is asked for by itself, and no worker for an adapter that it has."""
    adapters = [wanted(f"n{number}", "a").model_dump() for number in range(10_000)]
    desired = world.start()
    for adapter in adapters:
        record = NameRecord(adapter["name"], world.store.keys["a"].version, "demo", "a", False, 1, "config")
        await world.store.flip(record)
    await world.rollout.put("n0", source="demo", key="a", origin="config")
    world.fleet.calls.clear()
    await desired.take_user_config(1, {"adapters": adapters})
    await desired.apply()
    assert len(world.names) == 10_000
    assert {call for call, _ in world.fleet.calls} == {"state"}
    assert len(world.fleet.calls) == len(world.fleet.workers)

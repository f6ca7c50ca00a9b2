"""Configuration's adapters: loaded, replaced and deleted in the background; what others brought is left alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

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
        return DesiredSet(self.rollout, preload, num_workers=len(self.fleet.workers))

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
    assert await desired.not_ready() == "no worker is up"


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
    desired.take_user_config({"adapters": [wanted("x", "a").model_dump()]})
    await desired.apply()
    broken: list[object] = [{"adapters": [{"name": "x", "bogus": 1}]}, {"adaptors": []}, [], {"adapters": "x"}]
    for refused in broken:
        desired.take_user_config(refused)
        await desired.apply()
        assert world.names == {"x": "a"}
        assert await desired.not_ready() is None
        assert "user_config is refused" in caplog.messages[-1]
    desired.take_user_config({})
    await desired.apply()
    assert world.names == {}


async def test_a_service_that_starts_with_a_refused_user_config_says_so_and_deletes_nothing(world: World) -> None:
    former = world.start()
    former.take_user_config({"adapters": [wanted("x", "a").model_dump()]})
    await former.apply()
    desired = world.start(wanted("y", "b"))
    desired.take_user_config({"adapters": [{"name": "x", "source": "demo", "key": "a", "pined": True}]})
    await desired.apply()
    assert world.names == {"x": "a", "y": "b"}
    assert await desired.not_ready() == "user_config is refused: adapters.0.pined is no known field"
    desired.take_user_config({"adapters": []})
    await desired.apply()
    assert world.names == {"y": "b"}
    assert await desired.not_ready() is None

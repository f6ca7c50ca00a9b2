"""Roll-outs are all or nothing, name the worker that cannot, and leave neither holds nor pins behind."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from lorafleet.adapter_store.errors import InvalidName, UnknownAdapter, UnknownKey
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.errors import (
    AdapterDoesNotFit,
    NoWorker,
    RolloutFailed,
    ServiceUnavailable,
    StoreUnavailable,
)
from lorafleet.workers.errors import AdapterUnavailable
from lorafleet.workers.state import WorkerState
from tests.cluster.fleets import DictFleet, DictStore, manifest_of

OLD, NEW, BIG = manifest_of("old"), manifest_of("new"), manifest_of("big", rank=60)


@dataclass(slots=True)
class World:
    store: DictStore
    fleet: DictFleet
    rollout: Rollout

    async def put(self, name: str, key: str, **options: object) -> None:
        await self.rollout.put(name, source="demo", key=key, **options)  # type: ignore[arg-type]

    def check_tidy(self) -> None:
        """No holds, and pins only where a pinned name wants them."""
        assert self.fleet.holds() == 0
        wanted = {adapter.version for adapter in self.store.names.values() if adapter.pinned}
        for worker in self.fleet.workers.values():
            if worker.worker_id not in self.fleet.gone:
                assert worker.pinned <= wanted


@pytest.fixture
def world() -> World:
    store = DictStore(keys={"old": OLD, "new": NEW, "big": BIG, "big2": manifest_of("big2", rank=60)})
    fleet = DictFleet(store)
    rollout = Rollout(store, fleet, reserved={"tiny"})
    return World(store, fleet, rollout)


@pytest.mark.parametrize(("warm", "count"), [(0, 0), (1, 1), (2, 2), (9, 3), ("all", 3)])
async def test_a_new_adapter_is_resident_on_as_many_workers_as_asked(world: World, warm: object, count: int) -> None:
    placed = await world.rollout.put("shout", source="demo", key="old", warm=warm)  # type: ignore[arg-type]
    assert len(world.fleet.holders(OLD)) == count
    assert placed.adapter.version == OLD.version
    assert world.store.names["shout"].version == OLD.version
    world.check_tidy()


async def test_a_replacement_goes_wherever_the_old_version_is(world: World) -> None:
    await world.put("shout", "old", warm=2)
    holders = world.fleet.holders(OLD)
    await world.put("shout", "new", warm=0)
    assert world.fleet.holders(NEW) == holders
    assert world.fleet.holders(OLD) == set()
    world.check_tidy()


async def test_a_replacement_takes_warm_others_too(world: World) -> None:
    await world.put("shout", "old", warm=1)
    await world.put("shout", "new", warm=1)
    assert len(world.fleet.holders(NEW)) == 2


async def test_the_old_version_stays_while_it_is_leased(world: World) -> None:
    await world.put("shout", "old")
    (holder,) = world.fleet.holders(OLD)
    world.fleet.workers[holder].leases[OLD.version] = 20
    await world.put("shout", "new")
    assert {holder} <= world.fleet.holders(NEW)
    assert world.fleet.holders(OLD) == {holder}
    world.fleet.workers[holder].leases.clear()
    await world.fleet.reconcile(holder)
    assert world.fleet.holders(OLD) == set()


async def test_one_worker_that_cannot_stops_everything_and_is_named(world: World) -> None:
    await world.put("shout", "old", warm="all")
    world.fleet.workers["w1"].leases[OLD.version] = 1
    world.fleet.workers["w1"].total = 5
    with pytest.raises(AdapterDoesNotFit, match=r"worker w1 has no room for 'shout': .*needs 4 pages"):
        await world.put("shout", "new", warm=0)
    assert world.store.names["shout"].version == OLD.version
    assert world.fleet.holders(NEW) == set()
    assert world.fleet.holders(OLD) == {"w0", "w1", "w2"}
    world.check_tidy()


async def test_a_worker_that_fails_otherwise_is_a_503_that_says_why(world: World) -> None:
    await world.put("shout", "old", warm="all")
    world.fleet.workers["w2"].error = AdapterUnavailable("the adapter's weights cannot be fetched now")
    with pytest.raises(
        RolloutFailed, match="worker w2 could not take 'shout': the adapter's weights cannot be fetched"
    ):
        await world.put("shout", "new")
    world.fleet.workers["w2"].error = OSError("/secret/path")
    with pytest.raises(RolloutFailed) as caught:
        await world.put("shout", "new")
    assert "secret" not in caught.value.message
    assert world.store.names["shout"].version == OLD.version
    world.check_tidy()


async def test_a_cold_adapter_goes_to_a_worker_that_has_room(world: World) -> None:
    await world.put("big", "big", pinned=False, warm=2)
    for worker_id in world.fleet.holders(BIG):
        world.fleet.workers[worker_id].leases[BIG.version] = 1
    await world.put("big2", "big2", warm=1)
    assert world.fleet.holders(world.store.keys["big2"]).isdisjoint(world.fleet.holders(BIG))
    with pytest.raises(AdapterDoesNotFit):
        await world.put("big2", "big2", warm="all")
    world.check_tidy()


async def test_what_fits_nowhere_is_refused_even_if_nobody_is_to_load_it(world: World) -> None:
    for worker in world.fleet.workers.values():
        worker.total = 30
    with pytest.raises(AdapterDoesNotFit, match="no room for 'big'"):
        await world.put("big", "big", warm=0)
    assert world.store.names == {}


async def test_pinned_means_everywhere(world: World) -> None:
    await world.put("shout", "old", pinned=True, warm=0)
    assert all(worker.pinned == {OLD.version} for worker in world.fleet.workers.values())
    await world.rollout.set_pinned("shout", False)
    assert all(not worker.pinned for worker in world.fleet.workers.values())
    await world.rollout.set_pinned("shout", True)
    assert all(worker.pinned == {OLD.version} for worker in world.fleet.workers.values())
    world.check_tidy()


async def test_pinning_more_than_fits_pins_nothing(world: World) -> None:
    await world.put("big", "big", pinned=True)
    await world.put("shout", "old")
    with pytest.raises(AdapterDoesNotFit):
        await world.put("big2", "big2", pinned=True)
    assert "big2" not in world.store.names
    for worker in world.fleet.workers.values():
        worker.total = 62
        worker.resident.pop(OLD.version, None)
    with pytest.raises(AdapterDoesNotFit):
        await world.rollout.set_pinned("shout", True)
    assert not world.store.names["shout"].pinned
    world.check_tidy()


async def test_a_worker_that_dies_meanwhile_does_not_stop_a_rollout(world: World) -> None:
    await world.put("shout", "old", warm="all")
    world.fleet.on_make_resident = lambda worker_id: world.fleet.gone.add("w0")
    await world.put("shout", "new", warm=0)
    assert world.fleet.holders(NEW) == {"w1", "w2"}
    assert world.store.names["shout"].version == NEW.version
    world.check_tidy()


async def test_all_workers_dead_is_a_503(world: World) -> None:
    world.fleet.on_make_resident = lambda worker_id: world.fleet.gone.update(world.fleet.workers)
    with pytest.raises(NoWorker, match="died"):
        await world.put("shout", "old")
    with pytest.raises(NoWorker, match="no worker is up"):
        await world.put("shout", "old")
    assert world.store.names == {}


async def test_a_store_that_goes_away_at_the_flip_leaves_nothing_staged(world: World) -> None:
    await world.put("shout", "old", warm="all")
    world.store.fail_flip = StoreUnavailable("away")
    with pytest.raises(StoreUnavailable):
        await world.put("shout", "new", pinned=True)
    assert world.fleet.holders(NEW) == set()
    world.check_tidy()


async def test_a_client_that_goes_away_does_not_stop_a_rollout(world: World) -> None:
    world.store.may_publish = asyncio.Event()
    task = asyncio.create_task(world.put("shout", "old"))
    while not world.store.num_published:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    world.store.may_publish.set()
    async with asyncio.timeout(5):
        while world.rollout._under_way:
            await asyncio.sleep(0)
    assert world.store.names["shout"].version == OLD.version
    world.check_tidy()


async def test_changes_of_one_name_come_one_after_another(world: World) -> None:
    await asyncio.gather(*(world.put("shout", key, warm="all") for key in ("old", "new") * 10))
    assert world.fleet.holders(NEW) == {"w0", "w1", "w2"}
    assert world.fleet.holders(OLD) == set()
    assert world.store.names["shout"].version == NEW.version
    assert not world.rollout._locks


async def test_two_names_of_one_version_both_keep_it(world: World) -> None:
    await world.put("shout", "old", warm="all")
    await world.put("yell", "old", warm="all")
    await world.rollout.delete("shout")
    assert world.fleet.holders(OLD) == {"w0", "w1", "w2"}
    await world.rollout.delete("yell")
    assert world.fleet.holders(OLD) == set()


async def test_delete_frees(world: World) -> None:
    await world.put("shout", "old")
    await world.rollout.delete("shout")
    assert world.store.names == {}
    assert world.fleet.holders(OLD) == set()
    with pytest.raises(UnknownAdapter):
        await world.rollout.delete("shout")
    with pytest.raises(UnknownAdapter):
        await world.rollout.set_pinned("shout", True)
    with pytest.raises(UnknownAdapter):
        await world.rollout.adapter("shout")


@pytest.mark.parametrize("name", ["", "-a", "a//b", "a:b", "a b", "a\n", "ä", "a" * 129, "tiny"])
async def test_names_outside_the_grammar_and_the_bases_are_refused_before_anything_happens(
    world: World, name: str
) -> None:
    with pytest.raises(InvalidName):
        await world.put(name, "old")
    assert world.store.num_published == 0


async def test_a_source_that_has_nothing_changes_nothing(world: World) -> None:
    with pytest.raises(UnknownKey):
        await world.put("shout", "nowhere")
    assert world.fleet.calls == []


async def test_validate_says_what_it_would_take_and_evict(world: World) -> None:
    await world.put("big", "big", warm="all")
    world.fleet.workers["w1"].leases[BIG.version] = 1
    validation = await world.rollout.validate("demo", "big2")
    by_worker = {estimate.worker_id: estimate for estimate in validation.estimates}
    assert by_worker["w0"].evicts == (BIG.version,)
    assert by_worker["w0"].pages == 60
    assert by_worker["w1"].refusal is not None
    assert world.store.names.keys() == {"big"}
    assert world.store.num_published == 1


async def test_tables_show_names_and_the_dead_are_left_out(world: World) -> None:
    await world.put("shout", "old", warm="all")
    world.fleet.gone.add("w0")
    assert [state.worker_id for state in (await world.rollout.workers()).states] == ["w1", "w2"]
    assert (await world.rollout.workers()).states[0].adapters[0].name == "shout"
    (placed,) = await world.rollout.adapters()
    assert placed.workers == {"w1": "resident", "w2": "resident"}
    assert placed.pages == OLD.rank


async def test_a_silent_worker_is_listed_as_unknown(world: World) -> None:
    await world.put("shout", "old", warm="all")
    ask = world.fleet.state

    async def state(worker_id: str) -> WorkerState:
        if worker_id == "w1":
            raise ServiceUnavailable("worker w1 does not answer")
        return await ask(worker_id)

    world.fleet.state = state  # type: ignore[method-assign]
    expected = {"w0": "resident", "w1": "unknown", "w2": "resident"}
    listed = await world.rollout.workers()
    assert ([state.worker_id for state in listed.states], listed.silent) == (["w0", "w2"], ("w1",))
    (placed,) = await world.rollout.adapters()
    assert placed.workers == expected
    assert (await world.rollout.adapter("shout")).workers == expected


async def test_warm_makes_resident_what_has_a_name(world: World) -> None:
    await world.put("shout", "old", warm=0)
    await world.rollout.warm("shout", 2)
    assert len(world.fleet.holders(OLD)) == 2
    await world.rollout.warm("shout", 1)
    assert len(world.fleet.holders(OLD)) == 2
    await world.rollout.warm("shout", "all")
    assert len(world.fleet.holders(OLD)) == 3
    world.check_tidy()

"""The routers, driven as Ray Serve drives them, over replicas that only have an id and a report."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest, RequestRouter

from lorafleet.cluster import ray_internals
from lorafleet.cluster.errors import Overloaded, StoreUnavailable, WorkerGone
from lorafleet.cluster.routing.sole_router import SoleRouter
from lorafleet.cluster.routing.whereabouts import live_workers, note_resident, worker_of
from lorafleet.cluster.routing.worker_router import WorkerRouter
from lorafleet.cluster.wire import VERSION_PREFIX, RoutingReport
from lorafleet.workers.request import EngineRequest, SamplingParams

DEPLOYMENT = DeploymentID(name="worker", app_name="lorafleet")
SHOUT = "aa" * 20


@dataclass(slots=True)
class FakeReplica:
    """What a router sees of a replica."""

    worker_id: str
    routing_stats: dict[str, Any] = field(default_factory=dict)
    max_ongoing_requests: int = 1000

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.worker_id, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


def replicas(*worker_ids: str, resident: Iterable[str] = ()) -> list[Any]:
    stats = RoutingReport(tuple(version[:VERSION_PREFIX] for version in resident), free_pages=10).packed()
    return [FakeReplica(worker_id, stats) for worker_id in worker_ids]


def worker_router(*, max_load: int = 2, max_queued: int = 3) -> WorkerRouter:
    router = WorkerRouter(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)
    router.initialize_state(max_load=max_load, max_queued=max_queued, spill_gap=8, memory_s=5.0)
    return router


def call(
    version: str | None = None, *, method: str = "generate", request_id: str = "r", **kwargs: Any
) -> PendingRequest:
    """A call as Serve hands it over; those of one HTTP request share an internal id, as all of these do."""
    request = EngineRequest(request_id, version, (1, 2), SamplingParams())
    metadata = RequestMetadata(request_id="http", internal_request_id="http", call_method=method)
    return PendingRequest(args=[request], kwargs=kwargs, metadata=metadata)


async def place(router: RequestRouter, pending: PendingRequest, *, is_retry: bool = False) -> str:
    replica = await router._choose_replica_for_request(pending, is_retry=is_retry)
    worker_id: str = replica.replica_id.unique_id
    return worker_id


def complete(router: WorkerRouter, worker_id: str) -> None:
    router.on_request_completed(ReplicaID(worker_id, DEPLOYMENT), "http")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_serve_still_has_what_the_routers_build_on() -> None:
    for name in ("_choose_replica_for_request", "on_request_completed", "on_replica_actor_died", "update_replicas"):
        assert callable(getattr(RequestRouter, name)), name


async def test_places_by_residency_and_says_where() -> None:
    router = worker_router(max_load=10)
    router.update_replicas([*replicas("w0"), *replicas("w1", resident=[SHOUT])])
    assert [await place(router, call(SHOUT, request_id=f"r{i}")) for i in range(3)] == ["w1"] * 3
    assert worker_of("r2") == "w1"
    assert worker_of("unknown") is None
    assert live_workers(DEPLOYMENT) >= {"w0", "w1"}


async def test_calls_of_one_http_request_each_get_a_worker() -> None:
    router = worker_router(max_load=2)
    router.update_replicas(replicas("w0", "w1"))
    placed = await asyncio.gather(*(place(router, call(request_id=f"r{i}")) for i in range(4)))
    assert sorted(placed) == ["w0", "w0", "w1", "w1"]


async def test_those_that_find_all_full_wait_in_order_and_beyond_the_bound_are_refused() -> None:
    router = worker_router(max_load=1, max_queued=2)
    router.update_replicas(replicas("w0"))
    await place(router, call())
    waiting = [asyncio.create_task(place(router, call())) for _ in range(2)]
    await settle()
    with pytest.raises(Overloaded) as caught:
        await place(router, call())
    assert caught.value.retry_after_s
    complete(router, "w0")
    await settle()
    assert [task.done() for task in waiting] == [True, False]
    complete(router, "w0")
    assert await asyncio.gather(*waiting) == ["w0", "w0"]


async def test_who_can_only_be_served_where_its_adapter_is_waits_there_and_holds_up_nobody() -> None:
    router = worker_router(max_load=1)
    router.update_replicas([*replicas("w0"), *replicas("w1", resident=[SHOUT])])
    assert await place(router, call(SHOUT, only_resident=True)) == "w1"
    waiting = asyncio.create_task(place(router, call(SHOUT, only_resident=True)))
    await settle()
    assert not waiting.done()
    assert await place(router, call()) == "w0"
    complete(router, "w1")
    assert await waiting == "w1"


async def test_waiters_start_as_soon_as_a_worker_comes() -> None:
    router = worker_router()
    waiting = asyncio.create_task(place(router, call()))
    await settle()
    assert not waiting.done()
    router.update_replicas(replicas("w0"))
    assert await waiting == "w0"


@pytest.mark.parametrize("when", ["waiting", "placed"])
async def test_a_cancelled_call_gives_its_place_back(when: str) -> None:
    router = worker_router(max_load=1)
    router.update_replicas(replicas("w0"))
    await place(router, call())
    cancelled = asyncio.create_task(place(router, call()))
    other = asyncio.create_task(place(router, call()))
    await settle()
    if when == "placed":
        complete(router, "w0")  # the future has its worker, the task has not run yet
    cancelled.cancel()
    await settle()
    if when == "waiting":
        complete(router, "w0")
    assert await other == "w0"
    assert cancelled.cancelled()


async def test_an_addressed_call_goes_there_even_if_it_is_full_and_fails_if_it_is_gone() -> None:
    router = worker_router(max_load=1)
    router.update_replicas(replicas("w0", "w1"))
    await place(router, call())
    await place(router, call())
    for worker_id in ("w0", "w1"):
        assert await place(router, call(method="state", worker_id=worker_id)) == worker_id
    with pytest.raises(WorkerGone, match="w2"):
        await place(router, call(method="state", worker_id="w2"))


async def test_a_version_that_a_worker_is_known_to_have_counts_as_there() -> None:
    router = worker_router(max_load=100)
    router.update_replicas(replicas("w0", "w1"))
    note_resident(SHOUT, ["w1"])
    assert {await place(router, call(SHOUT)) for _ in range(5)} == {"w1"}


async def test_excluded_workers_are_avoided_while_there_are_others() -> None:
    router = worker_router(max_load=100)
    router.update_replicas(replicas("w0", "w1", resident=[SHOUT]))
    excluded = frozenset({"w0"})
    assert {await place(router, call(SHOUT, excluded=excluded)) for _ in range(8)} == {"w1"}
    router.update_replicas(replicas("w0"))
    assert await place(router, call(SHOUT, excluded=excluded)) == "w0"


async def test_one_that_waits_for_another_worker_does_not_hold_up_those_behind() -> None:
    router = worker_router(max_load=1)
    router.update_replicas(replicas("w0", "w1"))
    placed = [await place(router, call()), await place(router, call())]
    assert sorted(placed) == ["w0", "w1"]
    picky = asyncio.create_task(place(router, call(excluded=frozenset({"w0"}))))
    other = asyncio.create_task(place(router, call()))
    await settle()
    complete(router, "w0")
    assert await other == "w0"
    complete(router, "w1")
    assert await picky == "w1"


async def test_a_rejected_call_tries_another_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_internals, "RETRY_PAUSE_S", 0.0)
    router = worker_router(max_load=100)
    router.update_replicas(replicas("w0", "w1"))
    for _ in range(8):
        pending = call(SHOUT)
        first = await place(router, pending)
        complete(router, first)
        assert await place(router, pending, is_retry=True) != first


async def test_nothing_goes_to_a_dead_worker_and_its_load_is_forgotten() -> None:
    router = worker_router(max_load=2)
    router.update_replicas(replicas("w0", "w1"))
    await asyncio.gather(*(place(router, call()) for _ in range(4)))
    waiting = asyncio.create_task(place(router, call()))
    await settle()
    router.on_replica_actor_died(ReplicaID("w0", DEPLOYMENT))
    router.update_replicas(replicas("w1", "w2"))
    assert await waiting == "w2"
    complete(router, "w0")  # late news of the dead
    assert await place(router, call()) == "w2"


async def test_the_store_is_missed_at_once_but_waited_for_at_the_start() -> None:
    router = SoleRouter(
        deployment_id=DeploymentID("adapter_store", "lorafleet"), handle_source=DeploymentHandleSource.REPLICA
    )
    router.initialize_state()
    first = asyncio.create_task(place(router, call()))
    await settle()
    assert not first.done()
    router.update_replicas(replicas("store"))
    assert await first == "store"
    router.on_replica_actor_died(ReplicaID("store", DEPLOYMENT))
    with pytest.raises(StoreUnavailable):
        await place(router, call())
    router.update_replicas(replicas("new"))
    assert await place(router, call()) == "new"


async def test_what_other_routers_sent_counts_and_ones_own_does_not_count_twice() -> None:
    router = worker_router(max_load=40)
    mine, theirs = "a" * 32, "b" * 32

    def report(worker_id: str, *answering: tuple[str, int]) -> FakeReplica:
        return FakeReplica(worker_id, RoutingReport(answering=answering).packed())

    def ask() -> PendingRequest:
        request = call()
        request.args.append(mine)
        return request

    router.update_replicas([report("w0"), report("w1", (theirs, 20))])
    chosen = [await router.choose(ask(), is_retry=False) for _ in range(10)]
    assert {replica.replica_id.unique_id for replica in chosen} == {"w0"}
    router.update_replicas([report("w0", (mine, 10), (theirs, 20)), report("w1", (theirs, 15))])
    assert (await router.choose(ask(), is_retry=False)).replica_id.unique_id == "w1"
    router.update_replicas([report("w0", (mine, 10)), report("w1", (mine, 1), (theirs, 30))])
    assert (await router.choose(ask(), is_retry=False)).replica_id.unique_id == "w0"

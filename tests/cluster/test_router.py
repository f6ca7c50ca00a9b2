"""The routers, driven as Ray Serve drives them, over replicas that only have an id and a report."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest, RequestRouter

from lorafleet.cluster.errors import StoreUnavailable, WorkerGone
from lorafleet.cluster.routing.sole_router import SoleRouter
from lorafleet.cluster.routing.whereabouts import live_workers, watch, workers_of
from lorafleet.cluster.routing.worker_router import WorkerRouter
from lorafleet.cluster.wire import VERSION_PREFIX, RoutingReport

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


def worker_router(app: str) -> WorkerRouter:
    router = WorkerRouter(deployment_id=DeploymentID("worker", app), handle_source=DeploymentHandleSource.REPLICA)
    router.initialize_state()
    return router


def call(**kwargs: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id="http", internal_request_id="http", call_method="state")
    return PendingRequest(args=[], kwargs=kwargs, metadata=metadata)


async def place(router: RequestRouter, pending: PendingRequest, *, is_retry: bool = False) -> str:
    replica = await router._choose_replica_for_request(pending, is_retry=is_retry)
    worker_id: str = replica.replica_id.unique_id
    return worker_id


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_serve_still_has_what_the_routers_build_on() -> None:
    for name in ("_choose_replica_for_request", "on_replica_actor_died", "update_replicas"):
        assert callable(getattr(RequestRouter, name)), name


async def test_a_call_goes_to_its_worker_and_fails_if_that_is_gone() -> None:
    router = worker_router("calls")
    router.update_replicas(replicas("w0", "w1"))
    for worker_id in ("w0", "w1"):
        assert await place(router, call(worker_id=worker_id)) == worker_id
    router.on_replica_actor_died(ReplicaID("w0", DEPLOYMENT))
    for is_retry in (False, True):
        with pytest.raises(WorkerGone, match="w0"):
            await place(router, call(worker_id="w0"), is_retry=is_retry)


async def test_what_routers_hear_is_told_to_who_watches() -> None:
    class Watcher:
        num_told = 0

        def hear(self) -> None:
            self.num_told += 1

        def note_resident(self, version: str, worker_id: str) -> None:
            raise AssertionError

    router, other, watcher = worker_router("told"), worker_router("other"), Watcher()
    watch(watcher, router.deployment_id)
    other.update_replicas(replicas("w9"))
    assert watcher.num_told == 0
    router.update_replicas([*replicas("w0"), *replicas("w1", resident=[SHOUT])])
    assert {key: report.resident for key, report in workers_of(router.deployment_id).items()} == {
        "w0": (),
        "w1": (SHOUT[:VERSION_PREFIX],),
    }
    router.on_replica_actor_died(ReplicaID("w0", DEPLOYMENT))
    assert live_workers(router.deployment_id) == {"w1"}
    assert watcher.num_told == 2


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

"""The deployment of one worker: `workers.worker.Worker` behind Serve's calls, with its way to the adapter store.

Methods that take a `worker_id` go to that worker: `WorkerRouter` reads the argument, here it is only checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.adapter_store.names import VersionsToKeep
from lorafleet.cluster import heap, ray_internals
from lorafleet.cluster.config import AppConfig
from lorafleet.cluster.metrics import WorkerMetrics
from lorafleet.cluster.store.client import StoreClient
from lorafleet.cluster.watchdog import Watchdog
from lorafleet.cluster.wire import (
    VERSION_PREFIX,
    Address,
    RoutingReport,
    WorkerCounts,
    replying,
)
from lorafleet.cluster.worker.answer_server import AnswerServer
from lorafleet.cluster.worker.reconciler import Reconciler
from lorafleet.cluster.worker.spare_keeper import HOOK, SpareKeeper
from lorafleet.workers.state import WorkerState
from lorafleet.workers.worker import Worker

logger = logging.getLogger(__name__)

METRICS_PERIOD_S = 1.0
STORE_PATIENCE_S = 60.0
"""How long a new worker waits for the store; then it serves the base, and adapters once the store is there."""


class WorkerReplica:
    """One worker of the service."""

    def __init__(self, config: AppConfig, store: DeploymentHandle[Any]) -> None:
        if config.worker.resolved_device == "cpu":
            threads = config.worker.cpu_threads or cpu_share(config.worker.num_replicas)
            torch.set_num_threads(max(1, threads // config.worker.tensor_parallel_size))
        elif (told := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
            torch.set_num_threads(int(told))  # Ray sets it for an actor, which may be after the imports
        self.worker_id: str = serve.get_replica_context().replica_id.unique_id
        self._store = StoreClient(store)
        self._worker = Worker(
            worker_id=self.worker_id,
            model=config.model,
            engine=config.worker.engine,
            pool=config.adapters.pool,
            fetch=self._store.fetch,
            node_id=ray.get_runtime_context().get_node_id(),
        )
        self._server = AnswerServer(
            self._worker.begin, ray.util.get_node_ip_address(), is_alive=lambda: not self._worker.is_stalled
        )
        self._reconciler = Reconciler(self._worker, self._ask_store)
        self._may_begin = False
        self._metrics = WorkerMetrics(self.worker_id)
        self._watchdog = Watchdog(lambda: self._worker.is_stalled)
        self._spares: SpareKeeper | None = None
        if config.worker.spare_processes and ray_internals.has_hook(HOOK):
            self._spares = SpareKeeper(
                ray_internals.folder_of_environment(),
                config.worker.spare_processes,
                ray_internals.start_spare_process,
            )
        self._tasks = [
            asyncio.create_task(self._reconciler.run()),
            asyncio.create_task(self._report()),
            asyncio.create_task(self._watchdog.run()),
        ]

    async def connection(self, worker_id: str) -> AsyncIterator[Address]:
        """Yield the address at which this worker takes requests. The call stays open as long as its ingress has some.

        Serve counts it: the worker does not end before it.
        """
        self._check(worker_id)
        yield await self._server.address()
        await asyncio.Event().wait()

    @replying
    async def state(self, worker_id: str) -> WorkerState:
        """Return this worker's residents, memory and load."""
        self._check(worker_id)
        return await self._worker.state()

    @replying
    async def counts(self, worker_id: str) -> WorkerCounts:
        """Return this worker's state and its counts of work done."""
        self._check(worker_id)
        return WorkerCounts(await self._worker.state(), await self._worker.served())

    @replying
    async def make_resident(self, version: str, *, hold_s: float, pinned: bool, worker_id: str) -> None:
        """Load a version and hold it. Raises NoRoomError, and what fetching raises."""
        self._check(worker_id)
        await self._worker.make_resident(version, hold_s=hold_s, pinned=pinned)

    @replying
    async def release_hold(self, version: str, worker_id: str) -> None:
        """End the hold of one `make_resident`."""
        self._check(worker_id)
        await self._worker.release_hold(version)

    @replying
    async def estimate(self, manifest: AdapterManifest, worker_id: str) -> tuple[int, tuple[str, ...]]:
        """Pages an adapter would take, and the versions it would evict. Raises NoRoomError."""
        self._check(worker_id)
        return await self._worker.estimate(manifest)

    @replying
    async def reconcile(self, worker_id: str) -> None:
        """Ask the store, now, what to hold. Raises StoreUnavailable."""
        self._check(worker_id)
        await self._reconciler.once()

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises: the step loop has ended or stands still.

        Serve sends requests once the first check has passed. It waits for the store, so that a worker that takes over
        from another one during an update can fetch what it lacks.
        """
        if not self._may_begin:
            await self._reconciler.await_first(STORE_PATIENCE_S)
            heap.settle()
            self._may_begin = True
            if self._spares is not None:
                self._tasks.append(asyncio.create_task(self._spares.run()))
        self._worker.check_health()

    async def record_routing_stats(self) -> dict[str, Any]:
        """The report that Serve's controller passes on to the routers, about once a second."""
        state = await self._worker.state()
        held = (adapter.version[:VERSION_PREFIX] for adapter in state.adapters if adapter.state != "retired")
        pages = state.adapter_pages
        # Sorted: the pool lists adapters in LRU order, and Serve broadcasts every report that differs from the last.
        return RoutingReport(tuple(sorted(held)), pages.total - pages.used, self._server.loads()).packed()

    def __del__(self) -> None:
        """Serve calls this when the replica has drained."""
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        spares = getattr(self, "_spares", None)
        if spares is not None:
            spares.close()
        if hasattr(self, "_server"):
            self._server.close()
        if hasattr(self, "_worker"):
            self._worker.close()

    def _check(self, worker_id: str) -> None:
        assert worker_id == self.worker_id, f"a call to worker {worker_id} reached {self.worker_id}"

    async def _ask_store(self, held: tuple[str, ...] | None, generation: int) -> VersionsToKeep | None:
        return await self._store.reconcile(self.worker_id, held, generation)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(METRICS_PERIOD_S)
            with contextlib.suppress(Exception):
                state, residency = await self._worker.state(), await self._worker.residency()
                self._metrics.publish(state, residency, self._worker.stats, self._worker.loader.load_s)


def cpu_share(num_workers: int) -> int:
    """Threads of one of `num_workers` workers that share this machine: its cores, or what Ray was told of them."""
    node_id = ray.get_runtime_context().get_node_id()
    told = next((node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["NodeID"] == node_id), 1.0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(told, cores)) // num_workers)

"""The client of the workers for all calls to one of them but sequences (`front.py`). Hides Ray's error types.

Worker ids come from the handle's request router, which hears of deaths and joins first. A call to a worker that is not
there fails; no other worker gets it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.handle import DeploymentHandle

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.cluster.errors import ServiceUnavailable, WorkerGone
from lorafleet.cluster.routing.calls import answer_of
from lorafleet.cluster.routing.whereabouts import live_workers
from lorafleet.cluster.wire import WorkerCounts
from lorafleet.workers.errors import EngineFailed
from lorafleet.workers.state import WorkerState

CALL_S = 10.0
"""How long a worker may take to answer what needs no loading."""
COUNTS_S = 3.0
"""How long a worker may take to report its counts: a scrape does not wait for long."""
STATE_S = 3.0
"""How long a worker may take to say what it holds: a listing goes on without one that is silent."""
LOAD_S = 600.0
"""How long a worker may take to make an adapter resident."""


class WorkersClient:
    """Workers behind the handle of a `WorkerReplica` deployment, routed by `WorkerRouter`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        # The first `options` starts the handle's router, which then begins to hear of replicas.
        self._handle = handle.options(method_name="state")

    async def worker_ids(self) -> frozenset[str]:
        return live_workers(self._handle.deployment_id)

    async def state(self, worker_id: str) -> WorkerState:
        state: WorkerState = await self._call(worker_id, "state", STATE_S)
        return state

    async def counts(self) -> list[WorkerCounts]:
        """Return the counts of every worker that answers in time."""
        asked = [self._call(worker_id, "counts", COUNTS_S) for worker_id in sorted(await self.worker_ids())]
        found = await asyncio.gather(*asked, return_exceptions=True)
        return [each for each in found if isinstance(each, WorkerCounts)]

    async def make_resident(self, worker_id: str, version: str, *, hold_s: float, pinned: bool) -> None:
        await self._call(worker_id, "make_resident", LOAD_S, version, hold_s=hold_s, pinned=pinned)

    async def release_hold(self, worker_id: str, version: str) -> None:
        await self._call(worker_id, "release_hold", CALL_S, version)

    async def estimate(self, worker_id: str, manifest: AdapterManifest) -> tuple[int, tuple[str, ...]]:
        num_pages, evicted = await self._call(worker_id, "estimate", CALL_S, manifest)
        return num_pages, evicted

    async def reconcile(self, worker_id: str) -> None:
        await self._call(worker_id, "reconcile", CALL_S)

    async def _call(self, worker_id: str, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        gone = WorkerGone(f"worker {worker_id} is gone")
        try:
            return await answer_of(
                self._handle.options(method_name=method).remote(*args, worker_id=worker_id, **kwargs),
                timeout_s,
                late=ServiceUnavailable(f"worker {worker_id} does not answer", None, 5.0),
                away=gone,
            )
        except EngineFailed as error:
            # A worker whose step loop has ended is about to be replaced.
            raise gone from error

"""The workers as the admin plane sees them: who is alive, and calls to one of them.

Ids come from the request router of the handle, which hears of deaths and joins first; a call to a worker that is not
there fails instead of going elsewhere.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.cluster.errors import ServiceUnavailable, WorkerGone, unwrap
from lorafleet.cluster.routing.whereabouts import live_workers
from lorafleet.cluster.wire import WorkerCounts, result_of
from lorafleet.workers.errors import EngineFailed
from lorafleet.workers.state import WorkerState

CALL_S = 10.0
"""How long a worker may take to answer what needs no loading."""
COUNTS_S = 3.0
"""How long one may take to say what it has served: a scrape does not wait for long."""
LOAD_S = 600.0
"""How long a worker may take to make an adapter resident."""


class Fleet(Protocol):
    """All workers. A call to one raises WorkerGone when it is not there, and ServiceUnavailable when it is silent."""

    async def worker_ids(self) -> frozenset[str]:
        """The workers that take requests now."""
        ...

    async def state(self, worker_id: str) -> WorkerState:
        """What a worker holds and does."""
        ...

    async def make_resident(self, worker_id: str, version: str, *, hold_s: float, pinned: bool) -> None:
        """Load a version and hold it. Raises NoRoomError, and what fetching raises."""
        ...

    async def release_hold(self, worker_id: str, version: str) -> None:
        """End the hold of one `make_resident`."""
        ...

    async def estimate(self, worker_id: str, manifest: AdapterManifest) -> tuple[int, tuple[str, ...]]:
        """Pages the adapter would take, and the versions it would evict. Raises NoRoomError."""
        ...

    async def reconcile(self, worker_id: str) -> None:
        """Have a worker ask the store what it is to hold, now."""
        ...


class ServeFleet:
    """The fleet behind a Serve handle, whose deployment is a `WorkerReplica` routed by `WorkerRouter`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        # The router of a handle starts, and begins to hear of replicas, with its first use.
        self._handle = handle.options(method_name="state")

    async def worker_ids(self) -> frozenset[str]:
        return live_workers(self._handle.deployment_id)

    async def state(self, worker_id: str) -> WorkerState:
        state: WorkerState = await self._call(worker_id, "state", CALL_S)
        return state

    async def counts(self) -> list[WorkerCounts]:
        """What each worker has served, of those that say so in time."""
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
        response = self._handle.options(method_name=method).remote(*args, worker_id=worker_id, **kwargs)
        try:
            async with asyncio.timeout(timeout_s):
                return result_of(await response)
        except TimeoutError:
            response.cancel()
            raise ServiceUnavailable(f"worker {worker_id} does not answer", None, 5.0) from None
        except RayTaskError as error:
            raise unwrap(error) from error
        except (RayActorError, DeploymentUnavailableError, EngineFailed) as error:
            # A worker whose step loop has ended is about to be replaced.
            raise WorkerGone(f"worker {worker_id} is gone") from error

"""The calls to workers that the control plane makes; `cluster/worker/client.py` makes them over Ray Serve."""

from __future__ import annotations

from typing import Protocol

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.workers.state import WorkerState


class Fleet(Protocol):
    """All workers. A call to one raises WorkerGone when it is not there, and ServiceUnavailable when it is silent."""

    async def worker_ids(self) -> frozenset[str]:
        """The workers that take requests now."""
        ...

    async def state(self, worker_id: str) -> WorkerState:
        """Return a worker's residents, memory and load."""
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

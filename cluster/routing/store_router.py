"""Routes calls to the one replica of the adapter store, and fails at once while there is none."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ray.serve.request_router import PendingRequest, RunningReplica

from lorafleet.cluster.errors import StoreUnavailable
from lorafleet.cluster.ray_internals import DirectRouter

START_PATIENCE_S = 5.0
"""How long a router that has never seen a replica waits for the first one."""


class StoreRouter(DirectRouter):
    """Routes to the one replica of the adapter store; raises StoreUnavailable at once while there is none."""

    def initialize_state(self, **_: Any) -> None:
        """Take `request_router_kwargs`: there are none."""
        self._seen = asyncio.Event()

    async def choose(self, request: PendingRequest, is_retry: bool) -> RunningReplica:
        """Return the store. Raises StoreUnavailable."""
        if not self._seen.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._seen.wait(), START_PATIENCE_S)
        for replica in self.replicas.values():
            return replica
        raise StoreUnavailable("the adapter store is away; it is being restarted", retry_after_s=2.0)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The controller says whether the store is there."""
        super().update_replicas(replicas)
        if replicas:
            self._seen.set()

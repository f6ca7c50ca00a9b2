"""Routes calls to the one replica of the adapter store or of the controller, and fails at once while there is none."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ray.serve.request_router import PendingRequest, RunningReplica

from lorafleet.cluster.errors import ControllerUnavailable, ServiceUnavailable, StoreUnavailable
from lorafleet.cluster.ray_internals import DirectRouter

START_PATIENCE_S = 5.0
"""How long a router that has never seen a replica waits for the first one."""
RESTARTS_S = 2.0
"""When a caller may ask again: a replica that died is back about then."""

_AWAY: dict[str, type[ServiceUnavailable]] = {"adapter_store": StoreUnavailable, "controller": ControllerUnavailable}


class SoleRouter(DirectRouter):
    """Routes to the only replica of a deployment. Raises the deployment's own error while it is away."""

    def initialize_state(self, **_: Any) -> None:
        """Take `request_router_kwargs`: there are none."""
        self._seen = asyncio.Event()

    async def choose(self, request: PendingRequest, is_retry: bool) -> RunningReplica:
        """Return the replica. Raises StoreUnavailable or ControllerUnavailable."""
        if not self._seen.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._seen.wait(), START_PATIENCE_S)
        for replica in self.replicas.values():
            return replica
        name: str = self.deployment_id.name
        raise _AWAY[name](f"the {name.replace('_', ' ')} is away; it is being restarted", retry_after_s=RESTARTS_S)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The controller says whether the replica is there."""
        super().update_replicas(replicas)
        if replicas:
            self._seen.set()

"""Routes calls to the workers, each to the one that its `worker_id` argument names, and hears which workers there are.

Requests do not come this way: each ingress sends them over connections of its own (`cluster/worker/client.py`), to
workers that `worker_queue.py` chooses from what is heard here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from lorafleet.cluster.errors import WorkerGone
from lorafleet.cluster.ray_internals import DirectRouter
from lorafleet.cluster.routing.whereabouts import note_router, tell
from lorafleet.cluster.wire import RoutingReport


class WorkerRouter(DirectRouter):
    """Lives on the event loop of its handle's router, which may run in a thread of its own."""

    def initialize_state(self, **_: Any) -> None:
        """Take `request_router_kwargs`: there are none."""
        self.workers: Mapping[str, RoutingReport] = {}
        """Workers that take calls now, and their latest reports. Replaced whole, so any thread may read it."""
        note_router(self)

    async def choose(self, request: PendingRequest, is_retry: bool) -> RunningReplica:
        """Return the named worker. Raises WorkerGone if it is not there."""
        worker_id = request.kwargs["worker_id"]
        for replica_id, replica in self.replicas.items():
            if replica_id.unique_id == worker_id:
                return replica
        raise WorkerGone(f"worker {worker_id} is gone")

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A worker was found dead: nothing goes there any more."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The controller says who is there, and passes on what the workers report of themselves."""
        super().update_replicas(replicas)
        self._tell()

    def _tell(self) -> None:
        self.workers = {
            replica_id.unique_id: RoutingReport.unpacked(replica.routing_stats)
            for replica_id, replica in self.replicas.items()
        }
        tell(self.deployment_id)

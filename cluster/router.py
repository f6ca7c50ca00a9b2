"""How calls find their replica: Ray Serve request routers for the workers and for the adapter store.

`WorkerRouter` places requests as `cluster/placement.py` says, takes a call with a `worker_id` argument to that worker
and nowhere else, keeps the requests that find all workers full in order of arrival, and refuses more than `max_queued`
of them at once. `StoreRouter` fails at once while the store is away, so that nobody waits for it. Both choose without
asking replicas for their queue lengths: Serve's own queue of routing tasks, with its polls and back-off, stays empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from lorafleet.cluster.errors import Overloaded, StoreUnavailable, WorkerGone
from lorafleet.cluster.metrics import QueueMetrics
from lorafleet.cluster.placement import Candidate, Placement
from lorafleet.cluster.whereabouts import note_request, note_router

RETRY_PAUSE_S = 0.02
"""Pause before a call that a replica rejected (it is shutting down, or full) is sent again."""
_NO_REPORT: tuple[frozenset[str], int] = (frozenset(), 0)
PROBE_S = 5.0
"""How long a new replica may take to answer Serve's question for its queue length, of which nothing depends here."""
START_PATIENCE_S = 5.0
"""How long a router that has never seen a replica waits for the first one."""


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for a worker."""

    version: str | None
    request_id: str | None
    excluded: frozenset[str]
    """Workers that failed or rejected it; taken again only if there is no other."""
    chosen: asyncio.Future[RunningReplica] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class WorkerRouter(RequestRouter):
    """Routes to workers by residency and load. Lives on the event loop of its handle's router."""

    queue_len_response_deadline_s = max_queue_len_response_deadline_s = PROBE_S

    def initialize_state(self, *, max_load: int, max_queued: int, spill_gap: int, memory_s: float, **_: Any) -> None:
        """Take `request_router_kwargs`: see `Placement`; `max_queued` bounds the requests that wait here."""
        self._placement = Placement(max_load=max_load, spill_gap=spill_gap, memory_s=memory_s)
        self._max_queued = max_queued
        self._waiting: deque[Waiter] = deque()
        self._in_flight: defaultdict[ReplicaID, int] = defaultdict(int)  # reserved or sent, and not completed
        self._listening: set[tuple[ReplicaID, str]] = set()  # calls that are no work, and last as long as the worker
        self._reports: dict[ReplicaID, tuple[frozenset[str], int]] = {}  # resident versions and free pages
        self._metrics = QueueMetrics()
        note_router(self)

    @property
    def deployment_id(self) -> Any:
        return self._deployment_id

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's hook for one round of its own queue, which these routers leave empty: all, the least loaded first."""
        return [[replica] for replica in sorted(candidate_replicas, key=lambda r: self._in_flight[r.replica_id])]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """The worker for one call. Raises Overloaded, or WorkerGone for a call to a worker that is not there."""
        if is_retry:
            await asyncio.sleep(RETRY_PAUSE_S)
        worker_id = pending_request.kwargs.get("worker_id")
        if worker_id is not None:
            if pending_request.metadata.call_method == "deltas":
                replica = self._replica(worker_id)
                self._listening.add((replica.replica_id, pending_request.metadata.internal_request_id))
                return replica
            replica = self._reserve(worker_id)
            if pending_request.metadata.call_method == "make_resident":
                self._placement.remember(pending_request.args[0], worker_id, time.monotonic())
            return replica
        return await self._wait_for_worker(pending_request, is_retry)

    def _reserve(self, worker_id: str) -> RunningReplica:
        replica = self._replica(worker_id)
        self._in_flight[replica.replica_id] += 1
        return replica

    def _replica(self, worker_id: str) -> RunningReplica:
        for replica_id, replica in self._replicas.items():
            if replica_id.unique_id == worker_id:
                return replica
        raise WorkerGone(f"worker {worker_id} is gone")

    async def _wait_for_worker(self, pending_request: PendingRequest, is_retry: bool) -> RunningReplica:
        # Serve keeps this object over retries, and a call that comes again was rejected where it went last.
        excluded: frozenset[str] = getattr(pending_request, "rejected_by", frozenset())
        excluded |= pending_request.kwargs.get("excluded", frozenset())
        request = pending_request.args[0] if pending_request.args else None
        waiter = Waiter(getattr(request, "version", None), getattr(request, "request_id", None), excluded)
        if is_retry:
            self._waiting.appendleft(waiter)
        else:
            self._waiting.append(waiter)
        self._place_waiting()
        if not waiter.chosen.done() and len(self._waiting) > self._max_queued and not is_retry:
            self._waiting.remove(waiter)
            raise Overloaded(f"all workers are full and {self._max_queued} requests wait already", retry_after_s=1.0)
        try:
            replica = await waiter.chosen
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.chosen.cancelled():
                self._release(waiter.chosen.result().replica_id)
            raise
        pending_request.rejected_by = excluded | {replica.replica_id.unique_id}
        return replica

    def _place_waiting(self) -> None:
        """Give workers to those that wait, in order, until all workers are full."""
        self._place_in_order()
        self._metrics.publish(len(self._waiting))

    def _place_in_order(self) -> None:
        for waiter in tuple(self._waiting):
            candidates = [self._candidate(replica_id) for replica_id in self._replicas]
            candidates = [c for c in candidates if c.worker_id not in waiter.excluded] or candidates
            worker_id = self._placement.choose(waiter.version, candidates, time.monotonic())
            if worker_id is None:
                if waiter.excluded:
                    continue  # others may take a worker that this one had better not
                return
            self._waiting.remove(waiter)
            if waiter.request_id is not None:
                note_request(waiter.request_id, worker_id)
            waiter.chosen.set_result(self._reserve(worker_id))

    def _candidate(self, replica_id: ReplicaID) -> Candidate:
        resident, free_pages = self._reports.get(replica_id, _NO_REPORT)
        return Candidate(replica_id.unique_id, self._in_flight[replica_id], resident, free_pages)

    def _release(self, replica_id: ReplicaID) -> None:
        self._in_flight[replica_id] = max(0, self._in_flight[replica_id] - 1)
        self._place_waiting()

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Serve calls this once for every replica that `_choose_replica_for_request` returned."""
        super().on_request_completed(replica_id, internal_request_id)
        call = replica_id, internal_request_id
        if call in self._listening:
            self._listening.remove(call)
        else:
            self._release(replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A worker was found dead: nothing goes there any more."""
        super().on_replica_actor_died(replica_id)
        self._forget(replica_id)
        self._place_waiting()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The controller says who is there, and passes on what the workers report of themselves."""
        before = set(self._replicas)
        super().update_replicas(replicas)
        for replica_id in before - set(self._replicas):
            self._forget(replica_id)
        for replica_id, replica in self._replicas.items():
            stats = replica.routing_stats or {}
            self._reports[replica_id] = frozenset(stats.get("resident", ())), stats.get("free_pages", 0)
        self._place_waiting()

    def _forget(self, replica_id: ReplicaID) -> None:
        self._in_flight.pop(replica_id, None)
        self._listening -= {call for call in self._listening if call[0] == replica_id}
        self._reports.pop(replica_id, None)
        self._placement.forget(replica_id.unique_id)


class StoreRouter(RequestRouter):
    """Routes to the one replica of the adapter store; raises StoreUnavailable at once while there is none."""

    queue_len_response_deadline_s = max_queue_len_response_deadline_s = PROBE_S

    def initialize_state(self, **_: Any) -> None:
        """Take `request_router_kwargs`: there are none."""
        self._seen = asyncio.Event()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's hook for one round of its own queue, which these routers leave empty."""
        return [candidate_replicas]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """The store. Raises StoreUnavailable."""
        if is_retry:
            await asyncio.sleep(RETRY_PAUSE_S)
        if not self._seen.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._seen.wait(), START_PATIENCE_S)
        for replica in self._replicas.values():
            return replica
        raise StoreUnavailable("the adapter store is away; it is being restarted", retry_after_s=2.0)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """The controller says whether the store is there."""
        super().update_replicas(replicas)
        if replicas:
            self._seen.set()

"""Routes calls to the workers.

A request goes to the worker that `placement.py` chooses. A call with a `worker_id` argument goes to that worker and
nowhere else. Requests that find all workers full wait in order of arrival; one more than
`max_queued` is refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from lorafleet.cluster.errors import Overloaded, WorkerGone
from lorafleet.cluster.metrics import QueueMetrics
from lorafleet.cluster.ray_internals import DirectRouter
from lorafleet.cluster.routing.placement import Candidate, Placement
from lorafleet.cluster.routing.whereabouts import note_request, note_router
from lorafleet.cluster.wire import RoutingReport

_NO_REPORT = RoutingReport()


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for a worker."""

    version: str | None
    request_id: str | None
    excluded: frozenset[str]
    """Workers that failed or rejected it; taken again only if there is no other."""
    only_resident: bool = False
    """Whether it goes where its adapter is resident, if it is anywhere."""
    chosen: asyncio.Future[RunningReplica] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class WorkerRouter(DirectRouter):
    """Routes to workers by residency and load. Lives on the event loop of its handle's router."""

    def initialize_state(self, *, max_load: int, max_queued: int, spill_gap: int, memory_s: float, **_: Any) -> None:
        """Take `request_router_kwargs`: see `Placement`; `max_queued` bounds the requests that wait here."""
        self._placement = Placement(max_load=max_load, spill_gap=spill_gap, memory_s=memory_s)
        self._max_queued = max_queued
        self._waiting: deque[Waiter] = deque()
        self._in_flight: defaultdict[ReplicaID, int] = defaultdict(int)  # reserved or sent, and not completed
        self._listening: set[tuple[ReplicaID, str]] = set()  # calls that are no work, and last as long as the worker
        self._reports: dict[ReplicaID, RoutingReport] = {}
        self._outbox_ids: set[str] = set()  # whose answers this router's calls ask for
        self._other_outbox_ids: set[str] = set()  # of routers that have requests on workers, as of their last reports
        self._metrics = QueueMetrics()
        note_router(self)

    async def choose(self, request: PendingRequest, is_retry: bool) -> RunningReplica:
        """Choose the worker for one call.

        Raises Overloaded, and WorkerGone for a call to a worker that is not there.
        """
        worker_id = request.kwargs.get("worker_id")
        if worker_id is not None:
            if request.metadata.call_method == "deltas":
                replica = self._replica(worker_id)
                self._listening.add((replica.replica_id, request.metadata.internal_request_id))
                return replica
            return self._reserve(worker_id)
        return await self._wait_for_worker(request, is_retry)

    def note_resident(self, version: str, worker_id: str) -> None:
        """A worker has an adapter and has not reported it yet."""
        self._placement.remember(version, worker_id, time.monotonic())

    def _reserve(self, worker_id: str) -> RunningReplica:
        replica = self._replica(worker_id)
        self._in_flight[replica.replica_id] += 1
        return replica

    def _replica(self, worker_id: str) -> RunningReplica:
        for replica_id, replica in self.replicas.items():
            if replica_id.unique_id == worker_id:
                return replica
        raise WorkerGone(f"worker {worker_id} is gone")

    async def _wait_for_worker(self, pending_request: PendingRequest, is_retry: bool) -> RunningReplica:
        # Serve keeps this object over retries, and a call that comes again was rejected where it went last.
        excluded: frozenset[str] = getattr(pending_request, "rejected_by", frozenset())
        excluded |= pending_request.kwargs.get("excluded", frozenset())
        request, *outbox_ids = pending_request.args or (None,)
        self._outbox_ids.update(outbox_ids)
        waiter = Waiter(
            getattr(request, "version", None),
            getattr(request, "request_id", None),
            excluded,
            pending_request.kwargs.get("only_resident", False),
        )
        if is_retry:
            self._waiting.appendleft(waiter)
        else:
            self._waiting.append(waiter)
        self._place_waiting()
        if not waiter.chosen.done() and len(self._waiting) > self._max_queued and not is_retry:
            self._waiting.remove(waiter)
            raise Overloaded(
                f"all workers are full and {self._max_queued} requests wait, which is the most; try again later",
                retry_after_s=1.0,
            )
        try:
            began_s = time.monotonic()
            replica = await waiter.chosen
            self._metrics.note_routed(time.monotonic() - began_s)
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
            candidates = [self._candidate(replica_id) for replica_id in self.replicas]
            candidates = [c for c in candidates if c.worker_id not in waiter.excluded] or candidates
            worker_id = self._placement.choose(
                waiter.version, candidates, time.monotonic(), only_resident=waiter.only_resident
            )
            if worker_id is None:
                if waiter.excluded or waiter.only_resident:
                    continue  # others may take a worker that this one had better not
                return
            self._waiting.remove(waiter)
            if waiter.request_id is not None:
                note_request(waiter.request_id, worker_id)
            waiter.chosen.set_result(self._reserve(worker_id))

    def _candidate(self, replica_id: ReplicaID) -> Candidate:
        report = self._reports.get(replica_id, _NO_REPORT)
        others = sum(count for outbox_id, count in report.answering if outbox_id not in self._outbox_ids)
        held = self._in_flight[replica_id]
        return Candidate(
            replica_id.unique_id, held, report.resident, report.free_pages, others, 1 + len(self._other_outbox_ids)
        )

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
        before = set(self.replicas)
        super().update_replicas(replicas)
        for replica_id in before - set(self.replicas):
            self._forget(replica_id)
        for replica_id, replica in self.replicas.items():
            self._reports[replica_id] = RoutingReport.unpacked(replica.routing_stats)
        told = {outbox_id for report in self._reports.values() for outbox_id, _ in report.answering}
        self._other_outbox_ids = told - self._outbox_ids
        self._place_waiting()

    def _forget(self, replica_id: ReplicaID) -> None:
        self._in_flight.pop(replica_id, None)
        self._listening -= {call for call in self._listening if call[0] == replica_id}
        self._reports.pop(replica_id, None)
        self._placement.forget(replica_id.unique_id)

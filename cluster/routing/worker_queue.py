"""Gives workers to the requests of one ingress, in order of arrival. Pure: no Ray, no I/O.

A request goes to the worker that `placement.py` chooses. Requests that find all workers full wait; one more than
`max_queued` is refused.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorafleet.cluster.errors import Overloaded
from lorafleet.cluster.metrics import QueueMetrics
from lorafleet.cluster.routing.placement import Candidate, Placement
from lorafleet.cluster.wire import RoutingReport

LOST_S = 1.0
"""How long a worker is passed over, while there are others, whose connection was lost: it may be dead."""


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that needs a worker."""

    version: str | None
    excluded: frozenset[str]
    """Workers that failed it; taken again only if there is no other."""
    only_resident: bool
    """Whether it goes where its adapter is resident, if it is anywhere."""
    place: Callable[[str], None]
    """Called once, with the id of its worker."""
    fail: Callable[[Exception], None]
    """Called once in its place, if there will be no worker."""
    began_s: float = 0.0


class WorkerQueue:
    """The workers as this ingress knows them, and the requests that wait for one. One event loop uses it."""

    def __init__(
        self, placement: Placement, *, max_queued: int, ingress_id: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """max_queued: most requests that wait here; ingress_id: as workers name this ingress in their reports."""
        self._placement = placement
        self._max_queued = max_queued
        self.ingress_id = ingress_id
        self._clock = clock
        self.workers: Mapping[str, RoutingReport] = {}
        """Those that take requests now."""
        self._num_routers = 1
        self._held: Counter[str] = Counter()
        """By worker: requests that were placed there and not released."""
        self._lost: dict[str, float] = {}
        """By worker: when its connection was lost."""
        self._waiting: deque[Waiter] = deque()
        self._metrics = QueueMetrics()

    @property
    def is_stuck(self) -> bool:
        """True if requests wait and there is no worker at all."""
        return bool(self._waiting) and not self.workers

    def update(self, workers: Mapping[str, RoutingReport]) -> None:
        """Take note of the workers that take requests now, and of what they report of themselves."""
        for worker_id in self.workers.keys() - workers.keys():
            self._placement.forget(worker_id)
        self.workers = workers
        told = {ingress_id for report in workers.values() for ingress_id, _ in report.answering}
        self._num_routers = 1 + len(told - {self.ingress_id})
        self._place_waiting()

    def note_resident(self, version: str, worker_id: str) -> None:
        """A worker has an adapter and has not reported it yet."""
        self._placement.remember(version, worker_id, self._clock())

    def avoid(self, worker_id: str) -> None:
        """The connection to a worker was lost."""
        self._lost[worker_id] = self._clock()

    def add(self, waiter: Waiter) -> None:
        """Place a request, now or as soon as there is room. Raises Overloaded beyond the bound."""
        waiter.began_s = self._clock()
        self._waiting.append(waiter)
        self._place_waiting()
        if len(self._waiting) > self._max_queued and self._waiting[-1] is waiter:
            self._waiting.pop()
            raise Overloaded(
                f"all workers are full and {self._max_queued} requests wait, which is the most; try again later",
                retry_after_s=1.0,
            )

    def remove(self, waiter: Waiter) -> None:
        """A request waits no more; it may have been placed."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)
            self._metrics.publish(len(self._waiting))

    def release(self, worker_id: str) -> None:
        """A request that was placed on a worker is over."""
        self._held[worker_id] -= 1
        if self._held[worker_id] <= 0:
            del self._held[worker_id]
        self._place_waiting()

    def refuse(self, error: Exception) -> None:
        """All that wait get this error."""
        waiting, self._waiting = self._waiting, deque()
        self._metrics.publish(0)
        for waiter in waiting:
            waiter.fail(error)

    def _place_waiting(self) -> None:
        """Give workers to those that wait, in order, until all workers are full."""
        if self._waiting:
            self._place_in_order()
            self._metrics.publish(len(self._waiting))

    def _place_in_order(self) -> None:
        for waiter in tuple(self._waiting):
            worker_id = self._choose(waiter)
            if worker_id is not None:
                self._waiting.remove(waiter)
                self._held[worker_id] += 1
                self._metrics.note_routed(self._clock() - waiter.began_s)
                waiter.place(worker_id)
            elif not waiter.excluded and not waiter.only_resident:
                return  # only those may be passed: others may take a worker that they had better not

    def _choose(self, waiter: Waiter) -> str | None:
        now_s = self._clock()
        self._lost = {worker_id: at_s for worker_id, at_s in self._lost.items() if now_s - at_s < LOST_S}
        candidates = [self._candidate(worker_id, report) for worker_id, report in self.workers.items()]
        for avoided in (waiter.excluded, self._lost):
            candidates = [each for each in candidates if each.worker_id not in avoided] or candidates
        return self._placement.choose(waiter.version, candidates, now_s, only_resident=waiter.only_resident)

    def _candidate(self, worker_id: str, report: RoutingReport) -> Candidate:
        others = sum(count for ingress_id, count in report.answering if ingress_id != self.ingress_id)
        held = self._held.get(worker_id, 0)
        return Candidate(worker_id, held, report.resident, report.free_pages, others, self._num_routers)

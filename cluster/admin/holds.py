"""One adapter version on its way to several workers before its name flips: all that must have it get it, or none does.

Holds keep the version on a worker meanwhile, and run out by themselves should this process die.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from lorafleet.adapter_store.errors import AdapterStoreError
from lorafleet.cluster.admin.fleet import Fleet
from lorafleet.cluster.errors import AdapterDoesNotFit, ClusterError, NoWorker, RolloutFailed, WorkerGone
from lorafleet.workers.errors import NoRoomError, WorkerError

logger = logging.getLogger(__name__)

HOLD_S = 300.0
"""How long a loaded version stays without a name, should nobody come back to it."""


class Holds:
    """Makes one version resident on workers and holds it there until `release`."""

    def __init__(self, fleet: Fleet, name: str, version: str, *, pinned: bool) -> None:
        """name: what errors call the adapter; pinned: whether the version is pinned where it is made resident."""
        self._fleet = fleet
        self._name = name
        self._version = version
        self._pinned = pinned
        self._held: list[str] = []

    async def require(self, worker_ids: Sequence[str]) -> None:
        """All of these must have it, except those that die meanwhile, which serve nobody.

        Raises AdapterDoesNotFit or RolloutFailed, which name the first worker that could not and why; NoWorker when all
        died.
        """
        failures = await self._make_resident(worker_ids)
        if failures:
            raise self._refusal(*failures[0])
        if worker_ids and not self._held:
            raise NoWorker("every worker that was to take the adapter died; try again", None, 2.0)

    async def extend(self, candidates: Sequence[str], count: int) -> None:
        """`count` of `candidates` are to have it too, the first if they can; raises as `require` when too few can."""
        failures: list[tuple[str, Exception]] = []
        remaining = list(candidates)
        missing = count
        while missing and remaining:
            chosen, remaining = remaining[:missing], remaining[missing:]
            before = len(self._held)
            failures += await self._make_resident(chosen)
            missing -= len(self._held) - before
        if missing and failures:
            raise self._refusal(*failures[0])
        if count and not self._held:
            raise NoWorker("every worker that was to take the adapter died; try again", None, 2.0)

    async def release(self) -> None:
        """Let go: a version that has no name by now leaves the workers."""
        held, self._held = self._held, []
        results = await asyncio.gather(
            *(self._fleet.release_hold(worker_id, self._version) for worker_id in held), return_exceptions=True
        )
        for worker_id, result in zip(held, results, strict=True):
            if isinstance(result, Exception) and not isinstance(result, WorkerGone):
                logger.warning("worker %s keeps a loaded version until its hold ends: %s", worker_id, result)

    async def _make_resident(self, worker_ids: Sequence[str]) -> list[tuple[str, Exception]]:
        """Returns who could not, and why."""
        results = await asyncio.gather(
            *(
                self._fleet.make_resident(worker_id, self._version, hold_s=HOLD_S, pinned=self._pinned)
                for worker_id in worker_ids
            ),
            return_exceptions=True,
        )
        failures: list[tuple[str, Exception]] = []
        for worker_id, result in zip(worker_ids, results, strict=True):
            if result is None:
                self._held.append(worker_id)
            elif not isinstance(result, Exception):
                raise result
            elif not isinstance(result, WorkerGone):
                failures.append((worker_id, result))
        return failures

    def _refusal(self, worker_id: str, error: Exception) -> ClusterError:
        reason = str(error)
        if isinstance(error, NoRoomError):
            return AdapterDoesNotFit(f"worker {worker_id} has no room for {self._name!r}: {reason}", "name")
        if not isinstance(error, (WorkerError, AdapterStoreError, ClusterError)):
            logger.error("worker %s could not take %r", worker_id, self._name, exc_info=error)
            reason = "internal error; the log has it"
        return RolloutFailed(f"worker {worker_id} could not take {self._name!r}: {reason}", "name", 2.0)

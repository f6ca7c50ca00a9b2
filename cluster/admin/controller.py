"""The deployment of the control plane: roll-outs, their holds, and what configuration wants.

One replica, which keeps nothing that must outlive it: the store has the names and the desired state, and holds
on workers expire. If it dies during a roll-out, the old version or the new one is served. Its successor continues from
the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from ray.serve.handle import DeploymentHandle

from lorafleet.adapter_store.names import NameRecord
from lorafleet.cluster import heap
from lorafleet.cluster.admin.desired import DesiredSet
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.config import AppConfig, Warm
from lorafleet.cluster.errors import StoreUnavailable
from lorafleet.cluster.store.client import StoreClient
from lorafleet.cluster.watchdog import Watchdog
from lorafleet.cluster.wire import ListedWorkers, Placed, StoreProblem, Validation, in_parts, replying
from lorafleet.cluster.worker.client import WorkersClient

logger = logging.getLogger(__name__)

ASK_S = 0.5
"""How often a controller that knows of no `user_config` asks the store for one."""


class Controller:
    """The one place that changes names. Every method runs on the event loop that made it."""

    def __init__(self, config: AppConfig, workers: DeploymentHandle[Any], store: DeploymentHandle[Any]) -> None:
        client = StoreClient(store)
        self._rollout = Rollout(client, WorkersClient(workers), reserved={config.model.id})
        self._desired = DesiredSet(
            self._rollout, config.adapters.preload, store=client, num_workers=config.worker.num_replicas
        )
        heap.settle()
        self._is_told = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self._apply()),
            asyncio.create_task(Watchdog().run()),
            asyncio.create_task(heap.trim_often()),
        ]

    @replying
    async def put(self, name: str, *, source: str, key: str, pinned: bool, warm: Warm, replace: bool) -> Placed:
        """Publish an adapter and flip a name to it, everywhere at once."""
        return await self._rollout.put(name, source=source, key=key, pinned=pinned, warm=warm, replace=replace)

    @replying
    async def delete(self, name: str) -> None:
        """Take a name away."""
        await self._rollout.delete(name)

    @replying
    async def set_pinned(self, name: str, pinned: bool) -> Placed:
        """Pin or unpin an adapter."""
        return await self._rollout.set_pinned(name, pinned)

    @replying
    async def validate(self, source: str, key: str) -> Validation:
        """Try an adapter without loading it."""
        return await self._rollout.validate(source, key)

    @replying
    async def locate(self, path: str) -> tuple[str, str]:
        """The source and key that a path stands for."""
        return await self._rollout.locate(path)

    @replying
    async def adapter(self, name: str) -> Placed:
        """One adapter."""
        return await self._rollout.adapter(name)

    @replying
    async def adapters(self, after: str = "", limit: int | None = None) -> list[bytes]:
        """Adapters in order of their names, in parts: at most `limit`, those that come after `after`."""
        return await asyncio.to_thread(in_parts, await self._rollout.adapters(after, limit))

    @replying
    async def problems(self) -> tuple[StoreProblem, ...]:
        """Return the faults of the store's state folder, and why the newest `user_config` was refused."""
        found = await self._rollout.problems()
        refusal = self._desired.refusal
        return found if refusal is None else (*found, StoreProblem("user_config_refused", "user_config", "", refusal))

    @replying
    async def has(self, name: str) -> bool:
        """Return True if an adapter has this name."""
        return await self._rollout.has(name)

    @replying
    async def records(self) -> tuple[NameRecord, ...]:
        """All names."""
        return await self._rollout.records()

    @replying
    async def workers(self) -> ListedWorkers:
        """All workers, and which of them do not answer."""
        return await self._rollout.workers()

    async def not_ready(self) -> str | None:
        """Return why the service is not ready; None if it is."""
        return await self._desired.not_ready()

    async def user_config_stamp(self) -> int:
        """The stamp of the newest `user_config` that it was given; 0 if none."""
        return self._desired.generation

    @replying
    async def take_user_config(self, stamp: int, user_config: object) -> None:
        """Take what Serve gave an ingress: applied in the background, or logged as refused; None: there is none."""
        await self._desired.take_user_config(stamp, user_config or {})
        self._is_told.set()

    async def _apply(self) -> None:
        # Before it is known what is wanted, names of the former user_config would be deleted.
        while not self._is_told.is_set():
            try:
                if await self._desired.resume():
                    break
            except StoreUnavailable:
                pass
            except Exception:
                logger.exception("the store's desired state cannot be read; it is asked again")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_told.wait(), ASK_S)
        await self._desired.run()

    def __del__(self) -> None:
        """Serve calls this when the replica stops."""
        for task in getattr(self, "_tasks", ()):
            task.cancel()

"""The deployment of the control plane: roll-outs, their holds, and what configuration wants.

One replica. It keeps nothing that must outlive it: names are the store's, and holds on workers expire. So one that
dies in the midst of a roll-out leaves the old version or the new one, and its successor goes on from the store.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.handle import DeploymentHandle

from lorafleet.adapter_store.names import NameTable
from lorafleet.cluster.admin.desired import DesiredSet
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.config import AppConfig, Warm
from lorafleet.cluster.store.client import StoreClient
from lorafleet.cluster.wire import Placed, Validation, replying
from lorafleet.cluster.worker.client import WorkersClient
from lorafleet.workers.state import WorkerState


class Controller:
    """The one place that changes names. Every method runs on the event loop that made it."""

    def __init__(self, config: AppConfig, workers: DeploymentHandle[Any], store: DeploymentHandle[Any]) -> None:
        self._rollout = Rollout(StoreClient(store), WorkersClient(workers), reserved={config.model.id})
        self._desired = DesiredSet(self._rollout, config.adapters.preload, num_workers=config.worker.num_replicas)
        self._stamp = 0
        self._is_told = asyncio.Event()
        self._applying = asyncio.create_task(self._apply())

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
    async def adapters(self) -> list[Placed]:
        """All adapters that have a name."""
        return await self._rollout.adapters()

    @replying
    async def table(self) -> NameTable:
        """All names."""
        return await self._rollout.table()

    @replying
    async def workers(self) -> list[WorkerState]:
        """All workers that answer."""
        return await self._rollout.workers()

    async def not_ready(self) -> str | None:
        """Why the service is not ready; None: it is."""
        return await self._desired.not_ready()

    async def user_config_stamp(self) -> int:
        """The stamp of the newest `user_config` that it was given; 0 if none."""
        return self._stamp

    async def take_user_config(self, stamp: int, user_config: object) -> None:
        """Take what Serve gave an ingress: applied in the background, or logged as refused; None: there is none."""
        if stamp > self._stamp:
            self._stamp = stamp
            self._desired.take_user_config(user_config or {})
            self._is_told.set()

    async def _apply(self) -> None:
        # Before an ingress has told what is wanted, names of the former user_config would be deleted.
        await self._is_told.wait()
        await self._desired.run()

    def __del__(self) -> None:
        """Serve calls this when the replica stops."""
        if hasattr(self, "_applying"):
            self._applying.cancel()

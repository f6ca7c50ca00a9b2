"""The admin plane of an ingress, put together: roll-outs, what configuration wants, and the routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from lorafleet.cluster.admin.desired import DesiredAdapters
from lorafleet.cluster.admin.fleet import ServeFleet
from lorafleet.cluster.admin.rollout import Rollout
from lorafleet.cluster.admin.routes import build_router
from lorafleet.cluster.config import AppConfig
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.store.client import StoreClient


class AdminPlane:
    """Lives on the ingress's event loop."""

    def __init__(
        self,
        config: AppConfig,
        workers: DeploymentHandle[Any],
        store: DeploymentHandle[Any],
        keys: Keys,
        observe: Callable[[str, str | None], None],
    ) -> None:
        """observe: told of every name that was flipped (and its version) or deleted (None), before the reply."""
        self.rollout = Rollout(StoreClient(store), ServeFleet(workers), observe=observe, reserved={config.model.id})
        self.router = build_router(self.rollout, keys, config.adapters.sources)
        self._desired = DesiredAdapters(self.rollout, config.adapters.preload, num_workers=config.worker.num_replicas)
        self._applying: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to load what configuration wants."""
        assert self._applying is None, "started twice"
        self._applying = asyncio.create_task(self._desired.run())

    def apply(self, user_config: object) -> None:
        """Take Serve's `user_config`; it is applied in the background, or logged as refused."""
        self._desired.take_user_config(user_config or {})

    async def not_ready(self) -> str | None:
        """Why the service is not ready yet; None: it is."""
        return await self._desired.not_ready()

    def stop(self) -> None:
        """End what runs in the background."""
        if self._applying is not None:
            self._applying.cancel()

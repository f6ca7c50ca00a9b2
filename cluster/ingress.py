"""The ingress deployment: OpenAI's routes, the admin plane and the Python handle's surface, on one event loop.

A plain class: `cluster/app.py` makes a Serve deployment of it, with `take_http_app` as Serve's way to its routes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from lorafleet.cluster.admin.controller import AdminPlane
from lorafleet.cluster.config import AppConfig
from lorafleet.cluster.http.app import build_http_app
from lorafleet.cluster.http.probes import build_probes
from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.openai.routes import build_router
from lorafleet.cluster.ray_internals import http_hosts
from lorafleet.cluster.serving.dispatch import Dispatcher
from lorafleet.cluster.serving.names import Names
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.cluster.serving.streams import ServeWorkers
from lorafleet.cluster.store.client import StoreClient
from lorafleet.workers.request import GenerateDelta, GenerateRequest

_http_app: ContextVar[FastAPI] = ContextVar("http_app")


def take_http_app() -> FastAPI:
    """The routes of the Ingress that was just made: Serve calls this right after the constructor, in its context."""
    return _http_app.get()


class Ingress:
    """The one way in. Every method runs on the event loop that made it."""

    def __init__(self, config: AppConfig, workers: DeploymentHandle[Any], store: DeploymentHandle[Any]) -> None:
        """Raises ExposedWithoutToken when HTTP is bound beyond loopback and the admin plane has no token."""
        keys = config.auth.read_keys()
        keys.check_exposure(http_hosts())
        self._names = Names(StoreClient(store))
        self._dispatcher = Dispatcher(
            config.model.id, Prompts.load(config.model), self._names, ServeWorkers(workers), RequestMetrics()
        )
        self._admin = AdminPlane(config, workers, store, keys, self._names.observe)
        _http_app.set(
            build_http_app(
                [
                    build_router(self._dispatcher, keys, started=int(time.time())),
                    build_probes(self._admin.not_ready),
                    self._admin.router,
                ],
                config.http.cors_origins,
            )
        )
        self._names.start()
        self._admin.start()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        """All deltas of all `n` answers as they come, for calls with `stream=True`. Closing it stops the workers.

        Raises what HTTP would answer with: a ClusterError, an AdapterStoreError or a WorkerError.
        """
        async with aclosing(self._dispatcher.generate(request)) as deltas:
            async for delta in deltas:
                yield delta

    def reconfigure(self, user_config: object) -> None:
        """Take the desired adapters, in the background. A refused `user_config` is logged and changes nothing."""
        self._admin.apply(user_config)

    def check_health(self) -> None:
        """Serve replaces the replica when this is not answered: the event loop stands still."""

    def __del__(self) -> None:
        """Serve calls this when the replica has drained."""
        if hasattr(self, "_admin"):
            self._admin.stop()
            self._names.stop()

"""The ingress deployment: OpenAI's routes, the admin routes and the Python handle's surface.

A plain class: `cluster/app.py` makes a Serve deployment of it, with `take_http_app` as Serve's way to its routes.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from lorafleet.cluster import heap
from lorafleet.cluster.admin import routes as admin
from lorafleet.cluster.admin.client import ControllerClient
from lorafleet.cluster.admin.readiness import Readiness
from lorafleet.cluster.admin.relay import UserConfigRelay
from lorafleet.cluster.anthropic import routes as anthropic
from lorafleet.cluster.config import AppConfig
from lorafleet.cluster.http.app import build_http_app
from lorafleet.cluster.http.probes import build_probes
from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.openai import embeddings
from lorafleet.cluster.openai import routes as openai
from lorafleet.cluster.openai.peer_routes import build_peer_router
from lorafleet.cluster.ray_internals import has_token, http_hosts
from lorafleet.cluster.responses import routes as responses
from lorafleet.cluster.routing.placement import Placement
from lorafleet.cluster.routing.whereabouts import live_workers
from lorafleet.cluster.routing.worker_queue import WorkerQueue
from lorafleet.cluster.serving.dispatch import Dispatcher
from lorafleet.cluster.serving.exposition import Exposition
from lorafleet.cluster.serving.names import Names
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.cluster.store.client import StoreClient
from lorafleet.cluster.tracing import Traces
from lorafleet.cluster.watchdog import Watchdog
from lorafleet.cluster.worker.client import WorkersClient
from lorafleet.cluster.worker.front import Front
from lorafleet.workers.checkpoint import without_torch
from lorafleet.workers.request import GenerateDelta, GenerateRequest

STORE_PATIENCE_S = 60.0
"""How long a new ingress waits for the store's names; then it serves the base, and adapters once the store is there."""

UNCHECKED_S = 5.0
"""Longest time without a question for the health of an ingress that takes requests; Serve asks once a second."""

MEMORY_S = 5.0
"""How long the ingress believes that an adapter is where it sent it, before the worker has said so."""

_http_app: ContextVar[FastAPI] = ContextVar("http_app")


def take_http_app() -> FastAPI:
    """The routes of the Ingress that was just made: Serve calls this right after the constructor, in its context."""
    return _http_app.get()


class Ingress:
    """One way in of several: it keeps nothing that another one must know. Every method runs on one event loop."""

    def __init__(
        self,
        config: AppConfig,
        workers: DeploymentHandle[Any],
        store: DeploymentHandle[Any],
        controller: DeploymentHandle[Any],
    ) -> None:
        """Raises EmptySecret, and ExposedWithoutToken when HTTP is bound beyond loopback and a token is missing."""
        keys = config.auth.read_keys()
        keys.check_exposure(http_hosts(), ray_has_token=has_token())
        tracing = config.tracing
        self._traces = Traces.to(tracing.endpoint, tracing.sample_ratio) if tracing.endpoint is not None else None
        self._names = Names(StoreClient(store))
        with without_torch():
            prompts = Prompts.load(config.model)
        self._dispatcher = Dispatcher(
            config.model.id,
            prompts,
            self._names,
            Front(workers, _queue(config)),
            RequestMetrics(traces=self._traces),
            salts_prefixes=config.worker.prefix_cache == "per_key",
        )
        control = ControllerClient(controller, self._names.observe)
        self._readiness = Readiness(control, partial(live_workers, workers.deployment_id))
        self._checked_s = time.monotonic()
        self._relay = UserConfigRelay(control, is_serving=self._is_serving)
        self._tasks: list[asyncio.Task[None]] = []
        _http_app.set(
            build_http_app(
                [
                    openai.build_router(self._dispatcher, keys, started=config.model_created_s),
                    embeddings.build_router(self._dispatcher, keys),
                    anthropic.build_router(self._dispatcher, keys),
                    responses.build_router(self._dispatcher, keys),
                    build_probes(self._readiness.not_ready, self._readiness.problems),
                    build_peer_router(
                        self._dispatcher,
                        keys,
                        self._readiness.not_ready,
                        Exposition(config.model.id, WorkersClient(workers).counts),
                    ),
                    admin.build_router(control, keys, hubs=config.adapters.hubs),
                ],
                config.http.cors_origins,
                is_open=keys.are_none,
                bounds=prompts.bounds,
                names_requests=False,  # Serve's proxy does
            )
        )
        self._names.start()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        """All deltas of all `n` answers as they come, for calls with `stream=True`. Closing it stops the workers.

        Raises what HTTP would answer with: a ClusterError, an AdapterStoreError or a WorkerError.
        """
        async with aclosing(self._dispatcher.generate(request)) as deltas:
            async for delta in deltas:
                yield delta

    def reconfigure(self, user_config: object) -> None:
        """Hand the desired adapters on to the controller. A refused `user_config` is logged and changes nothing."""
        self._relay.take(user_config)

    async def check_health(self) -> None:
        """Serve replaces the replica when this is not answered: the event loop stands still."""
        self._checked_s = time.monotonic()
        # Serve asks for the first time after it has given the replica its user_config, and sends requests afterwards.
        if not self._tasks:
            await self._names.await_table(STORE_PATIENCE_S)
            heap.settle()
            self._tasks = [
                asyncio.create_task(self._relay.run()),
                asyncio.create_task(self._readiness.run()),
                asyncio.create_task(Watchdog().run()),
                asyncio.create_task(heap.trim_often()),
            ]

    def _is_serving(self) -> bool:
        """False once the ingress drains: Serve asks for its health no more."""
        return time.monotonic() - self._checked_s < UNCHECKED_S

    def __del__(self) -> None:
        """Serve calls this when the replica has drained."""
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if hasattr(self, "_names"):
            self._names.stop()
        traces: Traces | None = getattr(self, "_traces", None)
        if traces is not None:
            traces.close()


def _queue(config: AppConfig) -> WorkerQueue:
    worker = config.worker
    placement = Placement(max_load=worker.max_load, spill_gap=max(1, worker.max_running // 8), memory_s=MEMORY_S)
    # Each ingress has a queue of its own; the bound is for all of them.
    max_queued = math.ceil(worker.max_queued_requests / config.ingress.num_replicas)
    return WorkerQueue(placement, max_queued=max_queued, ingress_id=uuid.uuid4().hex)

"""The real HTTP application on a free port, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from lorafleet.cluster.admin import routes as admin_routes
from lorafleet.cluster.admin.client import ControlPlane
from lorafleet.cluster.anthropic import routes as anthropic_routes
from lorafleet.cluster.http.app import build_http_app
from lorafleet.cluster.http.auth import Keys
from lorafleet.cluster.http.incoming import BOUNDS, Bounds
from lorafleet.cluster.http.probes import build_probes
from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.openai import embeddings
from lorafleet.cluster.openai.peer_routes import build_peer_router
from lorafleet.cluster.openai.routes import build_router
from lorafleet.cluster.responses import routes as responses_routes
from lorafleet.cluster.serving.dispatch import Dispatcher
from lorafleet.cluster.serving.exposition import Exposition
from lorafleet.cluster.serving.names import Names
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.cluster.wire import WorkerCounts
from tests.cluster.fakes import FakeStore, FakeWorkers, make_prompts
from tests.support.wait import eventually

BASE_ID = "org/tiny"
STARTED = 1_700_000_000


async def no_counts() -> Sequence[WorkerCounts]:
    """No worker says what it has served."""
    return ()


@dataclass(slots=True)
class Service:
    """The data plane over a fake store, and fake workers or other ones."""

    base_id: str = BASE_ID
    keys: Keys = field(default_factory=Keys)
    prompts: Prompts = field(default_factory=make_prompts)
    store: FakeStore = field(default_factory=FakeStore)
    waits_for: str | None = None
    salts_prefixes: bool = False
    bounds: Bounds = BOUNDS
    workers: Any = None
    """`FakeWorkers`, unless others are given."""
    counts: Callable[[], Awaitable[Sequence[WorkerCounts]]] = no_counts
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    control: ControlPlane | None = None
    """Without one there are no admin routes."""
    url: str = ""

    def __post_init__(self) -> None:
        self.workers = self.workers or FakeWorkers(self.prompts)

    def app(self) -> FastAPI:
        dispatcher = Dispatcher(
            self.base_id,
            self.prompts,
            Names(self.store),
            self.workers,
            self.metrics,
            salts_prefixes=self.salts_prefixes,
        )

        async def not_ready() -> str | None:
            return self.waits_for

        admin = [] if self.control is None else [admin_routes.build_router(self.control, self.keys)]
        return build_http_app(
            [
                *admin,
                build_router(dispatcher, self.keys, started=STARTED),
                embeddings.build_router(dispatcher, self.keys),
                anthropic_routes.build_router(dispatcher, self.keys),
                responses_routes.build_router(dispatcher, self.keys),
                build_probes(not_ready),
                build_peer_router(dispatcher, self.keys, not_ready, Exposition(self.base_id, self.counts)),
            ],
            bounds=self.bounds,
        )

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=20, **options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="secret", max_retries=0, timeout=20)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20)


@contextmanager
def serving(service: Service) -> Iterator[Service]:
    """Serve while the block runs."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(service.app(), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])), daemon=True)
    thread.start()
    eventually(lambda: server.started)
    service.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        yield service
    finally:
        server.should_exit = True
        thread.join(10)

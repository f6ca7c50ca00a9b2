"""The data plane over a real worker in this process: its replies are what the model says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from lorafleet.cluster.serving.dispatch import Sink
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.cluster.wire import WorkerCounts
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.request import EngineRequest, GenerateDelta
from lorafleet.workers.worker import Worker
from tests.cluster.fakes import FakeStore
from tests.cluster.serving import BASE_ID, Service, serving
from tests.workers.harness import ENGINE, POOL, Shelf


class LocalWorkers:
    """One worker, on the event loop that asks it."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def generate(self, request: EngineRequest, excluded: frozenset[str], *, only_resident: bool = False) -> LocalStream:
        return LocalStream(self._worker.worker_id, self._worker.generate(request))


class LocalStream:
    """One sequence."""

    def __init__(self, worker_id: str, deltas: AsyncGenerator[GenerateDelta, None]) -> None:
        self.worker_id: str | None = worker_id
        self._deltas = deltas
        self._closing: asyncio.Future[None] | None = None
        self._sink: Sink = lambda delta: False

    async def next(self) -> GenerateDelta:
        while (delta := await anext(self._deltas)).finish_reason is None and self._sink(delta):
            pass
        return delta

    def pour_into(self, sink: Sink) -> None:
        self._sink = sink

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._deltas.aclose())


@contextmanager
def engine_service(shelf: Shelf) -> Iterator[Service]:
    """Serve the shelf's base as `BASE_ID`, and its adapters by the names of their folders."""
    model = ModelConfig(id=BASE_ID, source=str(shelf.base))
    worker = Worker(worker_id="w0", model=model, engine=ENGINE, pool=POOL, fetch=shelf.fetch)
    versions = {folder.name: version for version, folder in shelf.folders.items()}

    async def counts() -> list[WorkerCounts]:
        return [WorkerCounts(await worker.state(), await worker.served())]

    service = Service(
        prompts=Prompts.load(model), store=FakeStore(versions), workers=LocalWorkers(worker), counts=counts
    )
    try:
        with serving(service):
            yield service
        worker.check_health()
    finally:
        worker.close()

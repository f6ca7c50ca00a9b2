"""The demo's base and adapters behind all routes, in one process without Ray: what clients are driven against.

`python -m tests.clients.service` serves until it is interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafleet.adapter_store.errors import UnknownAdapter
from lorafleet.adapter_store.names import NameRecord
from lorafleet.adapter_store.source_config import DirectoryConfig
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.cluster.store.paths import locate
from lorafleet.cluster.wire import WorkerCounts
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.worker import Worker
from tests.cluster.engines import LocalWorkers
from tests.cluster.fakes import FakeStore
from tests.cluster.serving import Service, serving
from tests.workers.harness import Shelf

DEMO = Path(__file__).parents[2] / "examples" / "demo"
BASE_ID = "demo"
LOADED = ("shout", "pirate", "json")


class LoadedHere:
    """The part of the control plane that vLLM's and SGLang's load routes call, over one worker's shelf."""

    def __init__(self, shelf: Shelf, store: FakeStore) -> None:
        self._shelf = shelf
        self._store = store

    async def has(self, name: str) -> bool:
        return name in self._store.versions

    async def locate(self, path: str) -> tuple[str, str]:
        return locate(path, [DirectoryConfig(name="demo", root=DEMO / "adapters")])

    async def put(self, name: str, *, source: str, key: str, replace: bool = True, pinned: bool = False) -> None:
        self._store.flip(name, self._shelf.put(DEMO / "adapters" / key))

    async def delete(self, name: str) -> None:
        if name not in self._store.versions:
            raise UnknownAdapter("adapter_not_found", f"there is no adapter {name!r}", "name")
        self._store.flip(name, None)

    async def records(self) -> tuple[NameRecord, ...]:
        return ()


@contextmanager
def client_service() -> Iterator[Service]:
    """Serve while the block runs."""
    model = ModelConfig(id=BASE_ID, source=str(DEMO / "base"), max_model_len=512, tool_parser="hermes")
    shelf = Shelf(DEMO / "base")
    versions = {name: shelf.put(DEMO / "adapters" / name) for name in LOADED}
    worker = Worker(
        worker_id="w0",
        model=model,
        engine=EngineConfig(device="cpu", max_batch_tokens=1024, kv_bytes=64 << 20, max_running=64),
        pool=PoolConfig(max_rank=64, pool_bytes=32 << 20),
        fetch=shelf.fetch,
    )

    async def counts() -> list[WorkerCounts]:
        return [WorkerCounts(await worker.state(), await worker.served())]

    store = FakeStore(versions)
    control: Any = LoadedHere(shelf, store)
    service = Service(
        base_id=BASE_ID,
        prompts=Prompts.load(model),
        store=store,
        workers=LocalWorkers(worker),
        counts=counts,
        control=control,
    )
    try:
        with serving(service):
            yield service
    finally:
        worker.close()


if __name__ == "__main__":
    with client_service() as running:
        print(running.url, flush=True)
        while True:
            time.sleep(3600)

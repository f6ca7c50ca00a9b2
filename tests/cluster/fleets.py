"""A fleet and a store of dicts, for roll-outs without Ray: workers have pages, may die, refuse and be silent."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lorafleet.adapter_store.errors import StaleGeneration, UnknownAdapter, UnknownKey
from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.adapter_store.names import NamedAdapter, NameRecord
from lorafleet.adapter_store.records import DesiredRecord, DesiredState
from lorafleet.adapter_store.source_config import SourceConfig
from lorafleet.cluster.errors import WorkerGone
from lorafleet.cluster.store.paths import locate
from lorafleet.cluster.wire import StoreProblem
from lorafleet.workers.errors import NoRoomError
from lorafleet.workers.state import AdapterPages, KVPages, ResidentAdapter, WorkerState


def manifest_of(content: str, rank: int = 4) -> AdapterManifest:
    """An adapter that takes `rank` pages; other content is another version."""
    version = hashlib.sha256(content.encode()).hexdigest()
    return AdapterManifest(version=version, rank=rank, targets=("q_proj",), modules=(), num_bytes=100 * rank)


@dataclass(slots=True)
class DictStore:
    """Keys stand for manifests, names for keys."""

    keys: dict[str, AdapterManifest] = field(default_factory=dict)
    names: dict[str, NamedAdapter] = field(default_factory=dict)
    sources: Sequence[SourceConfig] = ()
    """Where `locate` looks."""
    generation: int = 0
    wanted: DesiredState = field(default_factory=lambda: DesiredState(0, ()))
    found: tuple[StoreProblem, ...] = ()
    num_published: int = 0
    fail_flip: Exception | None = None
    taken: set[str] = field(default_factory=set)
    may_publish: asyncio.Event | None = None
    """Loading waits for it."""

    async def publish(self, source: str, key: str) -> AdapterManifest:
        self.num_published += 1
        if self.may_publish is not None:
            await self.may_publish.wait()
        return await self.validate(source, key)

    async def validate(self, source: str, key: str) -> AdapterManifest:
        if key not in self.keys:
            raise UnknownKey("key_not_found", f"source {source} has no adapter {key}", "key")
        return self.keys[key]

    async def flip(self, record: NameRecord) -> NamedAdapter:
        if self.fail_flip is not None:
            raise self.fail_flip
        manifest = next(manifest for manifest in self.keys.values() if manifest.version == record.version)
        self.generation += 1
        self.names[record.name] = NamedAdapter.of(replace(record, generation=self.generation), manifest)
        self.taken.discard(record.name)
        return self.names[record.name]

    async def delete(self, name: str, *, by_config: bool = False) -> None:
        if self.names.pop(name, None) is None:
            raise UnknownAdapter("adapter_not_found", f"there is no adapter {name!r}", "name")
        self.generation += 1
        if not by_config:
            self.taken.add(name)

    async def taken_down(self) -> frozenset[str]:
        return frozenset(self.taken)

    async def set_pinned(self, name: str, pinned: bool) -> None:
        self.names[name] = replace(self.names[name], pinned=pinned)
        self.generation += 1

    async def locate(self, path: str) -> tuple[str, str]:
        return locate(path, self.sources)

    async def named(self, name: str) -> NamedAdapter:
        if name not in self.names:
            raise UnknownAdapter("adapter_not_found", f"there is no adapter {name!r}", "name")
        return self.names[name]

    async def records(self) -> tuple[NameRecord, ...]:
        return tuple(self.names.values())

    async def page(self, after: str, limit: int | None) -> tuple[NamedAdapter, ...]:
        return tuple(self.names[name] for name in sorted(self.names) if name > after)[:limit]

    async def problems(self) -> tuple[StoreProblem, ...]:
        return self.found

    async def desired(self) -> DesiredState:
        return self.wanted

    async def set_desired(self, adapters: tuple[DesiredRecord, ...], generation: int) -> DesiredState:
        if generation < self.wanted.generation:
            raise StaleGeneration("stale_generation", "it is older", "generation")
        self.wanted = DesiredState(generation, adapters)
        return self.wanted


@dataclass(slots=True)
class PagedWorker:
    """One worker's pool."""

    worker_id: str
    total: int = 100
    resident: dict[str, AdapterManifest] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    holds: list[str] = field(default_factory=list)
    leases: dict[str, int] = field(default_factory=dict)
    error: Exception | None = None
    """What `make_resident` meets."""

    @property
    def used(self) -> int:
        return sum(manifest.rank for manifest in self.resident.values())

    def evictable(self) -> list[str]:
        return [v for v in self.resident if v not in self.pinned and v not in self.holds and not self.leases.get(v)]

    def victims(self, manifest: AdapterManifest) -> tuple[str, ...]:
        free, victims = self.total - self.used, []
        for version in self.evictable():
            if free >= manifest.rank:
                break
            free += self.resident[version].rank
            victims.append(version)
        if free < manifest.rank:
            raise NoRoomError(manifest.version, manifest.rank, self.total - self.used, 0, 0, self.total)
        return tuple(victims)

    def state(self) -> WorkerState:
        return WorkerState(
            worker_id=self.worker_id,
            pid=1,
            node_id="n",
            device="cpu",
            running=0,
            waiting=0,
            leases=sum(self.leases.values()),
            kv_pages=KVPages(used=0, cached=0, total=1),
            adapter_pages=AdapterPages(used=self.used, total=self.total),
            adapters=tuple(
                ResidentAdapter(
                    version=version,
                    rank=manifest.rank,
                    pages=manifest.rank,
                    pinned=version in self.pinned,
                    leases=self.leases.get(version, 0),
                    state="resident",
                )
                for version, manifest in self.resident.items()
            ),
        )


class DictFleet:
    """Workers by id. `gone` are still listed by the router, but dead."""

    def __init__(self, store: DictStore, worker_ids: Sequence[str] = ("w0", "w1", "w2")) -> None:
        self.store = store
        self.workers = {worker_id: PagedWorker(worker_id) for worker_id in worker_ids}
        self.gone: set[str] = set()
        self.calls: list[tuple[str, str]] = []
        self.on_make_resident: Callable[[str], None] = lambda worker_id: None

    def holders(self, manifest: AdapterManifest) -> set[str]:
        return {w.worker_id for w in self.workers.values() if manifest.version in w.resident}

    def holds(self) -> int:
        return sum(len(worker.holds) for worker in self.workers.values())

    def _worker(self, worker_id: str, call: str) -> PagedWorker:
        self.calls.append((call, worker_id))
        if worker_id in self.gone or worker_id not in self.workers:
            raise WorkerGone(f"worker {worker_id} is gone")
        return self.workers[worker_id]

    async def worker_ids(self) -> frozenset[str]:
        return frozenset(self.workers)

    async def state(self, worker_id: str) -> WorkerState:
        return self._worker(worker_id, "state").state()

    async def make_resident(self, worker_id: str, version: str, *, hold_s: float, pinned: bool) -> None:
        self.on_make_resident(worker_id)
        worker = self._worker(worker_id, "make_resident")
        if worker.error is not None:
            raise worker.error
        if version not in worker.resident:
            manifest = next(manifest for manifest in self.store.keys.values() if manifest.version == version)
            for victim in worker.victims(manifest):
                del worker.resident[victim]
            worker.resident[version] = manifest
        assert hold_s > 0
        worker.holds.append(version)
        if pinned:
            worker.pinned.add(version)

    async def release_hold(self, worker_id: str, version: str) -> None:
        self._worker(worker_id, "release_hold").holds.remove(version)

    async def estimate(self, worker_id: str, manifest: AdapterManifest) -> tuple[int, tuple[str, ...]]:
        return manifest.rank, self._worker(worker_id, "estimate").victims(manifest)

    async def reconcile(self, worker_id: str) -> None:
        """As a worker does it: what is held stays as it is until it has a name or is let go."""
        worker = self._worker(worker_id, "reconcile")
        named = {adapter.version: adapter.pinned for adapter in self.store.names.values()}
        for version in list(worker.resident):
            if version not in named:
                if version in worker.holds:
                    continue
                worker.pinned.discard(version)
                if not worker.leases.get(version):
                    del worker.resident[version]
            elif named[version]:
                worker.pinned.add(version)
            else:
                worker.pinned.discard(version)

"""One worker: a base model on one device or several, its engine and its adapters. The cluster makes it a deployment."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from typing import TypeVar

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights
from lorafleet.workers.adapter_loader import AdapterLoader
from lorafleet.workers.assembly import assemble
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.engine import Delivery
from lorafleet.workers.memory.kv_cache import KVPageCounts
from lorafleet.workers.memory.residency import ResidencySnapshot
from lorafleet.workers.memory.state_store import StateSlotCounts
from lorafleet.workers.request import EngineRequest, GenerateDelta
from lorafleet.workers.state import AdapterPages, KVPages, RankState, ResidentAdapter, StateSlots, WorkerState
from lorafleet.workers.stats import EngineStats, ServedCounts

Result = TypeVar("Result")
Take = Callable[[GenerateDelta | Exception], None]
"""Takes what comes of a request, on the event loop."""


class Worker:
    """Generates with any mix of adapters, and makes adapters resident and lets them go.

    `fetch` gives the weights of a version from the adapter store; it is awaited on the caller's event loop. All async
    methods are called on one event loop.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        model: ModelConfig,
        engine: EngineConfig,
        pool: PoolConfig,
        fetch: Callable[[str], Awaitable[AdapterWeights]],
        node_id: str = "",
    ) -> None:
        """Load the base and start the engine. Raises UnsupportedModel and WorkerConfigError."""
        self.worker_id = worker_id
        self._node_id = node_id
        self._fetch = fetch
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, Take] = {}
        self._fetches: set[Future[AdapterWeights]] = set()
        self._parts = assemble(
            worker_id=worker_id,
            model=model,
            engine=engine,
            pool=pool,
            fetch=self._fetch_blocking,
            deliver=self._deliver,
        )
        self._engine = self._parts.engine
        self._loader = self._parts.loader
        self._engine.start()

    @property
    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._engine.stats

    @property
    def loader(self) -> AdapterLoader:
        """The adapters' counters: loads, seconds, evictions."""
        return self._loader

    # --- generation ---

    async def generate(self, request: EngineRequest) -> AsyncGenerator[GenerateDelta, None]:
        """Stream one answer, one delta a step. Closing the generator aborts the request within two steps.

        Raises PromptTooLong, AdapterUnavailable, EngineFailed, and what `fetch` raises for an unknown version.
        """
        queue: asyncio.Queue[GenerateDelta | Exception] = asyncio.Queue()
        abort = self.begin(request, queue.put_nowait)
        try:
            is_done = False
            while not is_done:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                is_done = item.finish_reason is not None
                yield item
        finally:
            abort()

    def begin(self, request: EngineRequest, take: Take) -> Callable[[], None]:
        """`generate` without a task: `take` is called with each delta as it is made, or with the error that ends all.

        Returns what aborts the request within two steps, and does nothing once it is over. Called on the event loop.
        """
        self._event_loop = asyncio.get_running_loop()
        # A caller may send the same id twice (a retry that raced its first attempt); streams are kept apart here.
        request = replace(request, request_id=f"{request.request_id}#{next(_serials)}")
        self._streams[request.request_id] = take
        try:
            self._engine.submit(request)
        except Exception:
            del self._streams[request.request_id]
            raise
        return partial(self._abort, request.request_id)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._engine.abort(request_id)

    def _deliver(self, deliveries: list[Delivery]) -> None:
        """On the engine's thread: one hand-over to the event loop a step, whatever the number of streams."""
        assert self._event_loop is not None
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody listens
            self._event_loop.call_soon_threadsafe(self._distribute, deliveries)

    def _distribute(self, deliveries: list[Delivery]) -> None:
        for request_id, item in deliveries:
            is_last = isinstance(item, Exception) or item.finish_reason is not None
            take = self._streams.pop(request_id, None) if is_last else self._streams.get(request_id)
            if take is not None:
                take(item)

    # --- adapters ---

    async def make_resident(self, version: str, *, hold_s: float = 0.0, pinned: bool = False) -> None:
        """Load a version, and keep it for `hold_s` seconds even if nobody uses it, for ever when pinned.

        Raises NoRoomError when it cannot fit beside what is leased, held or pinned, and what `fetch` raises.
        """
        self._event_loop = asyncio.get_running_loop()
        future = await self._on_engine(lambda: self._loader.make_resident(version, hold_s=hold_s, pinned=pinned))
        await asyncio.wrap_future(future)

    async def release_hold(self, version: str) -> None:
        """End what `hold_s` began."""
        await self._on_engine(lambda: self._loader.release_hold(version))

    async def reconcile(self, named: Mapping[str, bool], asked: Collection[str] | None = None) -> None:
        """Follow the store: `named` are the versions that have a name, and whether they are pinned.

        Pinned ones become resident (as far as they fit), others are unpinned, and versions without a name leave as soon
        as nothing uses them. Of these only those in `asked`, which the store was asked about; None: all.
        """
        self._event_loop = asyncio.get_running_loop()
        await self._on_engine(lambda: self._loader.reconcile(named, asked))

    async def estimate(self, manifest: AdapterManifest) -> tuple[int, tuple[str, ...]]:
        """Pages the adapter would take, and the versions it would evict. Raises NoRoomError."""
        return await self._on_engine(lambda: self._loader.estimate(manifest))

    async def held_versions(self) -> tuple[str, ...]:
        """Versions that are resident, loading or on their way out."""
        return await self._on_engine(
            lambda: tuple(entry.version for entry in self._parts.residency.snapshot().adapters)
        )

    async def residency(self) -> ResidencySnapshot:
        """The account of the adapter pool, with its counters."""
        return await self._on_engine(self._parts.residency.snapshot)

    async def state(self) -> WorkerState:
        """Return the worker's residents, memory and load now."""
        # The engine's thread only counts: to describe a thousand residents takes milliseconds.
        snapshot, kv, slots, running, waiting = await self._on_engine(self._counts)
        reserved = len(self._parts.runner.null_pages)
        device, group = str(self._parts.runner.base.device), self._parts.group
        first = RankState(rank=0, pid=os.getpid(), device=device, silent_s=0.0)
        return WorkerState(
            worker_id=self.worker_id,
            pid=os.getpid(),
            node_id=self._node_id,
            device=device,
            running=running,
            waiting=waiting,
            leases=sum(entry.leases for entry in snapshot.adapters),
            kv_pages=KVPages(used=kv.used - reserved, cached=kv.cached, total=kv.total - reserved),
            state_slots=StateSlots(**asdict(slots)) if slots.total else None,
            adapter_pages=AdapterPages(used=snapshot.pages_used, total=snapshot.pages_total),
            ranks=(first, *(() if group is None else group.states())),
            adapters=tuple(
                ResidentAdapter(
                    version=entry.version,
                    rank=entry.rank,
                    pages=entry.pages,
                    pinned=entry.pinned,
                    leases=entry.leases,
                    state=entry.state,
                )
                for entry in snapshot.adapters
            ),
        )

    def _counts(self) -> tuple[ResidencySnapshot, KVPageCounts, StateSlotCounts, int, int]:
        """Residents, memory, running and waiting sequences; on the engine's thread, so that they fit together."""
        engine, parts = self._engine, self._parts
        pages, slots = parts.cache.counts, parts.runner.states.counts
        return parts.residency.snapshot(), pages, slots, engine.num_running, engine.num_waiting

    async def served(self) -> ServedCounts:
        """Return the worker's counts of work since it started."""
        return await self._on_engine(self._engine.served)

    def routing_stats(self) -> dict[str, object]:
        """Return the state that a router needs: resident versions and load. Cheap, and safe from any thread."""
        return {
            "resident": self._loader.resident_versions,
            "running": self._engine.num_running,
            "waiting": self._engine.num_waiting,
        }

    def check_health(self) -> None:
        """Raises EngineFailed when the step loop has ended or stands still, or another rank has."""
        if self._parts.group is not None:
            self._parts.group.check()
        self._engine.check_health()

    @property
    def is_stalled(self) -> bool:
        """True if the step loop stands still, or lacks another rank; only the end of the process helps then."""
        group = self._parts.group
        return self._engine.is_stalled or (group is not None and group.is_lost)

    def close(self) -> None:
        """End the engine, its threads and the other ranks."""
        self._parts.close()
        for fetch in tuple(self._fetches):
            fetch.cancel()

    # --- threads ---

    async def _on_engine(self, function: Callable[[], Result]) -> Result:
        return await asyncio.wrap_future(self._engine.call(function))

    def _fetch_blocking(self, version: str) -> AdapterWeights:
        """On a loader thread: await `fetch` on the event loop."""
        assert self._event_loop is not None
        future: Future[AdapterWeights] = asyncio.run_coroutine_threadsafe(
            _await(self._fetch(version)), self._event_loop
        )
        self._fetches.add(future)
        try:
            return future.result()
        finally:
            self._fetches.discard(future)


_serials = itertools.count()


async def _await(awaitable: Awaitable[Result]) -> Result:
    return await awaitable

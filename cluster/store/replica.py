"""The deployment of the adapter store: `adapter_store.service.AdapterStore` over Ray's object store.

One replica; its catalogue is on disk, so another one goes on where it stopped. Where a node is drained, Serve starts
the other one first: it asks this one to end, for only one may have the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from lorafleet.adapter_store.base_weights import CheckpointWeights
from lorafleet.adapter_store.conversations import BaseTokens
from lorafleet.adapter_store.errors import StoreUnusable
from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights
from lorafleet.adapter_store.names import NamedAdapter, NameRecord, VersionsToKeep
from lorafleet.adapter_store.records import Damage, DesiredRecord, DesiredState
from lorafleet.adapter_store.service import AdapterStore
from lorafleet.cluster import heap
from lorafleet.cluster.config import AppConfig
from lorafleet.cluster.listener import Listener
from lorafleet.cluster.metrics import StoreMetrics
from lorafleet.cluster.store.lookups import answer
from lorafleet.cluster.store.paths import locate
from lorafleet.cluster.watchdog import Watchdog
from lorafleet.cluster.wire import (
    Address,
    Found,
    Lookup,
    NamedVersion,
    NamesAt,
    StoredWeights,
    StoreProblem,
    named_version,
    replying,
)
from lorafleet.workers.checkpoint import load_tokenizer
from lorafleet.workers.model_parts import served_geometry

logger = logging.getLogger(__name__)

WATCH_S = 1.0
"""How long a `watch` lasts: callers learn from its end that the store lives, and from its failure that it died."""
METRICS_PERIOD_S = 5.0


HAND_OVER_S = 10.0
"""How long the replica that has the state folder may take to hear that it is to end."""


def own_deployment() -> DeploymentHandle[Any]:
    """The way to the replica of this deployment that takes calls."""
    context = serve.get_replica_context()
    return serve.get_deployment_handle(context.deployment, context.app_name)


def put(weights: AdapterWeights) -> StoredWeights:
    """Move weights to shared memory; they stay as long as somebody has the reference."""
    return StoredWeights(ray.put(weights))


class StoreReplica:
    """The one adapter store of a service."""

    def __init__(self, config: AppConfig, predecessor: Callable[[], DeploymentHandle[Any]] = own_deployment) -> None:
        """predecessor: the way to the replica that may have the state folder."""
        torch.set_num_threads(1)
        model = config.model
        tokenizer = load_tokenizer(model.source)
        self._sources = config.adapters.sources
        self._open = partial(
            AdapterStore,
            state_dir=config.state_dir,
            sources=config.adapters.sources,
            geometry=served_geometry(model, config.worker, config.worker.resolved_device),
            max_rank=config.adapters.max_rank,
            host_cache_bytes=config.adapters.host_cache_bytes,
            put=put,
            base_weights=CheckpointWeights(model.source) if model.load == "weights" else None,
            base_tokens=None if tokenizer is None else BaseTokens(tokenizer.get_vocab()),
        )
        self._predecessor = predecessor
        try:
            self._store = self._open()
        except StoreUnusable as error:
            if error.code != "store_locked":
                raise
        self._listener = Listener(ray.util.get_node_ip_address(), partial(answer, self._found))
        self._is_settled = False
        self._created_s: dict[str, int] = {}
        self._metrics = StoreMetrics()
        self._tasks = [
            asyncio.create_task(self._report()),
            asyncio.create_task(Watchdog().run()),
            asyncio.create_task(heap.trim_often()),
        ]

    @replying
    async def publish(self, source: str, key: str) -> AdapterManifest:
        return await self._store.publish(source, key)

    @replying
    async def validate(self, source: str, key: str) -> AdapterManifest:
        return await self._store.validate(source, key)

    @replying
    async def locate(self, path: str) -> tuple[str, str]:
        """The source and key that a path on this machine stands for."""
        return await asyncio.to_thread(locate, path, self._sources)

    @replying
    async def flip(self, record: NameRecord) -> NamedAdapter:
        return await self._store.flip(record)

    @replying
    async def delete(self, name: str, *, by_config: bool = False) -> NamedAdapter:
        return await self._store.delete(name, by_config=by_config)

    @replying
    async def set_pinned(self, name: str, pinned: bool) -> NamedAdapter:
        return await self._store.set_pinned(name, pinned)

    @replying
    async def resolve(self, name: str) -> NamedVersion:
        """Return the version of a name, for one request. The manifest is left out: it is thousands of times as long."""
        return self._named_version(await self._store.resolve(name))

    async def address(self) -> Address:
        """Return the address at which this replica answers what `known` does."""
        return await self._listener.address()

    async def known(self, names: Lookup) -> Found:
        """Return the versions of names at one moment, as `resolve` does; None for a name without one."""
        return self._found(names)

    def _found(self, names: Lookup) -> Found:
        return tuple(map(self._known, names))

    def _known(self, name: str) -> NamedVersion | None:
        adapter = self._store.find(name)
        return None if adapter is None else self._named_version(adapter)

    async def names(self, since: int = -1) -> NamesAt:
        """Return the names that changed after a generation, as `resolve` does; all names where that is not known."""
        if since >= 0:
            changes = await self._store.names_since(since)
            if changes.is_complete:
                entries = tuple(map(self._named_version, changes.adapters))
                return NamesAt(changes.generation, entries, changes.deleted, is_whole=False)
        table = await self._store.table()
        entries = await asyncio.to_thread(lambda: tuple(map(self._named_version, table.adapters)))
        return NamesAt(table.generation, entries)

    @replying
    async def named(self, name: str) -> NamedAdapter:
        return await self._store.named(name)

    async def records(self) -> tuple[NameRecord, ...]:
        return await self._store.records()

    async def taken_down(self) -> frozenset[str]:
        return await self._store.taken_down()

    async def page(self, after: str, limit: int | None) -> tuple[NamedAdapter, ...]:
        return await self._store.page(after, limit)

    async def problems(self) -> tuple[StoreProblem, ...]:
        """Return the unused parts of the state folder, and why it cannot be written."""
        return tuple(
            StoreProblem("store_damaged", found.kind, found.entry, found.reason)
            if isinstance(found, Damage)
            else StoreProblem(found.code, "folder", "", found.message)
            for found in await self._store.problems()
        )

    async def desired(self) -> DesiredState:
        return await self._store.desired()

    @replying
    async def set_desired(self, adapters: tuple[DesiredRecord, ...], generation: int) -> DesiredState:
        return await self._store.set_desired(adapters, generation)

    async def watch(self, generation: int) -> int:
        """Return after `WATCH_S`, or as soon as the names are not those of `generation`; says what they are of."""
        deadline = asyncio.get_running_loop().time() + WATCH_S
        while await self._store.generation() == generation and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return await self._store.generation()

    @replying
    async def manifest(self, version: str) -> AdapterManifest:
        return await self._store.manifest(version)

    @replying
    async def fetch(self, version: str) -> StoredWeights:
        stored: StoredWeights = await self._store.fetch(version)
        return stored

    @replying
    async def reconcile(self, worker_id: str, held: tuple[str, ...] | None, generation: int) -> VersionsToKeep | None:
        """Tell a worker which of its versions to keep, and which versions are pinned; None: as it was told before."""
        if held is None:
            return await self._store.reconcile_again(worker_id, generation)
        return await self._store.reconcile(worker_id, held)

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises: the state folder cannot be written, or is another service's.

        Serve sends requests once the first check has passed.
        """
        if not hasattr(self, "_store"):
            with contextlib.suppress(Exception):  # it ends, or it is no replica of this service
                await asyncio.wait_for(self._predecessor().options(method_name="hand_over").remote(), HAND_OVER_S)
            self._store = self._open()
        if not self._is_settled:
            heap.settle()
            self._is_settled = True
        await asyncio.to_thread(self._store.check_health)

    async def hand_over(self) -> None:
        """End this process: another replica is to have the state folder. What is under way fails as if it had died."""
        logger.info("the adapter store hands its state folder over to another replica, and ends")
        self._listener.close()
        self._store.close()
        asyncio.get_running_loop().call_later(HAND_OVER_S / 100, os._exit, 0)

    def __del__(self) -> None:
        """Serve calls this when the replica stops."""
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if hasattr(self, "_listener"):
            self._listener.close()
        if hasattr(self, "_store"):
            self._store.close()

    def _named_version(self, adapter: NamedAdapter) -> NamedVersion:
        return named_version(adapter, self._created_s.setdefault(adapter.version, int(time.time())))

    async def _report(self) -> None:
        while True:
            with contextlib.suppress(Exception):
                usage = self._store.usage
                self._metrics.publish(
                    num_on_disk=usage.num_versions, num_in_host_memory=usage.num_cached, host_bytes=usage.cached_bytes
                )
                self._metrics.publish_problems(Counter(problem.code for problem in await self.problems()))
            await asyncio.sleep(METRICS_PERIOD_S)

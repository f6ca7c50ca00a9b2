"""The adapter store: the one authority on which names there are, which version each points at, and where weights lie.

A plain class with async methods; one event loop calls it, and all that blocks runs in threads. `cluster` makes a Serve
deployment of one replica of it, and injects `put`, which moves weights into Ray's object store.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lorafleet.adapter_store.base_weights import BaseWeights
from lorafleet.adapter_store.catalog import Catalog
from lorafleet.adapter_store.conversations import TOKENIZER_FILE, BaseTokens, keep_own_tokens
from lorafleet.adapter_store.errors import (
    AdapterRefused,
    AdapterStoreError,
    InvalidName,
    StoreUnusable,
    UnknownVersion,
)
from lorafleet.adapter_store.host_cache import HostCache
from lorafleet.adapter_store.manifest import (
    NAME_RULE,
    AdapterManifest,
    AdapterWeights,
    BaseGeometry,
)
from lorafleet.adapter_store.names import NAME_PATTERN, NamedAdapter, NameRecord, NameTable, VersionsToKeep
from lorafleet.adapter_store.open_sources import OpenSource, OpenSources
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.adapter_store.records import Damage, DesiredRecord, DesiredState
from lorafleet.adapter_store.resolution import AbsentNames, first_offer, unknown_adapter
from lorafleet.adapter_store.single_flight import SingleFlight
from lorafleet.adapter_store.source_config import SourceConfig
from lorafleet.adapter_store.version_use import GRACE_S, VersionUse

__all__ = [
    "AdapterStore",
    "Damage",
    "DesiredRecord",
    "DesiredState",
    "NameTable",
    "NamedAdapter",
    "TableChanges",
    "VersionsToKeep",
    "identity",
]

Result = TypeVar("Result")


_COLLECTED_AT_ONCE = 500
"""Versions that `collect` judges before other calls have their turn."""

_DISK_THREADS = 4


def identity(weights: AdapterWeights) -> Any:
    """The default of `put`: weights are kept as they are."""
    return weights


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Number and size of the versions that the store keeps."""

    num_versions: int
    """Versions on disk."""
    num_cached: int
    """Versions in host memory."""
    cached_bytes: int


@dataclass(frozen=True, slots=True)
class TableChanges:
    """Changes of names after a generation."""

    generation: int
    adapters: tuple[NamedAdapter, ...]
    deleted: tuple[str, ...]
    is_complete: bool
    """False if the store no longer knows all that was deleted since: read the whole table."""


class AdapterStore:
    """Names, versions and weights of one base's adapters. Errors are those of `errors.py`."""

    def __init__(
        self,
        *,
        state_dir: Path,
        sources: Sequence[SourceConfig],
        geometry: BaseGeometry,
        max_rank: int,
        host_cache_bytes: int,
        put: Callable[[AdapterWeights], Any] = identity,
        clock: Callable[[], float] = time.monotonic,
        base_weights: BaseWeights | None = None,
        base_tokens: BaseTokens | None = None,
    ) -> None:
        """Open the state of this base below `state_dir` and remove what a crash left. Blocks.

        `put` is called in a thread; what it returns is what `fetch` gives. `base_weights` is where the base's own
        weights can be read: adapters on embeddings bring copies of them, and are refused without it. Without
        `base_tokens` chat templates and tokenizers are ignored.
        """
        self._reader = AdapterReader(geometry, max_rank, base_weights, base_tokens)
        self._sources = OpenSources(sources)
        self._catalog = Catalog(state_dir / f"base-{_fingerprint(geometry)}")
        self._disk = ThreadPoolExecutor(_DISK_THREADS, "adapter-store")
        self._put = put
        self._clock = clock
        self._cache: HostCache[Any] = HostCache(host_cache_bytes)
        self._fetches: SingleFlight[Any] = SingleFlight()
        self._resolves: SingleFlight[NamedAdapter] = SingleFlight()
        self._absent = AbsentNames(clock)
        for version, manifest in self._catalog.manifests.items():
            # The served dtype may have changed since it was published.
            num_bytes = self._reader.num_bytes(manifest.modules, manifest.extras)
            self._catalog.manifests[version] = replace(manifest, num_bytes=num_bytes)
        self._table = NameTable(-1, ())
        self._use = VersionUse(self._catalog.manifests, clock)
        self._collected_at = clock()
        self._failure: StoreUnusable | None = None
        """Why the last write failed, until one succeeds."""
        self._background: set[asyncio.Task[tuple[str, ...]]] = set()

    @property
    def usage(self) -> StoreUsage:
        """Number and size of the versions kept now."""
        return StoreUsage(len(self._catalog.manifests), len(self._cache), self._cache.num_bytes)

    def close(self) -> None:
        """Let another store have the state folder; work that runs is not waited for."""
        self._sources.close()
        self._disk.shutdown(wait=False, cancel_futures=True)
        self._catalog.close()

    async def publish(self, source: str, key: str) -> AdapterManifest:
        """Fetch, validate and publish an adapter as a version; it has no name yet.

        Raises UnknownSource, InvalidKey, UnknownKey, AdapterRefused, SourceUnavailable.
        """
        opened = self._sources[source]
        manifest, value = await self._in_source(opened, lambda: self._publish(opened, key))
        self._failure = None
        self._cache.put(manifest.version, value, manifest.num_bytes)
        return manifest

    async def validate(self, source: str, key: str) -> AdapterManifest:
        """Fetch and check an adapter as `publish` does, and keep nothing."""
        opened = self._sources[source]
        return await self._in_source(opened, lambda: self._validate(opened, key))

    async def flip(self, record: NameRecord) -> NamedAdapter:
        """Let the record's name point at its version, durably. Raises InvalidName, UnknownVersion."""
        _check_name(record.name)
        self._touch_named(record.name)
        named = self._named(await self._on_disk(lambda: self._catalog.set_name(record)))
        self._failure = None
        return named

    async def delete(self, name: str, *, explicit: bool = True, by_config: bool = False) -> NamedAdapter:
        """Take a name away, durably, and say what it was. Raises UnknownAdapter.

        After an `explicit` delete no `resolve` source brings the name back, until it is loaded again. `by_config`: it
        has left the configuration.
        """
        self._touch_named(name)
        delete = partial(self._catalog.delete_name, name, explicit=explicit, by_config=by_config)
        return self._named(await self._on_disk(delete))

    async def set_pinned(self, name: str, pinned: bool) -> NamedAdapter:
        """Pin or unpin a name, durably. Raises UnknownAdapter."""
        return self._named(await self._on_disk(lambda: self._catalog.pin_name(name, pinned)))

    async def resolve(self, name: str) -> NamedAdapter:
        """The adapter of this name; a name that is not known is looked for, once, in the sources marked `resolve`.

        Raises UnknownAdapter; AdapterRefused if a source offers what cannot be served; SourceUnavailable if no source
        offers it and not all could be asked.
        """
        record = self._catalog.names.records.get(name)
        if record is not None:
            return self._named(record)
        known = self._absent.get(name)
        if known is not None:
            raise known
        if NAME_PATTERN.fullmatch(name) is None or self._catalog.names.is_deleted(name):
            raise unknown_adapter(name)
        return await self._resolves.do(name, lambda: self._resolve(name))

    async def table(self) -> NameTable:
        """All names. Equal generations mean equal tables; see `generation`."""
        if self._table.generation != self._catalog.names.generation:
            self._table = await self._on_disk(self._new_table)
        return self._table

    async def named(self, name: str) -> NamedAdapter:
        """The adapter of this name; no source is asked. Raises UnknownAdapter."""
        adapter = self.find(name)
        if adapter is None:
            raise unknown_adapter(name)
        return adapter

    def find(self, name: str) -> NamedAdapter | None:
        """The adapter of this name, None if there is none; no source is asked."""
        record = self._catalog.names.records.get(name)
        return None if record is None else self._named(record)

    async def records(self) -> tuple[NameRecord, ...]:
        """All names without their manifests."""
        return await self._on_disk(lambda: tuple(self._catalog.names.records.copy().values()))

    async def taken_down(self) -> frozenset[str]:
        """The names that somebody deleted, other than the configuration, and that were not loaded since."""
        return self._catalog.names.taken_down()

    async def page(self, after: str, limit: int | None) -> tuple[NamedAdapter, ...]:
        """At most `limit` adapters in order of their names, those that come after `after`; None: all of them."""
        adapters = (await self.table()).adapters
        start = bisect_right(adapters, after, key=lambda adapter: adapter.name)
        return adapters[start:] if limit is None else adapters[start : start + limit]

    async def names_since(self, generation: int) -> TableChanges:
        """The names that changed after `generation`; costs what changed, not what there is."""
        return await self._on_disk(lambda: self._changes_since(generation))

    async def damaged(self) -> list[Damage]:
        """All that is damaged in the state folder and therefore not served, by name."""
        return list(await self._on_disk(self._catalog.damaged))

    async def desired(self) -> DesiredState:
        """The desired state that was set last."""
        return self._catalog.desired()

    async def set_desired(self, adapters: Sequence[DesiredRecord], generation: int) -> DesiredState:
        """Replace the desired state, durably. Raises StaleGeneration for an older generation than the one kept."""
        given = tuple(adapters)
        return await self._on_disk(lambda: self._catalog.set_desired(given, generation))

    async def generation(self) -> int:
        """Grows with every change of any name: a cheap way to see whether a table is still true."""
        return self._catalog.names.generation

    async def manifest(self, version: str) -> AdapterManifest:
        """The manifest of a published version. Raises UnknownVersion."""
        manifest = self._catalog.manifests.get(version)
        if manifest is None:
            raise UnknownVersion("version_not_found", f"there is no adapter version {version[:40]!r}", "version")
        return manifest

    async def fetch(self, version: str) -> Any:
        """Return a version's weights, as `put` returned them, from host memory or else from disk.

        Raises UnknownVersion, AdapterRefused if the limits have become narrower, StoreUnusable if the disk's copy is
        damaged.
        """
        await self.manifest(version)
        self._use.touch(version)
        with self._cache.hold(version):
            value = self._cache.get(version)
            if value is None:
                value = await self._fetches.do(version, lambda: self._fetch(version))
            return value

    async def reconcile(self, worker_id: str, held: Iterable[str]) -> VersionsToKeep:
        """Note the versions that a worker holds. Return those of them that have a name, and all pinned ones."""
        versions = frozenset(held)
        self._note_holding(worker_id, versions)
        return self._catalog.names.versions_to_keep(versions)

    async def reconcile_again(self, worker_id: str, generation: int) -> VersionsToKeep | None:
        """The same for a worker that holds what it said last; None if the names are of the generation that it was told.

        Raises UnknownWorker for a worker that has not said what it holds.
        """
        versions = self._use.held_by(worker_id)
        self._note_holding(worker_id, versions)
        is_told = generation == self._catalog.names.generation
        return None if is_told else self._catalog.names.versions_to_keep(versions)

    def _note_holding(self, worker_id: str, versions: frozenset[str]) -> None:
        self._use.hold(worker_id, versions)
        now = self._clock()
        if now - self._collected_at >= GRACE_S / 10:
            self._collected_at = now
            task = asyncio.create_task(self.collect())
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def collect(self) -> tuple[str, ...]:
        """Remove published versions that nothing has named, held or asked for during the grace period; returns them."""
        self._use.expire()
        removed = []
        for number, version in enumerate(list(self._catalog.manifests), 1):
            if number % _COLLECTED_AT_ONCE == 0:
                await asyncio.sleep(0)
            if self._is_unwanted(version) and await self._on_disk(partial(self._remove, version)):
                self._cache.drop(version)
                self._use.forget(version)
                removed.append(version)
        await self._on_disk(self._catalog.expire_tombstones)
        return tuple(removed)

    async def problems(self) -> tuple[Damage | StoreUnusable, ...]:
        """Return the state folder's faults: all damaged entries, and why the last write failed."""
        damaged = await self.damaged()
        return (*damaged, *filter(None, (self._failure,)))

    def check_health(self) -> None:
        """Raises StoreUnusable when the state folder cannot be written any more."""
        self._catalog.check_writable()

    def _named(self, record: NameRecord) -> NamedAdapter:
        return NamedAdapter.of(record, self._catalog.manifests[record.version])

    def _new_table(self) -> NameTable:
        # The generation is read first: a change meanwhile makes the table newer than it says, and it is made again.
        generation = self._catalog.names.generation
        records = sorted(self._catalog.names.records.copy().values(), key=lambda record: record.name)
        return NameTable(generation, tuple(self._named(record) for record in records))

    def _changes_since(self, generation: int) -> TableChanges:
        changes = self._catalog.names.changes_since(generation)
        adapters = tuple(self._named(record) for record in changes.records)
        return TableChanges(changes.generation, adapters, changes.deleted, changes.is_complete)

    async def _on_disk(self, work: Callable[[], Result]) -> Result:
        with self._noting_failures():
            return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    @contextlib.contextmanager
    def _noting_failures(self) -> Iterator[None]:
        try:
            yield
        except StoreUnusable as error:
            if error.code in ("store_full", "store_not_writable"):
                self._failure = error
            raise

    async def _in_source(self, opened: OpenSource, work: Callable[[], Result]) -> Result:
        with self._noting_failures():
            return await opened.run(work)

    def _publish(self, opened: OpenSource, key: str) -> tuple[AdapterManifest, Any]:
        with self._catalog.staging_folder() as folder:
            weights = self._read_from(opened, key, folder)
            self._reader.drop_base_copies(folder)
            # Before it is published, so that it is never seen unnamed and old.
            self._use.touch(weights.manifest.version)
            self._catalog.publish(folder, weights.manifest)
        return weights.manifest, self._put(weights)

    def _validate(self, opened: OpenSource, key: str) -> AdapterManifest:
        with self._catalog.staging_folder() as folder:
            return self._read_from(opened, key, folder).manifest

    def _read_from(self, opened: OpenSource, key: str, folder: Path) -> AdapterWeights:
        """Only the copy is looked at: what happens to the original meanwhile cannot give a mixed version."""
        opened.fetch(key, folder, self._reader.max_weights_bytes)
        return self._reader.read(folder, strict=opened.config.strict)

    async def _fetch(self, version: str) -> Any:
        manifest = await self.manifest(version)
        value = await self._on_disk(lambda: self._read_published(version))
        self._cache.put(version, value, manifest.num_bytes)
        return value

    def _read_published(self, version: str) -> Any:
        folder = self._catalog.folder(version)
        try:
            chat = self._catalog.manifests[version].chat
            if chat is not None and not (folder / TOKENIZER_FILE).exists():
                keep_own_tokens(folder, chat.own_tokens)  # versions from before they were kept
            weights = self._reader.read(folder)
            why = None if weights.manifest.version == version else "its content has changed"
        except (AdapterRefused, FileNotFoundError) as error:
            # Settings may have become narrower since it was published; that is no damage.
            narrower = ("rank_too_large", "overflow", "base_weights_unverified")
            if isinstance(error, AdapterRefused) and error.code in narrower:
                raise
            why = str(error) if isinstance(error, AdapterRefused) else "its files are gone"
        if why is not None:
            self._catalog.mark_damaged(version, f"{why}: load it again")
            message = f"adapter version {version} cannot be read back from disk ({why}): load it again"
            raise StoreUnusable("store_damaged", message, "version")
        return self._put(weights)

    async def _resolve(self, name: str) -> NamedAdapter:
        asks = {source: partial(self.publish, source, name) for source in self._sources.resolving}
        try:
            source, manifest = await first_offer(name, asks)
        except AdapterRefused as error:
            named = AdapterRefused(error.code, f"adapter {name}: {error.message}", error.param)
            self._absent.put(name, named)
            raise named from error
        except AdapterStoreError as error:
            self._absent.put(name, error)
            raise
        record = NameRecord(name, manifest.version, source, name, False, 0, "resolve")
        return self._named(await self._on_disk(lambda: self._catalog.add_name(record)))

    def _touch_named(self, name: str) -> None:
        """The grace period of the version that a name is about to leave starts now."""
        record = self._catalog.names.records.get(name)
        if record is not None:
            self._use.touch(record.version)

    def _is_unwanted(self, version: str) -> bool:
        return version not in self._fetches and not self._catalog.names.is_named(version) and self._use.is_over(version)

    def _remove(self, version: str) -> bool:
        return self._catalog.remove(version, lambda: self._is_unwanted(version))


def _check_name(name: str) -> None:
    if NAME_PATTERN.fullmatch(name) is None:
        raise InvalidName("invalid_name", f"name {name[:140]!a} is refused: {NAME_RULE}", "name")


def _fingerprint(geometry: BaseGeometry) -> str:
    """Tells bases apart by what adapters see of them; names given for one base are not those of another."""
    modules = sorted((name, shape.kind, shape.in_dim, shape.out_dim) for name, shape in geometry.modules.items())
    return hashlib.sha256(json.dumps(modules).encode()).hexdigest()[:16]

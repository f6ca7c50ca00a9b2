"""Tracks the adapter versions in a worker's pool: their users, and the next to evict when another needs room.

A version is `loading` (its pages are reserved, its weights on their way), `resident`, or `retired` (replaced or
deleted: it goes when its last lease does). Leased, pinned, held and loading versions stay; of the others the one used
longest ago goes first. One engine thread calls everything here; only `AdapterPool.upload` may run elsewhere, between
`reserve` and `publish` or `abandon`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.workers.errors import NoRoomError
from lorafleet.workers.memory.adapter_pool import AdapterPool, Allocation, UploadedAdapter

MAX_EVICTED = 1 << 16
"""Evicted versions that are remembered, to tell loads from reloads."""
ResidencyState = Literal["loading", "resident", "retired"]


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One version in the pool."""

    version: str
    rank: int
    pages: int
    slot: int
    pinned: bool
    leases: int
    holds: int
    state: ResidencyState


@dataclass(frozen=True, slots=True)
class ResidencySnapshot:
    """The account of a pool at one moment; `loads`, `evictions` and `reloads_after_eviction` count since the start."""

    pages_used: int
    pages_total: int
    adapters: tuple[AdapterUse, ...]
    """Least recently used first."""
    loads: int
    evictions: int
    reloads_after_eviction: int


@dataclass(slots=True, eq=False)
class _Entry:
    allocation: Allocation
    num_leases: int = 0
    num_holds: int = 0
    is_loaded: bool = False
    is_pinned: bool = False
    is_retired: bool = False
    counts_as_evictable: bool = False
    """In the residency's totals; `_recount` keeps it."""
    counts_as_pinned: bool = False

    @property
    def state(self) -> ResidencyState:
        if self.is_retired:
            return "retired"
        return "resident" if self.is_loaded else "loading"

    @property
    def is_in_use(self) -> bool:
        return not self.is_loaded or self.num_leases > 0 or self.num_holds > 0

    @property
    def is_evictable(self) -> bool:
        return not self.is_in_use and not self.is_pinned


class AdapterLease:
    """A request's hold on a version, from `Residency.acquire` to `release`, which is called exactly once.

    It may be taken while the version loads, which then cannot be evicted before the request has run.
    """

    __slots__ = (
        "_entry",
        "_residency",
        "has_experts",
        "has_extras",
        "invocation",
        "is_plain",
        "is_tabled",
        "own_tokens",
        "version",
    )

    def __init__(self, residency: Residency, entry: _Entry) -> None:
        self.version = entry.allocation.manifest.version
        manifest = entry.allocation.manifest
        self.has_extras = bool(manifest.extras) or manifest.vocabulary is not None
        self.is_tabled = residency.is_tabled(manifest)
        self.has_experts = residency.is_on_experts(manifest)
        self.invocation = manifest.invocation
        self.own_tokens = () if manifest.chat is None else manifest.chat.own_tokens
        self.is_plain = not (self.has_extras or self.invocation)
        """Whether the adapter is low-rank factors for all of a sequence and no more."""
        self._residency = residency
        self._entry: _Entry | None = entry
        entry.num_leases += 1
        residency._recount(entry)

    @property
    def is_ready(self) -> bool:
        """Return True if the version is resident, so that `slot` may be used."""
        assert self._entry is not None, f"lease on {self.version} is used after its release"
        return self._entry.is_loaded

    @property
    def slot(self) -> int:
        """The slot of the adapter's rows in a batch."""
        assert self._entry is not None, f"lease on {self.version} is used after its release"
        assert self._entry.is_loaded, f"{self.version} is still loading"
        return self._entry.allocation.slot

    def release(self) -> None:
        assert self._entry is not None, f"lease on {self.version} is released twice"
        entry, self._entry = self._entry, None
        entry.num_leases -= 1
        self._residency._touch(entry)


class Residency:
    """Policy over an `AdapterPool`; the only one that allocates from it."""

    def __init__(self, pool: AdapterPool) -> None:
        self._pool = pool
        self._experts = {name for name, place in pool.layout.places.items() if place.shape.kind == "experts"}
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._evicted: dict[str, None] = {}
        """The last evicted ones, in order."""
        # Totals, so that asking for room takes no look at every entry: waiting requests ask in every step.
        self._num_evictable = self._evictable_pages = 0
        self._num_pinned = self._pinned_pages = 0
        self._num_loads = 0
        self._num_evictions = 0
        self._num_reloads = 0

    def is_tabled(self, manifest: AdapterManifest) -> bool:
        """Return True if a captured graph can find all extras of the adapter."""
        return manifest.vocabulary is None and self._pool.untabled.isdisjoint(extra.name for extra in manifest.extras)

    def is_on_experts(self, manifest: AdapterManifest) -> bool:
        """Return True if the adapter has low-rank factors on experts."""
        return bool(self._experts) and any(module.name in self._experts for module in manifest.modules)

    def __contains__(self, version: str) -> bool:
        """Return True if the version has pages: it is loading, resident or retired."""
        return version in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def state(self, version: str) -> ResidencyState | None:
        """None: it has no pages here."""
        entry = self._entries.get(version)
        return entry.state if entry else None

    # Coming: try_reserve, then publish or abandon.

    def fits_beside_pinned(self, manifest: AdapterManifest) -> bool:
        """Return True if the version would fit beside the pinned ones alone. If not, waiting for room is in vain."""
        room = self._pool.num_pages_total - self._pinned_pages
        return self._num_pinned < self._pool.num_slots and self._pool.num_pages(manifest) <= room

    def victims(self, manifest: AdapterManifest) -> tuple[str, ...] | None:
        """Versions that `try_reserve` would evict now, least recently used first; None when even that makes no room."""
        missing_pages = self._pool.num_pages(manifest) - self._pool.num_pages_free
        missing_slots = 1 - self._pool.num_slots_free
        if missing_pages > self._evictable_pages or missing_slots > self._num_evictable:
            return None
        candidates: list[tuple[str, int]] = []
        for version, entry in self._entries.items():
            if missing_pages <= 0 and missing_slots <= 0:
                break
            if entry.is_evictable:
                candidates.append((version, len(entry.allocation.page_ids)))
                missing_pages -= candidates[-1][1]
                missing_slots -= 1
        assert missing_pages <= 0, "the totals are not those of the entries"
        assert missing_slots <= 0, "the totals are not those of the entries"
        # What was taken before a larger one made it needless stays.
        victims = []
        for version, num_pages in reversed(candidates):
            if missing_pages + num_pages <= 0 and missing_slots + 1 <= 0:
                missing_pages += num_pages
                missing_slots += 1
            else:
                victims.append(version)
        return tuple(reversed(victims))

    def try_reserve(self, manifest: AdapterManifest) -> Allocation | None:
        """Pages and a slot for a version that is not here, evicting what must go; where that cannot help, None.

        Nothing is evicted then. The version is `loading` until `publish` or `abandon`.
        """
        assert manifest.version not in self._entries, f"{manifest.version} is here already"
        victims = self.victims(manifest)
        if victims is None:
            return None
        for version in victims:
            self._remove(version)
            self._evicted[version] = None
            if len(self._evicted) > MAX_EVICTED:
                del self._evicted[next(iter(self._evicted))]
            self._num_evictions += 1
        allocation = self._pool.allocate(manifest)
        self._entries[manifest.version] = _Entry(allocation)
        return allocation

    def no_room(self, manifest: AdapterManifest) -> NoRoomError:
        """The error that says why the version does not fit."""
        pinned = sum(len(e.allocation.page_ids) for e in self._entries.values() if e.is_pinned)
        in_use = sum(len(e.allocation.page_ids) for e in self._entries.values() if e.is_in_use and not e.is_pinned)
        return NoRoomError(
            manifest.version,
            needed=self._pool.num_pages(manifest),
            free=self._pool.num_pages_free,
            in_use=in_use,
            pinned=pinned,
            total=self._pool.num_pages_total,
        )

    def publish(self, uploaded: UploadedAdapter) -> None:
        """The version is resident: called between two steps. One that was retired meanwhile goes at once if unused."""
        version = uploaded.allocation.manifest.version
        entry = self._entries[version]
        assert not entry.is_loaded, version
        assert entry.allocation is uploaded.allocation, version
        self._pool.publish(uploaded)
        entry.is_loaded = True
        self._num_loads += 1
        if version in self._evicted:
            del self._evicted[version]
            self._num_reloads += 1
        self._touch(entry)

    def abandon(self, version: str) -> None:
        """The load failed: give its pages back. Leases and holds on it have been released, and `upload` is over."""
        entry = self._entries[version]
        assert not entry.is_loaded, version
        assert entry.num_leases == 0, f"{version} has {entry.num_leases} leases"
        assert entry.num_holds == 0, f"{version} has {entry.num_holds} holds"
        self._remove(version)

    # Use.

    def acquire(self, version: str) -> AdapterLease:
        """Lease a version that has pages, in any state: a request keeps the version it came with."""
        entry = self._entries[version]
        self._entries.move_to_end(version)
        return AdapterLease(self, entry)

    def try_acquire(self, version: str) -> AdapterLease | None:
        """None: the version has no pages here."""
        return self.acquire(version) if version in self._entries else None

    # Staying: holds for the length of a roll-out, pins for good.

    def hold(self, version: str) -> None:
        """Keep the version until `unhold`; holds are counted. A retired version is wanted again."""
        entry = self._entries[version]
        entry.num_holds += 1
        entry.is_retired = False
        self._recount(entry)

    def unhold(self, version: str) -> None:
        entry = self._entries[version]
        assert entry.num_holds > 0, f"{version} is not held"
        entry.num_holds -= 1
        self._touch(entry)

    def pin(self, version: str) -> None:
        """Keep the version until `unpin` or `retire`; pinning is not counted. A retired version is wanted again."""
        entry = self._entries[version]
        entry.is_pinned = True
        entry.is_retired = False
        self._recount(entry)

    def unpin(self, version: str) -> None:
        entry = self._entries[version]
        entry.is_pinned = False
        self._recount(entry)

    # Going.

    def retire(self, version: str) -> None:
        """No name points at the version any more: it goes as soon as nothing uses it. Unpins; unknown is no error."""
        self._evicted.pop(version, None)
        entry = self._entries.get(version)
        if entry is not None:
            entry.is_pinned = False
            entry.is_retired = True
            self._recount(entry)
            self._drop_if_done(entry)

    def restore(self, version: str) -> None:
        """A name points at the version again before it went."""
        self._entries[version].is_retired = False

    def snapshot(self) -> ResidencySnapshot:
        adapters = tuple(
            AdapterUse(
                version=version,
                rank=entry.allocation.manifest.rank,
                pages=len(entry.allocation.page_ids),
                slot=entry.allocation.slot,
                pinned=entry.is_pinned,
                leases=entry.num_leases,
                holds=entry.num_holds,
                state=entry.state,
            )
            for version, entry in self._entries.items()
        )
        return ResidencySnapshot(
            pages_used=self._pool.num_pages_used,
            pages_total=self._pool.num_pages_total,
            adapters=adapters,
            loads=self._num_loads,
            evictions=self._num_evictions,
            reloads_after_eviction=self._num_reloads,
        )

    def _touch(self, entry: _Entry) -> None:
        """A use ended: the version is the most recently used one, or gone if it was retired."""
        self._entries.move_to_end(entry.allocation.manifest.version)
        self._recount(entry)
        self._drop_if_done(entry)

    def _drop_if_done(self, entry: _Entry) -> None:
        if entry.is_retired and not entry.is_in_use:
            self._remove(entry.allocation.manifest.version)

    def _remove(self, version: str) -> None:
        entry = self._entries.pop(version)
        self._recount(entry)
        self._pool.free(entry.allocation)

    def _recount(self, entry: _Entry) -> None:
        """Bring the totals up to date after a change to an entry."""
        is_here = entry.allocation.manifest.version in self._entries
        is_evictable, is_pinned = is_here and entry.is_evictable, is_here and entry.is_pinned
        evictable_more, pinned_more = is_evictable - entry.counts_as_evictable, is_pinned - entry.counts_as_pinned
        entry.counts_as_evictable, entry.counts_as_pinned = is_evictable, is_pinned
        num_pages = len(entry.allocation.page_ids)
        self._num_evictable += evictable_more
        self._evictable_pages += evictable_more * num_pages
        self._num_pinned += pinned_more
        self._pinned_pages += pinned_more * num_pages

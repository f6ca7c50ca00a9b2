"""The first rank's memories: those of a worker of one process, which tell the other ranks what they do."""

from __future__ import annotations

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights
from lorafleet.workers.group.entries import Freed, Published, Zeroed
from lorafleet.workers.group.leader import Group
from lorafleet.workers.memory.adapter_pool import AdapterPool, Allocation, UploadedAdapter
from lorafleet.workers.memory.kv_cache import KVCache


class LeadingCache(KVCache):
    """The first rank's KV cache. Who holds which page is its own affair; the others learn which pages become zero."""

    group: Group | None = None
    """Set when the others are ready: during the start every rank does the same by itself."""

    def _zero(self, pages: list[int]) -> None:
        if pages and self.group is not None:
            self.group.tell(Zeroed(tuple(pages)))
        super()._zero(pages)


class LeadingPool(AdapterPool):
    """The first rank's adapter pool, whose slots are those of all ranks."""

    group: Group | None = None
    """Set when the others are ready."""

    def allocate(self, manifest: AdapterManifest) -> Allocation:
        allocation = super().allocate(manifest)
        if self.group is not None:
            self.group.tell_allocated(manifest, allocation.slot)
        return allocation

    def upload(self, allocation: Allocation, weights: AdapterWeights) -> UploadedAdapter:
        """As in `AdapterPool`, on all ranks. Raises what any of them raises."""
        if self.group is None:
            return super().upload(allocation, weights)
        with self.group.uploading(allocation.slot, weights):
            return super().upload(allocation, weights)

    def publish(self, uploaded: UploadedAdapter) -> None:
        if self.group is not None:
            self.group.tell(Published(uploaded.allocation.slot))
        super().publish(uploaded)

    def free(self, allocation: Allocation) -> None:
        if self.group is not None:
            self.group.tell(Freed(allocation.slot))
        super().free(allocation)

"""The memories of another rank than the first: nobody decides here who has which page."""

from __future__ import annotations

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.workers.memory.adapter_pool import AdapterPool, Allocation
from lorafleet.workers.memory.kv_cache import KVCache


class FollowingCache(KVCache):
    """Another rank's KV cache: pages of no owner, written by steps."""

    def zero(self, pages: tuple[int, ...]) -> None:
        """Make pages zero, after all that was launched before."""
        self._zero(list(pages))


class FollowingPool(AdapterPool):
    """Another rank's adapter pool: its slots are the first rank's, its pages its own."""

    def take(self, manifest: AdapterManifest) -> Allocation | None:
        """As `allocate`; None, with a slot taken all the same, where the pages do not suffice."""
        if self.can_allocate(manifest):
            return self.allocate(manifest)
        self._slots.allocate(1)
        return None

    def give_slot(self, slot: int) -> None:
        """Take back a slot without pages."""
        self._slots.free([slot])

"""Names in memory, as the catalogue has them on disk: which version each points at, and which names were deleted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from lorafleet.adapter_store.names import NameRecord, VersionsToKeep
from lorafleet.adapter_store.records import Damage, NameChanges, Tombstone


class NameIndex:
    """Entries of names in order of their generations. Any thread reads; the catalogue makes one change at a time."""

    def __init__(self) -> None:
        self.records: dict[str, NameRecord] = {}
        self.tombstones: dict[str, Tombstone] = {}
        self.damaged: dict[str, str] = {}
        """Names whose entry cannot be used, and why."""
        self.generation = 0
        """Of the latest change."""
        self.expired = 0
        """The latest generation of which a tombstone was removed."""
        self._named: Counter[str] = Counter()
        self._pinned: Counter[str] = Counter()
        """By version, the names that point at it, and those of them that are pinned."""
        self._lock = threading.Lock()
        """Held to change the entries, and to read several of them at one moment."""

    def put(self, entry: NameRecord | Tombstone) -> None:
        """Add the latest change, in place of the name's former entry."""
        with self._lock:
            # Taken out first, a name comes last again when it is put back: so both stay in order of generations.
            self.tombstones.pop(entry.name, None)
            self.damaged.pop(entry.name, None)
            before = self.records.pop(entry.name, None)
            if before is not None:
                self._count(before, -1)
            self.generation = entry.generation
            if isinstance(entry, Tombstone):
                self.tombstones[entry.name] = entry
            else:
                self.records[entry.name] = entry
                self._count(entry, 1)

    def expire(self, tombstones: Iterable[Tombstone], expired: int) -> None:
        """Remove tombstones; those up to the generation `expired` may be missing from now on."""
        with self._lock:
            self.expired = expired
            for tombstone in tombstones:
                del self.tombstones[tombstone.name]

    def is_named(self, version: str) -> bool:
        """Return True if a name points at the version."""
        return version in self._named

    def is_deleted(self, name: str) -> bool:
        """Return True if the name was deleted and not loaded since. A damaged entry counts as deleted."""
        return name in self.damaged or (name in self.tombstones and self.tombstones[name].explicit)

    def taken_down(self) -> frozenset[str]:
        """The names that somebody deleted, not the configuration, and that were not loaded since."""
        with self._lock:
            return frozenset(name for name, each in self.tombstones.items() if each.explicit and not each.by_config)

    def changes_since(self, generation: int) -> NameChanges:
        """The names that changed after `generation`; costs what changed, not what there is."""
        with self._lock:
            records, deleted = [], []
            for record in reversed(self.records.values()):
                if record.generation <= generation:
                    break
                records.append(record)
            for tombstone in reversed(self.tombstones.values()):
                if tombstone.generation <= generation:
                    break
                deleted.append(tombstone.name)
            is_complete = self.expired <= generation <= self.generation
            return NameChanges(self.generation, tuple(records), tuple(deleted), is_complete)

    def versions_to_keep(self, held: Iterable[str]) -> VersionsToKeep:
        """Versions of `held` that have a name, and all pinned ones."""
        with self._lock:
            named = {version: version in self._pinned for version in held if version in self._named}
            return VersionsToKeep(self.generation, dict.fromkeys(self._pinned, True) | named)

    def faults(self) -> list[Damage]:
        """The damaged entries."""
        with self._lock:
            return [Damage("name", name, why) for name, why in self.damaged.items()]

    def _count(self, record: NameRecord, number: int) -> None:
        for counter in (self._named, self._pinned) if record.pinned else (self._named,):
            counter[record.version] += number
            if not counter[record.version]:
                del counter[record.version]

"""Adapter weights in host memory, by bytes, least recently used out first. Knows digests and sizes only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Value]):
    value: Value
    num_bytes: int


class HostCache(Generic[Value]):
    """Versions and what is kept for them. One event loop calls it.

    A held version is not evicted, so the cache may exceed its capacity by what is held, and by no more.
    """

    def __init__(self, max_bytes: int) -> None:
        assert max_bytes >= 0, max_bytes
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[str, _Entry[Value]] = OrderedDict()
        self._holds: dict[str, int] = {}

    def __contains__(self, version: str) -> bool:
        return version in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, version: str) -> Value | None:
        """Return the value of `version` and make it the most recently used; None if there is none."""
        entry = self._entries.get(version)
        if entry is None:
            return None
        self._entries.move_to_end(version)
        return entry.value

    def put(self, version: str, value: Value, num_bytes: int) -> None:
        """Keep `value` as the most recently used, in place of what was kept before, and evict down to the capacity.

        What is larger than the whole cache is not kept.
        """
        self.drop(version)
        if num_bytes > self.max_bytes:
            return
        self._entries[version] = _Entry(value, num_bytes)
        self.num_bytes += num_bytes
        self._evict()

    def drop(self, version: str) -> None:
        """Forget `version`, held or not."""
        entry = self._entries.pop(version, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes

    @contextmanager
    def hold(self, version: str) -> Iterator[None]:
        """While inside, `version` is not evicted, be it here already or put later."""
        self._holds[version] = self._holds.get(version, 0) + 1
        try:
            yield
        finally:
            self._holds[version] -= 1
            if not self._holds[version]:
                del self._holds[version]
                self._evict()

    def _evict(self) -> None:
        if self.num_bytes <= self.max_bytes:
            return
        for version in list(self._entries):
            if version not in self._holds:
                self.drop(version)
                if self.num_bytes <= self.max_bytes:
                    return

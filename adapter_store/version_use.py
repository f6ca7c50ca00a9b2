"""Notes of who uses a version that has no name: since when nobody asked for it, and which workers hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lorafleet.adapter_store.errors import UnknownWorker

GRACE_S = 600.0
"""How long a version without a name stays published, and how long a worker that fell silent is believed to hold any."""


@dataclass(frozen=True, slots=True)
class _Holding:
    """Versions that a worker reported, and the time of its report."""

    at: float
    versions: frozenset[str]


class VersionUse:
    """The latest use of each published version. The event loop writes; any thread may ask."""

    def __init__(self, versions: Iterable[str], clock: Callable[[], float]) -> None:
        """versions: those that are there at the start, where their grace period begins."""
        self._clock = clock
        self._touched = dict.fromkeys(versions, clock())
        self._holdings: dict[str, _Holding] = {}

    def touch(self, version: str) -> None:
        """Begin the version's grace period anew."""
        self._touched[version] = self._clock()

    def forget(self, version: str) -> None:
        """Drop what is known of a version that was removed."""
        self._touched.pop(version, None)

    def hold(self, worker_id: str, versions: frozenset[str]) -> None:
        """Note what a worker holds now."""
        self._holdings[worker_id] = _Holding(self._clock(), versions)

    def held_by(self, worker_id: str) -> frozenset[str]:
        """The versions that a worker named last. Raises UnknownWorker for one that has not said what it holds."""
        holding = self._holdings.get(worker_id)
        if holding is None:
            raise UnknownWorker("unknown_worker", f"the store does not know what worker {worker_id} holds")
        return holding.versions

    def expire(self) -> None:
        """Forget the workers that fell silent."""
        now = self._clock()
        for worker_id, holding in list(self._holdings.items()):
            if now - holding.at >= GRACE_S:
                del self._holdings[worker_id]

    def is_over(self, version: str) -> bool:
        """True if the version's grace period is over and no worker holds it."""
        now = self._clock()
        return now - self._touched.setdefault(version, now) >= GRACE_S and all(
            version not in holding.versions for holding in list(self._holdings.values())
        )

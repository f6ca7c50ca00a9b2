"""Remembers the workers that this process's request routers reach, and tells who wants to know of changes.

A module of its own because Serve pickles a router's module by value: what lives there is not what others import.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from lorafleet.cluster.wire import RoutingReport


class Router(Protocol):
    """A request router of workers."""

    workers: Mapping[str, RoutingReport]

    @property
    def deployment_id(self) -> Any: ...


class Watcher(Protocol):
    """Wants to know of workers."""

    def hear(self) -> None:
        """The workers, or what they report of themselves, may have changed. Called on any thread."""
        ...

    def note_resident(self, version: str, worker_id: str) -> None:
        """A worker has an adapter and has not reported it yet. Called on the event loop of the caller."""
        ...


_routers: weakref.WeakSet[Router] = weakref.WeakSet()
_watchers: weakref.WeakKeyDictionary[Watcher, Any] = weakref.WeakKeyDictionary()
"""And the ids of their deployments."""
_lock = threading.Lock()
"""Routers may run in another thread than those who ask."""


def note_router(router: Router) -> None:
    """A router has started."""
    with _lock:
        _routers.add(router)


def watch(watcher: Watcher, deployment_id: Any) -> None:
    """From now on the watcher hears of a deployment's workers, as long as somebody else keeps it."""
    with _lock:
        _watchers[watcher] = deployment_id


def tell(deployment_id: Any) -> None:
    """A router has heard of its workers."""
    with _lock:
        watchers = [watcher for watcher, watched in _watchers.items() if watched == deployment_id]
    for watcher in watchers:
        watcher.hear()


def note_resident(version: str, worker_ids: Iterable[str]) -> None:
    """Workers have an adapter and have not reported it yet."""
    with _lock:
        watchers = list(_watchers)
    for watcher in watchers:
        for worker_id in worker_ids:
            watcher.note_resident(version, worker_id)


def workers_of(deployment_id: Any) -> dict[str, RoutingReport]:
    """The workers of a deployment that a router of this process can reach now, and their reports."""
    with _lock:
        routers = [router for router in _routers if router.deployment_id == deployment_id]
    found: dict[str, RoutingReport] = {}
    for router in routers:
        found |= router.workers
    return found


def live_workers(deployment_id: Any) -> frozenset[str]:
    """Ids of the workers of a deployment that a router of this process can reach now."""
    return frozenset(workers_of(deployment_id))

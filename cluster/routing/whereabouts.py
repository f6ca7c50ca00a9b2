"""Remembers the workers that this process's request routers reach, and the worker that each request was sent to.

A module of its own because Serve pickles a router's module by value: what lives there is not what others import.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

MAX_REQUESTS = 8192
"""Latest requests of which `worker_of` knows the worker."""


class Router(Protocol):
    """A request router of workers."""

    @property
    def deployment_id(self) -> Any: ...

    @property
    def curr_replicas(self) -> Mapping[Any, object]: ...

    def note_resident(self, version: str, worker_id: str) -> None: ...


_routers: weakref.WeakSet[Router] = weakref.WeakSet()
_workers: OrderedDict[str, str] = OrderedDict()


def note_router(router: Router) -> None:
    """A router has started."""
    _routers.add(router)


def note_request(request_id: str, worker_id: str) -> None:
    """A request goes to a worker."""
    _workers[request_id] = worker_id
    if len(_workers) > MAX_REQUESTS:
        _workers.popitem(last=False)


def note_resident(version: str, worker_ids: Iterable[str]) -> None:
    """Workers have an adapter and have not reported it yet."""
    for router in _routers:
        for worker_id in worker_ids:
            router.note_resident(version, worker_id)


def live_workers(deployment_id: Any) -> frozenset[str]:
    """Ids of the workers of a deployment that a router of this process can reach now."""
    routers = [router for router in _routers if router.deployment_id == deployment_id]
    return frozenset(replica_id.unique_id for router in routers for replica_id in tuple(router.curr_replicas))


def worker_of(request_id: str) -> str | None:
    """The worker that a request was sent to last; None before it was, and after it was forgotten."""
    return _workers.get(request_id)


def forget_request(request_id: str) -> None:
    """A request is over."""
    _workers.pop(request_id, None)

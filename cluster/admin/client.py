"""The control plane as the routes of an ingress call it, and the client that reaches it from another process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle

from lorafleet.adapter_store.names import NameRecord
from lorafleet.cluster.config import Warm
from lorafleet.cluster.errors import ControllerUnavailable
from lorafleet.cluster.ray_internals import by_value
from lorafleet.cluster.routing.calls import answer_of
from lorafleet.cluster.routing.whereabouts import note_resident
from lorafleet.cluster.wire import (
    ListedWorkers,
    NamedVersion,
    Placed,
    StoreProblem,
    Validation,
    from_parts,
    named_version,
)

CALL_S = 15.0
"""How long the controller may take to answer what loads nothing: longer than it waits for a silent worker."""
CHANGE_S = 1260.0
"""How long a change may take: the store's time to fetch an adapter, and the workers' to load it."""


class ControlPlane(Protocol):
    """The calls that the admin routes make. `Rollout` takes them; `ControllerClient` sends them to another process."""

    async def put(
        self, name: str, *, source: str, key: str, pinned: bool = False, warm: Warm = 1, replace: bool = True
    ) -> Placed: ...

    async def delete(self, name: str) -> None: ...

    async def set_pinned(self, name: str, pinned: bool) -> Placed: ...

    async def validate(self, source: str, key: str) -> Validation: ...

    async def locate(self, path: str) -> tuple[str, str]: ...

    async def adapter(self, name: str) -> Placed: ...

    async def adapters(self, after: str = "", limit: int | None = None) -> list[Placed]: ...

    async def problems(self) -> tuple[StoreProblem, ...]: ...

    async def has(self, name: str) -> bool: ...

    async def records(self) -> tuple[NameRecord, ...]: ...

    async def workers(self) -> ListedWorkers: ...


class ControllerClient:
    """Every method raises ControllerUnavailable while the controller is away, and the control plane's own errors."""

    def __init__(self, handle: DeploymentHandle[Any], observe: Callable[[str, NamedVersion | None], None]) -> None:
        """observe: told of every name that was flipped (and to what) or deleted (None), before the reply."""
        self._handle = by_value(handle)
        self._observe = observe

    async def put(
        self, name: str, *, source: str, key: str, pinned: bool = False, warm: Warm = 1, replace: bool = True
    ) -> Placed:
        placed: Placed = await self._call(
            "put", CHANGE_S, name, source=source, key=key, pinned=pinned, warm=warm, replace=replace
        )
        self._observe(name, named_version(placed.adapter, 0))
        note_resident(placed.adapter.version, [w for w, state in placed.workers.items() if state == "resident"])
        return placed

    async def delete(self, name: str) -> None:
        await self._call("delete", CHANGE_S, name)
        self._observe(name, None)

    async def set_pinned(self, name: str, pinned: bool) -> Placed:
        placed: Placed = await self._call("set_pinned", CHANGE_S, name, pinned)
        return placed

    async def validate(self, source: str, key: str) -> Validation:
        validation: Validation = await self._call("validate", CHANGE_S, source, key)
        return validation

    async def locate(self, path: str) -> tuple[str, str]:
        source, key = await self._call("locate", CALL_S, path)
        return source, key

    async def adapter(self, name: str) -> Placed:
        placed: Placed = await self._call("adapter", CALL_S, name)
        return placed

    async def adapters(self, after: str = "", limit: int | None = None) -> list[Placed]:
        return await from_parts(await self._call("adapters", CALL_S, after, limit))

    async def problems(self) -> tuple[StoreProblem, ...]:
        problems: tuple[StoreProblem, ...] = await self._call("problems", CALL_S)
        return problems

    async def has(self, name: str) -> bool:
        has: bool = await self._call("has", CALL_S, name)
        return has

    async def records(self) -> tuple[NameRecord, ...]:
        records: tuple[NameRecord, ...] = await self._call("records", CALL_S)
        return records

    async def workers(self) -> ListedWorkers:
        workers: ListedWorkers = await self._call("workers", CALL_S)
        return workers

    async def not_ready(self) -> str | None:
        """Return why the service is not ready; None if it is."""
        reason: str | None = await self._call("not_ready", CALL_S)
        return reason

    async def user_config_stamp(self) -> int:
        """The stamp of the newest `user_config` that the controller was given; 0 if none."""
        stamp: int = await self._call("user_config_stamp", CALL_S)
        return stamp

    async def take_user_config(self, stamp: int, user_config: object) -> None:
        """Hand on the `user_config` that Serve gave an ingress."""
        await self._call("take_user_config", CALL_S, stamp, user_config)

    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        return await answer_of(
            self._handle.options(method_name=method).remote(*args, **kwargs),
            timeout_s,
            late=ControllerUnavailable("the controller does not answer", None, 5.0),
            away=ControllerUnavailable(
                "the controller is away; a change that was under way may have been made", None, 2.0
            ),
        )

"""The adapter store as other processes call it: typed, and without Ray's wrapping of errors."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights
from lorafleet.adapter_store.names import NamedAdapter, NameRecord, VersionsToKeep
from lorafleet.adapter_store.records import DesiredRecord, DesiredState
from lorafleet.cluster.errors import StoreUnavailable
from lorafleet.cluster.ray_internals import by_reference, by_value
from lorafleet.cluster.routing.calls import answer_of
from lorafleet.cluster.store.lookups import Lookups
from lorafleet.cluster.wire import Address, NamedVersion, NamesAt, StoredWeights, StoreProblem

CALL_S = 10.0
"""How long the store may take to answer from its catalogue."""
FETCH_S = 600.0
"""How long it may take to fetch and validate an adapter."""


class StoreClient:
    """Every method raises StoreUnavailable while the store is away, and the store's own errors."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        # Answers may hold references to shared memory, so they go by reference, but for what every request asks.
        self._handle = by_reference(handle)
        self._light_handle = by_value(handle)
        self._known = by_value(handle, method_name="known")
        self._lookups = Lookups(self._address)

    async def publish(self, source: str, key: str) -> AdapterManifest:
        manifest: AdapterManifest = await self._call("publish", FETCH_S, source, key)
        return manifest

    async def validate(self, source: str, key: str) -> AdapterManifest:
        manifest: AdapterManifest = await self._call("validate", FETCH_S, source, key)
        return manifest

    async def locate(self, path: str) -> tuple[str, str]:
        source, key = await self._call("locate", CALL_S, path)
        return source, key

    async def flip(self, record: NameRecord) -> NamedAdapter:
        named: NamedAdapter = await self._call("flip", CALL_S, record)
        return named

    async def delete(self, name: str, *, by_config: bool = False) -> None:
        await self._call("delete", CALL_S, name, by_config=by_config)

    async def taken_down(self) -> frozenset[str]:
        found: frozenset[str] = await self._call("taken_down", CALL_S)
        return found

    async def set_pinned(self, name: str, pinned: bool) -> None:
        await self._call("set_pinned", CALL_S, name, pinned)

    async def resolve(self, name: str) -> NamedVersion:
        """Return the version of `name` without its manifest. A name without a version is looked up in the sources."""
        entry: NamedVersion = await self._await(self._light_handle.options(method_name="resolve").remote(name), FETCH_S)
        return entry

    async def known(self, names: tuple[str, ...]) -> tuple[NamedVersion | None, ...]:
        """Return the versions of names, as `resolve` does; None for a name without one."""
        found = await self._lookups.ask(names)
        if found is None:
            found = await self._await(self._known.remote(names), CALL_S)
        return found

    async def named(self, name: str) -> NamedAdapter:
        """The adapter of this name; no source is asked. Raises UnknownAdapter."""
        named: NamedAdapter = await self._call("named", CALL_S, name)
        return named

    async def records(self) -> tuple[NameRecord, ...]:
        """All names, without the manifests."""
        records: tuple[NameRecord, ...] = await self._call("records", CALL_S)
        return records

    async def page(self, after: str, limit: int | None) -> tuple[NamedAdapter, ...]:
        """At most `limit` adapters in order of their names, those that come after `after`."""
        page: tuple[NamedAdapter, ...] = await self._call("page", CALL_S, after, limit)
        return page

    async def problems(self) -> tuple[StoreProblem, ...]:
        """Return the unused parts of the state folder, and why it cannot be written."""
        problems: tuple[StoreProblem, ...] = await self._call("problems", CALL_S)
        return problems

    async def desired(self) -> DesiredState:
        """The desired state that was set last."""
        state: DesiredState = await self._call("desired", CALL_S)
        return state

    async def set_desired(self, adapters: tuple[DesiredRecord, ...], generation: int) -> DesiredState:
        """Replace the desired state. Raises StaleGeneration for an older generation than the one kept."""
        state: DesiredState = await self._call("set_desired", CALL_S, adapters, generation)
        return state

    async def names(self, since: int) -> NamesAt:
        """Return the names that changed after a generation; -1: all names."""
        names: NamesAt = await self._call("names", CALL_S, since)
        return names

    async def watch(self, generation: int) -> int:
        """Wait about a second, less if the names are not of this generation; the generation that they are of then."""
        current: int = await self._call("watch", CALL_S, generation)
        return current

    async def reconcile(self, worker_id: str, held: tuple[str, ...] | None, generation: int) -> VersionsToKeep | None:
        """Return the versions that the worker is to keep; None: as before.

        Raises UnknownWorker if `held` is None and must be told.
        """
        keep: VersionsToKeep | None = await self._call("reconcile", CALL_S, worker_id, held, generation)
        return keep

    async def fetch(self, version: str) -> AdapterWeights:
        """The weights of a version: read-only arrays that lie in this node's shared memory."""
        stored: StoredWeights = await self._call("fetch", FETCH_S, version)
        weights: AdapterWeights = await asyncio.to_thread(ray.get, stored.ref)
        return weights

    async def _address(self) -> Address:
        address: Address = await self._call("address", CALL_S)
        return address

    async def _call(self, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        return await self._await(self._handle.options(method_name=method).remote(*args, **kwargs), timeout_s)

    async def _await(self, response: DeploymentResponse[Any], timeout_s: float) -> Any:
        return await answer_of(
            response,
            timeout_s,
            late=StoreUnavailable("the adapter store does not answer", None, 2.0),
            away=StoreUnavailable("the adapter store is away", None, 2.0),
        )

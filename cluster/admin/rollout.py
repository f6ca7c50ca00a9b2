"""Publishes, replaces, pins and deletes adapters over the whole cluster, all or nothing.

A replacement is first loaded where the old version is resident, and on as many other workers as `warm` says. Then the
name flips at the store. Every request asks the store for the version, so none gets the old one after the flip. If a
worker that must have the new version cannot load it, the holds are released and nothing flips. Changes of one name run
one after another. A change that has begun is finished even if its client goes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from lorafleet.adapter_store.errors import InvalidName, UnknownAdapter
from lorafleet.adapter_store.manifest import NAME_RULE, AdapterManifest
from lorafleet.adapter_store.names import NamedAdapter, NameRecord, Origin
from lorafleet.cluster.admin.fleet import Fleet
from lorafleet.cluster.admin.holds import Holds
from lorafleet.cluster.config import NAME_PATTERN, Warm
from lorafleet.cluster.errors import (
    AdapterDoesNotFit,
    NameTaken,
    NoWorker,
    ServiceUnavailable,
    StoreUnavailable,
    WorkerGone,
)
from lorafleet.cluster.wire import Estimate, ListedWorkers, Placed, StoreProblem, Validation
from lorafleet.workers.errors import NoRoomError
from lorafleet.workers.state import ResidentAdapter, WorkerState

logger = logging.getLogger(__name__)

RECONCILE_S = 2.0
"""How long a change waits for workers to follow it at once; those that are late follow on their timer."""
NAMES_S = 3.0
"""How long a listing of workers waits for the names of what they hold."""

Result = TypeVar("Result")


class Store(Protocol):
    """The adapter store, which alone decides what names stand for. Every method raises StoreUnavailable."""

    async def publish(self, source: str, key: str) -> AdapterManifest: ...

    async def validate(self, source: str, key: str) -> AdapterManifest: ...

    async def flip(self, record: NameRecord) -> NamedAdapter: ...

    async def delete(self, name: str, *, by_config: bool = False) -> None: ...

    async def taken_down(self) -> frozenset[str]: ...

    async def set_pinned(self, name: str, pinned: bool) -> None: ...

    async def named(self, name: str) -> NamedAdapter: ...

    async def records(self) -> tuple[NameRecord, ...]: ...

    async def problems(self) -> tuple[StoreProblem, ...]: ...

    async def page(self, after: str, limit: int | None) -> tuple[NamedAdapter, ...]: ...

    async def locate(self, path: str) -> tuple[str, str]: ...


class Rollout:
    """The one place that changes what names stand for."""

    def __init__(self, store: Store, fleet: Fleet, *, reserved: Collection[str] = ()) -> None:
        """reserved: names that requests understand otherwise: the base's."""
        self._reserved = reserved
        self._store = store
        self._fleet = fleet
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._under_way: set[asyncio.Task[Any]] = set()

    # --- changes ---

    async def put(
        self,
        name: str,
        *,
        source: str,
        key: str,
        pinned: bool = False,
        warm: Warm = 1,
        origin: Origin = "admin",
        replace: bool = True,
        seen: int | None = None,
    ) -> Placed:
        """Publish what `source` has under `key` and flip `name` to it.

        replace: False raises NameTaken for a name that is loaded. seen: the generation that the name had when this was
        decided, 0 for none; NameTaken where it has another by now. Raises InvalidName, what the store refuses the
        adapter for, AdapterDoesNotFit, RolloutFailed, NoWorker and StoreUnavailable.
        """
        self._check_name(name)
        return await self._to_the_end(self._put(name, source, key, pinned, warm, origin, replace, seen))

    async def delete(self, name: str) -> None:
        """Take a name away; streams on its version end as they began. Raises UnknownAdapter, StoreUnavailable."""
        await self._to_the_end(self._delete(name))

    async def drop(self, name: str) -> None:
        """The same for a name that has left the configuration, unless it is somebody else's by now, or gone."""
        await self._to_the_end(self._drop(name))

    async def set_pinned(self, name: str, pinned: bool) -> Placed:
        """Keep an adapter resident on every worker, or no longer.

        Raises UnknownAdapter, AdapterDoesNotFit, RolloutFailed, NoWorker, StoreUnavailable.
        """
        return await self._to_the_end(self._set_pinned(name, pinned))

    async def warm(self, name: str, warm: Warm) -> None:
        """Have an adapter that has a name resident on at least `warm` workers. Raises as `put`."""
        await self._to_the_end(self._warm(name, warm))

    async def _put(
        self,
        name: str,
        source: str,
        key: str,
        pinned: bool,
        warm: Warm,
        origin: Origin,
        replace: bool,
        seen: int | None,
    ) -> Placed:
        async with self._lock(name):
            # Asked under the lock: of two loads at the same time the second one finds what the first one made.
            found = await self._find(name) if not replace or seen is not None else None
            if not replace and found is not None:
                raise NameTaken(f"an adapter is named {name!r} already; delete it first, or replace it", "name")
            if seen is not None and seen != (0 if found is None else found.generation):
                raise NameTaken(f"adapter {name!r} has been changed meanwhile", "name")
            manifest = await self._store.publish(source, key)
            before, states = await asyncio.gather(self._find(name), self._living())
            async with self._holding(name, manifest.version, states, pinned) as holds:
                if pinned or warm == "all":
                    must = states
                else:
                    must = [state for state in states if before is not None and _holds(state, before.version)]
                await holds.require([state.worker_id for state in must])
                others = sorted(
                    (state for state in states if state not in must), key=lambda s: _reluctance(s, manifest)
                )
                if others and isinstance(warm, int):
                    await holds.extend([state.worker_id for state in others], min(warm, len(others)))
                if not must and not warm:
                    await self._check_fit(name, manifest, states)
                adapter = await self._store.flip(NameRecord(name, manifest.version, source, key, pinned, warm, origin))
            return await self._placed(adapter)

    async def _delete(self, name: str) -> None:
        async with self._lock(name):
            await self._store.delete(name)
            await self._reconcile(await self._states())

    async def _drop(self, name: str) -> None:
        async with self._lock(name):
            found = await self._find(name)
            if found is not None and found.origin == "config":
                await self._store.delete(name, by_config=True)
                await self._reconcile(await self._states())

    async def _warm(self, name: str, warm: Warm) -> None:
        async with self._lock(name):
            adapter = await self._named(name)
            states = await self._living()
            count = len(states) if warm == "all" else min(warm, len(states))
            missing = [state for state in states if not _holds(state, adapter.version)]
            count -= len(states) - len(missing)
            if count <= 0:
                return
            missing.sort(key=lambda state: _reluctance(state, adapter.manifest))
            async with self._holding(name, adapter.version, states, adapter.pinned) as holds:
                await holds.extend([state.worker_id for state in missing], count)

    async def _set_pinned(self, name: str, pinned: bool) -> Placed:
        async with self._lock(name):
            adapter = await self._named(name)
            states = await self._living() if pinned else await self._states()
            async with self._holding(name, adapter.version, states, pinned) as holds:
                if pinned:
                    await holds.require([state.worker_id for state in states])
                await self._store.set_pinned(name, pinned)
            return await self._placed(await self._named(name))

    # --- questions ---

    async def validate(self, source: str, key: str) -> Validation:
        """Dry run: what an adapter would take and evict, and where. Raises what the store refuses it for."""
        manifest = await self._store.validate(source, key)
        states = await self._states()
        estimates = await asyncio.gather(*(self._estimate(state.worker_id, manifest) for state in states))
        return Validation(manifest, tuple(estimate for estimate in estimates if estimate is not None))

    async def adapter(self, name: str) -> Placed:
        """One adapter. Raises UnknownAdapter, StoreUnavailable."""
        return await self._placed(await self._named(name))

    async def adapters(self, after: str = "", limit: int | None = None) -> list[Placed]:
        """Adapters in order of their names: at most `limit`, those that come after `after`. Raises StoreUnavailable."""
        page, (states, silent) = await asyncio.gather(self._store.page(after, limit), self._ask())
        copies = _copies(states)
        return [_placed(adapter, states, copies.get(adapter.version, {}), silent) for adapter in page]

    async def problems(self) -> tuple[StoreProblem, ...]:
        """Return the faults of the store's state folder. Raises StoreUnavailable."""
        return await self._store.problems()

    async def has(self, name: str) -> bool:
        """Return True if an adapter has this name. Raises StoreUnavailable."""
        return await self._find(name) is not None

    async def records(self) -> tuple[NameRecord, ...]:
        """All names. Raises StoreUnavailable."""
        return await self._store.records()

    async def taken_down(self) -> frozenset[str]:
        """The names that somebody deleted, other than the configuration, and that were not loaded since."""
        return await self._store.taken_down()

    async def num_holders(self) -> Counter[str]:
        """On how many workers each version is, of those that answer."""
        states = await self._states()
        return Counter(copy.version for state in states for copy in state.adapters if copy.state != "retired")

    async def worker_ids(self) -> frozenset[str]:
        """Workers that take requests now."""
        return await self._fleet.worker_ids()

    async def locate(self, path: str) -> tuple[str, str]:
        """The source and key of a path, judged where the store is. Raises InvalidKey, UnknownKey, StoreUnavailable."""
        return await self._store.locate(path)

    async def workers(self) -> ListedWorkers:
        """All workers, with the names of what they hold as far as the store can be asked."""
        (states, silent), names = await asyncio.gather(self._ask(), self._names_of_versions())
        named = tuple(
            state.model_copy(
                update={"adapters": tuple(h.model_copy(update={"name": names.get(h.version)}) for h in state.adapters)}
            )
            for state in states
        )
        return ListedWorkers(named, tuple(silent))

    # --- parts ---

    async def _names_of_versions(self) -> dict[str, str]:
        """A name for each version; none where the store does not say so in time."""
        names: dict[str, str] = {}
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(NAMES_S):
                records = await self._store.records()
            for record in sorted(records, key=lambda record: record.name):
                names.setdefault(record.version, record.name)
        return names

    def _check_name(self, name: str) -> None:
        if re.fullmatch(NAME_PATTERN, name) is None:
            raise InvalidName("invalid_name", f"name {name[:140]!a} is refused: {NAME_RULE}", "name")
        if name in self._reserved:
            raise InvalidName("name_reserved", f"{name!r} is the base model's name; choose another one", "name")

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _to_the_end(self, change: Coroutine[Any, Any, Result]) -> Result:
        """Run a change in a task of its own, which outlives whoever waits for it."""
        task = asyncio.create_task(change)
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        # Taken here too, for who asked may be gone.
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.info("a change was not made: %s", error)

    @contextlib.asynccontextmanager
    async def _holding(
        self, name: str, version: str, states: Sequence[WorkerState], pinned: bool
    ) -> AsyncIterator[Holds]:
        """Let the body make a version resident; in the end workers follow the store, and nothing is held."""
        holds = Holds(self._fleet, name, version, pinned=pinned)
        try:
            yield holds
        except BaseException:
            # Without its hold a version that got no name goes, pinned or not.
            await holds.release()
            await self._reconcile(states)
            raise
        # With its hold a version cannot go on an older word of the store's, which did not know its name.
        await self._reconcile(states)
        await holds.release()

    async def _named(self, name: str) -> NamedAdapter:
        adapter = await self._find(name)
        if adapter is None:
            raise UnknownAdapter("adapter_not_found", f"no adapter is named {name[:128]!r}", "name")
        return adapter

    async def _find(self, name: str) -> NamedAdapter | None:
        try:
            return await self._store.named(name)
        except UnknownAdapter:
            return None

    async def _placed(self, adapter: NamedAdapter) -> Placed:
        states, silent = await self._ask()
        placed = _placed(adapter, states, _copies(states).get(adapter.version, {}), silent)
        if placed.pages is None and states:
            estimate = await self._estimate(states[0].worker_id, adapter.manifest)
            if estimate is not None:
                placed = replace(placed, pages=estimate.pages)
        return placed

    async def _states(self) -> list[WorkerState]:
        """The states of all workers that answer, by id."""
        return (await self._ask())[0]

    async def _ask(self) -> tuple[list[WorkerState], list[str]]:
        """The states of all workers that answer, by id, and the ids of those that live and do not."""
        worker_ids = sorted(await self._fleet.worker_ids())
        results = await asyncio.gather(*(self._fleet.state(w) for w in worker_ids), return_exceptions=True)
        states, silent = [], []
        for worker_id, result in zip(worker_ids, results, strict=True):
            if isinstance(result, WorkerState):
                states.append(result)
            elif not isinstance(result, WorkerGone):
                silent.append(worker_id)
                logger.warning("worker %s does not say what it holds: %s", worker_id, result)
        return states, silent

    async def _living(self) -> list[WorkerState]:
        """The states of all workers that are alive. Raises NoWorker, and ServiceUnavailable for one that is silent."""
        worker_ids = sorted(await self._fleet.worker_ids())
        results = await asyncio.gather(*(self._fleet.state(w) for w in worker_ids), return_exceptions=True)
        states = []
        for result in results:
            if isinstance(result, WorkerState):
                states.append(result)
            elif not isinstance(result, WorkerGone):
                raise result
        if not states:
            raise NoWorker("no worker is up; try again", None, 5.0)
        return states

    async def _estimate(self, worker_id: str, manifest: AdapterManifest) -> Estimate | None:
        try:
            pages, evicts = await self._fleet.estimate(worker_id, manifest)
        except NoRoomError as error:
            return Estimate(worker_id, error.needed, (), str(error))
        except (WorkerGone, ServiceUnavailable):
            return None
        return Estimate(worker_id, pages, evicts, None)

    async def _check_fit(self, name: str, manifest: AdapterManifest, states: Sequence[WorkerState]) -> None:
        """Nobody is to load it now, but somebody must be able to."""
        estimates = await asyncio.gather(*(self._estimate(state.worker_id, manifest) for state in states))
        refused = [estimate for estimate in estimates if estimate is not None and estimate.refusal is not None]
        if refused and len(refused) == len(states):
            raise AdapterDoesNotFit(f"worker {refused[0].worker_id} has no room for {name!r}: {refused[0].refusal}")

    async def _reconcile(self, states: Sequence[WorkerState]) -> None:
        """Have workers follow the store now; a worker that is late or gone follows on its own timer, or never."""
        tasks = [asyncio.create_task(self._fleet.reconcile(state.worker_id)) for state in states]
        if not tasks:
            return
        done, late = await asyncio.wait(tasks, timeout=RECONCILE_S)
        for task in done:
            error = task.exception()
            if error is not None and not isinstance(error, (WorkerGone, StoreUnavailable)):
                logger.warning("a worker could not follow the adapter store: %s", error)
        for task in late:
            task.cancel()


def _copies(states: Sequence[WorkerState]) -> dict[str, dict[str, ResidentAdapter]]:
    """Version -> worker id -> what the worker holds of it."""
    copies: dict[str, dict[str, ResidentAdapter]] = {}
    for state in states:
        for copy in state.adapters:
            copies.setdefault(copy.version, {})[state.worker_id] = copy
    return copies


def _placed(
    adapter: NamedAdapter,
    states: Sequence[WorkerState],
    held: Mapping[str, ResidentAdapter],
    silent: Collection[str] = (),
) -> Placed:
    pages = next((copy.pages for copy in held.values()), None)
    workers: dict[str, str] = dict.fromkeys(silent, "unknown")
    workers |= {s.worker_id: held[s.worker_id].state if s.worker_id in held else "absent" for s in states}
    return Placed(adapter, pages, workers)


def _holds(state: WorkerState, version: str) -> bool:
    return any(held.version == version and held.state != "retired" for held in state.adapters)


def _reluctance(state: WorkerState, manifest: AdapterManifest) -> tuple[bool, float, int]:
    """Sorts workers that might take a version: first those that have it, then by room, then by how little they do."""
    pages = state.adapter_pages
    return not _holds(state, manifest.version), pages.used / max(1, pages.total), state.running + state.waiting

"""Names of adapters and the versions they stand for, asked of the adapter store on every request.

The store alone decides. A request waits for a call that was made after it came; all that come meanwhile share the next
one. While it is away, the last table answers instead, so adapters on workers are served on. One
call always waits at the store, and its failure shows at once that the store is gone. So no request waits for a timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from bisect import bisect_right
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from lorafleet.adapter_store.errors import UnknownAdapter
from lorafleet.adapter_store.names import NAME_PATTERN
from lorafleet.cluster.errors import ModelNotFound, StoreUnavailable
from lorafleet.cluster.wire import NamedVersion, NamesAt

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
PROBE_S = 0.1
"""How often a store that is away is asked whether it is back."""

T = TypeVar("T")


class NameStore(Protocol):
    """The calls that are made to the adapter store. Each raises StoreUnavailable while the store is away."""

    async def resolve(self, name: str) -> NamedVersion:
        """Return the version of `name`; fetch it on first use where a source allows that. Raises UnknownAdapter."""
        ...

    async def known(self, names: tuple[str, ...]) -> tuple[NamedVersion | None, ...]:
        """Return the versions of these names at one moment; None for a name without one."""
        ...

    async def names(self, since: int) -> NamesAt:
        """Return the names that changed after this generation, or all of them; -1: all."""
        ...

    async def watch(self, generation: int) -> int:
        """Wait about a second, less if the names are not of this generation; raises as soon as the store is gone."""
        ...


class Names:
    """Resolves names at the store, and from memory while it is away."""

    def __init__(self, store: NameStore, *, patience_s: float = 2.0, first_use_s: float = 300.0) -> None:
        """patience_s: how long a known name may take before the store counts as away; first_use_s: an unknown one."""
        self._store = store
        self._patience_s = patience_s
        self._first_use_s = first_use_s
        self._names: dict[str, NamedVersion] = {}
        self._generation = -1
        self._num_observed = 0
        self._gone = asyncio.Event()
        self._has_table = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._asked: dict[str, asyncio.Future[NamedVersion | None]] = {}
        """Names for the next call to the store."""
        self._asking: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        """True if the store was away at the last call."""
        return self._gone.is_set()

    def start(self) -> None:
        """Begin to watch the store; the first use does so too. Needs a running loop."""
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch(), name="adapter-store-watch")

    async def await_table(self, timeout_s: float) -> bool:
        """Wait for the first table; False if the store has not told it in time."""
        self.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_table.wait()
        return self._has_table.is_set()

    def stop(self) -> None:
        """End the watch."""
        for task in (self._watcher, self._asking):
            if task is not None:
                task.cancel()

    async def resolve(self, name: str) -> NamedVersion:
        """Return the entry of `name` now.

        Raises ModelNotFound, StoreUnavailable (the store is away and never told of this name), or what the store
        raises when a first use fails.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise ModelNotFound(f"no model or adapter is named {name[:128]!r}; GET /v1/models lists them", "model")
        self.start()
        if not self.is_away:
            is_known = name in self._names
            before = self._num_observed
            try:
                entry = await self._ask(name) if is_known else None
                if entry is None:
                    is_known = False
                    entry = await self._unless_gone(self._store.resolve(name), self._first_use_s)
            except UnknownAdapter:
                self._names.pop(name, None)
                raise ModelNotFound(
                    f"no model or adapter is named {name!r}; GET /v1/models lists them", "model"
                ) from None
            except StoreUnavailable:
                self._gone.set()
            except TimeoutError:
                if not is_known:
                    raise StoreUnavailable(
                        f"adapter {name!r} is still being fetched; try again", "model", RETRY_AFTER_S
                    ) from None
                self._gone.set()
            else:
                if self._num_observed == before and entry != self._names.get(name):
                    self._num_observed += 1
                    self._names[name] = entry
                return entry
        known = self._names.get(name)
        if known is None:
            raise StoreUnavailable(
                f"the adapter store is away and {name!r} is not known yet; try again", "model", RETRY_AFTER_S
            )
        return known

    def observe(self, name: str, entry: NamedVersion | None) -> None:
        """Take note of what was just published under `name`; None: the name is gone."""
        self._num_observed += 1
        known = self._names.pop(name, None)
        if entry is not None:
            # The store may have told of it already, and also since when it has the version.
            if known is not None and not entry.created_s and replace(known, created_s=0) == entry:
                entry = known
            self._names[name] = entry

    async def entries(self, after: str = "", limit: int | None = None) -> list[NamedVersion]:
        """Names in order behind `after`, at most `limit`: from the store, or the last ones seen while it is away."""
        await self._look()
        ordered = sorted(self._names.values(), key=_name_of)
        begin = bisect_right(ordered, after, key=_name_of)
        return ordered[begin : None if limit is None else begin + limit]

    async def entry(self, name: str) -> NamedVersion | None:
        """A name that has a version, from the store, or as it was seen last while the store is away."""
        await self._look()
        return self._names.get(name)

    async def _ask(self, name: str) -> NamedVersion | None:
        """Return the entry of a name by a call to the store that begins after this one. Raises as `_unless_gone`."""
        answer = self._asked.get(name)
        if answer is None:
            answer = self._asked[name] = asyncio.get_running_loop().create_future()
        if self._asking is None:
            # In a context of its own: Serve ends the calls that a request made with the request.
            self._asking = asyncio.get_running_loop().create_task(self._ask_all(), context=contextvars.Context())
        return await asyncio.shield(answer)

    async def _ask_all(self) -> None:
        """Call the store until nobody asks."""
        try:
            while self._asked:
                asked, self._asked = self._asked, {}
                try:
                    entries = await self._unless_gone(self._store.known(tuple(asked)), self._patience_s)
                except Exception as error:
                    for answer in asked.values():
                        answer.set_exception(error)
                        answer.exception()  # its callers may have left
                else:
                    for answer, entry in zip(asked.values(), entries, strict=True):
                        answer.set_result(entry)
        finally:
            self._asking = None

    async def _look(self) -> None:
        self.start()
        if not self.is_away:
            try:
                await self._unless_gone(self._refresh(), self._patience_s)
            except (StoreUnavailable, TimeoutError):
                self._gone.set()

    async def _refresh(self) -> None:
        before = self._num_observed
        names = await self._store.names(self._generation)
        # What was observed meanwhile may be newer than this answer; the next one has it.
        if self._num_observed == before:
            changed = {entry.name: entry for entry in names.entries}
            if names.is_whole:
                self._names = changed
            else:
                for name in names.deleted:
                    self._names.pop(name, None)
                self._names.update(changed)
            self._generation = names.generation
            self._has_table.set()

    async def _unless_gone(self, call: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """The call's result; StoreUnavailable as soon as the store counts as gone, TimeoutError when late."""
        asked = asyncio.ensure_future(call)
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({asked, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if asked.done() and not asked.cancelled():
                return asked.result()
            if asked.cancelled():
                raise StoreUnavailable("the adapter store is stopping; try again", None, RETRY_AFTER_S)
            if gone.done():
                raise StoreUnavailable("the adapter store is away; try again", None, RETRY_AFTER_S)
            raise TimeoutError
        finally:
            asked.cancel()
            gone.cancel()

    async def _watch(self) -> None:
        """Keep one call waiting at the store. It fails when the store dies; the next answer says that it is back."""
        generation = -1
        while True:
            try:
                if generation != self._generation or self.is_away:
                    async with asyncio.timeout(self._patience_s):
                        await self._refresh()
                    self._gone.clear()
                generation = await self._store.watch(self._generation)
            except (StoreUnavailable, TimeoutError):
                if not self.is_away:
                    if self._has_table.is_set():  # at the start nothing is lost
                        logger.warning("the adapter store is away; the names known so far go on being served")
                    self._gone.set()
                await asyncio.sleep(PROBE_S)
            except Exception:
                logger.exception("watching the adapter store failed")
                await asyncio.sleep(1.0)


def _name_of(entry: NamedVersion) -> str:
    return entry.name

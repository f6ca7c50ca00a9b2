"""Names of adapters and the versions they stand for, asked of the adapter store on every request.

The store alone decides. While it is away the last table that was seen answers instead, so that what workers hold goes
on being served. That the store is gone shows at once on a call that always waits at it; nobody has to run into a
timeout for it, and no request waits while it is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lorafleet.cluster.errors import ModelNotFound, StoreUnavailable

logger = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RETRY_AFTER_S = 2.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """A name, the version it stands for, and where that came from."""

    name: str
    version: str
    origin: str
    """Source and key, as in `demo/shout`."""
    created: int
    """When the name was published, in Unix seconds."""


class NameStore(Protocol):
    """What is asked of the adapter store. Every call raises StoreUnavailable when the store is away."""

    async def resolve(self, name: str) -> str:
        """The version of `name`; fetches on first use where a source allows it. Raises ModelNotFound."""
        ...

    async def table(self) -> Sequence[NamedVersion]:
        """All names."""
        ...

    async def watch(self) -> None:
        """Return after a second or so, or raise as soon as the store is gone."""
        ...


class Names:
    """Resolves names at the store, and from memory while it is away."""

    def __init__(self, store: NameStore, *, patience_s: float = 2.0, first_use_s: float = 300.0) -> None:
        """patience_s: how long a known name may take before the store counts as away; first_use_s: an unknown one."""
        self._store = store
        self._patience_s = patience_s
        self._first_use_s = first_use_s
        self._names: dict[str, NamedVersion] = {}
        self._num_observed = 0
        self._gone = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        """Whether the store is away, as far as is known."""
        return self._gone.is_set()

    def _keep_watch(self) -> None:
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch(), name="adapter-store-watch")

    async def stop(self) -> None:
        """End the watch."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher

    async def resolve(self, name: str) -> str:
        """The version that `name` stands for now.

        Raises ModelNotFound, StoreUnavailable (the store is away and never told of this name), or what the store
        raises when a first use fails.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise ModelNotFound(f"no model or adapter is named {name[:128]!r}", "model")
        self._keep_watch()
        if not self.is_away:
            known = self._names.get(name)
            try:
                version = await self._unless_gone(
                    self._store.resolve(name), self._first_use_s if known is None else self._patience_s
                )
            except ModelNotFound:
                self._names.pop(name, None)
                raise
            except (StoreUnavailable, TimeoutError):
                self._gone.set()
            else:
                if known is None or known.version != version:
                    self.observe(name, version)
                return version
        known = self._names.get(name)
        if known is None:
            raise StoreUnavailable(
                f"the adapter store is away and {name!r} is not known yet; try again", "model", RETRY_AFTER_S
            )
        return known.version

    def observe(self, name: str, version: str | None) -> None:
        """Take note of a version that was just published under `name`; None: the name is gone."""
        self._num_observed += 1
        known = self._names.get(name)
        if version is None:
            self._names.pop(name, None)
        else:
            origin, created = (known.origin, known.created) if known is not None else ("", 0)
            self._names[name] = NamedVersion(name, version, origin, created)

    async def entries(self) -> list[NamedVersion]:
        """All names in order, from the store; the last ones seen while it is away."""
        self._keep_watch()
        if not self.is_away:
            try:
                await self._unless_gone(self._refresh(), self._patience_s)
            except (StoreUnavailable, TimeoutError):
                self._gone.set()
        return sorted(self._names.values(), key=lambda entry: entry.name)

    async def _refresh(self) -> None:
        before = self._num_observed
        entries = await self._store.table()
        # What was observed meanwhile may be newer than this answer; the next one has it.
        if self._num_observed == before:
            self._names = {entry.name: entry for entry in entries}

    async def _unless_gone(self, call: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """The call's result; StoreUnavailable as soon as the store counts as gone, TimeoutError when late."""
        asked = asyncio.ensure_future(call)
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({asked, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            if gone.done():
                raise StoreUnavailable("the adapter store is away; try again", None, RETRY_AFTER_S)
            raise TimeoutError
        finally:
            asked.cancel()
            gone.cancel()

    async def _watch(self) -> None:
        """Keep one call waiting at the store; when it is gone, the next answer says that it is back."""
        while True:
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._refresh()
                if self.is_away:
                    logger.info("the adapter store is back")
                    self._gone.clear()
                await self._store.watch()
            except (StoreUnavailable, TimeoutError):
                if not self.is_away:
                    logger.warning("the adapter store is away; names known so far go on being served")
                    self._gone.set()
                await asyncio.sleep(0.1)
            except Exception:
                logger.exception("watching the adapter store failed")
                await asyncio.sleep(1.0)

"""Keeps one worker in line with the store's catalogue: at start, on a timer, and when told that something changed.

What the store says decides; a hint only makes a worker ask sooner, so nothing is lost with one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Protocol

from lorafleet.adapter_store.errors import UnknownWorker
from lorafleet.adapter_store.names import VersionsToKeep
from lorafleet.cluster.errors import StoreUnavailable

logger = logging.getLogger(__name__)


Ask = Callable[[tuple[str, ...] | None, int], Awaitable[VersionsToKeep | None]]
"""Which of these versions, and which others, a worker is to hold. None for the versions: the same as before. The number
is the generation of the last answer; None is returned when both are as before. Raises UnknownWorker and
StoreUnavailable.
"""


class Reconciled(Protocol):
    """A worker, as the reconciler sees it."""

    async def held_versions(self) -> tuple[str, ...]: ...

    async def reconcile(self, named: Mapping[str, bool], asked: Collection[str]) -> None: ...


class Reconciler:
    """Passes the store's word on to a worker."""

    def __init__(self, worker: Reconciled, ask: Ask, *, period_s: float = 1.0) -> None:
        self._worker = worker
        self._held: tuple[str, ...] | None = None
        """What the store was told last that the worker holds."""
        self._keep = VersionsToKeep(-1, {})
        """What it said then."""
        self._ask = ask
        self._period_s = period_s
        self._one_at_a_time = asyncio.Lock()
        self._has_followed = asyncio.Event()

    async def once(self) -> None:
        """Ask now, and follow. Raises StoreUnavailable.

        The question is put after the call, so what the store decided before it is followed when it returns.
        """
        async with self._one_at_a_time:
            held = tuple(sorted(await self._worker.held_versions()))
            try:
                keep = await self._ask(None if held == self._held else held, self._keep.generation)
            except UnknownWorker:
                keep = await self._ask(held, -1)
            self._held = held
            self._keep = keep or self._keep
            # Also what was said before: a pinned version that found no room may find some now.
            await self._worker.reconcile(self._keep.versions, frozenset(held))
            self._has_followed.set()

    async def await_first(self, timeout_s: float) -> bool:
        """Wait until the store's word has been followed once; False if that does not come in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._has_followed.wait()
        return self._has_followed.is_set()

    async def run(self) -> None:
        """Ask again and again, until cancelled; go on with what there is while the store is away."""
        is_away = False
        while True:
            try:
                await self.once()
                is_away = False
            except StoreUnavailable as error:
                if not is_away:
                    logger.warning("adapters stay as they are: %s", error)
                is_away = True
            except Exception:
                logger.exception("reconciling with the adapter store failed")
            await asyncio.sleep(self._period_s)

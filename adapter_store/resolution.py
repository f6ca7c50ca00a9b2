"""Resolves names that were never loaded: asks the sources, and remembers for a while that none has a name."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from lorafleet.adapter_store.errors import AdapterStoreError, InvalidKey, SourceUnavailable, UnknownAdapter, UnknownKey
from lorafleet.adapter_store.manifest import AdapterManifest

PATIENCE_S = 1.0
"""How long a source that offers a name waits for those before it to answer."""

ABSENT_S = 5.0
"""How long a name that no source offers, or that was refused, is not asked for again."""

UNAVAILABLE_S = 1.0
"""The same for a name whose sources could not be reached."""

_MAX_ABSENT = 4096


def unknown_adapter(name: str) -> UnknownAdapter:
    """`adapter_not_found` for a name, however long or strange."""
    return UnknownAdapter("adapter_not_found", f"there is no adapter {name[:128]!r}", "model")


async def first_offer(
    name: str, asks: Mapping[str, Callable[[], Coroutine[Any, Any, AdapterManifest]]]
) -> tuple[str, AdapterManifest]:
    """Ask all sources at once. Return the first, in their order, that has the name, and its adapter.

    Once a later source offers the name, a slow source is waited for `PATIENCE_S` only. Raises AdapterRefused if the
    first source that has the name has no adapter that can be served. Raises SourceUnavailable if no source has it and
    not all could be asked, else UnknownAdapter.
    """
    tasks = [(source, asyncio.create_task(ask())) for source, ask in asks.items()]
    pending, is_patient = {task for _, task in tasks}, True
    try:
        while True:
            # Up to the first offer: sources that are still asked, or that do not have the name.
            before = list(itertools.takewhile(lambda item: not _is_offer(item[1]), tasks))
            is_offered = len(before) < len(tasks)
            if is_offered and (not is_patient or all(task.done() for _, task in before)):
                source, task = tasks[len(before)]
                return source, task.result()
            if not pending:
                errors = (task.exception() for _, task in tasks)
                raise next((error for error in errors if isinstance(error, SourceUnavailable)), unknown_adapter(name))
            patience = PATIENCE_S if is_offered else None
            done, pending = await asyncio.wait(pending, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            is_patient = bool(done)
    finally:
        for _, task in tasks:
            if not task.cancel() and not task.cancelled():
                task.exception()  # seen, though it did not matter


def _is_offer(task: asyncio.Task[AdapterManifest]) -> bool:
    return task.done() and not isinstance(task.exception(), UnknownKey | InvalidKey | SourceUnavailable)


class AbsentNames:
    """Recent refusals by name, so that requests for a name that is not there cannot hammer the sources."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: OrderedDict[str, tuple[float, AdapterStoreError]] = OrderedDict()

    def get(self, name: str) -> AdapterStoreError | None:
        """The error that was the answer a moment ago."""
        until, error = self._until.get(name, (0.0, None))
        if error is None or self._clock() >= until:
            return None
        # A new one each time: an exception that is raised again and again collects tracebacks.
        return type(error)(error.code, error.message, error.param)

    def put(self, name: str, error: AdapterStoreError) -> None:
        """Remember an answer, and of all only the latest few thousand."""
        seconds = UNAVAILABLE_S if error.retryable else ABSENT_S
        self._until[name] = (self._clock() + seconds, error)
        self._until.move_to_end(name)
        while len(self._until) > _MAX_ABSENT:
            self._until.popitem(last=False)

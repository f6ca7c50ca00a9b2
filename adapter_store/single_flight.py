"""One piece of work for all who ask for the same thing at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class SingleFlight(Generic[Value]):
    """Shares running work by key. A caller who goes away neither ends it for the others nor leaves it undone."""

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Task[Value]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._running

    async def do(self, key: str, work: Callable[[], Coroutine[Any, Any, Value]]) -> Value:
        """The result, or the error, of the work that runs for `key`; `work` is started if none does."""
        task = self._running.get(key)
        if task is None:
            task = asyncio.create_task(work())
            self._running[key] = task
            task.add_done_callback(lambda done: self._finish(key, done))
        return await asyncio.shield(task)

    def _finish(self, key: str, task: asyncio.Task[Value]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # seen, even when every caller has gone away

"""A few threads that callers share in turn: one with much to do keeps nobody else waiting behind all of it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


class FairThreads:
    """Runs blocking work for callers in turn, at most so many at once. One event loop uses it."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._num_free = num_threads
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Of each caller that waits; the first is served next."""

    async def run(self, caller: str, work: Callable[..., Result], *args: Any) -> Result:
        """Run `work(*args)` on a thread. Cancelling a call that waits takes it out; one that runs is left alone."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(caller, deque()).append(turn)
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end()
            raise
        running = asyncio.get_running_loop().run_in_executor(self._threads, work, *args)
        running.add_done_callback(self._ended)
        return await asyncio.shield(running)

    def _serve(self) -> None:
        while self._num_free and self._queues:
            caller, queue = self._queues.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._queues[caller] = queue  # behind the others
            if not turn.done():
                self._num_free -= 1
                turn.set_result(None)

    def _ended(self, running: asyncio.Future[Any]) -> None:
        if not running.cancelled():
            running.exception()  # taken here too, for who asked may be gone
        self._end()

    def _end(self) -> None:
        self._num_free += 1
        self._serve()

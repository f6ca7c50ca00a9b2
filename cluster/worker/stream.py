"""The deltas of one sequence, between the connection that brings them and the answer that they become."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from lorafleet.cluster.worker.pace import Pace
from lorafleet.workers.request import GenerateDelta


class AnswerStream:
    """The deltas of one sequence on one worker, or on the way to one. One event loop uses it."""

    def __init__(self, pace: Pace) -> None:
        self.worker_id: str | None = None
        """The worker that was chosen; None before that."""
        self.end: Callable[[], None] = _do_nothing
        """Takes the sequence out of wherever it is: the queue, or the connection to a worker, which then aborts it."""
        self._pace = pace
        self._items: deque[GenerateDelta | Exception] = deque()
        self._may_read = asyncio.Event()
        self._has_begun = False
        self._is_awaited = False
        """Whether a reader waits in `next`, so that all earlier items are with the client."""
        self._sink: Callable[[GenerateDelta], bool] | None = None

    def put(self, item: GenerateDelta | Exception) -> None:
        """Queue a delta or an error for `next`.

        The first and the last item wake the reader at once; others wait for `wake`.
        """
        last = self._items[-1] if self._items else None
        if isinstance(last, GenerateDelta) and isinstance(item, GenerateDelta):
            # Not read yet: all on the way to the client get one message for several steps.
            self._items[-1] = last.then(item)
        else:
            self._items.append(item)
        if not self._has_begun or isinstance(item, Exception) or item.finish_reason is not None:
            self.wake()

    def wake(self) -> None:
        """Hand the sink what it may take, and let `next` have the rest."""
        if self._sink is not None and self._is_awaited and not self._may_read.is_set():
            self._pour(self._sink)
        if self._items:
            self._may_read.set()

    def pour_into(self, sink: Callable[[GenerateDelta], bool]) -> None:
        """Give deltas in the middle of the answer to `sink` while a reader waits in `next`, in the place of waking it.

        sink: returns False where it does not take the delta, which `next` then returns. What it raises, `next` raises.
        """
        self._sink = sink

    def _pour(self, sink: Callable[[GenerateDelta], bool]) -> None:
        while self._items:
            item = self._items[0]
            if isinstance(item, Exception) or item.finish_reason is not None:
                return
            try:
                if not sink(item):
                    return
            except Exception as error:
                self._items = deque([error])
                return
            self._items.popleft()
            self._pace.note_event()

    async def next(self) -> GenerateDelta:
        """The next delta. Raises WorkerGone, Overloaded, NoWorker, or what the worker raised."""
        self._is_awaited = True
        try:
            await self._may_read.wait()
        finally:
            self._is_awaited = False
        self._has_begun = True
        item = self._items.popleft()
        if not self._items:
            self._may_read.clear()
        self._pace.note_event()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        """Stop the worker, or the wait for one. Calling it again does nothing."""
        end, self.end = self.end, _do_nothing
        end()


def _do_nothing() -> None:
    pass

"""The way of other threads into the step loop: calls that its thread runs in order, between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from lorafleet.workers.errors import EngineFailed

Result = TypeVar("Result")


class Commands:
    """A queue of calls. Any thread adds to it; the loop's thread runs and closes it."""

    def __init__(self) -> None:
        self.wake = threading.Event()
        """Set when there is something to do; the loop sleeps on it."""
        self.is_closed = False
        self._queue: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        """Held to add a command and to close: no command is added that would never run."""

    def post(self, command: Callable[[], None]) -> None:
        """Add a command. Raises EngineFailed when the queue is closed."""
        with self._lock:
            if self.is_closed:
                raise EngineFailed("the step loop has ended")
            self._queue.append(command)
        self.wake.set()

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Add a function, and return the future of its result. Raises EngineFailed when the queue is closed."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        return future

    def run(self) -> None:
        """Run all commands that are there. On the loop's thread."""
        while self._queue:
            self._queue.popleft()()

    def close(self) -> None:
        """Take no further commands; those that are there may still run."""
        with self._lock:
            self.is_closed = True
        self.wake.set()

"""Runs a function that may never end on a thread of its own, and ends it when its time is over."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class _Over(BaseException):
    """Its time is over."""


async def within(limit_s: float, function: Callable[[], Result]) -> Result:
    """Return or raise what `function` does. After `limit_s`, end its Python code and raise TimeoutError."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

    def run() -> None:
        result: Result | None = None
        failed: BaseException | None = None
        with contextlib.suppress(_Over):
            try:
                result = function()
            except Exception as error:
                failed = error
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(settle, result, failed)

    thread = threading.Thread(target=run, name="time-limited", daemon=True)
    thread.start()
    try:
        return await asyncio.wait_for(future, limit_s)
    except (TimeoutError, asyncio.CancelledError):
        if thread.is_alive() and thread.ident is not None:
            # The thread is used for nothing else, so an exception that comes late hurts nobody.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Over))
        raise

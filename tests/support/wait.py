"""Waiting for something that a task, a thread or another process does. A test waits for the effect, not for a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TIMEOUT_S = 30.0
"""Only a failing test waits as long."""
FIRST_PAUSE_S = 0.002
LONGEST_PAUSE_S = 0.1


async def until(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Let the event loop run until `condition` holds. It is asked often, to see what only holds for a short time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"the condition did not come true within {timeout_s} s"
        await asyncio.sleep(FIRST_PAUSE_S)


def eventually(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until other threads or processes have made `condition` true. It is asked less and less often."""
    deadline_s = time.monotonic() + timeout_s
    pause_s = FIRST_PAUSE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"the condition did not come true within {timeout_s} s"
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

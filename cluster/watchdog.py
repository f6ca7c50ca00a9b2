"""Ends its process from outside when that stands still: a hang is noticed late, and by those who cannot act.

The watchdog is a small process of its own, so a parent that is stopped, or whose event loop hangs, cannot keep it from
acting. What ends by it is replaced by Serve, and a GPU is free again. Run as a script it is the child.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

BEAT_S = 1.0
"""How often the process shows that it lives."""
LIMIT_S = 15.0
"""How long it may show nothing."""
_ALIVE, _END_ME = b"+", b"-"


class Watchdog:
    """Guards the process that makes it. Its event loop calls `run`."""

    def __init__(self, is_stuck: Callable[[], bool] = lambda: False, *, limit_s: float = LIMIT_S) -> None:
        """is_stuck: whether the process is to be ended though its event loop lives."""
        self._is_stuck = is_stuck
        self._beat_s = min(BEAT_S, limit_s / 5)
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).resolve()), str(os.getpid()), str(limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends the parent's group leaves it time to look
        )

    async def run(self) -> None:
        """Show that the process lives, until cancelled; then nobody guards it any more."""
        assert self._child.stdin is not None
        descriptor = self._child.stdin.fileno()
        os.set_blocking(descriptor, False)
        try:
            while True:
                with contextlib.suppress(BlockingIOError):  # the child is late: what is in the pipe will do
                    os.write(descriptor, _END_ME if self._is_stuck() else _ALIVE)
                await asyncio.sleep(self._beat_s)
        except BrokenPipeError:
            return
        finally:
            self.close()

    def close(self) -> None:
        """Let the child go."""
        if self._child.stdin is not None:
            self._child.stdin.close()


def watch(pid: int, limit_s: float) -> None:
    """Read the parent's beats from standard input; end it when they stay away, and oneself when it is gone."""
    while True:
        ready, _, _ = select.select([0], [], [], limit_s)
        beats = os.read(0, 4096) if ready else _END_ME
        if not beats:
            return
        if _END_ME in beats:
            if os.getppid() == pid:  # else it is gone, and its number may be another's
                os.kill(pid, signal.SIGKILL)
            return


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]))

"""Keeps processes in reserve for workers to come, on its node: one that dies is then followed by a process that has the
imports behind it.

One worker of a node is the keeper. It has Ray start a process whenever a slot for one is free. Locks on files say who
holds a slot and who is the keeper. The system lets go of them when their process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the keeper looks, and a spare process looks for a keeper."""
PAUSE_S = 10.0
"""From the start of a worker, or from the moment a spare process was taken, to the start of the next one."""
RETRY_PAUSE_S = 60.0
"""The pause once a process was started, which may need long to come on a busy machine."""
LONGEST_PAUSE_S = 600.0
"""The pause doubles up to this while none becomes ready."""
MAX_SPARES = 8
HOOK = "lorafleet.cluster.worker.spare_process.prepare"
"""Called in each process of the workers' runtime environment."""
STARTING, READY = "starting", "ready"


class FileLock:
    """A lock that one process holds by a file, with a word about its state in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, state: str) -> bool:
        """Take the lock unless another process has it, and say one's state. Returns whether one has it."""
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            self._descriptor = descriptor
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()} {state}".encode(), 0)
        return True

    def release(self) -> None:
        """Let go of it, on purpose: nothing is said of who had it."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def is_held(self) -> bool:
        """True while a process holds it."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @property
    def holder(self) -> tuple[int, str] | None:
        """Id and state of the process that holds it, or died with it; None if it was released, or never held."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid, state = self.path.read_text().split()
            return int(pid), state
        return None


def keeper_lock(folder: Path) -> FileLock:
    """The lock of the node's keeper."""
    return FileLock(folder / "keeper")


def slots(folder: Path, count: int = MAX_SPARES) -> list[FileLock]:
    """The locks of the node's spare processes, of which each takes one."""
    return [FileLock(folder / f"spare-{index}") for index in range(count)]


class SpareKeeper:
    """One worker's part in keeping its node's spare processes."""

    def __init__(self, folder: Path, num_spares: int, start: Callable[[], None]) -> None:
        """folder: the node's, for its locks. start: starts a spare process; it blocks."""
        self._lock = keeper_lock(folder)
        self._slots = slots(folder, num_spares)
        self._start = start
        self._pause_s = PAUSE_S
        self._due_s: float | None = None
        self._has_warned = False

    async def run(self) -> None:
        """Keep them until cancelled. What fails is logged once, and tried again ever more seldom."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self.is_due(time.monotonic()):
                    await asyncio.to_thread(self._start)
            except Exception:
                if not self._has_warned:
                    logger.warning("no process is kept in reserve; a new worker starts as without it", exc_info=True)
                self._has_warned = True

    def is_due(self, now_s: float) -> bool:
        """Return True if a process is to be started now. Ask it often."""
        if not self._lock.acquire(READY):
            self._due_s = None
            return False
        free = [slot for slot in self._slots if not slot.is_held]
        if not free and all(slot.holder is not None and slot.holder[1] == READY for slot in self._slots):
            self._pause_s = PAUSE_S
        if not free or self._due_s is None:
            self._due_s = now_s + self._pause_s
        if now_s < self._due_s:
            return False
        self._pause_s = min(max(2 * self._pause_s, RETRY_PAUSE_S), LONGEST_PAUSE_S)
        self._due_s = now_s + self._pause_s
        return True

    def close(self) -> None:
        """Keep them no more. They end unless another worker of the node keeps them."""
        self._lock.release()

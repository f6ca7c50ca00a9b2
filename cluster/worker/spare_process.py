"""A process in reserve: it imports what a worker needs, and may become a worker at any time.

Ray calls `prepare` in each process of the workers' runtime environment, before it serves.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from pathlib import Path

from lorafleet.cluster import ray_internals
from lorafleet.cluster.worker.spare_keeper import LOOK_S, READY, STARTING, keeper_lock, slots

logger = logging.getLogger(__name__)

TITLE = "ray::IDLE lorafleet worker in reserve"
PATIENCE_S = 30.0
"""How long a spare process waits for a keeper after one that was killed, or for a slot."""
LEAVE_S = 10.0
"""How long it waits for one after a keeper that has ended in order: an update may start the next worker meanwhile."""
_NOT_INITIALIZED = 3
"""CUDA's `CUDA_ERROR_NOT_INITIALIZED`."""


def prepare() -> None:
    """Import a worker's modules, unless the process was started for a worker, which imports them by itself.

    Raises what an import raises, and RuntimeError where one has looked at the GPUs. Ray then ends the process.
    """
    if not ray_internals.is_spare_process():
        return
    ray_internals.name_process(TITLE)
    folder = ray_internals.folder_of_environment()
    is_ready = threading.Event()
    threading.Thread(target=_guard, args=(folder, is_ready), name="lorafleet-spare", daemon=True).start()
    import lorafleet.cluster.worker.replica  # noqa: F401

    if has_seen_gpus():
        raise RuntimeError("an import has initialised CUDA, so that Ray can no longer say which GPU a worker has")
    is_ready.set()


def has_seen_gpus() -> bool:
    """Return True if CUDA's driver is initialised: a change of `CUDA_VISIBLE_DEVICES` has no effect any more."""
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        return False
    return bool(driver.cuCtxGetDevice(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED)


def _guard(folder: Path, is_ready: threading.Event) -> None:
    """Hold a slot until the process is given to a worker. End the process if nobody needs it.

    Never before its imports are done: it may be given away by then, and knows it only when it serves.
    """
    keeper, mine = keeper_lock(folder), None
    needed_s = time.monotonic()
    while not ray_internals.is_actor():
        mine = mine or next((slot for slot in slots(folder) if slot.acquire(STARTING)), None)
        if mine is not None and is_ready.is_set():
            mine.acquire(READY)
        if not is_ready.is_set() or (mine is not None and keeper.is_held):
            needed_s = time.monotonic()
        elif time.monotonic() - needed_s > (PATIENCE_S if mine is None or keeper.holder else LEAVE_S):
            os._exit(0)
        time.sleep(LOOK_S)
    if mine is not None:
        mine.release()

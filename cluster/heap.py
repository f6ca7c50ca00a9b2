"""Memory of a process beside its objects: what the collector looks through, and what the allocator keeps."""

from __future__ import annotations

import asyncio
import ctypes
import gc

TRIM_S = 60.0


def settle() -> None:
    """Have the collector pass over all objects that there are. Call it when a start has made what stays.

    To look through them takes a tenth of a second or more, in which every thread stands still.
    """
    gc.collect()
    gc.freeze()


async def trim_often(period_s: float = TRIM_S) -> None:
    """Give free memory back to the system, until cancelled.

    glibc has a heap for every few threads, and keeps what is free in them. At 5 operations a second an ingress grew by
    some 20 MB an hour like that, while what was in use stayed the same.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, nor the need
    while trim is not None:
        await asyncio.sleep(period_s)
        await asyncio.to_thread(trim, 0)

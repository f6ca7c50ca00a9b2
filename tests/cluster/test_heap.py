"""What is free in the heap goes back to the system, and collections pass over what was there before."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import resource
from pathlib import Path

import pytest

from lorafleet.cluster.heap import settle, trim_often
from tests.support.wait import until

NUM_BLOCKS, BLOCK_BYTES = 20_000, 2000
"""40 MB in blocks that Python takes from the C library, and that it does not map one by one."""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc only")
async def test_free_memory_goes_back() -> None:
    blocks = [bytes(BLOCK_BYTES) for _ in range(NUM_BLOCKS)]
    del blocks[:-1]  # the last one keeps the end of the heap in use
    before = resident_bytes()
    trimming = asyncio.create_task(trim_often(0.01))
    await until(lambda: resident_bytes() < before - NUM_BLOCKS * BLOCK_BYTES // 2)
    trimming.cancel()


def test_collections_pass_over_what_is_there() -> None:
    kept = [[number] for number in range(1000)]
    try:
        settle()
        assert not any(each in kept for each in gc.get_objects() if type(each) is list)
        assert gc.get_freeze_count() > len(kept)
    finally:
        gc.unfreeze()

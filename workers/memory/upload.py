"""Brings adapters' weights to the device, block by block: one is copied to pinned memory while others are on their way.

A block is a part of the adapter's array as it is. What puts its rows into their pages is a kernel, so that a load costs
the host a few calls a block. They are made by one thread: the engine's thread waits for the interpreter behind every
other that wants it, and its streams with it. The blocks are pinned once, at the start: pinning memory takes as long as
copying it several times, and holds up the whole device meanwhile.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.kernels.row_copy import place_rows
from lorafleet.workers.memory.packing import Ints
from lorafleet.workers.memory.page_plan import PagePlan

with warnings.catch_warnings():
    # Weights from an object store are read-only, and only read here; torch says so once a process, which is now.
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), dtype=np.uint8))

MAX_THREADS = 8
"""Torch's own, that copy a block to pinned memory without the interpreter: a core copies about 6 GB/s, and so many are
as fast as the way to the device."""
NUM_BUFFERS = 8
"""Blocks in pinned memory, of all loads together: those that are being copied and those that are on their way."""


@dataclass(slots=True, eq=False)
class _Buffer:
    """Pinned memory of one block."""

    elements: Tensor
    """(block_elements,)."""
    is_copied: torch.cuda.Event | None = None
    """After it the buffer may be written again."""


class Uploader:
    """Writes adapters into their places in a pool. Safe to use from several threads at once."""

    def __init__(self, pool: Tensor, *, block_elements: int) -> None:
        """pool: the whole of it, flat. block_elements: the most that a plan's blocks have."""
        self._pool = pool
        self.stream: torch.cuda.Stream | None = None
        """What the copies run on; None on a CPU, where they are done when `write` returns."""
        if pool.is_cuda:
            # Some releases of torch leave the constructor untyped.
            make_stream = cast(Callable[[torch.device], torch.cuda.Stream], torch.cuda.Stream)
            self.stream = make_stream(pool.device)
            self._num_threads = max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // 2))
            self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
            for _ in range(NUM_BUFFERS):
                self._buffers.put(_Buffer(torch.empty(block_elements, dtype=pool.dtype, pin_memory=True)))

    def on_stream(self) -> AbstractContextManager[object]:
        """Run launches within the block on `stream`. On a CPU it does nothing, and CUDA is not touched."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def warm_up(self) -> None:
        """Launch what `write` launches, in all its forms, for a row of no elements."""
        moves = torch.zeros((3, 1), dtype=torch.int64, device=self._pool.device)
        for is_aligned in (True, False):
            place_rows(torch.empty_like(self._pool[:1]), self._pool, moves, is_aligned=is_aligned)

    def write(self, plan: PagePlan, weights: AdapterWeights, starts: Ints) -> None:
        """Write the adapter's rows to `starts`, which are the plan's, each with zeros up to where the next may start.

        On CUDA it returns when the weights have been read and the last copies are queued on `stream`.
        """
        source = torch.from_numpy(weights.flat).view(self._pool.dtype)
        assert not plan.blocks or plan.blocks[-1].last <= len(source), (plan.blocks[-1], len(source))
        moves = torch.empty((3, len(starts)), dtype=torch.int64, pin_memory=self.stream is not None)
        plan.fill_moves(starts, moves.numpy())
        with self.on_stream():
            if self.stream is not None:
                # Of this thread. Ray gives a worker's torch one, and on a GPU nothing else computes on the CPU.
                torch.set_num_threads(self._num_threads)
            moves = moves.to(self._pool.device, non_blocking=True)
            for block in plan.blocks:
                rows = moves[:, block.first_row : block.last_row]
                elements = self._to_device(source[block.first : block.last])
                place_rows(elements, self._pool, rows, is_aligned=plan.is_aligned)

    def _to_device(self, source: Tensor) -> Tensor:
        """A block of an adapter's array where the pool is; on CUDA it is on its way there when this returns."""
        if self.stream is None:
            return source
        buffer = self._buffers.get()
        try:
            if buffer.is_copied is not None:
                buffer.is_copied.synchronize()
            pinned = buffer.elements[: len(source)]
            pinned.copy_(source)
            elements = pinned.to(self._pool.device, non_blocking=True)
            buffer.is_copied = self.stream.record_event()
        finally:
            self._buffers.put(buffer)
        return elements

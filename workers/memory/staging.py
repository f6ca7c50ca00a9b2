"""Brings adapters' pages to the device, block by block: one is laid out while the one before is on its way.

The blocks are pinned once, at the start: pinning memory takes as long as copying it several times, and holds up the
whole device meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import cast

import torch
from torch import Tensor

from lorafleet.adapter_store.manifest import AdapterWeights, Array
from lorafleet.workers.memory.packing import Ints
from lorafleet.workers.memory.page_plan import Block, PagePlan

MAX_THREADS = 8
"""Blocks that are laid out at once, where there are processors enough: a core copies about 6 GB/s."""
NUM_BUFFERS = 2 * MAX_THREADS
"""Blocks in pinned memory: as many again are on their way."""


@dataclass(slots=True, eq=False)
class _Buffer:
    """Pinned memory of one block."""

    pages: Tensor
    """(block_pages, page_elements)."""
    is_copied: torch.cuda.Event | None = None
    """After it the buffer may be written again."""


class Stager:
    """Writes adapters into their pages of a pool. Safe to use from several threads at once."""

    def __init__(self, elements: Tensor, *, page_elements: int, block_pages: int) -> None:
        """elements: the whole pool, flat; it is cut into pages, and pages into blocks."""
        self._pages = elements.view(-1, page_elements)
        self._block_pages = block_pages
        self.stream: torch.cuda.Stream | None = None
        """What the copies run on; None on a CPU, where they are done when `write` returns."""
        if elements.is_cuda:
            # Some releases of torch leave the constructor untyped.
            make_stream = cast(Callable[[torch.device], torch.cuda.Stream], torch.cuda.Stream)
            self.stream = make_stream(elements.device)
            # A thread lays out its block alone: torch's own threads would be as many again for each of these. Torch
            # keeps that for every thread that starts later: on a GPU's worker none of them computes on the CPU.
            num_threads = max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // 2))
            self._threads = ThreadPoolExecutor(num_threads, "lorafleet-copy", lambda: torch.set_num_threads(1))
            self._buffers: SimpleQueue[_Buffer] = SimpleQueue()
            for _ in range(NUM_BUFFERS):
                pages = torch.empty((block_pages, page_elements), dtype=elements.dtype, pin_memory=True)
                self._buffers.put(_Buffer(pages))

    def write(self, plan: PagePlan, weights: AdapterWeights, page_ids: Ints) -> None:
        """Lay the adapter into the pages `page_ids`, (plan.num_pages,), and zero what no row covers in them.

        On CUDA it returns when everything is laid out and the last copies are queued on `stream`.
        """
        ids = torch.from_numpy(page_ids)
        if self.stream is None:
            pages = torch.empty((self._block_pages, self._pages.shape[1]), dtype=self._pages.dtype)
            for block in plan.blocks:
                self._fill(block, weights, pages)
                self._copy(block, pages, ids)
            return
        with torch.cuda.stream(self.stream):
            device_ids = ids.pin_memory().to(self._pages.device, non_blocking=True)
        list(self._threads.map(lambda block: self._write_block(block, weights, device_ids), plan.blocks))

    def _write_block(self, block: Block, weights: AdapterWeights, ids: Tensor) -> None:
        buffer = self._buffers.get()
        try:
            if buffer.is_copied is not None:
                buffer.is_copied.synchronize()
            self._fill(block, weights, buffer.pages)
            assert self.stream is not None
            with torch.cuda.stream(self.stream):
                self._copy(block, buffer.pages, ids)
                buffer.is_copied = self.stream.record_event()
        finally:
            self._buffers.put(buffer)

    def _fill(self, block: Block, weights: AdapterWeights, pages: Tensor) -> None:
        block.write(weights, as_numpy(pages).reshape(-1))

    def _copy(self, block: Block, pages: Tensor, ids: Tensor) -> None:
        # Pages lie anywhere: one copy to the device, where one kernel puts them into their places.
        last_page = block.first_page + block.num_pages
        image = pages[: block.num_pages].to(self._pages.device, non_blocking=True)
        self._pages.index_copy_(0, ids[block.first_page : last_page], image)


def as_numpy(tensor: Tensor) -> Array:
    """The tensor's memory as numpy has it: bfloat16 bits are uint16."""
    if tensor.dtype == torch.bfloat16:
        return cast(Array, tensor.view(torch.uint16).numpy())
    return cast(Array, tensor.numpy())

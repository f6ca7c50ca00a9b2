"""Captured steps: one graph a number of rows, replayed with whatever mix of adapters the batch has.

The host's part of a replay is one copy into the graph's own input buffer. Batches without adapters have graphs of their
own, which contain no LoRA work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafleet.kernels.segments import CHUNK_LENGTHS
from lorafleet.workers.batch import StepBatch, StepInputs
from lorafleet.workers.layout import most_chunks

MAX_ROWS = 2048
"""Of a graph for prompts beside decodes."""
MAX_TABLE_ENTRIES = 1 << 20
"""Of the block tables of such a graph, which hold a line a row and travel to the device with every step."""


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A captured step of a fixed number of rows."""

    graph: torch.cuda.CUDAGraph
    packed: Tensor
    """Int32 input buffer: `StepBatch.packed` of a batch of this size."""
    inputs: StepInputs
    """Views of `packed`."""
    logits: Tensor
    """(num_logits, vocab), overwritten by each replay of any graph."""

    def replay(self) -> Tensor:
        """Compute the step whose inputs are in `packed`; does not wait."""
        self.graph.replay()
        return self.logits


def capture(
    forward: Callable[[StepInputs], Tensor], blank: StepBatch, device: torch.device, pool: Any, logits: Tensor | None
) -> StepGraph:
    """Capture `forward` over a batch of padding. `pool` is shared by all graphs, which never run at once.

    So are `logits`, those of the largest, for which they are None: what each left of its own would stay for good.
    """
    packed = torch.from_numpy(blank.packed).to(device)
    inputs = blank.view(packed)
    left = forward(inputs)  # compiles kernels and sets up libraries, which a capture must not do
    if logits is None:
        logits = torch.empty_like(left)
    logits = logits[: len(left)]
    del left
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits.copy_(forward(inputs))
    return StepGraph(graph, packed, inputs, logits)


def kernel_shapes(max_batch_tokens: int, num_slots: int) -> Iterator[tuple[int, int]]:
    """(chunk length, number of chunks) of batches that between them need every csgmv kernel that a batch may need.

    A tiling depends on these two beside the module, on the second by its doublings.
    """
    for chunk_length in CHUNK_LENGTHS:
        most = most_chunks(max_batch_tokens, num_slots, chunk_length)
        yield from ((chunk_length, 1 << n) for n in range((most - 1).bit_length() + 1))


def graph_sizes(max_running: int, max_batch_tokens: int, max_pages: int) -> tuple[int, ...]:
    """Numbers of rows worth a graph: dense where padding would cost most. `max_pages`: of the longest sequence.

    They go beyond `max_running` so that decodes with prompts beside them have one: below some 1,500 rows a step without
    a graph takes longer to launch than to compute.
    """
    for_prompts = min(MAX_ROWS, max(512, MAX_TABLE_ENTRIES // max_pages // 256 * 256))
    largest = min(max(max_running, for_prompts), max(max_batch_tokens, max_running))
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 64), *range(512, 1024, 128)]
    sizes += range(1024, 1 << 20, 256)
    return (*(size for size in sizes if size < largest), largest)

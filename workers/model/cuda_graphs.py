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
from lorafleet.workers.batch import StepBatch, StepInputs, most_chunks

MAX_ROWS = 512


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A captured step of a fixed number of rows."""

    graph: torch.cuda.CUDAGraph
    packed: Tensor
    """Int32 input buffer: `StepBatch.packed` of a batch of this size."""
    inputs: StepInputs
    """Views of `packed`."""
    logits: Tensor
    """(size, vocab), overwritten by each replay."""

    def replay(self) -> Tensor:
        """Compute the step whose inputs are in `packed`; does not wait."""
        self.graph.replay()
        return self.logits


def capture(forward: Callable[[StepInputs], Tensor], blank: StepBatch, device: torch.device, pool: Any) -> StepGraph:
    """Capture `forward` over a batch of padding. `pool` is shared by all graphs, which never run at once."""
    packed = torch.from_numpy(blank.packed).to(device)
    inputs = blank.view(packed)
    forward(inputs)  # compiles kernels and sets up libraries, which a capture must not do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = forward(inputs)
    return StepGraph(graph, packed, inputs, logits)


def kernel_shapes(max_batch_tokens: int, num_slots: int) -> Iterator[tuple[int, int]]:
    """(chunk length, number of chunks) of batches that between them need every csgmv kernel that a batch may need.

    A tiling depends on these two beside the module, on the second by its doublings.
    """
    for chunk_length in CHUNK_LENGTHS:
        most = most_chunks(max_batch_tokens, num_slots, chunk_length)
        yield from ((chunk_length, 1 << n) for n in range((most - 1).bit_length() + 1))


def graph_sizes(max_running: int, max_batch_tokens: int, logits_chunk_tokens: int) -> tuple[int, ...]:
    """Numbers of rows worth a graph: dense where padding would cost most.

    They go beyond `max_running` so that decodes with a short prompt or two beside them have one: below `MAX_ROWS` a
    step without a graph takes longer to launch than to compute. A graph has the logits of all its rows, so none is
    larger than `logits_chunk_tokens`.
    """
    largest = min(max(max_running, MAX_ROWS), max(max_batch_tokens, max_running), logits_chunk_tokens)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 4096, 64)]
    return (*(size for size in sizes if size < largest), largest)

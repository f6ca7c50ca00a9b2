"""Captured steps: one graph a form, replayed with whatever mix of adapters the batch has.

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
from lorafleet.workers.step.batch import StepInputs
from lorafleet.workers.step.layout import most_chunks
from lorafleet.workers.step.message import StepMessage


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A captured step of a fixed form."""

    graph: torch.cuda.CUDAGraph
    packed: Tensor
    """Int32 input buffer: `StepMessage.packed` of a step of this form."""
    inputs: StepInputs
    """Views of `packed`."""
    logits: Tensor
    """(num_logits, vocab), overwritten by each replay of any graph."""

    def replay(self) -> Tensor:
        """Compute the step whose inputs are in `packed`; does not wait."""
        self.graph.replay()
        return self.logits


def capture(
    forward: Callable[[StepInputs], Tensor],
    blank: StepMessage,
    device: torch.device,
    pool: Any,
    logits: Tensor | None,
    *,
    has_collectives: bool = False,
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
    # NCCL's own threads ask the driver about earlier collectives meanwhile, which must not end the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local" if has_collectives else "global"):
        logits.copy_(forward(inputs))
    return StepGraph(graph, packed, inputs, logits)


def kernel_shapes(max_batch_tokens: int, num_slots: int) -> Iterator[tuple[int, int]]:
    """(chunk length, number of chunks) of batches that between them need every csgmv kernel that a batch may need.

    A tiling depends on these two beside the module, on the second by its doublings.
    """
    for chunk_length in CHUNK_LENGTHS:
        most = most_chunks(max_batch_tokens, num_slots, chunk_length)
        yield from ((chunk_length, 1 << n) for n in range((most - 1).bit_length() + 1))

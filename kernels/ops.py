"""LoRA on rows of one forward pass: the only entry points that model layers use.

Each operation has a module: its checks and its choice of a backend in `shrink`, `expand` and `embedding`, its Triton
kernels in the module ending in `_triton`, plain torch for all of them in `reference`. On CUDA nothing synchronises with
the device, and a call can be captured in a graph: the launches cover `max_chunks`, whatever a replayed batch holds.
"""

from __future__ import annotations

from torch import Tensor

from lorafleet.kernels.embedding import embed
from lorafleet.kernels.expand import expand
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.shrink import Hidden, shrink
from lorafleet.kernels.weights import LoraWeights

__all__ = ["Hidden", "add_lora", "embed", "expand", "shrink"]


def add_lora(x: Tensor, weights: LoraWeights, segments: Segments, y: Tensor) -> None:
    """Compute y += x @ A^T @ B * scaling in place. Arguments and errors: `shrink`, `expand`."""
    if segments.has_lora:
        expand(shrink(x, weights, segments), weights, segments, y)

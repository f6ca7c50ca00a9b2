"""Expand: y += h B with the adapter's scaling, each row with its own adapter's B.

Checks the arguments, then runs the Triton kernel of `expand_triton` on CUDA and plain torch elsewhere. Two forms give
the same sum. `accumulate=True` adds onto the base output. `accumulate=False` writes the delta first, with zeros or the
bias elsewhere, and the base product accumulates onto it; this moves half the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafleet.kernels import fp8, reference
from lorafleet.kernels.checks import check_matrix, check_slots
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.shrink import Hidden
from lorafleet.kernels.weights import LoraEmbeddingWeights, LoraWeights

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expand(
    h: Hidden,
    weights: LoraWeights | LoraEmbeddingWeights,
    segments: Segments,
    y: Tensor,
    *,
    accumulate: bool = True,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
) -> None:
    """Compute y (+)= h @ B * scaling in place, each row with its own adapter's B.

    h: what `shrink` returned for the same weights and segments. y: (rows, out_dim) in the pool's dtype or float32, unit
    stride along out_dim, rows may be strided. With `accumulate`, rows and slices without an adapter keep their bits;
    without it every element of y is written: the delta, or zero, plus `bias` (out_dim,) if given. With `scales` (rows,)
    float32, every element becomes y * scales[:, None], plus the delta and the bias. Raises ValueError.
    """
    check_matrix("y", y, segments.num_rows, weights.out_dim, weights.pool, (weights.pool.dtype, torch.float32))
    _check_bias(bias, accumulate and scales is None, weights.out_dim, y)
    check_slots(weights, segments)
    if scales is not None:
        fp8.check_scales(scales, y)
        accumulate = True
        if not isinstance(h, Tensor):
            fp8.rescale(y, scales, bias)
            bias = scales = None
    if isinstance(h, Tensor):
        from lorafleet.kernels import expand_triton

        expand_triton.expand(h, weights, segments, y, accumulate=accumulate, bias=bias, scales=scales)
    else:
        reference.expand(h, weights, y, accumulate=accumulate, bias=bias)


def _check_bias(bias: Tensor | None, accumulate: bool, out_dim: int, y: Tensor) -> None:
    if bias is None:
        return
    if accumulate:
        raise ValueError("bias is written with accumulate=False only; the base product adds it otherwise")
    if bias.shape != (out_dim,) or bias.stride(0) != 1 or bias.device != y.device:
        raise ValueError(
            f"bias must be a contiguous ({out_dim},) on {y.device}, got {tuple(bias.shape)} on {bias.device}"
        )
    if bias.dtype not in _DTYPES:
        raise ValueError(f"bias must be {' or '.join(map(str, _DTYPES))}, got {bias.dtype}")

"""LoRA on rows of one forward pass: the only entry points that model layers use.

Checks the arguments, then runs the Triton kernels on CUDA and plain torch elsewhere. On CUDA nothing synchronises with
the device, and a call can be captured in a graph: the launches cover `max_chunks`, whatever a replayed batch holds.
Two forms give the same sum: add onto the base output (`accumulate=True`), or write the delta first, with zeros or the
bias elsewhere, and let the base product accumulate onto it (`accumulate=False`), which moves half the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorafleet.kernels import fp8, reference
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import LoraEmbeddingWeights, LoraWeights

Hidden = reference.Hidden | Tensor
"""What `shrink` leaves for `expand`; its layout is the backend's own."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shrink(x: Tensor, weights: LoraWeights, segments: Segments) -> Hidden:
    """Compute h = x @ A^T for every slice of `weights`, each row with its own adapter's A.

    x: (rows, in_dim) in the pool's dtype, unit stride along in_dim. Returns h for `expand`. Raises ValueError for a
    wrong shape, stride, dtype or device, and for a slot that the row tables do not have.
    """
    _check_matrix("x", x, segments.num_rows, weights.in_dim, weights.pool, (weights.pool.dtype,))
    _check_slots(weights, segments)
    if x.is_cuda:
        from lorafleet.kernels import shrink_triton

        return shrink_triton.shrink(x, weights, segments)
    return reference.shrink(x, weights, segments)


def expand(
    h: Hidden,
    weights: LoraWeights,
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
    _check_matrix("y", y, segments.num_rows, weights.out_dim, weights.pool, (weights.pool.dtype, torch.float32))
    _check_bias(bias, accumulate and scales is None, weights.out_dim, y)
    _check_slots(weights, segments)
    if scales is not None:
        fp8.check_scales(scales, y)
        accumulate = True
        if not isinstance(h, Tensor):
            fp8.rescale(y, scales, bias)
            bias = scales = None
    _expand(h, weights, segments, y, accumulate, bias, scales)


def add_lora(x: Tensor, weights: LoraWeights, segments: Segments, y: Tensor) -> None:
    """Compute y += x @ A^T @ B * scaling in place. Arguments and errors: `shrink`, `expand`."""
    if segments.has_lora:
        expand(shrink(x, weights, segments), weights, segments, y)


def embed(token_ids: Tensor, weights: LoraEmbeddingWeights, segments: Segments, y: Tensor) -> None:
    """Compute y += A[:, token_ids]^T @ B * scaling in place: the delta of an embedding.

    token_ids: (rows,) int32 or int64, each below `num_embeddings`; the caller guarantees it on CUDA, where the base
    embedding reads them too, and that they were written before the kernel ahead of this call began. y: as in `expand`.
    Raises ValueError.
    """
    if token_ids.dim() != 1 or token_ids.shape[0] != segments.num_rows:
        raise ValueError(f"token_ids must have shape ({segments.num_rows},), got {tuple(token_ids.shape)}")
    if token_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"token_ids must be int32 or int64, got {token_ids.dtype}")
    _check_matrix("y", y, segments.num_rows, weights.out_dim, weights.pool, (weights.pool.dtype, torch.float32))
    _check_slots(weights, segments)
    if token_ids.is_cuda:
        from lorafleet.kernels import embedding_triton

        _expand(embedding_triton.lookup(token_ids, weights, segments), weights, segments, y, True, None)
    elif segments.has_lora:
        low, high = (int(bound) for bound in token_ids.aminmax())
        if low < 0 or high >= weights.num_embeddings:
            raise ValueError(f"token ids must lie in [0, {weights.num_embeddings}), got {low} to {high}")
        _expand(reference.shrink_embedding(token_ids, weights, segments), weights, segments, y, True, None)


def _expand(
    h: Hidden,
    weights: LoraWeights | LoraEmbeddingWeights,
    segments: Segments,
    y: Tensor,
    accumulate: bool,
    bias: Tensor | None,
    scales: Tensor | None = None,
) -> None:
    if isinstance(h, Tensor):
        # Triton exists on Linux alone, and takes a while to import.
        from lorafleet.kernels import expand_triton

        expand_triton.expand(h, weights, segments, y, accumulate=accumulate, bias=bias, scales=scales)
    else:
        reference.expand(h, weights, y, accumulate=accumulate, bias=bias)


def _check_matrix(
    name: str, matrix: Tensor, rows: int, width: int, pool: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    if matrix.dim() != 2 or matrix.shape[0] != rows or matrix.shape[1] != width:
        raise ValueError(f"{name} must have shape ({rows}, {width}), got {tuple(matrix.shape)}")
    if matrix.stride(1) != 1:
        raise ValueError(f"{name} must have unit stride along its last dimension, got strides {matrix.stride()}")
    if matrix.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {matrix.dtype}")
    if matrix.device != pool.device:
        raise ValueError(f"{name} must be on the pool's device {pool.device}, got {matrix.device}")


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


def _check_slots(weights: LoraWeights | LoraEmbeddingWeights, segments: Segments) -> None:
    if segments.max_slot >= weights.ranks.shape[0]:
        raise ValueError(
            f"slot {segments.max_slot} is out of range: the row tables have {weights.ranks.shape[0]} slots"
        )

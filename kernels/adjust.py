"""Rows of an adapter's own over a module's output: a scale (DoRA's) and a bias, each a row in the adapter pool.

Checks the arguments, then runs the Triton kernel of `adjust_triton` on CUDA and plain torch elsewhere. On CUDA nothing
synchronises, and a call can be captured in a graph: which rows have what is read from tables on the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lorafleet.kernels.segments import BASE_SLOT, Segments
from lorafleet.kernels.weights import ROW_ALIGN, OutputVectors


def adjust(y: Tensor, vectors: OutputVectors, segments: Segments, bias: Tensor | None = None) -> None:
    """Compute y += scale * (y - bias) + added in place, each row with its own adapter's, in float32.

    y: (rows, out_dim) in the pool's dtype, unit stride along out_dim. It has the base's bias and the adapter's delta.
    bias: (out_dim,), the base's, which is not scaled; None if it has none. Rows whose adapter has neither keep their
    bits. Raises ValueError.
    """
    if y.dim() != 2 or y.shape[0] != segments.num_rows or y.shape[1] < vectors.out_dim or y.stride(1) != 1:
        raise ValueError(
            f"y must have shape ({segments.num_rows}, {vectors.out_dim} or more) and unit stride along its last "
            f"dimension, got {tuple(y.shape)} with strides {y.stride()}"
        )
    if y.dtype != vectors.pool.dtype or y.device != vectors.pool.device:
        raise ValueError(f"y must be {vectors.pool.dtype} on {vectors.pool.device}, got {y.dtype} on {y.device}")
    if segments.max_slot >= vectors.starts.shape[0]:
        raise ValueError(f"slot {segments.max_slot} is out of range: the table has {vectors.starts.shape[0]} slots")
    if y.is_cuda:
        from lorafleet.kernels import adjust_triton

        adjust_triton.adjust(y, vectors, segments.row_slots, bias)
    else:
        _adjust(y, vectors, segments, bias)


def _adjust(y: Tensor, vectors: OutputVectors, segments: Segments, bias: Tensor | None) -> None:
    starts = vectors.starts.numpy()
    for slot in np.unique(segments.host_row_slots).tolist():
        if slot == BASE_SLOT or (starts[slot] < 0).all():
            continue
        rows = torch.from_numpy(np.flatnonzero(segments.host_row_slots == slot))
        for part in vectors.parts:
            added, scale = (_row(vectors, slot, entry, part.width) for entry in (part.added, part.scale))
            if added is None and scale is None:
                continue
            columns = y[:, part.column : part.column + part.width]
            own = columns.index_select(0, rows).float()
            if scale is not None:
                plain = own if bias is None else own - bias[part.column : part.column + part.width].float()
                own = own + scale * plain
            if added is not None:
                own = own + added
            columns.index_copy_(0, rows, own.to(y.dtype))


def _row(vectors: OutputVectors, slot: int, entry: int, width: int) -> Tensor | None:
    """(width,) float32; None: the adapter in the slot has no such row."""
    start = int(vectors.starts[slot, entry]) if entry >= 0 else -1
    return None if start < 0 else vectors.pool[start * ROW_ALIGN :][:width].float()

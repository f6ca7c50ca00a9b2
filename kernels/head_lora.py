"""LoRA on a linear module that is taken apart by heads, and multiplied with from either side.

The module gives each head some columns of its output. Latent attention multiplies queries with the columns of keys from
the output's side, and sums of latents with those of values from the input's side. Its LoRA does the same: with A
(rank, in_dim) and B (rank, out_dim) of a row's adapter, `add_absorbed` adds (query B_h^T) A, and `add_expanded` adds
(x A^T) B_h. Checks the arguments, then runs the Triton kernel of `head_lora_triton` on CUDA and plain torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lorafleet.kernels.checks import check_slots
from lorafleet.kernels.segments import BASE_SLOT, Segments
from lorafleet.kernels.weights import ROW_ALIGN, HeadColumns, LoraWeights


def add_absorbed(query: Tensor, weights: LoraWeights, segments: Segments, y: Tensor, columns: HeadColumns) -> None:
    """Compute y[row, h] += (query[row, h] @ B[:, columns of h]^T) @ A * scaling in place, with each row's own adapter.

    query: (rows, heads, columns.width). y: (rows, heads, in_dim). Both are of the pool's dtype and may be strided, but
    for the last dimension. Rows without an adapter keep their bits. Raises ValueError.
    """
    _check(query, y, (columns.width, weights.in_dim), weights, segments, columns)
    if query.is_cuda:
        from lorafleet.kernels import head_lora_triton

        head_lora_triton.add(query, weights, segments, y, columns, is_absorbed=True)
        return
    for rows, a, b, scaling in _adapters(weights, segments):
        for head in range(query.shape[1]):
            h = query[rows, head].float() @ b[:, columns.of(head)].t() * scaling
            y[rows, head] = (y[rows, head] + h @ a).to(y.dtype)


def add_expanded(x: Tensor, weights: LoraWeights, segments: Segments, y: Tensor, columns: HeadColumns) -> None:
    """Compute y[row, h] += (x[row, h] @ A^T) @ B[:, columns of h] * scaling in place, with each row's own adapter.

    x: (rows, heads, in_dim). y: (rows, heads, columns.width). The rest is as in `add_absorbed`.
    """
    _check(x, y, (weights.in_dim, columns.width), weights, segments, columns)
    if x.is_cuda:
        from lorafleet.kernels import head_lora_triton

        head_lora_triton.add(x, weights, segments, y, columns, is_absorbed=False)
        return
    for rows, a, b, scaling in _adapters(weights, segments):
        h = x[rows].float() @ a.t() * scaling
        for head in range(x.shape[1]):
            y[rows, head] = (y[rows, head] + h[:, head] @ b[:, columns.of(head)]).to(y.dtype)


def _adapters(weights: LoraWeights, segments: Segments) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Of each adapter of the pass on the module: its rows, A (rank, in_dim) and B (rank, out_dim), and its scaling."""
    for slot in np.unique(segments.host_row_slots).tolist():
        rank = 0 if slot == BASE_SLOT else int(weights.ranks[slot, 0])
        if rank:
            rows = torch.from_numpy(np.flatnonzero(segments.host_row_slots == slot))
            parts = [
                _read(weights, weights.b_rows[slot, part, :rank], width)
                for part, width in enumerate(weights.part_widths)
            ]
            a = _read(weights, weights.a_rows[slot, 0, :rank], weights.in_dim)
            yield rows, a, torch.cat(parts, dim=1), float(weights.scalings[slot, 0])


def _read(weights: LoraWeights, starts: Tensor, width: int) -> Tensor:
    """(rows, width) float32 of the pool."""
    elements = starts.long()[:, None] * ROW_ALIGN + torch.arange(width)
    return weights.pool.take(elements).float()


def _check(
    x: Tensor, y: Tensor, widths: tuple[int, int], weights: LoraWeights, segments: Segments, columns: HeadColumns
) -> None:
    for name, tensor, width in (("the input", x, widths[0]), ("y", y, widths[1])):
        if tensor.dim() != 3 or tensor.shape[0] != segments.num_rows or tensor.shape[2] != width:
            raise ValueError(f"{name} must have shape ({segments.num_rows}, heads, {width}), got {tuple(tensor.shape)}")
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} must have unit stride along its last dimension, got strides {tensor.stride()}")
        if tensor.dtype != weights.pool.dtype or tensor.device != weights.pool.device:
            raise ValueError(
                f"{name} must be {weights.pool.dtype} on {weights.pool.device}, as the pool is, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the input and y must have as many heads, got {x.shape[1]} and {y.shape[1]}")
    last = columns.of(x.shape[1] - 1).stop
    if weights.num_slices != 1 or last > weights.out_dim or columns.width > columns.step:
        raise ValueError(
            f"{x.shape[1]} heads of {columns} end at column {last}: weights of one module with at least as many "
            f"columns are needed, got {weights.num_slices} modules with {weights.out_dim}"
        )
    parts = weights.part_widths
    if any(part != parts[0] for part in parts[:-1]) or parts[-1] > parts[0]:
        raise ValueError(f"all parts of B but the last must be of one width, got {parts}")
    check_slots(weights, segments)

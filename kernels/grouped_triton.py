"""A Triton kernel for products of few rows with each of many matrices, which is as fast as the matrices are read.

A program has a run of one matrix's columns, and ends at once where the matrix has no rows. CUDA only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafleet.kernels.launching import launch

_BLOCK_COLUMNS = 64


def product(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Compute x[start:end] @ matrix for each matrix; arguments as in `expert_layers.grouped_product`.

    x: unit stride along in_dim; matrices of any strides. Rows after the last end stay unwritten.
    """
    num_matrices, in_dim, out_dim = matrices.shape
    out = torch.empty((x.shape[0], out_dim), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    mean = x.shape[0] / num_matrices
    launch(_product_kernel, (triton.cdiv(out_dim, _BLOCK_COLUMNS), num_matrices))(
        x,
        matrices,
        ends,
        out,
        x.stride(0),
        matrices.stride(0),
        matrices.stride(1),
        matrices.stride(2),
        in_dim,
        out_dim,
        BLOCK_ROWS=16 if mean <= 8 else 32 if mean <= 16 else 64,
        BLOCK_INNER=128 if x.element_size() == 2 else 32,
        BLOCK_COLUMNS=_BLOCK_COLUMNS,
        num_warps=4,
        num_stages=4,
    )
    return out


@triton.jit
def _product_kernel(
    x,
    matrices,
    ends,
    out,
    x_stride,
    matrix_stride,
    inner_stride,
    column_stride,
    in_dim,
    out_dim,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    index = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    has_column = (columns < out_dim)[None, :]
    start = tl.load(ends + index - 1, mask=index > 0, other=0)
    end = tl.load(ends + index)
    matrix = matrices + index.to(tl.int64) * matrix_stride + (columns.to(tl.int64) * column_stride)[None, :]
    for first in range(start, end, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        has_row = (rows < end)[:, None]
        from_row = x + (rows.to(tl.int64) * x_stride)[:, None]
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for inner in range(0, in_dim, BLOCK_INNER):
            inners = inner + tl.arange(0, BLOCK_INNER)
            is_inside = inners < in_dim
            left = tl.load(from_row + inners[None, :], mask=has_row & is_inside[None, :], other=0.0)
            right = tl.load(
                matrix + (inners.to(tl.int64) * inner_stride)[:, None], mask=is_inside[:, None] & has_column, other=0.0
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        target = out + (rows.to(tl.int64) * out_dim)[:, None] + columns[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=has_row & has_column)

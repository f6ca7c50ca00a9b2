"""The Triton kernel of `adjust`, which checks its arguments and documents them: one program a row and a run of columns.

A program of a row whose adapter has nothing here reads a slot and two starts, and ends.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorafleet.kernels.launching import launch
from lorafleet.kernels.weights import ROW_ALIGN, OutputVectors


def adjust(y: Tensor, vectors: OutputVectors, row_slots: Tensor, bias: Tensor | None) -> None:
    """`adjust.adjust`."""
    num_rows, num_runs = y.shape[0], vectors.runs.shape[0]
    if num_rows and num_runs:
        launch(_adjust_kernel, (num_rows, num_runs))(
            y,
            vectors.pool,
            vectors.starts,
            vectors.runs,
            row_slots,
            y if bias is None else bias,
            y.stride(0),
            vectors.starts.stride(0),
            HAS_BIAS=bias is not None,
            ROW_ALIGN=ROW_ALIGN,
            BLOCK=vectors.run_columns,
            num_warps=4,
        )


@triton.jit(do_not_specialize_on_alignment=["row_slots", "starts"])
def _adjust_kernel(
    y,
    pool,
    starts,
    runs,
    row_slots,
    bias,
    y_stride,
    starts_stride,
    HAS_BIAS: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    run = runs + tl.program_id(1) * 5
    added_entry, scale_entry = tl.load(run + 3), tl.load(run + 4)
    table = starts + slot * starts_stride
    added_start = tl.load(table + added_entry, mask=added_entry >= 0, other=-1).to(tl.int64)
    scale_start = tl.load(table + scale_entry, mask=scale_entry >= 0, other=-1).to(tl.int64)
    if (added_start < 0) & (scale_start < 0):
        return
    column, width, offset = tl.load(run), tl.load(run + 1), tl.load(run + 2)
    i = tl.arange(0, BLOCK)
    mask = i < width
    at = y + row * y_stride + column + i
    own = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    plain = own
    if HAS_BIAS:
        plain = own - tl.load(bias + column + i, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(pool + scale_start * ROW_ALIGN + offset + i, mask=mask & (scale_start >= 0), other=0.0)
    added = tl.load(pool + added_start * ROW_ALIGN + offset + i, mask=mask & (added_start >= 0), other=0.0)
    own = own + scale.to(tl.float32) * plain + added.to(tl.float32)
    tl.store(at, own.to(y.dtype.element_ty), mask=mask)

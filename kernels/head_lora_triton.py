"""The Triton kernel of `head_lora`, which checks its arguments and documents them.

A program takes one head for a tile of a chunk's rows: both products, with the ranks in blocks. The heads of a row read
the same A, which the L2 cache serves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafleet.kernels.launching import launch
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.tiling import VIEWS, power_of_two
from lorafleet.kernels.weights import ROW_ALIGN, HeadColumns, LoraWeights

MAX_BLOCK_RANKS = 64
"""Ranks of one product. The output of a higher rank is rounded once for each block of them."""
MAX_BLOCK_ROWS = 64
BLOCK_WIDTH = 128
"""Elements of a head, or of the module's input, that one step takes."""


def add(
    x: Tensor, weights: LoraWeights, segments: Segments, y: Tensor, columns: HeadColumns, *, is_absorbed: bool
) -> None:
    """`head_lora.add_absorbed` or `head_lora.add_expanded`."""
    block_rows = min(segments.chunk_length, MAX_BLOCK_ROWS)
    row_tiles = -(-segments.chunk_length // block_rows)
    num_tiles, num_heads = segments.max_chunks * row_tiles, x.shape[1]
    if not num_tiles or not weights.max_rank:
        return
    widths = weights.part_widths
    x_width, y_width = x.shape[2], y.shape[2]
    launch(_head_lora_kernel, (num_tiles, num_heads))(
        x,
        y,
        weights.pool,
        weights.ranks,
        weights.scalings,
        weights.a_rows,
        weights.b_rows,
        segments.permutation,
        segments.chunk_indptr,
        segments.chunk_slots,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        y.stride(1),
        weights.ranks.stride(0),
        weights.scalings.stride(0),
        weights.a_rows.stride(0),
        weights.b_rows.stride(0),
        weights.b_rows.stride(1),
        FIRST_COLUMN=columns.first,
        COLUMN_STEP=columns.step,
        PART_WIDTH=widths[0] if len(widths) > 1 else 0,
        IS_ABSORBED=is_absorbed,
        X_WIDTH=x_width,
        Y_WIDTH=y_width,
        BLOCK_X=min(BLOCK_WIDTH, max(16, power_of_two(x_width))),
        BLOCK_Y=min(BLOCK_WIDTH, max(16, power_of_two(y_width))),
        ROW_ALIGN=ROW_ALIGN,
        ROW_TILES=row_tiles,
        BLOCK_ROWS=block_rows,
        BLOCK_RANKS=min(MAX_BLOCK_RANKS, max(16, power_of_two(weights.max_rank))),
        SPLIT_H=weights.pool.dtype != torch.float32,
        num_warps=4,
    )


@triton.jit(do_not_specialize_on_alignment=VIEWS)
def _head_lora_kernel(
    x,
    y,
    pool,
    ranks,
    scalings,
    a_rows,
    b_rows,
    permutation,
    chunk_indptr,
    chunk_slots,
    x_stride,
    x_head_stride,
    y_stride,
    y_head_stride,
    ranks_stride,
    scalings_stride,
    a_slot_stride,
    b_slot_stride,
    b_part_stride,
    FIRST_COLUMN: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    PART_WIDTH: tl.constexpr,
    IS_ABSORBED: tl.constexpr,
    X_WIDTH: tl.constexpr,
    Y_WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    SPLIT_H: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    chunk = tile // ROW_TILES
    slot = tl.load(chunk_slots + chunk).to(tl.int64)
    start = tl.load(chunk_indptr + chunk) + tile % ROW_TILES * BLOCK_ROWS
    end = tl.load(chunk_indptr + chunk + 1)
    if (slot < 0) | (start >= end):
        return
    rank = tl.load(ranks + slot * ranks_stride)
    if rank == 0:
        return
    scaling = tl.load(scalings + slot * scalings_stride)
    i = start + tl.arange(0, BLOCK_ROWS)
    rows = tl.load(permutation + i, mask=i < end, other=0).to(tl.int64)
    inside = i < end
    x_rows = x + rows * x_stride + head * x_head_stride
    y_rows = y + rows * y_stride + head * y_head_stride
    a_table = a_rows + slot * a_slot_stride
    b_table = b_rows + slot * b_slot_stride
    column = FIRST_COLUMN + head * COLUMN_STEP
    for first in range(0, rank, BLOCK_RANKS):
        r = first + tl.arange(0, BLOCK_RANKS)
        is_rank = r < rank
        h = tl.zeros([BLOCK_ROWS, BLOCK_RANKS], tl.float32)
        for offset in range(0, X_WIDTH, BLOCK_X):
            k = offset + tl.arange(0, BLOCK_X)
            if IS_ABSORBED:
                left = _load_b(pool, b_table, b_part_stride, r, is_rank, column, k, k < X_WIDTH, PART_WIDTH, ROW_ALIGN)
            else:
                left = _load_a(pool, a_table, r, is_rank, k, k < X_WIDTH, ROW_ALIGN)
            given = tl.load(x_rows[:, None] + k[None, :], mask=inside[:, None] & (k < X_WIDTH)[None, :], other=0.0)
            h = tl.dot(given, tl.trans(left), h, input_precision="ieee")
        h = h * scaling
        for offset in range(0, Y_WIDTH, BLOCK_Y):
            n = offset + tl.arange(0, BLOCK_Y)
            if IS_ABSORBED:
                right = _load_a(pool, a_table, r, is_rank, n, n < Y_WIDTH, ROW_ALIGN)
            else:
                right = _load_b(pool, b_table, b_part_stride, r, is_rank, column, n, n < Y_WIDTH, PART_WIDTH, ROW_ALIGN)
            mask = inside[:, None] & (n < Y_WIDTH)[None, :]
            at = y_rows[:, None] + n[None, :]
            sums = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            high = h.to(right.dtype)
            sums = tl.dot(high, right, sums, input_precision="ieee")
            if SPLIT_H:
                # As two halves of the weights' dtype h keeps its bits.
                sums = tl.dot((h - high.to(tl.float32)).to(right.dtype), right, sums)
            tl.store(at, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _load_a(pool, table, r, is_rank, k, is_column, ROW_ALIGN: tl.constexpr):
    """(ranks, columns) of A, zero beyond the rank and the columns."""
    starts = tl.load(table + r, mask=is_rank, other=0).to(tl.int64) * ROW_ALIGN
    return tl.load(pool + starts[:, None] + k[None, :], mask=is_rank[:, None] & is_column[None, :], other=0.0)


@triton.jit
def _load_b(
    pool,
    table,
    part_stride,
    r,
    is_rank,
    column,
    k,
    is_column,
    PART_WIDTH: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
):
    """(ranks, columns) of B from `column` on, whichever parts have them; zero beyond the rank and the columns."""
    mask = is_rank[:, None] & is_column[None, :]
    if PART_WIDTH == 0:
        starts = tl.load(table + r, mask=is_rank, other=0).to(tl.int64) * ROW_ALIGN + column
        return tl.load(pool + starts[:, None] + k[None, :], mask=mask, other=0.0)
    part = (column + k) // PART_WIDTH
    starts = tl.load(table + part[None, :] * part_stride + r[:, None], mask=mask, other=0).to(tl.int64) * ROW_ALIGN
    return tl.load(pool + starts + ((column + k) % PART_WIDTH)[None, :], mask=mask, other=0.0)

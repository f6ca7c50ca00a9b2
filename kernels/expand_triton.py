"""Expand: y (+)= h @ B * scaling over the paged pool, each row with its own adapter's B.

One launch covers all slices, however wide each is. A program owns a tile of rows and a span of one part's columns,
keeps h and walks the span. B rows lie along the wide side, so every load and store is a long run of one row.
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from lorafleet.kernels.launching import launch
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.tiling import (
    VIEWS,
    ExpandTiling,
    Shape,
    dependent_launch,
    expand_tiling,
    power_of_two,
    stages,
)
from lorafleet.kernels.weights import ROW_ALIGN, LoraEmbeddingWeights, LoraWeights

MAX_BLOCK_RANKS = 128
"""Ranks that one product takes; a higher rank is summed over several."""


def expand(
    h: Tensor,
    weights: LoraWeights | LoraEmbeddingWeights,
    segments: Segments,
    y: Tensor,
    *,
    accumulate: bool = True,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    tiling: ExpandTiling | None = None,
) -> None:
    """y[row, part] (+)= (sum over splits of h[split, row, slice of part]) @ B[slot, part] * scaling[slot, slice].

    h: (splits, rows, num_slices, max_rank) fp32 as `shrink` leaves it. y: (rows, out_dim), rows may be strided. With
    `accumulate`, rows and slices without an adapter are not touched. Without it, every element of y is written: the
    delta or zero, plus `bias` (out_dim,) if given. With `scales` (rows,) every element becomes
    y * scales[:, None] plus the delta and the bias.
    """
    if tiling is None:
        num_slices = len(set(weights.part_slices))
        out_dim, max_rank, max_chunks = weights.out_dim, weights.max_rank, power_of_two(segments.max_chunks)
        shape = Shape(num_slices, out_dim, max_rank, segments.chunk_length, max_chunks, weights.pool.dtype, y.device)
        tiling = expand_tiling(shape)
    block_ranks = min(power_of_two(max(16, weights.max_rank)), MAX_BLOCK_RANKS)
    row_tiles = -(-segments.chunk_length // tiling.block_rows)
    spans = [-(-width // tiling.span) for width in weights.part_widths]
    programs = segments.max_chunks * row_tiles * sum(spans)
    if programs == 0:
        return
    steps = -(-tiling.span // min(tiling.block_columns, tiling.block_elements // block_ranks))
    tile_bytes = tiling.block_elements * weights.pool.element_size()
    pdl = dependent_launch(y)
    launch(_expand_kernel, (programs,))(
        h,
        weights.pool,
        weights.ranks,
        weights.scalings,
        weights.b_rows,
        segments.permutation,
        segments.chunk_indptr,
        segments.chunk_slots,
        y,
        bias,
        scales,
        segments.num_rows,
        y.stride(0),
        weights.ranks.stride(0),
        weights.scalings.stride(0),
        weights.b_rows.stride(0),
        weights.b_rows.stride(1),
        weights.max_rank,
        PART_SLICES=weights.part_slices,
        PART_STARTS=weights.part_starts,
        PART_WIDTHS=weights.part_widths,
        COLUMN_ALIGN=math.gcd(ROW_ALIGN, *weights.part_starts, *weights.part_widths),
        PART_SPANS=tuple(itertools.accumulate(spans, initial=0)),
        NUM_SLICES=h.shape[2],
        NUM_SPLITS=h.shape[0],
        ROW_ALIGN=ROW_ALIGN,
        ROW_TILES=row_tiles,
        BLOCK_ROWS=tiling.block_rows,
        BLOCK_RANKS=block_ranks,
        RANK_BLOCKS=-(-weights.max_rank // block_ranks),
        BLOCK_COLUMNS=tiling.block_columns,
        BLOCK_ELEMENTS=tiling.block_elements,
        SPAN=tiling.span,
        SPLIT_H=weights.pool.dtype != torch.float32 and (tiling.split_h or weights.pool.dtype == torch.float16),
        ACCUMULATE=accumulate,
        PDL=pdl,
        num_warps=tiling.num_warps,
        num_stages=stages(tiling.num_stages, steps, tile_bytes, y),
        launch_pdl=pdl,
    )


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=VIEWS)
def _expand_kernel(
    h,
    pool,
    ranks,
    scalings,
    b_rows,
    permutation,
    chunk_indptr,
    chunk_slots,
    y,
    bias,
    scales,
    num_rows,
    y_stride,
    ranks_stride,
    scalings_stride,
    b_slot_stride,
    b_part_stride,
    max_rank,
    PART_SLICES: tl.constexpr,
    PART_STARTS: tl.constexpr,
    PART_WIDTHS: tl.constexpr,
    COLUMN_ALIGN: tl.constexpr,
    PART_SPANS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
    SPLIT_H: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PDL: tl.constexpr,
):
    NUM_PARTS: tl.constexpr = len(PART_WIDTHS)
    pid = tl.program_id(0)
    span = pid % PART_SPANS[NUM_PARTS]
    tile = pid // PART_SPANS[NUM_PARTS]
    part = 0
    slice_ = PART_SLICES[0]
    part_start = PART_STARTS[0]
    part_width = PART_WIDTHS[0]
    column = span * SPAN
    for p in tl.static_range(1, NUM_PARTS):
        inside = span >= PART_SPANS[p]
        part = tl.where(inside, p, part)
        slice_ = tl.where(inside, PART_SLICES[p], slice_)
        part_start = tl.where(inside, PART_STARTS[p], part_start)
        part_width = tl.where(inside, PART_WIDTHS[p], part_width)
        column = tl.where(inside, (span - PART_SPANS[p]) * SPAN, column)
    if NUM_PARTS > 1:
        # The choice above hides what all parts have in common, and with it the wide loads and stores.
        part_start = tl.multiple_of(part_start, COLUMN_ALIGN)
        part_width = tl.multiple_of(part_width, COLUMN_ALIGN)
        column = tl.multiple_of(column, ROW_ALIGN)

    chunk = tile // ROW_TILES
    slot = tl.load(chunk_slots + chunk)
    start = tl.load(chunk_indptr + chunk) + tile % ROW_TILES * BLOCK_ROWS
    end = tl.load(chunk_indptr + chunk + 1)
    if start >= end:
        if PDL:
            # Every program ends after shrink: who waits for this kernel relies on that.
            gdc_wait()
        return
    rank = 0
    scaling = 0.0
    if slot >= 0:
        rank = tl.load(ranks + slot.to(tl.int64) * ranks_stride + slice_)
        scaling = tl.load(scalings + slot.to(tl.int64) * scalings_stride + slice_)
    i = start + tl.arange(0, BLOCK_ROWS)
    rows = tl.load(permutation + i, mask=i < end, other=0).to(tl.int64)
    y_part = y + part_start
    bias_part = bias
    if bias is not None:
        bias_part = bias + part_start
    factors = scales
    if scales is not None:
        factors = scales + rows
    column_end = tl.minimum(column + SPAN, part_width)
    if rank == 0:
        if PDL:
            gdc_wait()
        if not ACCUMULATE or scales is not None:
            for offset in range(0, tl.minimum(SPAN, part_width - column), BLOCK_COLUMNS):
                n = column + offset + tl.arange(0, BLOCK_COLUMNS)
                sums = _base(y_part, rows, y_stride, bias_part, factors, i < end, n, column_end, ACCUMULATE)
                _store(y_part, rows, y_stride, sums, i < end, n, column_end)
    else:
        table = b_rows + slot.to(tl.int64) * b_slot_stride + part * b_part_stride
        h_row_stride = NUM_SLICES * max_rank
        h_slice = h + slice_ * max_rank
        h_split_stride = num_rows.to(tl.int64) * h_row_stride
        # A low-rank adapter takes a small tile also where the tables have room for high ranks.
        LEVELS: tl.constexpr = 2 if BLOCK_RANKS >= 64 else 1
        for level in tl.static_range(LEVELS):
            if (rank > BLOCK_RANKS // 4 * level) & ((rank <= BLOCK_RANKS // 4) | (level == LEVELS - 1)):
                _walk_span(
                    h_slice, h_row_stride, h_split_stride, pool, table, y_part, bias_part, factors,
                    rows, y_stride, start, end, column, column_end, rank, max_rank, scaling, NUM_SPLITS, ROW_ALIGN,
                    BLOCK_ROWS, BLOCK_RANKS >> (LEVELS - 1 - level) * 2, RANK_BLOCKS if level == LEVELS - 1 else 1,
                    BLOCK_COLUMNS, BLOCK_ELEMENTS, SPAN, SPLIT_H, ACCUMULATE, PDL,
                )  # fmt: skip


@triton.jit
def _walk_span(
    h_slice,
    h_row_stride,
    h_split_stride,
    pool,
    table,
    y_part,
    bias_part,
    factors,
    rows,
    y_stride,
    start,
    end,
    column,
    column_end,
    rank,
    max_rank,
    scaling,
    NUM_SPLITS: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    SPAN: tl.constexpr,
    SPLIT_H: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Columns column..column_end, in blocks of as many as BLOCK_ELEMENTS elements of B allow."""
    COLUMNS: tl.constexpr = min(BLOCK_COLUMNS, BLOCK_ELEMENTS // BLOCK_RANKS)
    r = tl.arange(0, BLOCK_RANKS)
    n = column + tl.arange(0, COLUMNS)
    i = start + tl.arange(0, BLOCK_ROWS)
    b_starts = _locate(table, r, max_rank, ROW_ALIGN)
    ONE_STEP: tl.constexpr = (RANK_BLOCKS == 1) & (SPAN <= COLUMNS)
    if ONE_STEP:
        # B does not wait for h, and one step's fits into registers.
        b = _load_b(pool, b_starts, r < rank, n, column_end)
    if PDL:
        gdc_wait()
    if ONE_STEP:
        sums = _base(y_part, rows, y_stride, bias_part, factors, i < end, n, column_end, ACCUMULATE)
        h = _load_h(h_slice, h_row_stride, h_split_stride, i, end, r, rank, max_rank, scaling, NUM_SPLITS)
        sums = _product(h, b, sums, SPLIT_H)
        _store(y_part, rows, y_stride, sums, i < end, n, column_end)
    elif RANK_BLOCKS == 1:
        h = _load_h(h_slice, h_row_stride, h_split_stride, i, end, r, rank, max_rank, scaling, NUM_SPLITS)
        for offset in range(0, column_end - column, COLUMNS):
            sums = _base(y_part, rows, y_stride, bias_part, factors, i < end, n + offset, column_end, ACCUMULATE)
            b = _load_b(pool, b_starts, r < rank, n + offset, column_end)
            sums = _product(h, b, sums, SPLIT_H)
            _store(y_part, rows, y_stride, sums, i < end, n + offset, column_end)
    else:
        for offset in range(0, column_end - column, COLUMNS):
            sums = _base(y_part, rows, y_stride, bias_part, factors, i < end, n + offset, column_end, ACCUMULATE)
            for first in range(0, rank, BLOCK_RANKS):
                block = first + r
                b_starts = _locate(table, block, max_rank, ROW_ALIGN)
                b = _load_b(pool, b_starts, block < rank, n + offset, column_end)
                h = _load_h(h_slice, h_row_stride, h_split_stride, i, end, block, rank, max_rank, scaling, NUM_SPLITS)
                sums = _product(h, b, sums, SPLIT_H)
            _store(y_part, rows, y_stride, sums, i < end, n + offset, column_end)


@triton.jit
def _locate(table, r, max_rank, ROW_ALIGN: tl.constexpr):
    """Return the pool offset at which the B row of each rank starts."""
    return tl.load(table + r, mask=r < max_rank, other=0).to(tl.int64) * ROW_ALIGN


@triton.jit
def _load_b(pool, b_starts, used, n, column_end):
    """B's rows at columns n, zero beyond the rank."""
    mask = used[:, None] & (n < column_end)[None, :]
    return tl.load(pool + b_starts[:, None] + n[None, :], mask=mask, other=0.0)


@triton.jit
def _load_h(h_slice, h_row_stride, h_split_stride, i, end, r, rank, max_rank, scaling, NUM_SPLITS: tl.constexpr):
    """Rows i of h: the sum of the splits, in their order, and the adapter's scaling; zero beyond the rank."""
    pointers = h_slice + i.to(tl.int64)[:, None] * h_row_stride + r[None, :]
    # Masked by the row's end in memory, not by the rank, so that the loads stay wide.
    mask = (i < end)[:, None] & (r < max_rank)[None, :]
    h = tl.load(pointers, mask=mask, other=0.0)
    for split in tl.static_range(1, NUM_SPLITS):
        h += tl.load(pointers + split * h_split_stride, mask=mask, other=0.0)
    return tl.where((r < rank)[None, :], h * scaling, 0.0)


@triton.jit
def _product(h, b, sums, SPLIT_H: tl.constexpr):
    """Sums + h @ b. With SPLIT_H, h goes in as two halves of the weights' dtype, which keep its fp32 bits."""
    high = h.to(b.dtype)
    sums = tl.dot(high, b, sums, input_precision="ieee")
    if SPLIT_H:
        sums = tl.dot((h - high.to(tl.float32)).to(b.dtype), b, sums)
    return sums


@triton.jit
def _base(y_part, rows, y_stride, bias_part, factors, row_mask, n, column_end, ACCUMULATE: tl.constexpr):
    """Return the values that the delta of rows and columns n is added to, in float32."""
    sums = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    if ACCUMULATE:
        mask = row_mask[:, None] & (n < column_end)[None, :]
        sums += tl.load(y_part + rows[:, None] * y_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if factors is not None:
            sums *= tl.load(factors, mask=row_mask, other=0.0)[:, None]
    if bias_part is not None:
        sums += tl.load(bias_part + n, mask=n < column_end, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def _store(y_part, rows, y_stride, sums, row_mask, n, column_end):
    mask = row_mask[:, None] & (n < column_end)[None, :]
    tl.store(y_part + rows[:, None] * y_stride + n[None, :], sums.to(y_part.dtype.element_ty), mask=mask)

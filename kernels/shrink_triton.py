"""Shrink: h = x @ A^T over the paged pool, each row with its own adapter's A.

A program takes a tile of rows of one chunk, a split of the input width and a block of ranks, for all slices at once. It
reads the ranks that the adapter has. h keeps the splits' sums apart; expand adds them up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lorafleet.kernels.launching import launch
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.tiling import (
    FEW_ROWS,
    MAX_SPLITS,
    VIEWS,
    Shape,
    ShrinkTiling,
    dependent_launch,
    power_of_two,
    shrink_tiling,
    stages,
)
from lorafleet.kernels.weights import ROW_ALIGN, LoraWeights

MAX_SLICES = 4
"""Slices that may share an input."""
MAX_COLUMNS = 256
"""Columns of h, over all slices, that a program accumulates at once."""
FEW_RANKS = 16
"""Ranks of a block where rows are few. Programs are small then, so many have their loads in flight, whatever ranks the
tables have room for. x is so small that reading it for each block costs nothing."""
RANK_PROGRAMS = 8
"""Programs that share an adapter's rank blocks: those that a low rank leaves without one end at once."""
SPLIT_RANKS = 1024
"""Splits times ranks, at most: every program of expand reads all splits of its rows."""


def shrink(x: Tensor, weights: LoraWeights, segments: Segments, tiling: ShrinkTiling | None = None) -> Tensor:
    """h[split, i, s, r] = sum over the split's k of x[row(i), k] * A[slot(i), s, r, k], for r below the adapter's rank.

    x: (rows, in_dim). Returns (splits, rows, num_slices, max_rank) fp32, its rows in the order of
    `segments.permutation`; what lies at base rows and beyond an adapter's rank is unspecified.
    """
    num_slices, in_dim, max_rank = weights.num_slices, weights.in_dim, weights.max_rank
    if num_slices > MAX_SLICES:
        raise ValueError(f"{num_slices} slices share an input; at most {MAX_SLICES} can")
    is_few = segments.chunk_length <= FEW_ROWS
    most_ranks = FEW_RANKS if is_few else MAX_COLUMNS // power_of_two(num_slices)
    block_ranks = min(power_of_two(max(16, max_rank)), most_ranks)
    if tiling is None:
        max_chunks = power_of_two(segments.max_chunks)
        shape = Shape(num_slices, in_dim, max_rank, segments.chunk_length, max_chunks, weights.pool.dtype, x.device)
        tiling = shrink_tiling(shape)
    rank_blocks = -(-max_rank // block_ranks)
    rank_programs = min(rank_blocks, RANK_PROGRAMS) if is_few else 1
    max_splits = max(2, min(MAX_SPLITS, SPLIT_RANKS // max_rank))
    steps = -(-min(max(tiling.split_width, -(-in_dim // max_splits)), in_dim) // tiling.block_k)
    num_splits = -(-in_dim // (steps * tiling.block_k))
    h = torch.empty((num_splits, segments.num_rows, num_slices, max_rank), dtype=torch.float32, device=x.device)
    row_tiles = -(-segments.chunk_length // tiling.block_rows)
    programs = segments.max_chunks * row_tiles * num_splits
    if programs == 0:
        return h
    tile_bytes = (tiling.block_rows + num_slices * block_ranks) * tiling.block_k * x.element_size()
    pdl = dependent_launch(x)
    launch(_shrink_kernel, (programs, rank_programs))(
        x,
        weights.pool,
        weights.ranks,
        weights.a_rows,
        segments.permutation,
        segments.chunk_indptr,
        segments.chunk_slots,
        h,
        segments.num_rows,
        in_dim,
        x.stride(0),
        weights.ranks.stride(0),
        weights.a_rows.stride(0),
        weights.a_rows.stride(1),
        max_rank,
        NUM_SLICES=num_slices,
        ROW_ALIGN=ROW_ALIGN,
        ROW_TILES=row_tiles,
        NUM_SPLITS=num_splits,
        BLOCK_ROWS=tiling.block_rows,
        BLOCK_RANKS=block_ranks,
        RANK_BLOCKS=rank_blocks,
        RANK_PROGRAMS=rank_programs,
        BLOCK_K=tiling.block_k,
        STEPS=steps,
        EVEN_K=in_dim % (steps * tiling.block_k) == 0,
        PDL=pdl,
        EARLY=pdl and tiling.early,
        num_warps=tiling.num_warps,
        num_stages=stages(tiling.num_stages, steps, tile_bytes, x),
        launch_pdl=pdl,
    )
    return h


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=VIEWS)
def _shrink_kernel(
    x,
    pool,
    ranks,
    a_rows,
    permutation,
    chunk_indptr,
    chunk_slots,
    h,
    num_rows,
    in_dim,
    x_stride,
    ranks_stride,
    a_slot_stride,
    a_slice_stride,
    max_rank,
    NUM_SLICES: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    ROW_TILES: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    RANK_PROGRAMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    pid = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_RANKS
    split = pid % NUM_SPLITS
    tile = pid // NUM_SPLITS
    chunk = tile // ROW_TILES
    slot = tl.load(chunk_slots + chunk)
    start = tl.load(chunk_indptr + chunk) + tile % ROW_TILES * BLOCK_ROWS
    end = tl.load(chunk_indptr + chunk + 1)
    if (slot < 0) | (start >= end):
        if PDL:
            # Every program ends after the kernel ahead: who waits for this kernel relies on that.
            gdc_wait()
        return
    slot = slot.to(tl.int64)
    slot_ranks = ranks + slot * ranks_stride
    table = a_rows + slot * a_slot_stride
    # All that the walk needs is asked for at once, before the rank is known: the loads wait for the slot alone.
    i = start + tl.arange(0, BLOCK_ROWS)
    rows = tl.load(permutation + i, mask=i < end, other=0).to(tl.int64)
    LOW: tl.constexpr = min(NUM_SLICES, 2) * BLOCK_RANKS
    HIGH: tl.constexpr = max(NUM_SLICES - 2, 1) * BLOCK_RANKS
    low = tl.arange(0, LOW)
    high = LOW + tl.arange(0, HIGH)
    low_starts, low_ranks = _locate(slot_ranks, table, low, first, a_slice_stride, max_rank, NUM_SLICES, BLOCK_RANKS)
    high_starts, high_ranks = _locate(slot_ranks, table, high, first, a_slice_stride, max_rank, NUM_SLICES, BLOCK_RANKS)
    rank = tl.maximum(tl.max(low_ranks, axis=0), tl.max(high_ranks, axis=0))
    k = split * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
    x_pointers = x + rows[:, None] * x_stride + k[None, :]
    h_rows = h + (split.to(tl.int64) * num_rows + i) * (NUM_SLICES * max_rank)
    # A low-rank adapter takes a small tile also where the tables have room for high ranks.
    SMALL: tl.constexpr = BLOCK_RANKS // 4 if BLOCK_RANKS >= 64 else 0
    ONE_STEP: tl.constexpr = (STEPS == 1) & (SMALL == 0)
    inside = ((k < in_dim) | EVEN_K)[None, :]
    if ONE_STEP:
        # A does not wait for x, and one step's fits into registers.
        low_a = _load_a(pool, low_starts, first + low % BLOCK_RANKS < low_ranks, k, inside, ROW_ALIGN)
        if NUM_SLICES > 2:
            high_a = _load_a(pool, high_starts, first + high % BLOCK_RANKS < high_ranks, k, inside, ROW_ALIGN)
    if PDL:
        # The adapters are older than the kernel ahead, x is not. Who comes up beside this one relies on what was ahead.
        gdc_wait()
    if EARLY:
        gdc_launch_dependents()
    if rank > tl.maximum(first, SMALL):
        if ONE_STEP:
            x_tile = tl.load(x_pointers, mask=(i < end)[:, None] & inside, other=0.0)
            low_sums = tl.dot(x_tile, tl.trans(low_a), input_precision="ieee")
            _store(h_rows, low_sums, low, first, i < end, max_rank, NUM_SLICES, BLOCK_RANKS)
            if NUM_SLICES > 2:
                high_sums = tl.dot(x_tile, tl.trans(high_a), input_precision="ieee")
                _store(h_rows, high_sums, high, first, i < end, max_rank, NUM_SLICES, BLOCK_RANKS)
        else:
            _walk(
                x_pointers, pool, h_rows, low, low_starts, low_ranks, high, high_starts, high_ranks, first, i < end, k,
                in_dim, max_rank, NUM_SLICES, ROW_ALIGN, BLOCK_ROWS, BLOCK_RANKS, BLOCK_K, STEPS, EVEN_K,
            )  # fmt: skip
        if RANK_BLOCKS > RANK_PROGRAMS:
            STRIDE: tl.constexpr = RANK_PROGRAMS * BLOCK_RANKS
            for block in range(first + STRIDE, rank, STRIDE):
                low_starts, low_ranks = _locate(
                    slot_ranks, table, low, block, a_slice_stride, max_rank, NUM_SLICES, BLOCK_RANKS
                )
                high_starts, high_ranks = _locate(
                    slot_ranks, table, high, block, a_slice_stride, max_rank, NUM_SLICES, BLOCK_RANKS
                )
                _walk(
                    x_pointers, pool, h_rows, low, low_starts, low_ranks, high, high_starts, high_ranks, block, i < end,
                    k, in_dim, max_rank, NUM_SLICES, ROW_ALIGN, BLOCK_ROWS, BLOCK_RANKS, BLOCK_K, STEPS, EVEN_K,
                )  # fmt: skip
    elif SMALL > 0:  # noqa: SIM102 (one is known when compiling, the other is not)
        if rank > 0:
            few_low = tl.arange(0, LOW // 4)
            few_high = LOW // 4 + tl.arange(0, HIGH // 4)
            few_low_starts, few_low_ranks = _locate(
                slot_ranks, table, few_low, 0, a_slice_stride, max_rank, NUM_SLICES, SMALL
            )
            few_high_starts, few_high_ranks = _locate(
                slot_ranks, table, few_high, 0, a_slice_stride, max_rank, NUM_SLICES, SMALL
            )
            _walk(
                x_pointers, pool, h_rows, few_low, few_low_starts, few_low_ranks, few_high, few_high_starts,
                few_high_ranks, 0, i < end, k, in_dim, max_rank, NUM_SLICES, ROW_ALIGN, BLOCK_ROWS, SMALL, BLOCK_K,
                STEPS, EVEN_K,
            )  # fmt: skip


@triton.jit
def _locate(
    slot_ranks,
    table,
    column,
    first,
    a_slice_stride,
    max_rank,
    NUM_SLICES: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    """Return the start of A's row and its slice's rank, for columns (slice, rank) with the ranks from `first` on."""
    slice_ = column // BLOCK_RANKS
    r = first + column % BLOCK_RANKS
    row_start = tl.load(table + slice_ * a_slice_stride + r, mask=(slice_ < NUM_SLICES) & (r < max_rank), other=0)
    return row_start, tl.load(slot_ranks + slice_, mask=slice_ < NUM_SLICES, other=0)


@triton.jit
def _walk(
    x_pointers,
    pool,
    h_rows,
    low,
    low_starts,
    low_ranks,
    high,
    high_starts,
    high_ranks,
    first,
    row_mask,
    k,
    in_dim,
    max_rank,
    NUM_SLICES: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Walk a split for one block of ranks: the first two slices in one product, the others in a second."""
    low_used = first + low % BLOCK_RANKS < low_ranks
    low_sums = tl.zeros((BLOCK_ROWS, low.shape[0]), dtype=tl.float32)
    if NUM_SLICES > 2:
        high_used = first + high % BLOCK_RANKS < high_ranks
        high_sums = tl.zeros((BLOCK_ROWS, high.shape[0]), dtype=tl.float32)
    for step in range(STEPS):
        inside = ((k + step * BLOCK_K < in_dim) | EVEN_K)[None, :]
        x_tile = tl.load(x_pointers + step * BLOCK_K, mask=row_mask[:, None] & inside, other=0.0)
        low_a = _load_a(pool, low_starts, low_used, k + step * BLOCK_K, inside, ROW_ALIGN)
        low_sums = tl.dot(x_tile, tl.trans(low_a), low_sums, input_precision="ieee")
        if NUM_SLICES > 2:
            high_a = _load_a(pool, high_starts, high_used, k + step * BLOCK_K, inside, ROW_ALIGN)
            high_sums = tl.dot(x_tile, tl.trans(high_a), high_sums, input_precision="ieee")
    _store(h_rows, low_sums, low, first, row_mask, max_rank, NUM_SLICES, BLOCK_RANKS)
    if NUM_SLICES > 2:
        _store(h_rows, high_sums, high, first, row_mask, max_rank, NUM_SLICES, BLOCK_RANKS)


@triton.jit
def _load_a(pool, starts, used, k, inside, ROW_ALIGN: tl.constexpr):
    """A's rows at columns k, zero where they are not used."""
    pointers = pool + starts.to(tl.int64)[:, None] * ROW_ALIGN + k[None, :]
    return tl.load(pointers, mask=used[:, None] & inside, other=0.0)


@triton.jit
def _store(
    h_rows,
    sums,
    column,
    first,
    row_mask,
    max_rank,
    NUM_SLICES: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    slice_ = column // BLOCK_RANKS
    r = first + column % BLOCK_RANKS
    # Not only the ranks in use, so that the stores stay wide.
    mask = row_mask[:, None] & ((slice_ < NUM_SLICES) & (r < max_rank))[None, :]
    tl.store(h_rows[:, None] + (slice_ * max_rank + r)[None, :], sums, mask=mask)

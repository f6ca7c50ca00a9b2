"""The Triton kernels of `routing`: one launch for the order of few routed rows, one for their segments, one for sums.

A row's place is how many rows come before it, counted one by one. That is less work than a sort's launches as long as
rows are few. The order of many rows takes two launches if experts alone decide it: experts are counted by runs of rows,
then each run knows its first place at each expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafleet.kernels.launching import launch
from lorafleet.kernels.segments import BASE_SLOT

MOST_ROWS = 8192
"""Routed rows beyond which sorting is faster."""
_BLOCK = 16
_BLOCK_OTHERS = 256
_BLOCK_COLUMNS = 512
_RUN = 512
_SUB_RUN = 128
"""Rows of a run that are placed at a time."""


def order(
    experts: Tensor, num_experts: int, row_slots: Tensor | None, slot_stride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Order the routed rows. Arguments: `routing.route`; row_slots: (rows,) int32.

    Returns order and rows, (routed,) int64; places (routed,) int32; expert_ends (num_experts,) int32; and with
    `row_slots` the keys (routed,) int64 and slots (routed,) int32 of the places.
    """
    num_routed, device = experts.numel(), experts.device
    # Torch's own kernels read these: where kernels are only compiled, they must not find what is no index.
    zeros = torch.zeros(2 * num_routed + num_experts // 2 + 1, dtype=torch.int64, device=device)
    made, rows, ends = zeros[:num_routed], zeros[num_routed : 2 * num_routed], zeros[2 * num_routed :]
    ends = ends.view(torch.int32)[:num_experts]
    places = torch.empty(num_routed, dtype=torch.int32, device=device)
    keys = slots = None
    if row_slots is not None:
        keys = torch.empty(num_routed, dtype=torch.int64, device=device)
        slots = torch.empty(num_routed, dtype=torch.int32, device=device)
    num_blocks = triton.cdiv(num_routed, _BLOCK)
    launch(_order_kernel, (num_blocks + triton.cdiv(num_experts, _BLOCK),))(
        experts.contiguous(),
        row_slots,
        made,
        rows,
        places,
        ends,
        keys,
        slots,
        num_routed,
        num_experts,
        num_blocks,
        slot_stride,
        TOP_K=experts.shape[1],
        BLOCK=_BLOCK,
        BLOCK_OTHERS=_BLOCK_OTHERS,
        num_warps=4,
    )
    return made, rows, places, ends, keys, slots


def order_of_experts(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order many routed rows by their experts alone: a counting sort.

    Arguments: `routing.route`. Returns order and rows, (routed,) int64; places (routed,) int32; expert_ends
    (num_experts,) int32.
    """
    num_routed, device = experts.numel(), experts.device
    # Zeros as in `order`.
    made, rows = torch.zeros((2, num_routed), dtype=torch.int64, device=device)
    places = torch.empty(num_routed, dtype=torch.int32, device=device)
    ends = torch.zeros(num_experts, dtype=torch.int32, device=device)
    num_runs, width = triton.cdiv(num_routed, _RUN), triton.next_power_of_2(num_experts + 1)
    counts = torch.empty((num_runs, width), dtype=torch.int32, device=device)
    experts = experts.contiguous()
    launch(_count_kernel, (num_runs,))(experts, counts, num_routed, num_experts, RUN=_RUN, WIDTH=width, num_warps=4)
    launch(_place_kernel, (num_runs,))(
        experts,
        counts,
        made,
        rows,
        places,
        ends,
        num_routed,
        num_experts,
        num_runs,
        TOP_K=experts.shape[1],
        RUN=_RUN,
        SUB_RUN=_SUB_RUN,
        WIDTH=width,
        RUNS_AT_ONCE=16,
        num_warps=8,
    )
    return made, rows, places, ends


def spread(x: Tensor, top_k: int, places: Tensor) -> Tensor:
    """Arguments: `routing.spread`. One program takes a run of columns of one row."""
    num_rows, width = x.shape
    out = torch.empty((num_rows * top_k, width), dtype=x.dtype, device=x.device)
    if num_rows:
        launch(_spread_kernel, (num_rows, triton.cdiv(width, 4 * _BLOCK_COLUMNS)))(
            x, places, out, x.stride(0), width, TOP_K=top_k, BLOCK=4 * _BLOCK_COLUMNS, num_warps=4
        )
    return out


def segments(keys: Tensor, slots: Tensor, chunk_length: int, max_chunks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The permutation (routed,), chunk_indptr (max_chunks + 1,) and chunk_slots (max_chunks,) of rows in their order.

    keys, slots: as `order` gives them. All are int32.
    """
    num_routed, device = keys.shape[0], keys.device
    permutation = torch.empty(num_routed, dtype=torch.int32, device=device)
    chunk_indptr = torch.empty(max_chunks + 1, dtype=torch.int32, device=device)
    chunk_slots = torch.empty(max_chunks, dtype=torch.int32, device=device)
    block = triton.next_power_of_2(num_routed)
    launch(_segments_kernel, (1,))(
        keys,
        slots,
        permutation,
        chunk_indptr,
        chunk_slots,
        num_routed,
        max_chunks,
        CHUNK_LENGTH=chunk_length,
        BASE=BASE_SLOT,
        BLOCK=block,
        BLOCK_CHUNKS=triton.next_power_of_2(max_chunks + 1),
        num_warps=min(16, max(4, block // 512)),
    )
    return permutation, chunk_indptr, chunk_slots


def combine(y: Tensor, experts: Tensor, weights: Tensor, places: Tensor, num_experts: int, out: Tensor) -> None:
    """Arguments: `routing.combine`. One program takes a run of columns of one row."""
    num_rows, width = out.shape
    launch(_combine_kernel, (num_rows, triton.cdiv(width, _BLOCK_COLUMNS)))(
        y,
        experts.contiguous(),
        weights.contiguous(),
        places,
        out,
        y.stride(0),
        width,
        num_experts,
        TOP_K=experts.shape[1],
        BLOCK=_BLOCK_COLUMNS,
        num_warps=4,
    )


@triton.jit
def _key(experts, row_slots, routed, mask, num_experts, TOP_K: tl.constexpr):
    """The keys by which routed rows are ordered, and their experts and slots."""
    expert = tl.minimum(tl.load(experts + routed, mask=mask, other=0).to(tl.int64), num_experts)
    key, slot = expert, expert
    if row_slots is not None:
        slot = tl.load(row_slots + routed // TOP_K, mask=mask, other=0).to(tl.int64)
        key = (expert << 32) + slot + 1
    return key, expert, slot


@triton.jit(do_not_specialize=["num_routed", "num_blocks"], do_not_specialize_on_alignment=["row_slots"])
def _order_kernel(
    experts,
    row_slots,
    order,
    rows,
    places,
    ends,
    keys,
    slots,
    num_routed,
    num_experts,
    num_blocks,
    slot_stride,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    block = tl.program_id(0)
    if block < num_blocks:
        routed = block * BLOCK + tl.arange(0, BLOCK)
        mask = routed < num_routed
        key, expert, slot = _key(experts, row_slots, routed, mask, num_experts, TOP_K)
        place = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, num_routed, BLOCK_OTHERS):
            others = start + tl.arange(0, BLOCK_OTHERS)
            inside = others < num_routed
            other, _, _ = _key(experts, row_slots, others, inside, num_experts, TOP_K)
            is_before = (other[None, :] == key[:, None]) & (others[None, :] < routed[:, None])
            is_before = (is_before | (other[None, :] < key[:, None])) & inside[None, :]
            place += tl.sum(is_before.to(tl.int32), 1)
        tl.store(order + place, routed.to(tl.int64), mask=mask)
        tl.store(rows + place, (routed // TOP_K).to(tl.int64), mask=mask)
        tl.store(places + routed, place, mask=mask)
        if keys is not None:
            has_adapter = (slot >= 0) & (expert < num_experts)
            tl.store(keys + place, key, mask=mask)
            tl.store(slots + place, tl.where(has_adapter, slot * slot_stride + expert, -1).to(tl.int32), mask=mask)
    else:
        wanted = (block - num_blocks) * BLOCK + tl.arange(0, BLOCK)
        count = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, num_routed, BLOCK_OTHERS):
            others = start + tl.arange(0, BLOCK_OTHERS)
            inside = others < num_routed
            other = tl.load(experts + others, mask=inside, other=0).to(tl.int64)
            is_before = (other[None, :] <= wanted[:, None]) & inside[None, :]
            count += tl.sum(is_before.to(tl.int32), 1)
        tl.store(ends + wanted, count, mask=wanted < num_experts)


@triton.jit(do_not_specialize=["num_routed"])
def _count_kernel(experts, counts, num_routed, num_experts, RUN: tl.constexpr, WIDTH: tl.constexpr):
    run = tl.program_id(0)
    routed = run * RUN + tl.arange(0, RUN)
    # Rows after the last are counted where those without an expert are: nothing comes behind them.
    expert = tl.load(experts + routed, mask=routed < num_routed, other=num_experts)
    count = tl.histogram(tl.minimum(expert, num_experts).to(tl.int32), WIDTH)
    tl.store(counts + run * WIDTH + tl.arange(0, WIDTH), count)


@triton.jit(do_not_specialize=["num_routed", "num_runs"])
def _place_kernel(
    experts,
    counts,
    order,
    rows,
    places,
    ends,
    num_routed,
    num_experts,
    num_runs,
    TOP_K: tl.constexpr,
    RUN: tl.constexpr,
    SUB_RUN: tl.constexpr,
    WIDTH: tl.constexpr,
    RUNS_AT_ONCE: tl.constexpr,
):
    own = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.int32)
    before = tl.zeros((WIDTH,), dtype=tl.int32)
    for first in range(0, num_runs, RUNS_AT_ONCE):
        run = first + tl.arange(0, RUNS_AT_ONCE)
        inside = (run < num_runs)[:, None]
        count = tl.load(counts + run[:, None] * WIDTH + columns[None, :], mask=inside, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((run < own)[:, None], count, 0), 0)
    last = tl.cumsum(total, 0)
    if own == 0:
        tl.store(ends + columns, last, mask=columns < num_experts)
    next_place = last - total + before
    for first in range(own * RUN, (own + 1) * RUN, SUB_RUN):
        routed = first + tl.arange(0, SUB_RUN)
        inside = routed < num_routed
        expert = tl.minimum(tl.load(experts + routed, mask=inside, other=num_experts), num_experts).to(tl.int32)
        is_its = expert[:, None] == columns[None, :]
        ones = is_its.to(tl.int32)
        place = tl.sum(tl.where(is_its, next_place[None, :] + tl.cumsum(ones, 0) - 1, 0), 1)
        tl.store(order + place, routed.to(tl.int64), mask=inside)
        tl.store(rows + place, (routed // TOP_K).to(tl.int64), mask=inside)
        tl.store(places + routed, place, mask=inside)
        next_place += tl.sum(ones, 0)


@triton.jit
def _spread_kernel(x, places, out, x_stride, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside)
    for index in tl.static_range(TOP_K):
        place = tl.load(places + row * TOP_K + index).to(tl.int64)
        tl.store(out + place * width + columns, values, mask=inside)


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other)


@triton.jit(do_not_specialize=["num_routed", "max_chunks"])
def _segments_kernel(
    keys,
    slots,
    permutation,
    chunk_indptr,
    chunk_slots,
    num_routed,
    max_chunks,
    CHUNK_LENGTH: tl.constexpr,
    BASE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    places = tl.arange(0, BLOCK)
    inside = places < num_routed
    key = tl.load(keys + places, mask=inside, other=-1)
    before = tl.load(keys + places - 1, mask=inside & (places > 0), other=-1)
    slot = tl.load(slots + places, mask=inside, other=0)
    first = tl.associative_scan(tl.where(key != before, places, 0), 0, _larger)
    is_start = inside & ((places - first) % CHUNK_LENGTH == 0)
    chunk = tl.cumsum(is_start.to(tl.int32), 0) - 1
    tl.store(permutation + places, places, mask=inside)
    tl.store(chunk_indptr + chunk, places, mask=is_start)
    tl.store(chunk_slots + chunk, slot, mask=is_start)
    chunks = tl.arange(0, BLOCK_CHUNKS)
    is_unused = chunks >= tl.sum(is_start.to(tl.int32), 0)
    tl.store(chunk_indptr + chunks, tl.zeros_like(chunks) + num_routed, mask=is_unused & (chunks <= max_chunks))
    tl.store(chunk_slots + chunks, tl.zeros_like(chunks) + BASE, mask=is_unused & (chunks < max_chunks))


@triton.jit
def _combine_kernel(
    y,
    experts,
    weights,
    places,
    out,
    y_stride,
    width,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in tl.static_range(TOP_K):
        routed = row * TOP_K + index
        # Of no expert nothing was computed: what stands there may be no number.
        if tl.load(experts + routed) < num_experts:
            place = tl.load(places + routed).to(tl.int64)
            values = tl.load(y + place * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
            total += values * tl.load(weights + routed).to(tl.float32)
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), mask=inside)

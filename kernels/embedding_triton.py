"""Embedding's shrink: h = A[:, token] over the paged pool, each row with its own adapter's A.

A is stored token-major: a token's ranks are one short run. Programs are parallel over rows; none waits for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lorafleet.kernels.launching import launch
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.tiling import VIEWS, dependent_launch, power_of_two
from lorafleet.kernels.weights import ROW_ALIGN, LoraEmbeddingWeights

_BLOCK_ELEMENTS = 256
"""Rows times ranks of one program."""


def lookup(token_ids: Tensor, weights: LoraEmbeddingWeights, segments: Segments) -> Tensor:
    """h[0, i, 0, r] = A[slot(i)][r, token_ids[row(i)]], for r below the adapter's rank.

    token_ids: (rows,) int32 or int64, written before the kernel ahead began. Returns (1, rows, 1, max_rank) fp32 as
    `expand` takes it, rows in the order of `segments.permutation`. Values at base rows and beyond an adapter's rank are
    unspecified.
    """
    num_rows, max_rank = segments.num_rows, weights.max_rank
    h = torch.empty((1, num_rows, 1, max_rank), dtype=torch.float32, device=token_ids.device)
    if num_rows == 0:
        return h
    block_ranks = power_of_two(max_rank)
    block_rows = max(1, _BLOCK_ELEMENTS // block_ranks)
    pdl = dependent_launch(token_ids)
    launch(_lookup_kernel, (-(-num_rows // block_rows),))(
        token_ids,
        weights.pool,
        weights.ranks,
        weights.a_pages,
        segments.row_slots,
        segments.permutation,
        h,
        num_rows,
        token_ids.stride(0),
        weights.ranks.stride(0),
        weights.a_pages.stride(0),
        weights.num_embeddings,
        weights.page_elements,
        max_rank,
        ROW_ALIGN=ROW_ALIGN,
        BLOCK_ROWS=block_rows,
        BLOCK_RANKS=block_ranks,
        PDL=pdl,
        num_warps=min(4, max(1, block_rows * block_ranks // 64)),
        launch_pdl=pdl,
    )
    return h


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=VIEWS)
def _lookup_kernel(
    token_ids,
    pool,
    ranks,
    a_pages,
    row_slots,
    permutation,
    h,
    num_rows,
    token_stride,
    ranks_stride,
    a_slot_stride,
    num_embeddings,
    page_elements,
    max_rank,
    ROW_ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    PDL: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.load(permutation + i, mask=i < num_rows, other=0)
    slot = tl.load(row_slots + row, mask=i < num_rows, other=-1).to(tl.int64)
    token = tl.load(token_ids + row.to(tl.int64) * token_stride).to(tl.int32)
    rank = tl.load(ranks + slot * ranks_stride, mask=slot >= 0, other=0)
    page_tokens = page_elements // tl.maximum(rank, 1)
    page = token // page_tokens
    used = (rank > 0) & (token >= 0) & (token < num_embeddings)
    page_start = tl.load(a_pages + slot * a_slot_stride + page, mask=used, other=0).to(tl.int64) * ROW_ALIGN
    first = page_start + (token - page * page_tokens) * rank
    r = tl.arange(0, BLOCK_RANKS)
    if PDL:
        # Tables and token ids are older than the kernel ahead, which may still read the memory of h.
        gdc_wait()
        gdc_launch_dependents()
    values = tl.load(pool + first[:, None] + r[None, :], mask=used[:, None] & (r[None, :] < rank[:, None]), other=0.0)
    mask = (i < num_rows)[:, None] & (r < max_rank)[None, :]
    tl.store(h + i.to(tl.int64)[:, None] * max_rank + r[None, :], values.to(tl.float32), mask=mask)

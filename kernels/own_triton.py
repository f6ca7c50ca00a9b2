"""Triton kernels for parameters that adapters have in the base's place: a norm's weight, and rows of a matrix a token.

Each goes over what the base computed for all rows, and writes the rows whose adapter has a parameter of its own. Which
those are is read from tables on the device, so that a captured graph serves any mix of adapters. CUDA only: elsewhere
the layers ask `LoraContext.owners`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lorafleet.kernels.fused_triton import normed
from lorafleet.kernels.launching import launch
from lorafleet.kernels.norms import NormRule
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import ROW_ALIGN, OwnMatrix, OwnVector

_BLOCK_COPY = 1024
_BLOCK_TOKENS = 64
_BLOCK_INNER = 64
_CHUNK_GROUPS = 8
"""Programs that share the chunks of a run of outputs."""


def norm_rows(x: Tensor, y: Tensor, weight: OwnVector, segments: Segments, rule: NormRule) -> None:
    """Compute y[row], x[row] normalised, for rows with a weight of their own.

    It rounds as `fused.rms_norm` does. x, y: (rows, width), unit stride along width, in the pool's dtype.
    """
    num_rows, width = x.shape
    if num_rows:
        block = triton.next_power_of_2(width)
        launch(_norm_rows_kernel, (num_rows,))(
            x,
            y,
            weight.pool,
            weight.starts,
            segments.row_slots,
            x.stride(0),
            y.stride(0),
            weight.starts.stride(0),
            weight.entry,
            width,
            rule.eps,
            OFFSET=rule.offset,
            IS_WIDE=rule.is_wide,
            IS_CENTRED=rule.is_centred,
            ROW_ALIGN=ROW_ALIGN,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )


def take_rows(token_ids: Tensor, y: Tensor, matrix: OwnMatrix, segments: Segments, num_tokens: int) -> None:
    """Compute y[row] = matrix[token_ids[row]] for rows with a matrix of their own, of `num_tokens` rows.

    token_ids: (rows,) integers; a row whose token the matrix lacks keeps its bits. y: (rows, width), unit stride along
    width, in the pool's dtype.
    """
    num_rows, width = y.shape
    if num_rows:
        launch(_take_rows_kernel, (num_rows,))(
            token_ids,
            y,
            matrix.pool,
            matrix.pointers,
            segments.row_slots,
            token_ids.stride(0),
            y.stride(0),
            matrix.pointers.stride(0),
            matrix.entry,
            num_tokens,
            width,
            ROW_ALIGN=ROW_ALIGN,
            BLOCK=_BLOCK_COPY,
            num_warps=4,
        )


def without_own(x: Tensor, matrix: OwnMatrix, segments: Segments) -> Tensor:
    """A copy of x (rows, width) with zeros in the rows that have a matrix of their own."""
    slots = segments.row_slots.long()
    has_own = (matrix.pointers[:, matrix.entry].index_select(0, slots.clamp(min=0)) != 0) & (slots >= 0)
    return x.masked_fill(has_own[:, None], 0.0)


def add_product(x: Tensor, y: Tensor, matrix: OwnMatrix, segments: Segments) -> None:
    """Compute y[row] += x[row] @ matrix^T for rows with a matrix of their own.

    x: (rows, width), y: (rows, num_rows of the base's matrix), unit stride along their last dimension, in the pool's
    dtype. A program takes a run of outputs, and every n-th of the chunks: where none of these has a matrix of its own,
    it reads two short vectors and ends.
    """
    if x.shape[0]:
        num_groups = min(triton.next_power_of_2(segments.max_chunks), _CHUNK_GROUPS)
        launch(_add_product_kernel, (triton.cdiv(y.shape[1], _BLOCK_TOKENS), num_groups))(
            x,
            y,
            matrix.pool,
            matrix.pointers,
            segments.permutation,
            segments.chunk_indptr,
            segments.chunk_slots,
            x.stride(0),
            y.stride(0),
            matrix.pointers.stride(0),
            matrix.entry,
            x.shape[1],
            y.shape[1],
            segments.max_chunks,
            NUM_GROUPS=num_groups,
            BLOCK_CHUNKS=triton.next_power_of_2(triton.cdiv(segments.max_chunks, num_groups)),
            ROW_ALIGN=ROW_ALIGN,
            BLOCK_ROWS=min(32, segments.chunk_length),
            BLOCK_TOKENS=_BLOCK_TOKENS,
            BLOCK_INNER=_BLOCK_INNER,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["entry"], do_not_specialize_on_alignment=["row_slots", "starts"])
def _norm_rows_kernel(
    x,
    y,
    pool,
    starts,
    row_slots,
    x_stride,
    y_stride,
    starts_stride,
    entry,
    width,
    eps,
    OFFSET: tl.constexpr,
    IS_WIDE: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    start = tl.load(starts + slot * starts_stride + entry).to(tl.int64)
    if start < 0:
        return
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    scale = tl.load(pool + start * ROW_ALIGN + columns, mask=inside, other=0.0)
    values = normed(values, scale, inside, width, eps, OFFSET, IS_WIDE, IS_CENTRED)
    tl.store(y + row * y_stride + columns, values, mask=inside)


@triton.jit(do_not_specialize=["entry"], do_not_specialize_on_alignment=["row_slots", "token_ids", "pointers"])
def _take_rows_kernel(
    token_ids,
    y,
    pool,
    pointers,
    row_slots,
    token_stride,
    y_stride,
    pointers_stride,
    entry,
    num_tokens,
    width,
    ROW_ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    pointer = tl.load(pointers + slot * pointers_stride + entry)
    if pointer == 0:
        return
    token = tl.load(token_ids + row * token_stride).to(tl.int64)
    if (token < 0) | (token >= num_tokens):
        return
    source = pool + tl.load(pointer.to(tl.pointer_type(tl.int32)) + token).to(tl.int64) * ROW_ALIGN
    for first in range(0, width, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(y + row * y_stride + i, tl.load(source + i, mask=i < width, other=0.0), mask=i < width)


@triton.jit(
    do_not_specialize=["entry", "max_chunks"],
    do_not_specialize_on_alignment=["permutation", "chunk_indptr", "chunk_slots", "pointers"],
)
def _add_product_kernel(
    x,
    y,
    pool,
    pointers,
    permutation,
    chunk_indptr,
    chunk_slots,
    x_stride,
    y_stride,
    pointers_stride,
    entry,
    width,
    num_tokens,
    max_chunks,
    NUM_GROUPS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    group = tl.program_id(1)
    chunks = group + NUM_GROUPS * tl.arange(0, BLOCK_CHUNKS)
    slots = tl.load(chunk_slots + chunks, mask=chunks < max_chunks, other=-1).to(tl.int64)
    owned = tl.load(pointers + slots * pointers_stride + entry, mask=slots >= 0, other=0)
    if tl.max((owned != 0).to(tl.int32), 0) == 0:
        return
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = tokens < num_tokens
    for chunk in range(group, max_chunks, NUM_GROUPS):
        slot = tl.load(chunk_slots + chunk).to(tl.int64)
        pointer = tl.load(pointers + slot * pointers_stride + entry, mask=slot >= 0, other=0)
        begin = tl.load(chunk_indptr + chunk)
        # Nothing where the chunk has no matrix of its own.
        end = tl.where(pointer != 0, tl.load(chunk_indptr + chunk + 1), begin)
        starts = pointer.to(tl.pointer_type(tl.int32)) + tokens
        matrix = pool + (tl.load(starts, mask=is_token & (pointer != 0), other=0).to(tl.int64) * ROW_ALIGN)[:, None]
        for first in range(begin, end, BLOCK_ROWS):
            i = first + tl.arange(0, BLOCK_ROWS)
            is_row = i < end
            row = tl.load(permutation + i, mask=is_row, other=0).to(tl.int64)
            total = tl.zeros((BLOCK_ROWS, BLOCK_TOKENS), dtype=tl.float32)
            for inner in range(0, width, BLOCK_INNER):
                k = (inner + tl.arange(0, BLOCK_INNER))[None, :]
                own = tl.load(x + (row * x_stride)[:, None] + k, mask=is_row[:, None] & (k < width), other=0.0)
                weights = tl.load(matrix + k, mask=is_token[:, None] & (k < width), other=0.0)
                total = tl.dot(own, tl.trans(weights), total, input_precision="ieee")
            at = y + (row * y_stride)[:, None] + tokens[None, :]
            mask = is_row[:, None] & is_token[None, :]
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(at, total.to(y.dtype.element_ty), mask=mask)

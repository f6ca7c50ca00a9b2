"""csgmv in plain torch, over the same pages and the same segments as the Triton kernels: the CPU backend.

Chunks are the batch dimension of `torch.bmm`: the A and B rows of a chunk are gathered through the row tables, its rows
are padded to the longest chunk. Work follows the chunks and ranks in use; nothing loops over rows. fp32 accumulation
(float64 for a float64 pool, which is how tests use it as an oracle).
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.weights import ROW_ALIGN, LoraEmbeddingWeights, LoraWeights
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _ChunkLayout:
    """The adapters' chunks of a `Segments`, padded to (chunks, length): built once, used by every module."""

    slots: Tensor
    """(chunks,) int32."""
    rows: Tensor
    """(chunks * length,) int32: row at each place; padding repeats the chunk's first row."""
    lora_rows: Tensor
    """(lora_rows,) int64: every adapter row, ascending."""
    places: Tensor
    """(lora_rows,) int64: the place in the padded layout of each of `lora_rows`."""
    num_chunks: int
    length: int
    every_row: bool
    """No base rows: `lora_rows` is all rows in order, so outputs need no scatter."""


_layouts: WeakKeyDictionary[Segments, _ChunkLayout] = WeakKeyDictionary()


def _layout(segments: Segments) -> _ChunkLayout:
    layout = _layouts.get(segments)
    if layout is None:
        layout = _layouts[segments] = _build_layout(segments)
    return layout


def _build_layout(segments: Segments) -> _ChunkLayout:
    num_chunks = segments.num_lora_chunks
    indptr = segments.chunk_indptr[: num_chunks + 1].long()
    starts, lengths = indptr[:-1], indptr.diff()
    length = int(lengths.max())
    offsets = torch.arange(length)
    used = offsets < lengths[:, None]
    places = used.flatten().nonzero().squeeze(1)
    sorted_rows = torch.where(used, starts[:, None] + offsets, starts[:, None])
    rows = segments.permutation.index_select(0, sorted_rows.flatten())
    lora_rows, order = rows.index_select(0, places).long().sort()
    return _ChunkLayout(
        slots=segments.chunk_slots[:num_chunks],
        rows=rows,
        lora_rows=lora_rows,
        places=places.index_select(0, order),
        num_chunks=num_chunks,
        length=length,
        every_row=lora_rows.shape[0] == segments.num_rows,
    )


def shrink(x: Tensor, weights: LoraWeights, segments: Segments) -> Tensor:
    """h[c, l, s] = x[row(c, l)] @ A[slot(c), s]^T * scaling[slot(c), s], zero beyond the adapter's rank.

    x: (rows, in_dim). Returns (chunks, length, num_slices, ranks in use), fp32: the layout that `expand` takes.
    """
    if not segments.has_lora:
        return x.new_empty((0, 0, weights.num_slices, 0), dtype=torch.float32)
    layout = _layout(segments)
    ranks = weights.ranks.index_select(0, layout.slots)
    max_rank = int(ranks.max())
    shape = (layout.num_chunks, layout.length, weights.num_slices, max_rank)
    if max_rank == 0:
        return x.new_empty(shape, dtype=torch.float32)
    a = _gather_rows(weights.pool, weights.a_rows, ranks, layout.slots, weights.in_dim)
    inputs = _accumulation(x.index_select(0, layout.rows)).view(layout.num_chunks, layout.length, -1)
    h = torch.bmm(inputs, a.transpose(1, 2)).view(shape)
    return h.mul_(_rank_scalings(weights.scalings, ranks, layout.slots, max_rank, h.dtype))


def expand(
    h: Tensor,
    weights: LoraWeights | LoraEmbeddingWeights,
    segments: Segments,
    y: Tensor,
    *,
    accumulate: bool = True,
    bias: Tensor | None = None,
) -> None:
    """y[row(c, l), part] (+)= h[c, l, slice of part] @ B[slot(c), part], in place.

    h: what `shrink` returned. y: (rows, out_dim), rows may be strided. With `accumulate`, rows and slices without an
    adapter keep their bits. Without it every element is written: the delta, zero where there is none, plus `bias`
    (out_dim,) if given.
    """
    if not accumulate:
        if bias is None:
            y.zero_()
        else:
            y.copy_(bias)
    max_rank = h.shape[3]
    if max_rank == 0:
        return
    layout = _layout(segments)
    ranks = weights.ranks.index_select(0, layout.slots)
    for part, slice_ in enumerate(weights.part_slices):
        start, width = weights.part_starts[part], weights.part_widths[part]
        slice_ranks = ranks[:, slice_ : slice_ + 1]
        targeted = slice_ranks > 0
        if not targeted.any():
            continue
        b = _gather_rows(weights.pool, weights.b_rows[:, part : part + 1, :max_rank], slice_ranks, layout.slots, width)
        delta = torch.bmm(h[:, :, slice_, : b.shape[1]], b)
        if not targeted.all():
            # y + -0.0 is y to the bit, also where y is -0.0.
            delta = torch.where(targeted[:, :, None], delta, -0.0)
        delta = delta.flatten(0, 1).index_select(0, layout.places)
        _add_rows(y[:, start : start + width], delta, layout)


def shrink_embedding(token_ids: Tensor, weights: LoraEmbeddingWeights, segments: Segments) -> Tensor:
    """h[c, l] = A[slot(c)][:, token_ids[row(c, l)]] * scaling[slot(c)]; the layout that `expand` takes.

    token_ids: (rows,) int64 or int32. Returns (chunks, length, 1, ranks in use), fp32.
    """
    if not segments.has_lora:
        return torch.empty((0, 0, 1, 0))
    layout = _layout(segments)
    ranks = weights.ranks.index_select(0, layout.slots)
    max_rank = int(ranks.max())
    shape = (layout.num_chunks, layout.length, 1, max_rank)
    if max_rank == 0:
        return torch.empty(shape)
    tokens = token_ids.index_select(0, layout.rows).long().view(layout.num_chunks, layout.length)
    safe_ranks = ranks.long().clamp(min=1)
    page = torch.div(tokens * safe_ranks, (weights.page_elements // safe_ranks) * safe_ranks, rounding_mode="floor")
    pages = weights.a_pages.index_select(0, layout.slots).long()
    first = pages.gather(1, page.clamp(max=pages.shape[1] - 1)) * ROW_ALIGN
    first += (tokens - page * (weights.page_elements // safe_ranks)) * safe_ranks
    columns = torch.arange(max_rank)
    used = columns < ranks[:, :, None]
    elements = torch.where(used, first[:, :, None] + columns, 0)
    h = torch.where(used, _accumulation(weights.pool[elements]), 0.0).view(shape)
    return h.mul_(_rank_scalings(weights.scalings, ranks, layout.slots, max_rank, h.dtype))


def _accumulation(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _gather_rows(pool: Tensor, table: Tensor, ranks: Tensor, slots: Tensor, width: int) -> Tensor:
    """The pool's rows of each chunk: (chunks, slices * largest rank, width).

    Ranks that a chunk does not have repeat a row in use: finite weights, which h's zeros then cancel.
    """
    max_rank = int(ranks.max())
    rows = table[:, :, :max_rank].index_select(0, slots)
    used = torch.arange(max_rank) < ranks[:, :, None]
    if not used.all():
        rows = torch.where(used, rows, rows[used][0])
    # Rows start at any multiple of ROW_ALIGN, so the pool is read as overlapping windows.
    windows = pool.as_strided(((pool.shape[0] - width) // ROW_ALIGN + 1, width), (ROW_ALIGN, 1))
    gathered = _accumulation(windows.index_select(0, rows.flatten()))
    return gathered.view(slots.shape[0], -1, width)


def _rank_scalings(scalings: Tensor, ranks: Tensor, slots: Tensor, max_rank: int, dtype: torch.dtype) -> Tensor:
    """(chunks, 1, slices, max_rank): the adapter's scaling, zero beyond its rank."""
    used = torch.arange(max_rank) < ranks[:, :, None]
    return (scalings.index_select(0, slots)[:, :, None] * used).to(dtype)[:, None]


def _add_rows(y: Tensor, delta: Tensor, layout: _ChunkLayout) -> None:
    """y[lora_rows] += delta, rounded once."""
    if layout.every_row:
        y.add_(delta)
    elif y.dtype == delta.dtype:
        y.index_add_(0, layout.lora_rows, delta)
    else:
        y.index_copy_(0, layout.lora_rows, (y.index_select(0, layout.lora_rows) + delta).to(y.dtype))

"""csgmv in plain torch, over the same pages and the same segments as the Triton kernels: the CPU backend.

The adapters' rows are taken in *groups*: one adapter with many rows, or several with few each. A group's A rows are
gathered into one matrix for all its adapters, so that h is one product, in which each row keeps only its own adapter's
columns; B likewise. Nothing is padded, and the few operations a group take as long with one adapter as with eight. fp32
accumulation (float64 for a float64 pool, which makes an oracle of it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from lorafleet.kernels.segments import BASE_SLOT, Segments
from lorafleet.kernels.weights import ROW_ALIGN, LoraEmbeddingWeights, LoraWeights
from torch import Tensor

_GROUP_ADAPTERS = 8
"""Adapters of one group: beyond it, products with other adapters' columns cost more than another few operations."""
_GROUP_ROWS = 32
"""An adapter with more rows has a group of its own: its products are exact."""

IndexArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Group:
    slots: IndexArray
    """(adapters,)"""
    rows: Tensor
    """(rows,) int64, ascending."""
    owners: IndexArray
    """(rows,): index into `slots` of each row's adapter."""
    span: slice | None
    """`rows` as a slice where they are neighbours (a prefill, or the whole batch): nothing to gather or scatter."""


@dataclass(frozen=True, slots=True)
class _GroupHidden:
    group: _Group
    used: BoolArray
    """(num_slices, adapters, ranks): which entries of the row tables are in use; h's columns, in this order."""
    h: Tensor
    """(rows, columns) scaled, zero in other adapters' columns."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """What shrink leaves for expand."""

    groups: tuple[_GroupHidden, ...]


def shrink(x: Tensor, weights: LoraWeights, segments: Segments) -> Hidden:
    """h[row] = x[row] @ A[slot]^T * scaling[slot], for every slice.

    x: (rows, in_dim).
    """
    hidden = []
    for group in _groups(segments):
        used = _used(weights.ranks, group)
        if not used.any():
            continue
        a = _gather_rows(weights.pool, weights.a_rows, group, used, weights.in_dim)
        inputs = x.index_select(0, group.rows) if group.span is None else x[group.span]
        h = torch.mm(_accumulation(inputs), a.t())
        hidden.append(_GroupHidden(group, used, h.mul_(_column_scalings(weights.scalings, group, used, h.dtype))))
    return Hidden(tuple(hidden))


def shrink_embedding(token_ids: Tensor, weights: LoraEmbeddingWeights, segments: Segments) -> Hidden:
    """h[row] = A[slot][:, token_ids[row]] * scaling[slot].

    token_ids: (rows,) int64 or int32.
    """
    hidden = []
    for group in _groups(segments):
        used = _used(weights.ranks, group)
        if not used.any():
            continue
        tokens = token_ids.index_select(0, group.rows).numpy()
        ranks = weights.ranks.numpy()[group.slots, 0].astype(np.int64)
        page_tokens = weights.page_elements // np.maximum(ranks, 1)
        page, token = np.divmod(tokens, page_tokens[group.owners])
        # A rank-0 adapter has no page: its rows keep no column below.
        page = np.where(ranks[group.owners] > 0, page, 0)
        first = weights.a_pages.numpy()[group.slots[group.owners], page].astype(np.int64) * ROW_ALIGN
        first += token * ranks[group.owners]
        _, column_owners, column_ranks = used.nonzero()
        elements = first[:, None] + column_ranks
        own = group.owners[:, None] == column_owners
        values = weights.pool.take(torch.from_numpy(np.where(own, elements, 0)))
        h = torch.where(torch.from_numpy(own), _accumulation(values), 0.0)
        hidden.append(_GroupHidden(group, used, h.mul_(_column_scalings(weights.scalings, group, used, h.dtype))))
    return Hidden(tuple(hidden))


def expand(
    hidden: Hidden,
    weights: LoraWeights | LoraEmbeddingWeights,
    y: Tensor,
    *,
    accumulate: bool = True,
    bias: Tensor | None = None,
) -> None:
    """y[row, part] (+)= h[row, slice of part] @ B[slot, part], in place.

    y: (rows, out_dim), rows may be strided. With `accumulate`, rows and slices without an adapter keep their bits.
    Without it every element is written: the delta, zero where there is none, plus `bias` (out_dim,) if given.
    """
    if not accumulate:
        if bias is None:
            y.zero_()
        else:
            y.copy_(bias)
    for group_hidden in hidden.groups:
        group, used = group_hidden.group, group_hidden.used
        columns = np.cumsum(used.sum((1, 2))).tolist()
        for part, slice_ in enumerate(weights.part_slices):
            first = columns[slice_ - 1] if slice_ else 0
            if first == columns[slice_]:
                continue
            start, width = weights.part_starts[part], weights.part_widths[part]
            b = _gather_rows(weights.pool, weights.b_rows[:, part : part + 1], group, used[slice_ : slice_ + 1], width)
            targeted = used[slice_, :, 0]
            _add_product(
                y[:, start : start + width],
                group_hidden.h[:, first : columns[slice_]],
                b,
                group,
                None if targeted.all() else torch.from_numpy(targeted[group.owners].nonzero()[0]),
            )


_groups_of: WeakKeyDictionary[Segments, tuple[_Group, ...]] = WeakKeyDictionary()


def _groups(segments: Segments) -> tuple[_Group, ...]:
    """The groups of a batch: made at the first module, used by all."""
    groups = _groups_of.get(segments)
    if groups is None:
        groups = _groups_of[segments] = tuple(_make_groups(segments.host_row_slots))
    return groups


def _make_groups(row_slots: npt.NDArray[np.int32]) -> Iterator[_Group]:
    slots, counts = np.unique(row_slots[row_slots != BASE_SLOT], return_counts=True)
    few = slots[counts <= _GROUP_ROWS]
    members = [few[i : i + _GROUP_ADAPTERS] for i in range(0, few.size, _GROUP_ADAPTERS)]
    members += list(slots[counts > _GROUP_ROWS][:, None])
    for group_slots in members:
        rows = np.isin(row_slots, group_slots).nonzero()[0]
        first, last = int(rows[0]), int(rows[-1])
        yield _Group(
            slots=group_slots.astype(np.int64),
            rows=torch.from_numpy(rows),
            owners=np.searchsorted(group_slots, row_slots[rows]),
            span=slice(first, last + 1) if last - first < rows.size else None,
        )


def _used(ranks: Tensor, group: _Group) -> BoolArray:
    group_ranks = ranks.numpy()[group.slots].T
    used: BoolArray = np.arange(group_ranks.max()) < group_ranks[:, :, None]
    return used


def _accumulation(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _gather_rows(pool: Tensor, table: Tensor, group: _Group, used: BoolArray, width: int) -> Tensor:
    """The group's rows of the pool that are in use, (columns, width); `table` is (slots, slices, ranks)."""
    rows = table.numpy()[group.slots].transpose(1, 0, 2)[:, :, : used.shape[2]][used]
    # Rows start at any multiple of ROW_ALIGN, so the pool is read as overlapping windows.
    windows = pool.as_strided(((pool.shape[0] - width) // ROW_ALIGN + 1, width), (ROW_ALIGN, 1))
    return _accumulation(windows.index_select(0, torch.from_numpy(rows)))


def _column_scalings(scalings: Tensor, group: _Group, used: BoolArray, dtype: torch.dtype) -> Tensor:
    """What to multiply h with: the scaling in a row's own columns, zero elsewhere; (rows or 1, columns)."""
    slices, column_owners, _ = used.nonzero()
    factors = scalings.numpy()[group.slots[column_owners], slices]
    if len(group.slots) > 1:
        factors = factors * (group.owners[:, None] == column_owners)
    return torch.from_numpy(factors).to(dtype)


def _add_product(y: Tensor, h: Tensor, b: Tensor, group: _Group, targeted: Tensor | None) -> None:
    """y[rows of the group] += h @ b, rounded once; `targeted` restricts the group's rows."""
    if group.span is not None and targeted is None and y.dtype == h.dtype:
        y[group.span].addmm_(h, b)
        return
    rows = group.rows
    if targeted is not None:
        h, rows = h.index_select(0, targeted), rows.index_select(0, targeted)
    delta = torch.mm(h, b)
    if y.dtype == delta.dtype:
        y.index_add_(0, rows, delta)
    else:
        y.index_copy_(0, rows, (y.index_select(0, rows) + delta).to(y.dtype))

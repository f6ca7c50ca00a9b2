"""csgmv in plain torch, over the same pages and the same segments as the Triton kernels: the CPU backend.

The adapters' rows are taken in *groups*: one adapter with many rows, or several with few each. A group's A rows are
gathered into one matrix for all its adapters. So h is one product, in which each row keeps only its own adapter's
columns; B likewise. The few operations a group take as long with one adapter as with eight. Accumulation is in fp32, or
in float64 for a float64 pool, which makes an oracle of it.

If segments are to be exact, each adapter is a group of its own. No product is then smaller than BLAS needs to multiply
each row alike, so a row's bits do not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from lorafleet.kernels.segments import BASE_SLOT, Segments
from lorafleet.kernels.weights import ROW_ALIGN, LoraEmbeddingWeights, LoraWeights

_GROUP_ADAPTERS = 8
"""Adapters of one group: beyond it, products with other adapters' columns cost more than another few operations."""
_GROUP_ROWS = 32
"""An adapter with more rows has a group of its own: its products are exact."""
EXACT_ROWS = 16
"""With at least so many rows, BLAS sums a row as it would among any others; with fewer it has other ways."""
_MAX_PLANS = 8
"""Plans that a module remembers."""
_MAX_EXACT_PLANS = 64
"""The same where groups are to be exact: of the head alone, and each of one adapter."""
_MAX_RUNS = 3
"""Runs of rows that are multiplied one by one, where no copy is needed; more are gathered and scattered."""
_MAX_KEPT = 1 << 16
"""Elements of a gathered matrix that is kept with its plan: a larger one costs less to gather than to multiply with."""

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
    key: bytes
    """The same for groups of the same adapters whose rows belong to them in the same order."""
    is_exact: bool
    """See `SegmentShape`: then there is one adapter."""


@dataclass(slots=True)
class _Rows:
    """Rows of the pool, which make a matrix."""

    starts: Tensor
    """(rows,) int64, in `ROW_ALIGN` elements."""
    width: int
    kept: Tensor | None = None

    def read(self, pool: Tensor) -> Tensor:
        """(rows, width); what the pool holds of resident adapters does not change, so a small one is kept."""
        if self.kept is not None:
            return self.kept
        # Rows start at any multiple of ROW_ALIGN, so the pool is read as overlapping windows.
        windows = pool.as_strided(((pool.shape[0] - self.width) // ROW_ALIGN + 1, self.width), (ROW_ALIGN, 1))
        matrix = _accumulation(windows.index_select(0, self.starts))
        if matrix.numel() <= _MAX_KEPT:
            self.kept = matrix
        return matrix


@dataclass(frozen=True, slots=True)
class _PartPlan:
    start: int
    """First column of y."""
    width: int
    columns: slice
    """Of h."""
    b: _Rows
    """(columns, width)"""
    targeted: Tensor | None
    """(rows,) int64: which of the group's rows have this part; None: all."""
    runs: tuple[slice, ...]
    """The same as runs of neighbours."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """One module's tables for a group."""

    used: BoolArray
    """(num_slices, adapters, ranks): which entries of the row tables are in use; h's columns, in this order."""
    a: _Rows | None
    """(columns, in_dim); None for an embedding, whose A is read by token."""
    scalings: Tensor
    """(columns,) float32."""
    foreign: Tensor | None
    """(rows, columns) bool: columns of other adapters than the row's own; None: there are none."""
    parts: tuple[_PartPlan, ...]


@dataclass(frozen=True, slots=True)
class _GroupHidden:
    group: _Group
    plan: _Plan
    h: Tensor
    """(rows, columns) scaled, zero in other adapters' columns."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Intermediate values that shrink leaves for expand."""

    groups: tuple[_GroupHidden, ...]


def shrink(x: Tensor, weights: LoraWeights, segments: Segments) -> Hidden:
    """h[row] = x[row] @ A[slot]^T * scaling[slot], for every slice.

    x: (rows, in_dim).
    """
    hidden = []
    for group in _groups(segments):
        plan = _plan(weights, group)
        if plan is None:
            continue
        assert plan.a is not None
        a = plan.a.read(weights.pool)
        inputs = x.index_select(0, group.rows) if group.span is None else x[group.span]
        h = _product(_accumulation(inputs), a.t(), group).mul_(plan.scalings)
        if plan.foreign is not None:
            # Not by a factor of zero: what another adapter's A makes of this row may be infinite.
            h.masked_fill_(plan.foreign, 0.0)
        hidden.append(_GroupHidden(group, plan, h))
    return Hidden(tuple(hidden))


def shrink_embedding(token_ids: Tensor, weights: LoraEmbeddingWeights, segments: Segments) -> Hidden:
    """h[row] = A[slot][:, token_ids[row]] * scaling[slot].

    token_ids: (rows,) int64 or int32. Zero for a token that A lacks.
    """
    hidden = []
    for group in _groups(segments):
        plan = _plan(weights, group)
        if plan is None:
            continue
        tokens = token_ids.index_select(0, group.rows).numpy()
        ranks = weights.ranks.numpy()[group.slots, 0].astype(np.int64)
        page_tokens = weights.page_elements // np.maximum(ranks, 1)
        is_known = (tokens >= 0) & (tokens < weights.num_embeddings)
        page, token = np.divmod(np.where(is_known, tokens, 0), page_tokens[group.owners])
        # A rank-0 adapter has no page: its rows keep no column below.
        page = np.where(ranks[group.owners] > 0, page, 0)
        first = weights.a_pages.numpy()[group.slots[group.owners], page].astype(np.int64) * ROW_ALIGN
        first += token * ranks[group.owners]
        _, column_owners, column_ranks = plan.used.nonzero()
        elements = first[:, None] + column_ranks
        own = (group.owners[:, None] == column_owners) & is_known[:, None]
        values = weights.pool.take(torch.from_numpy(np.where(own, elements, 0)))
        h = torch.where(torch.from_numpy(own), _accumulation(values), 0.0)
        hidden.append(_GroupHidden(group, plan, h.mul_(plan.scalings)))
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
        for part in group_hidden.plan.parts:
            b = part.b.read(weights.pool)
            columns = y[:, part.start : part.start + part.width]
            _add_product(columns, group_hidden.h[:, part.columns], b, group_hidden.group, part)


def _groups(segments: Segments) -> tuple[_Group, ...]:
    """The groups of a batch: made at the first module, used by all, and by later steps with the same rows."""
    return _groups_of(segments.host_row_slots.tobytes(), segments.is_exact)


@lru_cache(maxsize=8)
def _groups_of(row_slots: bytes, is_exact: bool) -> tuple[_Group, ...]:
    return tuple(_make_groups(np.frombuffer(row_slots, dtype=np.int32), is_exact))


def _make_groups(row_slots: npt.NDArray[np.int32], is_exact: bool) -> Iterator[_Group]:
    slots, counts = np.unique(row_slots[row_slots != BASE_SLOT], return_counts=True)
    is_alone = (counts > _GROUP_ROWS) | is_exact
    few = slots[~is_alone]
    members = [few[i : i + _GROUP_ADAPTERS] for i in range(0, few.size, _GROUP_ADAPTERS)]
    members += list(slots[is_alone][:, None])
    for group_slots in members:
        rows = np.isin(row_slots, group_slots).nonzero()[0]
        first, last = int(rows[0]), int(rows[-1])
        group_row_slots = row_slots[rows]
        yield _Group(
            slots=group_slots.astype(np.int64),
            rows=torch.from_numpy(rows),
            owners=np.searchsorted(group_slots, group_row_slots),
            span=slice(first, last + 1) if last - first < rows.size else None,
            # How many rows a lone adapter has does not matter to what its tables say.
            key=(group_row_slots if group_slots.size > 1 else group_slots).tobytes(),
            is_exact=is_exact,
        )


@dataclass(slots=True)
class _Plans:
    """The plans of one module by the group's key, as long as its tables stay as they are."""

    stamp: tuple[int, ...]
    by_key: dict[bytes, _Plan | None]


_plans_of: MutableMapping[Tensor, _Plans] = WeakIdKeyDictionary()
"""By the module's `ranks`, which live as long as the module's weights."""


def _plan(weights: LoraWeights | LoraEmbeddingWeights, group: _Group) -> _Plan | None:
    """The plan of a group, None when no adapter of it targets the module. Decoding asks for the same ones each step."""
    plans = _plans_of.get(weights.ranks)
    # Torch counts the writes to a tensor and to its views: they tell whether an adapter came or went.
    stamp = (weights.ranks._version, weights.scalings._version, weights.b_rows._version)
    most = _MAX_EXACT_PLANS if group.is_exact else _MAX_PLANS
    if plans is None or plans.stamp != stamp or (group.key not in plans.by_key and len(plans.by_key) >= most):
        plans = _plans_of[weights.ranks] = _Plans(stamp, {})
    if group.key not in plans.by_key:
        plans.by_key[group.key] = _make_plan(weights, group)
    return plans.by_key[group.key]


def _make_plan(weights: LoraWeights | LoraEmbeddingWeights, group: _Group) -> _Plan | None:
    group_ranks = weights.ranks.numpy()[group.slots].T
    used: BoolArray = np.arange(group_ranks.max()) < group_ranks[:, :, None]
    if not used.any():
        return None
    slices, column_owners, _ = used.nonzero()
    return _Plan(
        used=used,
        a=_rows(weights.a_rows, weights.in_dim, group, used) if isinstance(weights, LoraWeights) else None,
        scalings=torch.from_numpy(weights.scalings.numpy()[group.slots[column_owners], slices]),
        foreign=torch.from_numpy(group.owners[:, None] != column_owners) if len(group.slots) > 1 else None,
        parts=tuple(_part_plans(weights, group, used)),
    )


def _part_plans(weights: LoraWeights | LoraEmbeddingWeights, group: _Group, used: BoolArray) -> Iterator[_PartPlan]:
    ends = np.cumsum(used.sum((1, 2))).tolist()
    for part, slice_ in enumerate(weights.part_slices):
        columns = slice(ends[slice_ - 1] if slice_ else 0, ends[slice_])
        if columns.start == columns.stop:
            continue
        targeted = used[slice_, group.owners, 0]
        edges = np.flatnonzero(np.diff(targeted, prepend=False, append=False)).tolist()
        yield _PartPlan(
            start=weights.part_starts[part],
            width=weights.part_widths[part],
            columns=columns,
            b=_rows(weights.b_rows[:, part : part + 1], weights.part_widths[part], group, used[slice_ : slice_ + 1]),
            targeted=None if targeted.all() else torch.from_numpy(targeted.nonzero()[0]),
            runs=tuple(slice(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True)),
        )


def _rows(table: Tensor, width: int, group: _Group, used: BoolArray) -> _Rows:
    """The entries of a row table (slots, slices, ranks) that the group uses."""
    starts = table.numpy()[group.slots].transpose(1, 0, 2)[:, :, : used.shape[2]][used]
    return _Rows(torch.from_numpy(starts.astype(np.int64)), width)


def _accumulation(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def padded(x: Tensor) -> Tensor:
    """(rows, width), with zeros behind them where they are fewer than `EXACT_ROWS`."""
    return F.pad(x, (0, 0, 0, max(0, EXACT_ROWS - x.shape[0])))


def _product(x: Tensor, matrix: Tensor, group: _Group) -> Tensor:
    """The product, of padded operands where the group is to be exact and they are too small for that."""
    num_rows, num_columns = x.shape[0], matrix.shape[1]
    if not group.is_exact or (num_rows >= EXACT_ROWS and num_columns > 1):
        return torch.mm(x, matrix)
    return torch.mm(padded(x), F.pad(matrix, (0, 1)) if num_columns == 1 else matrix)[:num_rows, :num_columns]


def _add_product(y: Tensor, h: Tensor, b: Tensor, group: _Group, part: _PartPlan) -> None:
    """y[rows of the group that have the part] += h @ b, rounded once."""
    if group.span is not None and y.dtype == h.dtype and not group.is_exact:
        if part.targeted is None:
            y[group.span].addmm_(h, b)
            return
        if len(part.runs) <= _MAX_RUNS:
            own = y[group.span]
            for run in part.runs:
                own[run].addmm_(h[run], b)
            return
    rows = group.rows
    if part.targeted is not None:
        h, rows = h.index_select(0, part.targeted), rows.index_select(0, part.targeted)
    delta = _product(h, b, group)
    if y.dtype == delta.dtype:
        y.index_add_(0, rows, delta)
    else:
        y.index_copy_(0, rows, (y.index_select(0, rows) + delta).to(y.dtype))

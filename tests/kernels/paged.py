"""Random adapters laid into a poisoned pool, and what they do in float64: the oracle of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorafleet.kernels.segments import BASE_SLOT, IntArray
from lorafleet.kernels.weights import ROW_ALIGN, LoraEmbeddingWeights, LoraWeights

POPULARITY: dict[str, Callable[[np.random.Generator, int, int], npt.NDArray[np.int64]]] = {
    "identical": lambda rng, rows, slots: np.full(rows, slots // 2),
    "distinct": lambda rng, rows, slots: rng.permutation(np.arange(rows) % slots),
    "uniform": lambda rng, rows, slots: rng.integers(0, slots, rows),
    "zipf": lambda rng, rows, slots: np.minimum(rng.zipf(1.5, rows) - 1, slots - 1),
    "skewed": lambda rng, rows, slots: np.where(rng.random(rows) < 0.9, 0, rng.integers(0, slots, rows)),
    "base": lambda rng, rows, slots: rng.integers(BASE_SLOT, slots, rows),
    "only_base": lambda rng, rows, slots: np.full(rows, BASE_SLOT),
}
"""Which adapter each row has: name -> (rng, rows, slots) -> (rows,) slots."""


class _Packer:
    """Rows of random values at shuffled, aligned places of a pool that is NaN elsewhere."""

    def __init__(self, rng: np.random.Generator, dtype: torch.dtype, device: torch.device) -> None:
        self._rng, self._dtype, self._device = rng, dtype, device
        self._rows: list[Tensor] = []

    def add(self, row: Tensor) -> int:
        """The row's number, which `pack` maps to its place."""
        self._rows.append(row)
        return len(self._rows) - 1

    def pack(self) -> tuple[Tensor, IntArray]:
        """The pool, and the start of each row in `ROW_ALIGN` elements."""
        units = np.array([-(-row.numel() // ROW_ALIGN) + 1 for row in self._rows] or [1])
        order = self._rng.permutation(len(units))
        starts = np.empty(len(units), dtype=np.int32)
        starts[order] = np.cumsum(units[order]) - units[order]
        pool = torch.full((int(units.sum()) * ROW_ALIGN,), float("nan"), dtype=self._dtype)
        for start, row in zip(starts, self._rows, strict=False):
            pool[start * ROW_ALIGN : start * ROW_ALIGN + row.numel()] = row
        return pool.to(self._device), starts


@dataclass(frozen=True)
class PagedLinear:
    weights: LoraWeights
    a: list[list[Tensor]]
    """[slot][slice] (rank, in_dim), the served dtype's values in float64."""
    b: list[list[Tensor]]
    """[slot][slice] (rank, width)."""

    def delta(self, x: Tensor, row_slots: IntArray) -> Tensor:
        """The adapters' delta of every row in float64; exact zeros where there is none."""
        x = x.double().cpu()
        scalings = self.weights.scalings.double().cpu()
        out = torch.zeros(x.shape[0], self.weights.out_dim, dtype=torch.float64)
        for slot in np.unique(row_slots[row_slots != BASE_SLOT]):
            rows = torch.from_numpy(np.flatnonzero(row_slots == slot))
            deltas = [
                x[rows] @ a.T @ b * scaling
                for a, b, scaling in zip(self.a[slot], self.b[slot], scalings[slot], strict=True)
            ]
            out[rows] = torch.cat(deltas, dim=1)
        return out

    def touched(self, row_slots: IntArray) -> Tensor:
        """(rows, out_dim) bool: where an adapter adds something."""
        widths = [b.shape[1] for b in self.b[0]]
        ranks = self.weights.ranks.cpu()[torch.from_numpy(row_slots).long().clamp(min=0)]
        targeted = (ranks > 0) & torch.from_numpy(row_slots >= 0)[:, None]
        return targeted.repeat_interleave(torch.tensor(widths), dim=1)


def paged_linear(
    rng: np.random.Generator,
    *,
    in_dim: int,
    widths: Sequence[int],
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    max_rank: int | None = None,
    max_part: int | None = None,
) -> PagedLinear:
    """Random adapters for one module; `ranks[slot][slice]`. Outputs wider than `max_part` are split into parts."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    num_slots, num_slices = len(ranks), len(widths)
    max_rank = max_rank or max(1, *(rank for row in ranks for rank in row))
    parts = [
        (slice_, start, min(max_part or width, width - start))
        for slice_, width in enumerate(widths)
        for start in range(0, width, max_part or width)
    ]
    packer = _Packer(rng, dtype, device)
    a_numbers = np.full((num_slots, num_slices, max_rank), -1)
    b_numbers = np.full((num_slots, len(parts), max_rank), -1)
    a: list[list[Tensor]] = []
    b: list[list[Tensor]] = []
    for slot in range(num_slots):
        a.append([])
        b.append([])
        for slice_, width in enumerate(widths):
            rank = ranks[slot][slice_]
            a_slice = (torch.randn(rank, in_dim, generator=generator) * in_dim**-0.5).to(dtype)
            b_slice = (torch.randn(rank, width, generator=generator) * max(rank, 1) ** -0.5).to(dtype)
            a_numbers[slot, slice_, :rank] = [packer.add(row) for row in a_slice]
            for part, (part_slice, start, part_width) in enumerate(parts):
                if part_slice == slice_:
                    b_numbers[slot, part, :rank] = [packer.add(row[start : start + part_width]) for row in b_slice]
            a[slot].append(a_slice.double())
            b[slot].append(b_slice.double())
    pool, starts = packer.pack()
    starts_of = np.concatenate([starts, rng.integers(0, max(1, starts.max(initial=0)), 1)]).astype(np.int32)
    offsets = np.cumsum([0, *widths])
    weights = LoraWeights(
        pool=pool,
        ranks=torch.tensor(ranks, dtype=torch.int32, device=device),
        scalings=torch.from_numpy(rng.uniform(0.25, 2.0, (num_slots, num_slices)).astype(np.float32)).to(device),
        a_rows=torch.from_numpy(starts_of[a_numbers]).to(device),
        b_rows=torch.from_numpy(starts_of[b_numbers]).to(device),
        in_dim=in_dim,
        part_slices=tuple(slice_ for slice_, _, _ in parts),
        part_starts=tuple(int(offsets[slice_]) + start for slice_, start, _ in parts),
        part_widths=tuple(width for _, _, width in parts),
    )
    return PagedLinear(weights, a, b)


@dataclass(frozen=True)
class PagedEmbedding:
    weights: LoraEmbeddingWeights
    a: list[Tensor]
    """[slot] (num_embeddings, rank), float64."""
    b: list[Tensor]
    """[slot] (rank, width), float64."""

    def delta(self, token_ids: Tensor, row_slots: IntArray) -> Tensor:
        """The adapters' delta of every row in float64."""
        out = torch.zeros(len(row_slots), self.weights.out_dim, dtype=torch.float64)
        for slot in np.unique(row_slots[row_slots != BASE_SLOT]):
            rows = torch.from_numpy(np.flatnonzero(row_slots == slot))
            scaling = float(self.weights.scalings[slot, 0])
            out[rows] = self.a[slot][token_ids.cpu()[rows].long()] @ self.b[slot] * scaling
        return out


def paged_embedding(
    rng: np.random.Generator,
    *,
    num_embeddings: int,
    width: int,
    ranks: Sequence[int],
    page_elements: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PagedEmbedding:
    """Random adapters for an embedding, `ranks[slot]`, A in pages of `page_elements`."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    num_slots, max_rank = len(ranks), max(1, *ranks)
    tokens_of = [page_elements // max(rank, 1) for rank in ranks]
    max_pages = max(-(-num_embeddings // tokens) for tokens in tokens_of)
    packer = _Packer(rng, dtype, device)
    a_numbers = np.full((num_slots, max_pages), -1)
    b_numbers = np.full((num_slots, 1, max_rank), -1)
    a: list[Tensor] = []
    b: list[Tensor] = []
    for slot, (rank, tokens) in enumerate(zip(ranks, tokens_of, strict=True)):
        a_slot = torch.randn(num_embeddings, rank, generator=generator).to(dtype)
        b_slot = (torch.randn(rank, width, generator=generator) * max(rank, 1) ** -0.5).to(dtype)
        if rank:
            for page, start in enumerate(range(0, num_embeddings, tokens)):
                a_numbers[slot, page] = packer.add(a_slot[start : start + tokens].flatten())
            b_numbers[slot, 0, :rank] = [packer.add(row) for row in b_slot]
        a.append(a_slot.double())
        b.append(b_slot.double())
    pool, starts = packer.pack()
    starts_of = np.concatenate([starts, [0]]).astype(np.int32)
    weights = LoraEmbeddingWeights(
        pool=pool,
        ranks=torch.tensor(ranks, dtype=torch.int32, device=device)[:, None],
        scalings=torch.from_numpy(rng.uniform(0.25, 2.0, (num_slots, 1)).astype(np.float32)).to(device),
        a_pages=torch.from_numpy(starts_of[a_numbers]).to(device),
        b_rows=torch.from_numpy(starts_of[b_numbers]).to(device),
        num_embeddings=num_embeddings,
        page_elements=page_elements,
        part_slices=(0,),
        part_starts=(0,),
        part_widths=(width,),
    )
    return PagedEmbedding(weights, a, b)

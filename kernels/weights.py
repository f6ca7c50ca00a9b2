"""The paged adapter weights of one module, as the kernels see them.

A pool is one flat tensor. A *row* is one LoRA rank of one module, contiguous along the wide side. An `A` row has
`in_dim` elements and a `B` row `out_dim`: B is stored transposed against PEFT's files. Rows lie anywhere in the pool.
Row tables have their places, in units of `ROW_ALIGN` elements, so an adapter pays only for its own ranks and modules.
`workers/memory/adapter_pool.py` owns the pool and hands out these views. They stay valid for the life of the pool, and
loading an adapter changes only their contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ROW_ALIGN = 16
"""Every row starts at a multiple of this many elements, so 16-byte loads are aligned in any dtype."""

_Elements = TypeVar("_Elements", int, npt.NDArray[np.int64])

LOAD_ALIGN = 8
"""Elements of a 16-byte load in the narrowest dtype: rows that begin and end at multiples of it are copied in those."""


def aligned(num_elements: _Elements) -> _Elements:
    """`num_elements`, rounded up to where the next row may start."""
    return -(-num_elements // ROW_ALIGN) * ROW_ALIGN


_RUN_COLUMNS = 2048
"""Columns that one program of `adjust` takes."""


@dataclass(frozen=True, slots=True)
class VectorPart:
    """A run of output columns whose rows of an adapter's own lie in one piece each."""

    column: int
    width: int
    added: int
    """Entry of `OutputVectors.starts` for what is added; -1: nothing ever is."""
    scale: int
    """Entry for the scale."""


@dataclass(frozen=True, slots=True)
class OutputVectors:
    """Extras of adapters over the output of a module, or of several that share their input."""

    pool: Tensor
    """(pool_elements,) model dtype: the whole pool."""
    starts: Tensor
    """(num_slots, num_entries) int32: start of each row, in ROW_ALIGN elements; -1 where the adapter has none."""
    parts: tuple[VectorPart, ...]
    run_columns: int = _RUN_COLUMNS
    runs: Tensor = field(init=False)
    """(num_runs, 5) int32 on the pool's device: column, width, offset in its part, and the part's entries."""

    def __post_init__(self) -> None:
        step = self.run_columns
        runs = [
            (part.column + offset, min(step, part.width - offset), offset, part.added, part.scale)
            for part in self.parts
            for offset in range(0, part.width, step)
        ]
        object.__setattr__(self, "runs", torch.tensor(runs, dtype=torch.int32, device=self.pool.device).view(-1, 5))

    @property
    def out_dim(self) -> int:
        """The column after the last."""
        return max((part.column + part.width for part in self.parts), default=0)


@dataclass(frozen=True, slots=True)
class OwnVector:
    """A vector of the base, such as a norm's weight, that adapters may have their own in the place of."""

    pool: Tensor
    """(pool_elements,) model dtype: the whole pool."""
    starts: Tensor
    """(num_slots, num_entries) int32: as in `OutputVectors`."""
    entry: int


@dataclass(frozen=True, slots=True)
class OwnMatrix:
    """A matrix of the base with a row a token that adapters may have their own in the place of."""

    pool: Tensor
    """(pool_elements,) model dtype: the whole pool."""
    pointers: Tensor
    """(num_slots, num_entries) int64: where on the device the starts of a matrix's rows are, int32 in ROW_ALIGN
    elements; 0 where the adapter has none.
    """
    entry: int


@dataclass(frozen=True, slots=True)
class HeadColumns:
    """Columns of a module's output: head h has those from `first` + h * `step` on."""

    first: int
    step: int
    width: int

    def of(self, head: int) -> slice:
        """The columns of a head."""
        start = self.first + head * self.step
        return slice(start, start + self.width)


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """Weights of a linear module, or of several that share their input (q/k/v, gate/up): `num_slices` of them.

    Slice `i` has its own A and B. A *part* is a run of output columns that one B row covers. Most slices have one part.
    An output too wide for a page (lm_head) has several parts, which share the slice's h.
    """

    pool: Tensor
    """(pool_elements,) model dtype: the whole pool."""
    ranks: Tensor
    """(num_slots, num_slices) int32 view: 0 where the slot's adapter does not target the slice."""
    scalings: Tensor
    """(num_slots, num_slices) float32 view: lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""
    a_rows: Tensor
    """(num_slots, num_slices, max_rank) int32 view: start of each A row, in ROW_ALIGN elements."""
    b_rows: Tensor
    """(num_slots, num_parts, max_rank) int32 view: start of each B row, in ROW_ALIGN elements."""
    in_dim: int
    part_slices: tuple[int, ...]
    """Slice whose h each part takes."""
    part_starts: tuple[int, ...]
    """First output column of each part, over the slices' concatenated outputs."""
    part_widths: tuple[int, ...]
    vectors: OutputVectors | None = None
    """What adapters have over the outputs beside A and B."""
    matrix: OwnMatrix | None = None
    """The module's own, where adapters may replace it."""

    def __post_init__(self) -> None:
        num_slots, num_slices = self.ranks.shape
        _check_table("a_rows", self.a_rows, (num_slots, num_slices, self.max_rank))
        _check_common(self)

    @property
    def num_slices(self) -> int:
        return self.ranks.shape[1]

    @property
    def num_parts(self) -> int:
        return len(self.part_widths)

    @property
    def max_rank(self) -> int:
        return self.a_rows.shape[2]

    @property
    def out_dim(self) -> int:
        """Width of the concatenated outputs."""
        return self.part_starts[-1] + self.part_widths[-1]


@dataclass(frozen=True, slots=True)
class LoraEmbeddingWeights:
    """Weights of an embedding: A is stored token-major, so the `rank` values of one token are contiguous.

    One page has `tokens = page_elements // r` tokens of rank `r`. The values of token `t` in slot `s` start at element
    `a_pages[s, t // tokens] * ROW_ALIGN + (t % tokens) * r` of the pool.
    """

    pool: Tensor
    """(pool_elements,) model dtype: the whole pool."""
    ranks: Tensor
    """(num_slots, 1) int32 view."""
    scalings: Tensor
    """(num_slots, 1) float32 view."""
    a_pages: Tensor
    """(num_slots, max_a_pages) int32 view: start of each page of A, in ROW_ALIGN elements."""
    b_rows: Tensor
    """(num_slots, num_parts, max_rank) int32 view, as in `LoraWeights`."""
    num_embeddings: int
    page_elements: int
    part_slices: tuple[int, ...]
    part_starts: tuple[int, ...]
    part_widths: tuple[int, ...]
    vectors: OutputVectors | None = None
    matrix: OwnMatrix | None = None

    def __post_init__(self) -> None:
        _check_table("a_pages", self.a_pages, (self.ranks.shape[0], self.a_pages.shape[1]))
        _check_common(self)

    @property
    def max_rank(self) -> int:
        return self.b_rows.shape[2]

    @property
    def num_parts(self) -> int:
        return len(self.part_widths)

    @property
    def out_dim(self) -> int:
        return self.part_starts[-1] + self.part_widths[-1]


def _check_common(weights: LoraWeights | LoraEmbeddingWeights) -> None:
    num_slots, num_slices = weights.ranks.shape
    _check_table("ranks", weights.ranks, (num_slots, num_slices))
    _check_table("scalings", weights.scalings, (num_slots, num_slices), torch.float32)
    _check_table("b_rows", weights.b_rows, (num_slots, len(weights.part_widths), weights.max_rank))
    if weights.pool.dim() != 1 or not weights.pool.is_contiguous():
        raise ValueError(f"pool must be flat and contiguous, got shape {tuple(weights.pool.shape)}")
    if not len(weights.part_slices) == len(weights.part_starts) == len(weights.part_widths):
        raise ValueError("part_slices, part_starts and part_widths must have an entry for each part")
    if not all(0 <= slice_ < num_slices for slice_ in weights.part_slices):
        raise ValueError(f"part_slices must lie below {num_slices}, got {weights.part_slices}")


def _check_table(name: str, table: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.int32) -> None:
    if tuple(table.shape) != tuple(shape) or table.dtype != dtype or (table.shape[-1] > 1 and table.stride(-1) != 1):
        raise ValueError(
            f"{name} must be {dtype} of shape {tuple(shape)} with unit stride along its last dimension,"
            f" got {table.dtype} of shape {tuple(table.shape)} with strides {table.stride()}"
        )

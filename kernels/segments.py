"""Rows of one forward pass, grouped by adapter and cut into chunks.

Owns the batch type that every csgmv kernel reads. Planned once a step by `workers/step/layout.py`; passes over chosen
rows (logits) are planned by `SegmentPlan.select`, so there is one type and one code path.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BASE_SLOT = -1
"""The slot of rows that use no adapter: rank 0, no pages, no cost."""
CHUNK_LENGTHS = (16, 32, 64, 128)
"""Bounds of the rows of one chunk."""

IntArray = npt.NDArray[np.int32]
Array = TypeVar("Array", IntArray, Tensor)
"""int32, on the host or on the device."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Segments:
    """Rows of one forward pass, grouped by adapter and cut into chunks. Compared by identity.

    Chunk `i` covers rows `permutation[chunk_indptr[i]:chunk_indptr[i + 1]]`, all of slot `chunk_slots[i]`. Base rows
    (`BASE_SLOT`) come last and have chunks too, so that a kernel that writes every row can reach them. A chunk holds at
    most `chunk_length` rows.
    """

    row_slots: Tensor
    """(num_rows,) int32: slot of each row, in the rows' own order."""
    permutation: Tensor
    """(num_rows,) int32: the rows sorted by slot, stable, base rows last."""
    chunk_indptr: Tensor
    """(max_chunks + 1,) int32: offsets into `permutation`; the unused tail repeats the last value."""
    chunk_slots: Tensor
    """(max_chunks,) int32: slot of each chunk; `BASE_SLOT` in the unused tail."""
    chunk_length: int
    """Bound of the rows of one chunk: 16, 32, 64 or 128."""
    num_chunks: int
    """Chunks in use, base chunks included; a captured graph may replay with fewer than `max_chunks`."""
    num_lora_chunks: int
    """Chunks of adapters; they are the first. 0: the batch has no LoRA work."""
    host_row_slots: IntArray
    """(num_rows,) the host's copy of `row_slots`, for backends and checks that need no synchronisation then."""
    is_exact: bool = False
    """See `SegmentShape`."""
    max_slot: int = field(init=False)
    """The largest slot of any row, `BASE_SLOT` without adapters: what launchers check against the row tables."""

    def __post_init__(self) -> None:
        max_slot = int(self.host_row_slots.max()) if self.host_row_slots.size else BASE_SLOT
        object.__setattr__(self, "max_slot", max_slot)

    @property
    def num_rows(self) -> int:
        return self.row_slots.shape[0]

    @property
    def max_chunks(self) -> int:
        return self.chunk_slots.shape[0]

    @property
    def has_lora(self) -> bool:
        return self.num_lora_chunks > 0


FEW_BATCH_ROWS = 128
"""Batches up to this size are cut into the shortest chunks: one adapter's rows then make programs enough."""


def chunk_length_for(num_rows: int, largest_segment: int, mean_segment: float) -> int:
    """The power of two in [16, 128] nearest above what an adapter really has; the least where the batch is small."""
    wanted = min(largest_segment, max(16.0, mean_segment)) if num_rows > FEW_BATCH_ROWS else 16
    return next((length for length in CHUNK_LENGTHS if wanted <= length), CHUNK_LENGTHS[-1])


@dataclass(frozen=True, slots=True)
class SegmentShape:
    """Sizes of segments as plain numbers, from which the places of their arrays follow."""

    num_rows: int
    max_chunks: int
    chunk_length: int
    num_chunks: int
    num_lora_chunks: int
    is_exact: bool = False
    """Whether a row is to get the same bits whichever rows stand beside it, on the CPU backend, at some cost."""

    @property
    def size(self) -> int:
        """Integers of the packed arrays."""
        return 2 * self.num_rows + 2 * self.max_chunks + 1

    def split(self, packed: Array) -> tuple[Array, Array, Array, Array]:
        """row_slots, permutation, chunk_slots and chunk_indptr, as views of `packed` (size,): the one order of them."""
        rows, chunks = self.num_rows, self.max_chunks
        return (
            packed[:rows],
            packed[rows : 2 * rows],
            packed[2 * rows : 2 * rows + chunks],
            packed[2 * rows + chunks :],
        )

    def view(self, packed: Tensor, host: IntArray) -> Segments:
        """The segments over `packed` (size,) int32, on any device, which holds (or will hold) what `host` does."""
        row_slots, permutation, chunk_slots, chunk_indptr = self.split(packed)
        return Segments(
            row_slots=row_slots,
            permutation=permutation,
            chunk_indptr=chunk_indptr,
            chunk_slots=chunk_slots,
            chunk_length=self.chunk_length,
            num_chunks=self.num_chunks,
            num_lora_chunks=self.num_lora_chunks,
            host_row_slots=self.split(host)[0],
            is_exact=self.is_exact,
        )


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """Segments on the host: one array to copy, and what is known without it."""

    shape: SegmentShape
    packed: IntArray
    """(shape.size,), laid out as `SegmentShape.split` says."""

    @property
    def row_slots(self) -> IntArray:
        """(num_rows,), a view of `packed`."""
        return self.shape.split(self.packed)[0]

    def select(
        self,
        rows: npt.NDArray[np.integer[Any]],
        *,
        chunk_length: int | None = None,
        max_chunks: int | None = None,
        is_exact: bool = False,
    ) -> SegmentPlan:
        """The plan of a pass over only `rows`: indices into this plan's, in whatever order. Else as `plan_segments`."""
        plan = plan_segments(self.row_slots[rows], chunk_length=chunk_length, max_chunks=max_chunks)
        return replace(plan, shape=replace(plan.shape, is_exact=is_exact))

    def view(self, packed: Tensor) -> Segments:
        """The segments over `packed`, which holds (or will hold) `self.packed`, int32, on any device."""
        return self.shape.view(packed, self.packed)


def plan_segments(
    row_slots: IntArray, *, chunk_length: int | None = None, max_chunks: int | None = None
) -> SegmentPlan:
    """Group rows by slot and cut each group into chunks, vectorised.

    row_slots: (num_rows,) int32, `BASE_SLOT` for base rows. `max_chunks` pads the chunk arrays (CUDA graphs).
    Raises ValueError when `max_chunks` is too small.
    """
    row_slots = np.ascontiguousarray(row_slots, dtype=np.int32)
    num_rows = row_slots.shape[0]
    # BASE_SLOT as unsigned is the largest key, so base rows sort last.
    permutation = np.argsort(row_slots.view(np.uint32), kind="stable")
    sorted_slots = row_slots[permutation]
    starts = np.flatnonzero(np.r_[True, sorted_slots[1:] != sorted_slots[:-1]]) if num_rows else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, num_rows])
    slots = sorted_slots[starts]
    if chunk_length is None:
        lora_lengths = lengths[slots != BASE_SLOT]
        if lora_lengths.size:
            chunk_length = chunk_length_for(num_rows, int(lora_lengths.max()), float(lora_lengths.mean()))
        else:
            chunk_length = 128
    chunks_per_segment = -(-lengths // chunk_length)
    num_chunks = int(chunks_per_segment.sum())
    capacity = num_chunks if max_chunks is None else max_chunks
    if num_chunks > capacity:
        raise ValueError(f"{num_chunks} chunks do not fit max_chunks={capacity}")
    has_base = num_rows > 0 and bool(slots[-1] == BASE_SLOT)
    shape = SegmentShape(
        num_rows=num_rows,
        max_chunks=capacity,
        chunk_length=chunk_length,
        num_chunks=num_chunks,
        num_lora_chunks=num_chunks - (int(chunks_per_segment[-1]) if has_base else 0),
    )
    packed = np.empty(shape.size, dtype=np.int32)
    to_row_slots, to_permutation, chunk_slots, chunk_indptr = shape.split(packed)
    to_row_slots[:] = row_slots
    to_permutation[:] = permutation
    chunk_slots[:num_chunks] = np.repeat(slots, chunks_per_segment)
    chunk_slots[num_chunks:] = BASE_SLOT
    within = np.arange(num_chunks) - np.repeat(np.cumsum(chunks_per_segment) - chunks_per_segment, chunks_per_segment)
    chunk_indptr[:num_chunks] = np.repeat(starts, chunks_per_segment) + within * chunk_length
    chunk_indptr[num_chunks:] = num_rows
    return SegmentPlan(shape, packed)


def build_segments(
    row_slots: IntArray, *, device: torch.device, chunk_length: int | None = None, max_chunks: int | None = None
) -> Segments:
    """`plan_segments`, with one copy to the device."""
    plan = plan_segments(row_slots, chunk_length=chunk_length, max_chunks=max_chunks)
    packed = torch.from_numpy(plan.packed)
    if device.type != "cpu":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return plan.view(packed)

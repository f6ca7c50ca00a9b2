"""Cuts a step's logits rows into passes over the head, with the segments of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorafleet.kernels.segments import SegmentPlan, Segments, SegmentShape


@dataclass(frozen=True, slots=True)
class PassShape:
    """One pass over the head, as plain numbers."""

    start: int
    """The first of the step's logits rows that it computes."""
    own_start: int
    own_stop: int
    """Which of the rows that it computes are its own; the others are their neighbours, which make it large enough."""
    segments: SegmentShape
    """Of the rows that it computes."""

    @property
    def num_rows(self) -> int:
        return self.segments.num_rows

    @property
    def first_own(self) -> int:
        """The first of the step's logits rows that is its own."""
        return self.start + self.own_start

    def view(self, logits_rows: Tensor, segments: Segments) -> LogitsPass:
        """The pass on the device. logits_rows: the step's; segments: the pass's."""
        rows = logits_rows[self.start : self.start + self.num_rows]
        return LogitsPass(rows, segments, slice(self.own_start, self.own_stop))


@dataclass(frozen=True, slots=True)
class LogitsPass:
    """One pass over the head, on the device."""

    rows: Tensor
    """(n,) int32: which of the step's rows it takes."""
    segments: Segments
    """Of those rows: the same type, derived, so that logits have no code path of their own."""
    own: slice
    """See `PassShape`."""


def plan_passes(
    segments: SegmentPlan,
    logits_rows: Any,
    *,
    max_rows: int,
    min_rows: int = 1,
    chunk_length: int | None = None,
    max_chunks: int | None = None,
) -> list[tuple[PassShape, SegmentPlan]]:
    """Cut a step's logits rows into passes, each with at most `max_rows` of its own; one pass when there are none.

    logits_rows: (num_logits,) integers, indices into the step's rows, in whatever order. A pass takes neighbours along
    until it has `min_rows`, or all there are; then its segments are exact. The rest as in `plan_segments`.
    """
    passes, num_logits = [], len(logits_rows)
    for first in range(0, max(1, num_logits), max_rows):
        last = min(first + max_rows, num_logits)
        start = max(0, min(first, last - min_rows))
        end = max(last, min(num_logits, start + min_rows))
        derived = segments.select(
            logits_rows[start:end], chunk_length=chunk_length, max_chunks=max_chunks, is_exact=min_rows > 1
        )
        passes.append((PassShape(start, first - start, last - start, derived.shape), derived))
    return passes

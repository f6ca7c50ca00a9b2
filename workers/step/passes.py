"""Cuts a step's logits rows into passes over the head, with the segments of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorafleet.kernels.segments import SegmentPlan, Segments


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One pass over the head, on the host."""

    start: int
    """The first of the step's logits rows that it computes."""
    own: slice
    """Which of the rows that it computes are its own; the others are their neighbours, which make it large enough."""
    segments: SegmentPlan
    """Of the rows that it computes."""

    @property
    def num_rows(self) -> int:
        return len(self.segments.row_slots)


@dataclass(frozen=True, slots=True)
class LogitsPass:
    """One pass over the head, on the device."""

    rows: Tensor
    """(n,) int32: which of the step's rows it takes."""
    segments: Segments
    """Of those rows: the same type, derived, so that logits have no code path of their own."""
    own: slice
    """See `PassPlan`."""


def plan_passes(
    segments: SegmentPlan,
    logits_rows: Any,
    *,
    max_rows: int,
    min_rows: int = 1,
    chunk_length: int | None = None,
    max_chunks: int | None = None,
) -> tuple[PassPlan, ...]:
    """Cut a step's logits rows into passes, each with at most `max_rows` of its own; one pass when there are none.

    logits_rows: (num_logits,) integers, indices into the step's rows, in whatever order. A pass takes neighbours along
    until it has `min_rows`, or all there are; then its segments are exact. The rest as in `plan_segments`.
    """
    plans, num_logits = [], len(logits_rows)
    for first in range(0, max(1, num_logits), max_rows):
        last = min(first + max_rows, num_logits)
        start = max(0, min(first, last - min_rows))
        end = max(last, min(num_logits, start + min_rows))
        derived = segments.select(
            logits_rows[start:end], chunk_length=chunk_length, max_chunks=max_chunks, is_exact=min_rows > 1
        )
        plans.append(PassPlan(start, slice(first - start, last - start), derived))
    return tuple(plans)

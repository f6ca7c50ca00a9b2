"""Logits of the wanted rows in passes, so that those of few rows exist at once however large the vocabulary is.

A pass is the model's own forward with `logits_to_keep`, so whatever an architecture does about its head (scaling, caps)
is done in each. What lies below the head is computed once a step: `BodyOnce`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

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


class BodyOnce:
    """Lets the body of a model, which is all below its head, compute once for several calls of the model.

    Within `once()` the first call of the body computes, and every further one returns what the first left. Where it is
    not the body that a model's forward calls, or where that may not be kept, each pass computes anew: slower, as right.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        body: Any = model.base_model
        # The heads of some call the decoder within a wrapper (OPT).
        body = getattr(body, "decoder", body)
        self._compute = body.forward
        self._is_open = False
        self._left: Any = None
        self.may_keep = body is not model
        """Whether what a call left may stand for the next call."""
        body.forward = self._forward

    @contextmanager
    def once(self) -> Iterator[None]:
        """One step: calls within have the same inputs."""
        self._is_open = self.may_keep
        try:
            yield
        finally:
            self._is_open, self._left = False, None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_open:
            return self._compute(*args, **kwargs)
        if self._left is None:
            self._left = self._compute(*args, **kwargs)
        return self._left

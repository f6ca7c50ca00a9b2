"""Lays a step's rows out as a message: padding for graphs, segments, passes over the head; and steps of nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lorafleet.kernels.segments import BASE_SLOT, SegmentShape, plan_segments
from lorafleet.workers.memory.state_store import NULL_SLOT
from lorafleet.workers.step.forms import GraphForm
from lorafleet.workers.step.message import StepHeader, StepMessage
from lorafleet.workers.step.passes import plan_passes
from lorafleet.workers.step.sampling import NO_SAMPLING, SamplingBatch

Ints = npt.NDArray[np.integer[Any]]

GRAPH_CHUNK_LENGTH = 16
"""Chunk length of captured batches, whatever their mix of adapters."""


def most_chunks(num_rows: int, num_slots: int, chunk_length: int = GRAPH_CHUNK_LENGTH) -> int:
    """Most chunks that so many rows make, of at most `num_slots` adapters and of the base."""
    num_segments = min(num_rows, num_slots + 1)
    return num_segments + (num_rows - num_segments) // chunk_length


def chunk_bounds(num_rows: int, num_slots: int, chunk_length: int = GRAPH_CHUNK_LENGTH) -> tuple[int, ...]:
    """Rising bounds of the chunks of captured batches of so many rows, each worth a graph of its own.

    They hold a 64th, a quarter and all as many adapters as there are rows: a kernel's programs for absent chunks
    end at once. But if few adapters share many rows, they would be most of the launch.
    """
    adapters = (num_rows // 64, num_rows // 4, num_rows) if num_rows >= 32 else (num_rows,)
    return tuple(sorted({most_chunks(num_rows, min(max(n, 1), num_slots), chunk_length) for n in adapters}))


@dataclass(frozen=True, slots=True)
class Layout:
    """The arrays of a step before they are packed."""

    token_ids: Ints
    positions: Ints
    row_pages: Ints
    row_offsets: Ints
    row_slots: npt.NDArray[np.int32]
    query_lengths: Ints
    context_lengths: Ints
    tables: Ints
    logits_rows: Ints
    targets: Ints
    """Of the prompts' rows, the first of `logits_rows`; the others have none."""
    state_slots: Ints
    """By sequence; NULL_SLOT for a base without recurrent states."""

    @property
    def num_decodes(self) -> int:
        """Sequences of one row, which come first."""
        return int(np.count_nonzero(self.query_lengths == 1))

    def in_form(self, form: GraphForm, row_sequence: Ints, null_page: int, max_logits: int) -> Layout:
        """The same work as a graph of `form` takes it. `row_sequence`: the sequence of each row.

        Rows more than there are attend to nothing and write to `null_page`. Logits are of as many rows as the form has,
        or of `max_logits`; those beyond the wanted ones are of the first row.
        """
        padding = form.num_rows - len(self.token_ids)
        query_lengths: Ints
        if form.num_prompts == 0:
            # A sequence of several rows has as many lines, unless it has states, which lines cannot share.
            places = np.arange(len(self.token_ids))
            query_lengths, context_lengths = np.ones(form.num_lines, dtype=np.int64), self.positions + 1
            tables, state_slots = self.tables[row_sequence], self.state_slots[row_sequence]
        else:
            assert self.num_decodes <= form.num_decodes, "the scheduler runs no more than the engine was made for"
            places = np.arange(len(self.tables))
            places[self.num_decodes :] += form.num_decodes - self.num_decodes
            query_lengths = _spread(self.query_lengths, places, form.num_lines)
            query_lengths[-1] = padding
            context_lengths, tables, state_slots = self.context_lengths, self.tables, self.state_slots
        return Layout(
            token_ids=_pad(self.token_ids, padding, 0),
            positions=_pad(self.positions, padding, 0),
            row_pages=_pad(self.row_pages, padding, null_page),
            row_offsets=_pad(self.row_offsets, padding, 0),
            row_slots=_pad(self.row_slots, padding, BASE_SLOT).astype(np.int32),
            query_lengths=query_lengths,
            context_lengths=_spread(context_lengths, places, form.num_lines),
            tables=_spread(tables, places, form.num_lines, form.num_pages),
            logits_rows=_pad(self.logits_rows, min(form.num_rows, max_logits) - len(self.logits_rows), 0),
            targets=self.targets,
            state_slots=_spread(state_slots, places, form.num_lines),
        )

    def pack(
        self,
        *,
        form: GraphForm | None,
        chunk_length: int | None,
        max_chunks: int | None,
        pass_rows: tuple[int, int],
        num_sampled: tuple[int, ...],
        num_prompt_tops: int,
        sampling: SamplingBatch,
        has_extras: bool = False,
        skips_experts: bool = False,
        pooled: tuple[tuple[int, int], ...] = (),
    ) -> StepMessage:
        """The message of these arrays. `chunk_length`, `max_chunks`: of its segments, as in `plan_segments`.

        `pass_rows`: fewest and most of a pass over the head. The others: as in `StepHeader`.
        """
        segments = plan_segments(self.row_slots, chunk_length=chunk_length, max_chunks=max_chunks)
        min_rows, max_rows = pass_rows
        passes = plan_passes(
            segments,
            self.logits_rows,
            min_rows=min_rows,
            max_rows=max_rows,
            chunk_length=chunk_length,
            max_chunks=max_chunks,
        )
        header = StepHeader(
            num_lines=len(self.query_lengths),
            num_decodes=self.num_decodes if form is None else form.num_decodes,
            num_table_pages=self.tables.shape[1],
            num_logits=len(self.logits_rows),
            num_prompt_rows=len(self.targets),
            num_prompt_tops=num_prompt_tops,
            num_sampled=num_sampled,
            has_pending=bool((self.token_ids < 0).any()),
            form=form,
            segments=segments.shape,
            passes=tuple(shape for shape, _ in passes),
            has_extras=has_extras,
            skips_experts=skips_experts,
            pooled=pooled,
        )
        packed = np.empty(header.size, dtype=np.int32)
        parts = header.split(packed)
        parts.token_ids[:] = self.token_ids
        parts.positions[:] = self.positions
        parts.row_pages[:] = self.row_pages
        parts.row_offsets[:] = self.row_offsets
        parts.query_indptr[0] = 0
        parts.query_indptr[1:] = np.cumsum(self.query_lengths)
        parts.context_lengths[:] = self.context_lengths
        parts.logits_rows[:] = self.logits_rows
        parts.targets[: len(self.targets)] = self.targets
        parts.targets[len(self.targets) :] = 0
        parts.state_slots[:] = self.state_slots
        parts.block_tables[:] = self.tables
        parts.segments[:] = segments.packed
        for part, (_, plan) in zip(parts.passes, passes, strict=True):
            part[:] = plan.packed
        return StepMessage(header, packed, sampling)


def _pad(array: Ints, count: int, value: int) -> Ints:
    return np.concatenate([array, np.full(count, value, dtype=array.dtype)])


def _spread(array: Ints, places: Ints, *shape: int) -> Ints:
    """Zeros of that shape, but for the array's lines, which come to `places`, each at the beginning of its own."""
    lines = np.zeros(shape, dtype=array.dtype)
    where: tuple[Any, ...] = (places, *map(slice, array.shape[1:]))
    lines[where] = array
    return lines


def blank_batch(
    form: GraphForm,
    *,
    null_page: int,
    has_lora: bool,
    max_chunks: int,
    max_logits: int,
    chunk_length: int | None = None,
) -> StepMessage:
    """A batch of padding alone, to capture a graph with; with `has_lora` one that goes through the LoRA kernels.

    `chunk_length`: another than the form's.
    """
    none = np.zeros(0, dtype=np.int64)
    tables = np.zeros((0, form.num_pages), dtype=np.int32)
    layout = Layout(none, none, none, none, none.astype(np.int32), none, none, tables, none, none, none)
    return _blank(
        layout.in_form(form, none, null_page, max_logits),
        form=form,
        chunk_length=chunk_length or form.chunk_length,
        max_chunks=max_chunks,
        pass_rows=(1, form.num_rows),
        has_lora=has_lora,
    )


def _blank(
    layout: Layout,
    *,
    form: GraphForm | None,
    chunk_length: int,
    max_chunks: int | None,
    pass_rows: tuple[int, int],
    has_lora: bool,
) -> StepMessage:
    message = layout.pack(
        form=form,
        chunk_length=chunk_length,
        max_chunks=max_chunks,
        pass_rows=pass_rows,
        num_sampled=(),
        num_prompt_tops=0,
        sampling=NO_SAMPLING,
        has_extras=form is not None and form.has_extras,
        skips_experts=form is not None and form.skips_experts,
    )
    if not has_lora:
        return message
    header = message.header
    passes = tuple(replace(each, segments=_all_lora(each.segments)) for each in header.passes)
    return replace(message, header=replace(header, segments=_all_lora(header.segments), passes=passes))


def _all_lora(shape: SegmentShape) -> SegmentShape:
    return replace(shape, num_lora_chunks=shape.max_chunks)


def blank_prompt(
    num_rows: int,
    *,
    page_tokens: int,
    null_page: int,
    has_lora: bool,
    chunk_length: int,
    max_pass_rows: int | None = None,
) -> StepMessage:
    """One prompt of `num_rows` tokens that leaves nothing behind, to compile and warm up with.

    Its last row has logits; all rows have, in passes of `max_pass_rows`, if that is given.
    """
    positions = np.arange(num_rows)
    num_pages = -(-num_rows // page_tokens)
    layout = Layout(
        token_ids=np.zeros_like(positions),
        positions=positions,
        row_pages=np.full_like(positions, null_page),
        row_offsets=positions % page_tokens,
        row_slots=np.full(num_rows, BASE_SLOT, dtype=np.int32),
        query_lengths=np.array([num_rows]),
        context_lengths=np.array([num_rows]),
        tables=np.full((1, num_pages), null_page, dtype=np.int32),
        logits_rows=positions[-1:] if max_pass_rows is None else positions,
        targets=np.zeros(0, dtype=np.int64),
        state_slots=np.full(1, NULL_SLOT),
    )
    return _blank(
        layout,
        form=None,
        chunk_length=chunk_length,
        max_chunks=None,
        pass_rows=(1, max_pass_rows or 1),
        has_lora=has_lora,
    )

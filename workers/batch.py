"""One step's work as tensors: tokens, positions, KV places, segments, logits rows and sampling settings.

Built once a step from what the scheduler chose; every layer reads the same arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorafleet.kernels.segments import BASE_SLOT, SegmentPlan, Segments, plan_segments
from lorafleet.workers.model.attention import AttentionBatch
from lorafleet.workers.model.logits import LogitsPass, PassPlan, plan_passes
from lorafleet.workers.model.sampler import NO_SAMPLING, SamplingBatch
from lorafleet.workers.sampling_table import SamplingTable
from lorafleet.workers.sequence import Sequence

Ints = npt.NDArray[np.integer[Any]]

GRAPH_CHUNK_LENGTH = 16
"""Chunk length of captured batches, whatever their mix of adapters."""
MAX_GRAPH_KEYS = 400_000
"""Keys that the rows of prompts in a captured batch may attend to, counted for each row. Every row reads its own, as a
decode does, where a prompt's rows would share them: beyond this it costs more than launching kernel by kernel does."""


def most_chunks(num_rows: int, num_slots: int, chunk_length: int = GRAPH_CHUNK_LENGTH) -> int:
    """Most chunks that so many rows make, of at most `num_slots` adapters and of the base."""
    num_segments = min(num_rows, num_slots + 1)
    return num_segments + (num_rows - num_segments) // chunk_length


def chunk_bounds(num_rows: int, num_slots: int) -> tuple[int, ...]:
    """Rising bounds of the chunks of captured batches of so many rows, each worth a graph of its own.

    They hold a 64th, a quarter and all as many adapters as there are rows: a kernel's programs for chunks that a batch
    does not have end at once, but where few adapters share many rows they would be most of the launch.
    """
    adapters = (num_rows // 64, num_rows // 4, num_rows) if num_rows >= 32 else (num_rows,)
    return tuple(sorted({most_chunks(num_rows, min(max(n, 1), num_slots)) for n in adapters}))


@dataclass(frozen=True, slots=True)
class ScheduledRows:
    """The next `num_rows` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_rows: int

    @property
    def samples(self) -> bool:
        """Whether this computes the sequence's last token, so that the next can be chosen."""
        return self.num_rows == self.sequence.num_uncomputed


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model reads in one forward pass, on the device."""

    token_ids: Tensor
    """(num_rows,) int32; negative for the tokens that the step in flight chooses."""
    positions: Tensor
    """(num_rows,) int32."""
    attention: AttentionBatch
    segments: Segments
    passes: tuple[LogitsPass, ...]
    """Over the head: together they take the rows whose logits are wanted, in that order."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass on the host: everything the device needs in one array, and what the host needs to know."""

    rows: tuple[ScheduledRows, ...]
    """Sequences with one row come first."""
    packed: npt.NDArray[np.int32]
    """Token ids, positions, KV pages, KV offsets, query offsets, context lengths, logits rows, block tables, segments
    and the passes' segments, one after another."""
    query_lengths: list[int]
    """Rows of each sequence; padding counts as sequences of one row."""
    context_lengths: list[int]
    """Tokens each sequence attends to; 0 for padding."""
    num_table_pages: int
    num_decodes: int
    num_logits: int
    segments: SegmentPlan
    passes: tuple[PassPlan, ...]
    has_pending: bool
    """Whether any token is one that the step in flight chooses."""
    graph_size: int | None
    """Rows that the batch is padded to, for a captured graph; None: not padded. Such a batch has every row as a
    sequence of its own: all keys of a layer are written before it attends, so a prompt's token finds those before it
    in the pages, as a decode does."""
    sampled: tuple[Sequence, ...]
    """Sequences that get a token, in the order of the last `len(sampled)` logits rows (padding after them)."""
    prompts: tuple[tuple[Sequence, int, int], ...]
    """(sequence, first position, count): prompt positions whose logits come first."""
    sampling: SamplingBatch

    @property
    def num_rows(self) -> int:
        return len(self.segments.row_slots)

    @property
    def graph_key(self) -> tuple[int, int]:
        """Rows and chunks of the LoRA work that the batch's graph was captured with; no chunks without such work."""
        assert self.graph_size is not None
        return self.graph_size, self.segments.max_chunks if self.segments.num_lora_chunks else 0

    @property
    def num_prompt_rows(self) -> int:
        """How many of the logits rows are the prompts'."""
        return sum(count for _, _, count in self.prompts)

    def view(self, packed: Tensor) -> StepInputs:
        """The inputs over `packed`, which holds (or will hold) `self.packed`, int32, on any device."""
        num_rows, num_sequences = self.num_rows, len(self.query_lengths)
        sizes = [num_rows] * 4
        sizes += [num_sequences + 1, num_sequences, self.num_logits, num_sequences * self.num_table_pages]
        sizes += [self.segments.packed.size, *(plan.segments.packed.size for plan in self.passes)]
        parts = torch.split(packed, sizes)
        token_ids, positions, row_pages, row_offsets, query_indptr, context_lengths, logits_rows, tables = parts[:8]
        passes = tuple(
            LogitsPass(
                rows=logits_rows[plan.start : plan.start + plan.num_rows],
                segments=plan.segments.view(part),
                own=plan.own,
            )
            for plan, part in zip(self.passes, parts[9:], strict=True)
        )
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            attention=AttentionBatch(
                row_pages=row_pages,
                row_offsets=row_offsets,
                query_indptr=query_indptr,
                query_lengths=self.query_lengths,
                context_lengths=context_lengths,
                host_context_lengths=self.context_lengths,
                block_tables=tables.view(num_sequences, self.num_table_pages),
                num_decodes=self.num_decodes,
            ),
            segments=self.segments.view(parts[8]),
            passes=passes,
        )


class BatchBuilder:
    """Makes the batches of one engine. Keeps what does not change from step to step in arrays, a line a sequence."""

    def __init__(
        self,
        *,
        page_tokens: int,
        max_pages: int,
        stop_token_ids: frozenset[int],
        num_slots: int,
        pass_rows: tuple[int, int],
        graph_sizes: tuple[int, ...] = (),
        null_page: int = 0,
    ) -> None:
        """`max_pages`: KV pages of the longest sequence. `num_slots`: most adapters in a batch. `pass_rows`: fewest and
        most of a pass over the head. `graph_sizes`, rising: batches that fit, with one pass, are padded to one of these
        rows; padding rows write their keys and values to `null_page`.
        """
        self._page_tokens = page_tokens
        self._sampling = SamplingTable(stop_token_ids)
        self._num_slots = num_slots
        self._pass_rows = pass_rows
        self._graph_sizes = graph_sizes
        self._null_page = null_page
        self._tables = np.zeros((0, max_pages), dtype=np.int32)
        self._free_lines: list[int] = []

    def release(self, sequence: Sequence) -> None:
        """A sequence is over: its line is for another."""
        if sequence.batch_line is not None:
            self._free_lines.append(sequence.batch_line)
            sequence.batch_line = None

    def build(self, scheduled: Iterable[ScheduledRows]) -> StepBatch:
        """Lay out the scheduled rows. Sequences with an adapter hold a lease on it, which is resident."""
        rows = tuple(sorted(scheduled, key=_place))
        sequences = [item.sequence for item in rows]
        lines = np.array([self._line(seq) for seq in sequences])
        lengths = np.array([item.num_rows for item in rows])
        starts = np.array([seq.num_computed for seq in sequences])
        ends = starts + lengths
        row_starts = np.cumsum(lengths) - lengths
        row_sequence = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(lengths.sum()) - np.repeat(row_starts - starts, lengths)
        token_ids: list[int] = []
        for seq, start, end in zip(sequences, starts.tolist(), ends.tolist(), strict=True):
            token_ids += seq.token_ids[start:end]
        slots = np.array([_slot(seq) for seq in sequences], dtype=np.int32)
        row_slots = slots[row_sequence]

        prompts = self._prompts(rows, starts, ends)
        samples = np.array([item.samples for item in rows])
        sampled = tuple(seq for seq, is_sampled in zip(sequences, samples.tolist(), strict=True) if is_sampled)
        sampled_rows = (row_starts + lengths - 1)[samples]
        prompt_rows = [
            row_starts[index] + np.arange(start - starts[index], start - starts[index] + count)
            for index, (_, start, count) in prompts
        ]
        logits_rows = np.concatenate([*prompt_rows, sampled_rows])

        extended = lengths > 1
        keys = int((lengths[extended] * ends[extended]).sum())
        graph_size, max_chunks = self._graph_size(len(positions), len(logits_rows), keys), None
        if graph_size is not None and any(seq.lease is not None and seq.lease.has_extras for seq in sequences):
            graph_size = None  # which rows have parameters of their own is decided on the host, layer by layer
        num_pages = self._tables.shape[1] if graph_size is not None else int(-(-ends.max() // self._page_tokens))
        tables = self._tables[lines, :num_pages]
        layout = _Layout(
            token_ids=np.array(token_ids),
            positions=positions,
            row_pages=tables[row_sequence, positions // self._page_tokens],
            row_offsets=positions % self._page_tokens,
            row_slots=row_slots,
            query_lengths=lengths,
            context_lengths=ends,
            tables=tables,
            logits_rows=logits_rows,
        )
        if graph_size is not None:
            num_adapters = np.unique(slots[slots != BASE_SLOT]).size
            needed = most_chunks(graph_size, num_adapters) if num_adapters else 0
            max_chunks = next(n for n in chunk_bounds(graph_size, self._num_slots) if n >= needed)
            layout = layout.by_rows(row_sequence).padded(graph_size, self._null_page, self._pass_rows[1])
        return _assemble(
            layout,
            graph_size=graph_size,
            chunk_length=None if graph_size is None else GRAPH_CHUNK_LENGTH,
            max_chunks=max_chunks,
            pass_rows=self._pass_rows,
            rows=rows,
            sampled=sampled,
            prompts=tuple(prompt for _, prompt in prompts),
            sampling=self._sampling.batch(sampled, lines[samples]),
        )

    def _graph_size(self, num_rows: int, num_logits: int, num_keys: int) -> int | None:
        """The smallest captured size that holds so many rows; None when none does, or not these logits and keys."""
        if num_logits > self._pass_rows[1] or num_keys > MAX_GRAPH_KEYS:
            return None
        return next((size for size in self._graph_sizes if size >= num_rows), None)

    def _line(self, sequence: Sequence) -> int:
        """The sequence's line, its page table brought up to date."""
        line = sequence.batch_line
        if line is None:
            if not self._free_lines:
                self._grow()
            line = sequence.batch_line = self._free_lines.pop()
            sequence.num_tabled_pages = 0
            self._sampling.put(line, sequence)
        pages = sequence.kv_pages
        if len(pages) != sequence.num_tabled_pages:
            self._tables[line, sequence.num_tabled_pages : len(pages)] = pages[sequence.num_tabled_pages :]
            sequence.num_tabled_pages = len(pages)
        return line

    def _grow(self) -> None:
        num_lines = len(self._tables)
        added = max(64, num_lines)
        self._free_lines.extend(range(num_lines, num_lines + added))
        self._tables = np.concatenate([self._tables, np.zeros((added, self._tables.shape[1]), dtype=np.int32)])
        self._sampling.grow(added)

    def _prompts(
        self, rows: tuple[ScheduledRows, ...], starts: Ints, ends: Ints
    ) -> list[tuple[int, tuple[Sequence, int, int]]]:
        """(index in `rows`, entry of `StepBatch.prompts`) of the sequences whose prompt logprobs are wanted."""
        prompts = []
        for index, item in enumerate(rows):
            if item.sequence.wants_prompt_logprobs:
                # The logits at position p predict token p + 1; the last prompt position is the sampler's.
                start = int(starts[index])
                count = min(int(ends[index]), item.sequence.num_prompt - 1) - start
                if count > 0:
                    prompts.append((index, (item.sequence, start, count)))
        return prompts


def _place(item: ScheduledRows) -> tuple[bool, int]:
    """Sequences with one row come first, and those of one adapter stand together, so that its rows are neighbours."""
    return item.num_rows > 1, _slot(item.sequence)


def _slot(sequence: Sequence) -> int:
    return BASE_SLOT if sequence.lease is None else sequence.lease.slot


def blank_batch(
    graph_size: int,
    *,
    max_pages: int,
    null_page: int,
    has_lora: bool,
    max_chunks: int,
    max_logits: int,
    chunk_length: int = GRAPH_CHUNK_LENGTH,
) -> StepBatch:
    """A batch of padding alone, to capture a graph with; with `has_lora` one that goes through the LoRA kernels."""
    none = np.zeros(0, dtype=np.int64)
    tables = np.zeros((0, max_pages), dtype=np.int32)
    layout = _Layout(none, none, none, none, none.astype(np.int32), none, none, tables, none)
    return _blank(
        layout.padded(graph_size, null_page, max_logits),
        graph_size=graph_size,
        chunk_length=chunk_length,
        max_chunks=max_chunks,
        pass_rows=(1, graph_size),
        has_lora=has_lora,
    )


def _blank(
    layout: _Layout,
    *,
    graph_size: int | None,
    chunk_length: int,
    max_chunks: int | None,
    pass_rows: tuple[int, int],
    has_lora: bool,
) -> StepBatch:
    batch = _assemble(
        layout,
        graph_size=graph_size,
        chunk_length=chunk_length,
        max_chunks=max_chunks,
        pass_rows=pass_rows,
        rows=(),
        sampled=(),
        prompts=(),
        sampling=NO_SAMPLING,
    )
    if not has_lora:
        return batch
    passes = tuple(replace(plan, segments=_all_lora(plan.segments)) for plan in batch.passes)
    return replace(batch, segments=_all_lora(batch.segments), passes=passes)


def _all_lora(plan: SegmentPlan) -> SegmentPlan:
    return replace(plan, num_lora_chunks=plan.max_chunks)


def blank_prompt(
    num_rows: int,
    *,
    page_tokens: int,
    null_page: int,
    has_lora: bool,
    chunk_length: int,
    max_pass_rows: int | None = None,
) -> StepBatch:
    """One prompt of `num_rows` tokens that leaves nothing behind, to compile and warm up with.

    Its last row has logits; all rows have, in passes of `max_pass_rows`, if that is given.
    """
    positions = np.arange(num_rows)
    num_pages = -(-num_rows // page_tokens)
    layout = _Layout(
        token_ids=np.zeros_like(positions),
        positions=positions,
        row_pages=np.full_like(positions, null_page),
        row_offsets=positions % page_tokens,
        row_slots=np.full(num_rows, BASE_SLOT, dtype=np.int32),
        query_lengths=np.array([num_rows]),
        context_lengths=np.array([num_rows]),
        tables=np.full((1, num_pages), null_page, dtype=np.int32),
        logits_rows=positions[-1:] if max_pass_rows is None else positions,
    )
    return _blank(
        layout,
        graph_size=None,
        chunk_length=chunk_length,
        max_chunks=None,
        pass_rows=(1, max_pass_rows or 1),
        has_lora=has_lora,
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """The arrays of a batch before they are packed."""

    token_ids: Ints
    positions: Ints
    row_pages: Ints
    row_offsets: Ints
    row_slots: npt.NDArray[np.int32]
    query_lengths: Ints
    context_lengths: Ints
    tables: Ints
    logits_rows: Ints

    def by_rows(self, row_sequence: Ints) -> _Layout:
        """The same work with every row as a sequence of its own."""
        return replace(
            self,
            query_lengths=np.ones_like(self.positions),
            context_lengths=self.positions + 1,
            tables=self.tables[row_sequence],
        )

    def padded(self, size: int, null_page: int, max_logits: int) -> _Layout:
        """With as many one-row sequences more as make `size` rows: they attend to nothing and write to `null_page`.

        Logits are of as many rows too, or of `max_logits`; those beyond the wanted ones are of the first row.
        """
        count = size - len(self.token_ids)
        tables = np.zeros((count, self.tables.shape[1]), dtype=self.tables.dtype)
        return _Layout(
            token_ids=_pad(self.token_ids, count, 0),
            positions=_pad(self.positions, count, 0),
            row_pages=_pad(self.row_pages, count, null_page),
            row_offsets=_pad(self.row_offsets, count, 0),
            row_slots=_pad(self.row_slots, count, BASE_SLOT).astype(np.int32),
            query_lengths=_pad(self.query_lengths, count, 1),
            context_lengths=_pad(self.context_lengths, count, 0),
            tables=np.concatenate([self.tables, tables]),
            logits_rows=_pad(self.logits_rows, min(size, max_logits) - len(self.logits_rows), 0),
        )


def _assemble(
    layout: _Layout,
    *,
    graph_size: int | None,
    chunk_length: int | None,
    max_chunks: int | None,
    pass_rows: tuple[int, int],
    rows: tuple[ScheduledRows, ...],
    sampled: tuple[Sequence, ...],
    prompts: tuple[tuple[Sequence, int, int], ...],
    sampling: SamplingBatch,
) -> StepBatch:
    segments = plan_segments(layout.row_slots, chunk_length=chunk_length, max_chunks=max_chunks)
    min_rows, max_rows = pass_rows
    passes = plan_passes(
        segments,
        layout.logits_rows,
        min_rows=min_rows,
        max_rows=max_rows,
        chunk_length=chunk_length,
        max_chunks=max_chunks,
    )
    packed = (
        layout.token_ids,
        layout.positions,
        layout.row_pages,
        layout.row_offsets,
        np.zeros(1, np.int64),
        np.cumsum(layout.query_lengths),
        layout.context_lengths,
        layout.logits_rows,
        layout.tables.reshape(-1),
        segments.packed,
        *(plan.segments.packed for plan in passes),
    )
    return StepBatch(
        rows=rows,
        packed=np.concatenate(packed, dtype=np.int32, casting="unsafe"),
        query_lengths=layout.query_lengths.tolist(),
        context_lengths=layout.context_lengths.tolist(),
        num_table_pages=layout.tables.shape[1],
        num_decodes=int(np.count_nonzero(layout.query_lengths == 1)),
        num_logits=len(layout.logits_rows),
        segments=segments,
        passes=passes,
        has_pending=bool((layout.token_ids < 0).any()),
        graph_size=graph_size,
        sampled=sampled,
        prompts=prompts,
        sampling=sampling,
    )


def _pad(array: Ints, count: int, value: int) -> Ints:
    return np.concatenate([array, np.full(count, value, dtype=array.dtype)])

"""Makes a batch of what the scheduler chose, once a step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lorafleet.kernels.segments import BASE_SLOT
from lorafleet.workers.sequence import Sequence
from lorafleet.workers.step.batch import ScheduledRows, StepBatch
from lorafleet.workers.step.forms import GraphForm, choose_form
from lorafleet.workers.step.layout import GRAPH_CHUNK_LENGTH, Ints, Layout, chunk_bounds, most_chunks
from lorafleet.workers.step.sampling_table import SamplingTable


class BatchBuilder:
    """Makes the batches of one engine. Keeps what does not change from step to step in arrays, a line a sequence."""

    def __init__(
        self,
        *,
        page_tokens: int,
        max_pages: int,
        stop_token_ids: frozenset[int],
        vocab_size: int,
        num_slots: int,
        pass_rows: tuple[int, int],
        graph_forms: tuple[GraphForm, ...] = (),
        null_page: int = 0,
    ) -> None:
        """`max_pages`: KV pages of the longest sequence. `num_slots`: most adapters in a batch. `pass_rows`: fewest and
        most of a pass over the head. `graph_forms`, rising: batches that fit one, with one pass, are padded to it;
        padding rows write their keys and values to `null_page`.
        """
        self._page_tokens = page_tokens
        self._sampling = SamplingTable(stop_token_ids, vocab_size)
        self._num_slots = num_slots
        self._pass_rows = pass_rows
        self._graph_forms = graph_forms
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
        form, max_chunks = None, None
        num_pages = int(-(-ends.max() // self._page_tokens))
        if len(logits_rows) <= self._pass_rows[1]:
            form = choose_form(
                self._graph_forms,
                num_rows=len(positions),
                num_prompts=int(np.count_nonzero(extended)),
                num_keys=keys,
                num_pages=num_pages,
            )
        if form is not None and any(seq.lease is not None and seq.lease.has_extras for seq in sequences):
            form = None  # which rows have parameters of their own is decided on the host, layer by layer
        tables = self._tables[lines, :num_pages]
        layout = Layout(
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
        if form is not None:
            num_adapters = np.unique(slots[slots != BASE_SLOT]).size
            needed = most_chunks(form.num_rows, num_adapters) if num_adapters else 0
            max_chunks = next(n for n in chunk_bounds(form.num_rows, self._num_slots) if n >= needed)
            layout = layout.in_form(form, row_sequence, self._null_page, self._pass_rows[1])
        return layout.pack(
            form=form,
            chunk_length=None if form is None else GRAPH_CHUNK_LENGTH,
            max_chunks=max_chunks,
            pass_rows=self._pass_rows,
            rows=rows,
            sampled=sampled,
            prompts=tuple(prompt for _, prompt in prompts),
            sampling=self._sampling.batch(sampled, lines[samples]),
        )

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

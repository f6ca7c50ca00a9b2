"""Builds a step's message of what the scheduler chose, and keeps whose its rows are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from lorafleet.kernels.segments import BASE_SLOT
from lorafleet.workers.grammars import fill_masks
from lorafleet.workers.memory.residency import AdapterLease
from lorafleet.workers.sequence import PromptRows, ScheduledRows, Sequence
from lorafleet.workers.step.forms import GraphForm, choose_form
from lorafleet.workers.step.layout import Layout, chunk_bounds, most_chunks
from lorafleet.workers.step.message import StepMessage
from lorafleet.workers.step.sampling_table import SamplingTable


@dataclass(frozen=True, slots=True)
class BuiltStep:
    """A step's message, and whose its rows are, which only the engine knows."""

    message: StepMessage
    rows: tuple[ScheduledRows, ...]
    """In the message's order: sequences with one row come first."""
    prompts: tuple[PromptRows, ...]
    """In the order of the message's rows for logprobs of prompts."""

    def fill_masks(self) -> None:
        """Ask the grammars of the rows that have one which tokens may come. They must have taken all tokens before."""
        sampling = self.message.sampling
        sampled = [item.sequence.matcher for item in self.rows for _ in range(item.num_sampled)]
        found = [matcher for row in sampling.masked.tolist() if (matcher := sampled[row]) is not None]
        fill_masks(found, sampling.masks)


class BatchBuilder:
    """Builds the steps of one engine. Keeps what does not change from step to step in arrays, a line a sequence."""

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
        extra_forms: tuple[GraphForm, ...] = (),
        null_page: int = 0,
        has_states: bool = False,
        has_experts: bool = False,
    ) -> None:
        """`max_pages`: KV pages of the longest sequence. `num_slots`: most adapters in a batch. `pass_rows`: fewest and
        most of a pass over the head. `graph_forms`, rising: a batch of one pass that fits one is padded to it.
        `extra_forms`: the same for batches of which an adapter has extras. `null_page` takes the keys and values of
        padding rows. `has_states`: the base has recurrent states, so graphs are for decodes alone. `has_experts`:
        adapters may be on the base's experts; batches of others skip LoRA there.
        """
        self._page_tokens = page_tokens
        self._sampling = SamplingTable(stop_token_ids, vocab_size)
        self._num_slots = num_slots
        self._pass_rows = pass_rows
        self._graph_forms = graph_forms
        self._extra_forms = extra_forms
        self._null_page = null_page
        self._has_states = has_states
        self._has_experts = has_experts
        self._tables = np.zeros((0, max_pages), dtype=np.int32)
        self._free_lines: list[int] = []

    def release(self, sequence: Sequence) -> None:
        """A sequence is over: its line is for another."""
        if sequence.batch_line is not None:
            self._free_lines.append(sequence.batch_line)
            sequence.batch_line = None

    def build(self, scheduled: Iterable[ScheduledRows]) -> BuiltStep:
        """Lay out the scheduled rows. Sequences with an adapter hold a lease on it, which is resident."""
        rows = tuple(sorted(scheduled, key=_place))
        sequences = [item.sequence for item in rows]
        lines = np.array([self._line(seq) for seq in sequences])
        lengths = np.array([item.num_rows for item in rows])
        num_sampled = tuple(item.num_sampled for item in rows)
        starts = np.array([seq.num_computed for seq in sequences])
        ends = starts + lengths
        row_ends = np.cumsum(lengths)
        row_starts = row_ends - lengths
        row_sequence = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(row_ends[-1]) - np.repeat(row_starts - starts, lengths)
        token_ids: list[int] = []
        for item in rows:
            token_ids += item.token_ids

        slots = np.array([_slot(seq) for seq in sequences], dtype=np.int32)
        row_slots = slots[row_sequence]
        special = [index for index, seq in enumerate(sequences) if seq.lease is not None and not seq.lease.is_plain]
        for index in special:
            start = int(row_starts[index])
            num_base = min(sequences[index].num_base - int(starts[index]), int(lengths[index]))
            row_slots[start : start + max(0, num_base)] = BASE_SLOT
        leases = [lease for index in special if (lease := sequences[index].lease) is not None and lease.has_extras]
        # Layers that look for extras look at experts too: such batches are few.
        skips_experts = self._has_experts and not leases and not any(map(_is_on_experts, sequences))

        prompts = [(index, prompt) for index, item in enumerate(rows) if (prompt := _prompt_rows(item)) is not None]
        prompt_rows = [row_starts[index] + np.arange(one.count) + one.start - starts[index] for index, one in prompts]
        num_each = np.array(num_sampled)
        sampled_rows = np.repeat(row_ends - np.cumsum(num_each), num_each) + np.arange(num_each.sum())
        pooled = tuple((end - item.num_pooled, end) for item, end in zip(rows, row_ends.tolist(), strict=True))
        pooled = tuple((first, end) for first, end in pooled if first < end)

        tables = self._tables[lines, : int(-(-ends.max() // self._page_tokens))]
        layout = Layout(
            token_ids=np.array(token_ids),
            positions=positions,
            row_pages=tables[row_sequence, positions // self._page_tokens],
            row_offsets=positions % self._page_tokens,
            row_slots=row_slots,
            query_lengths=lengths,
            context_lengths=ends,
            tables=tables,
            logits_rows=np.concatenate([*prompt_rows, sampled_rows]),
            targets=np.array([token_id for _, one in prompts for token_id in one.targets], dtype=np.int64),
            state_slots=np.array([seq.state_slot for seq in sequences]),
        )
        form = None if pooled else self._form_of(layout, leases)  # a graph gives logits only
        max_chunks = None
        if form is not None:
            slots = row_slots if special else slots
            num_adapters = np.unique(slots[slots != BASE_SLOT]).size
            has_one_graph = bool(leases) or (self._has_experts and not skips_experts)
            max_chunks = self._max_chunks(form, num_adapters, has_one_graph=has_one_graph)
            if skips_experts and num_adapters:
                form = replace(form, skips_experts=True)
            layout = layout.in_form(form, row_sequence, self._null_page, self._pass_rows[1])
        sampled = row_sequence[sampled_rows]
        message = layout.pack(
            form=form,
            chunk_length=None if form is None else form.chunk_length,
            max_chunks=max_chunks,
            pass_rows=self._pass_rows,
            has_extras=bool(leases),
            skips_experts=skips_experts,
            num_sampled=num_sampled,
            pooled=pooled,
            num_prompt_tops=max((one.sequence.request.sampling.prompt_tops for _, one in prompts), default=0),
            sampling=self._sampling.batch(
                [sequences[index] for index in sampled.tolist()], lines[sampled], positions[sampled_rows]
            ),
        )
        return BuiltStep(message, rows, tuple(one for _, one in prompts))

    def _form_of(self, layout: Layout, leases: list[AdapterLease]) -> GraphForm | None:
        """The graph that computes these rows; None if none does. leases: of adapters that have extras."""
        if len(layout.logits_rows) > self._pass_rows[1]:
            return None
        graph_forms = self._graph_forms
        if leases:
            # Layers that do not find all of it in tables are told on the host which rows have what, one after another.
            graph_forms = self._extra_forms if all(lease.is_tabled for lease in leases) else ()
        extended = layout.query_lengths > 1
        if self._has_states and extended.any():
            return None
        return choose_form(
            graph_forms,
            num_rows=len(layout.positions),
            num_prompts=int(np.count_nonzero(extended)),
            num_keys=int((layout.query_lengths[extended] * layout.context_lengths[extended]).sum()),
            num_pages=layout.tables.shape[1],
        )

    def _max_chunks(self, form: GraphForm, num_adapters: int, *, has_one_graph: bool) -> int:
        """The fewest chunks of a graph of this form that hold so many adapters; all, where there is one graph of it."""
        bounds = chunk_bounds(form.num_rows, self._num_slots, form.chunk_length)
        needed = most_chunks(form.num_rows, num_adapters, form.chunk_length) if num_adapters else 0
        return bounds[-1] if has_one_graph else next(n for n in bounds if n >= needed)

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


def _prompt_rows(item: ScheduledRows) -> PromptRows | None:
    """Return the rows of a sequence that give logprobs of its prompt; None if none do."""
    sequence = item.sequence
    if not sequence.wants_prompt_logprobs:
        return None
    # The logits at position p predict token p + 1; the last prompt position is the sampler's.
    start = sequence.num_computed
    count = min(start + item.num_rows, sequence.num_prompt - 1) - start
    return PromptRows(sequence, start, count) if count > 0 else None


def _place(item: ScheduledRows) -> tuple[bool, int]:
    """Sequences with one row come first, and those of one adapter stand together, so that its rows are neighbours."""
    return item.num_rows > 1, _slot(item.sequence)


def _is_on_experts(sequence: Sequence) -> bool:
    return sequence.lease is not None and sequence.lease.has_experts


def _slot(sequence: Sequence) -> int:
    return BASE_SLOT if sequence.lease is None else sequence.lease.slot

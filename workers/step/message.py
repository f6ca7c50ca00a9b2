"""The message of a step: all that a runner needs to compute it, as plain data that may travel to another process.

The engine builds one a step. Its runner reads it, and so may the runners of other ranks, which know no sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import numpy as np
from torch import Tensor

from lorafleet.kernels.segments import Array, IntArray, SegmentShape
from lorafleet.workers.step.batch import AttentionBatch, StepInputs
from lorafleet.workers.step.forms import GraphForm
from lorafleet.workers.step.passes import PassShape
from lorafleet.workers.step.sampling import SamplingBatch


@dataclass(frozen=True, slots=True)
class StepParts(Generic[Array]):
    """The parts of a step's packed array, int32, as views of it."""

    token_ids: Array
    """(num_rows,): negative for the tokens that the step in flight chooses."""
    positions: Array
    """(num_rows,)."""
    row_pages: Array
    """(num_rows,): KV page that takes each row's key and value."""
    row_offsets: Array
    """(num_rows,): token of that page."""
    query_indptr: Array
    """(num_lines + 1,): first row of each line."""
    context_lengths: Array
    """(num_lines,): tokens each line attends to; 0 for lines that no sequence has."""
    logits_rows: Array
    """(num_logits,): the rows whose logits are wanted: of prompts, then those to sample, then padding."""
    targets: Array
    """(num_logits,): the token whose logprob a prompt's row gives; 0 elsewhere."""
    state_slots: Array
    """(num_lines,): slot of each line's recurrent states; NULL_SLOT for lines that no sequence has."""
    block_tables: Array
    """(num_lines, num_table_pages): KV pages of each line; the tail is unused."""
    segments: Array
    """Of the rows: see `SegmentShape.split`."""
    passes: tuple[Array, ...]
    """The segments of each pass over the head."""


@dataclass(frozen=True, slots=True)
class StepHeader:
    """Header of a step: plain numbers, from which the places of the packed array's parts follow."""

    num_lines: int
    """Sequences that attention takes; in a graph's form also empty ones and the padding's."""
    num_decodes: int
    """Lines at the beginning for sequences of one row."""
    num_table_pages: int
    """Entries of a line's block table."""
    num_logits: int
    """Rows whose logits are wanted, padding included."""
    num_prompt_rows: int
    """The first of them, which give logprobs of prompts."""
    num_prompt_tops: int
    """Likeliest tokens that the prompts' rows give beside."""
    num_sampled: tuple[int, ...]
    """For each sequence, in the order of its rows: how many of them, the last ones, choose the token that follows."""
    has_pending: bool
    """Whether any token is one that the step in flight chooses."""
    form: GraphForm | None
    """Of the captured graph that computes the step, which is padded to it; None: none does."""
    segments: SegmentShape
    passes: tuple[PassShape, ...]
    has_extras: bool = False
    """Whether any adapter has more than low-rank factors."""
    skips_experts: bool = False
    """Whether no adapter is on experts."""
    pooled: tuple[tuple[int, int], ...] = ()
    """(first row, row after the last) of each run of rows whose hidden states are to be summed."""

    @property
    def num_rows(self) -> int:
        return self.segments.num_rows

    @property
    def num_sampled_rows(self) -> int:
        """Rows that choose a token; their logits come after the prompts'."""
        return sum(self.num_sampled)

    @property
    def graph_key(self) -> tuple[GraphForm, int]:
        """Form and chunks of the LoRA work that the step's graph was captured with; no chunks without such work."""
        assert self.form is not None
        return self.form, self.segments.max_chunks if self.segments.num_lora_chunks else 0

    @property
    def size(self) -> int:
        """Integers of the packed array."""
        size = 4 * self.num_rows + 3 * self.num_lines + 1 + 2 * self.num_logits + self.num_lines * self.num_table_pages
        return size + self.segments.size + sum(each.segments.size for each in self.passes)

    def split(self, packed: Array) -> StepParts[Array]:
        """Views of `packed` (size,), on the host or on a device: the one order of its parts."""
        end = 0

        def take(size: int) -> Array:
            nonlocal end
            end += size
            return packed[end - size : end]

        parts = StepParts(
            token_ids=take(self.num_rows),
            positions=take(self.num_rows),
            row_pages=take(self.num_rows),
            row_offsets=take(self.num_rows),
            query_indptr=take(self.num_lines + 1),
            context_lengths=take(self.num_lines),
            logits_rows=take(self.num_logits),
            targets=take(self.num_logits),
            state_slots=take(self.num_lines),
            block_tables=take(self.num_lines * self.num_table_pages).reshape(self.num_lines, self.num_table_pages),
            segments=take(self.segments.size),
            passes=tuple(take(each.segments.size) for each in self.passes),
        )
        assert packed.shape == (end,), (packed.shape, end)
        return parts


@dataclass(frozen=True, slots=True)
class StepMessage:
    """One step: what a runner needs to compute it. Holds numbers and arrays only, so it can be pickled."""

    header: StepHeader
    packed: IntArray
    """(header.size,): everything that the device needs, in one array."""
    sampling: SamplingBatch
    """How the rows to sample choose their tokens."""

    def view(self, packed: Tensor) -> StepInputs:
        """The inputs over `packed`, which holds (or will hold) `self.packed`, int32, on any device."""
        header = self.header
        host, parts = header.split(self.packed), header.split(packed)
        passes = tuple(
            shape.view(parts.logits_rows, shape.segments.view(part, own))
            for shape, part, own in zip(header.passes, parts.passes, host.passes, strict=True)
        )
        return StepInputs(
            token_ids=parts.token_ids,
            positions=parts.positions,
            attention=AttentionBatch(
                row_pages=parts.row_pages,
                row_offsets=parts.row_offsets,
                query_indptr=parts.query_indptr,
                query_lengths=np.diff(host.query_indptr).tolist(),
                context_lengths=parts.context_lengths,
                host_context_lengths=host.context_lengths.tolist(),
                block_tables=parts.block_tables,
                num_decodes=header.num_decodes,
            ),
            segments=header.segments.view(parts.segments, host.segments),
            passes=passes,
            targets=parts.targets,
            state_slots=parts.state_slots,
            host_state_slots=host.state_slots.tolist(),
            has_extras=header.has_extras,
            skips_experts=header.skips_experts,
        )

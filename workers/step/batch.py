"""One step's work as tensors: tokens, positions, KV places, segments, logits rows and sampling settings.

Built once a step from what the scheduler chose; every layer reads the same arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorafleet.kernels.segments import SegmentPlan, Segments
from lorafleet.workers.sequence import Sequence
from lorafleet.workers.step.forms import GraphForm
from lorafleet.workers.step.passes import LogitsPass, PassPlan
from lorafleet.workers.step.sampling import SamplingBatch


@dataclass(frozen=True, slots=True)
class ScheduledRows:
    """The next `num_rows` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_rows: int

    @property
    def samples(self) -> bool:
        """Whether this computes the sequence's last token, so that the next can be chosen."""
        return self.num_rows == self.sequence.num_uncomputed


@dataclass(slots=True)
class AttentionBatch:
    """Where the rows of one forward pass lie in the KV cache, and what each sequence attends to."""

    row_pages: Tensor
    """(num_rows,) int32: KV page that takes each row's key and value."""
    row_offsets: Tensor
    """(num_rows,) int32: token of that page."""
    query_indptr: Tensor
    """(num_sequences + 1,) int32: first row of each sequence."""
    query_lengths: list[int]
    """Rows of each sequence."""
    context_lengths: Tensor
    """(num_sequences,) int32: tokens each sequence attends to, its rows of this pass included."""
    host_context_lengths: list[int]
    block_tables: Tensor
    """(num_sequences, max_pages) int32: KV pages of each sequence; the tail is unused."""
    num_decodes: int
    """Lines at the beginning for sequences of one row; in a graph some of the last are empty, with a context of 0."""
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    """(sequence, sliding window) -> mask on the CPU, the decodes' under sequence -1. Made by the first layer that needs
    it, used by the others."""
    gathers: dict[int, Tensor] = field(default_factory=dict)
    """Likewise: sequence -> which rows of the cache to gather."""


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
    """Rows of each sequence, or of each line of a graph's form: those without one are empty or have the padding."""
    context_lengths: list[int]
    """Tokens each sequence attends to; 0 for lines that no sequence has."""
    num_table_pages: int
    num_decodes: int
    """Lines at the beginning for sequences of one row."""
    num_logits: int
    segments: SegmentPlan
    passes: tuple[PassPlan, ...]
    has_pending: bool
    """Whether any token is one that the step in flight chooses."""
    form: GraphForm | None
    """Of the captured graph that computes the batch, which is padded to it; None: none does."""
    sampled: tuple[Sequence, ...]
    """Sequences that get a token, in the order of the last `len(sampled)` logits rows (padding after them)."""
    prompts: tuple[tuple[Sequence, int, int], ...]
    """(sequence, first position, count): prompt positions whose logits come first."""
    sampling: SamplingBatch

    @property
    def num_rows(self) -> int:
        return len(self.segments.row_slots)

    @property
    def graph_key(self) -> tuple[GraphForm, int]:
        """Form and chunks of the LoRA work that the batch's graph was captured with; no chunks without such work."""
        assert self.form is not None
        return self.form, self.segments.max_chunks if self.segments.num_lora_chunks else 0

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

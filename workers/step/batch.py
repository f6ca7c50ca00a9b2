"""One step's tensors on the device, as views of the packed array: what every layer of the model reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lorafleet.kernels.segments import Segments
from lorafleet.workers.step.passes import LogitsPass


@dataclass(slots=True)
class AttentionBatch:
    """Places of a forward pass's rows in the KV cache, and the keys that each sequence attends to."""

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
    gathers: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Likewise: (sequence, KV heads) -> which rows of the cache to gather."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Inputs of the model in one forward pass, on the device."""

    token_ids: Tensor
    """(num_rows,) int32; negative for the tokens that the step in flight chooses."""
    positions: Tensor
    """(num_rows,) int32."""
    attention: AttentionBatch
    segments: Segments
    passes: tuple[LogitsPass, ...]
    """Over the head: together they take the rows whose logits are wanted, in that order."""
    targets: Tensor
    """(num_logits,) int32, by wanted row: the token whose logprob a prompt's row gives; 0 elsewhere."""
    state_slots: Tensor
    """(num_sequences,) int32: where each sequence's recurrent states are; NULL_SLOT for a base that has none."""
    host_state_slots: list[int]
    has_extras: bool = False
    """Whether any adapter has more than low-rank factors."""
    skips_experts: bool = False
    """Whether no adapter is on experts."""

"""One step's work as tensors: tokens, positions, KV places, segments, logits rows and sampling settings.

Built once a step from what the scheduler chose; every layer reads the same arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafleet.kernels.segments import BASE_SLOT, Segments, build_segments
from lorafleet.workers.model.attention import AttentionBatch
from lorafleet.workers.model.sampler import SamplingBatch
from lorafleet.workers.sequence import Sequence


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
class StepBatch:
    """Tensors of one forward pass. Sequences with one row come first."""

    rows: tuple[ScheduledRows, ...]
    token_ids: Tensor
    """(num_rows,) int64; negative for the tokens that the step in flight chooses."""
    has_pending: bool
    """Whether any of `token_ids` is such a placeholder."""
    positions: Tensor
    """(num_rows,) int64."""
    attention: AttentionBatch
    segments: Segments
    logits_rows: Tensor
    """(num_logits,) int64: rows whose logits are wanted: of prompts with logprobs first, then of the rows to sample."""
    logits_segments: Segments
    sampled: tuple[Sequence, ...]
    """Sequences that get a token, in the order of the last `len(sampled)` logits rows."""
    prompts: tuple[tuple[Sequence, int, int], ...]
    """(sequence, first position, count): prompt positions whose logits come first."""
    sampling: SamplingBatch


def build_batch(
    scheduled: Iterable[ScheduledRows],
    *,
    slot_of: Callable[[Sequence], int],
    page_tokens: int,
    stop_token_ids: frozenset[int],
    device: torch.device,
) -> StepBatch:
    """Lay out the scheduled rows; `slot_of` gives the slot of a sequence's adapter."""
    rows = tuple(sorted(scheduled, key=lambda item: item.num_rows > 1))
    sequences = [item.sequence for item in rows]
    lengths = np.array([item.num_rows for item in rows], dtype=np.int64)
    starts = np.array([seq.num_computed for seq in sequences], dtype=np.int64)
    ends = starts + lengths
    row_starts = np.cumsum(lengths) - lengths
    row_sequence = np.repeat(np.arange(len(rows)), lengths)
    positions = np.arange(lengths.sum()) - np.repeat(row_starts - starts, lengths)
    token_ids = np.concatenate(
        [np.array(seq.token_ids[start:end]) for seq, start, end in zip(sequences, starts, ends, strict=True)]
    )
    max_pages = max(len(seq.kv_pages) for seq in sequences)
    block_tables = np.zeros((len(rows), max_pages), dtype=np.int64)
    for index, seq in enumerate(sequences):
        block_tables[index, : len(seq.kv_pages)] = seq.kv_pages
    slots = np.array([BASE_SLOT if seq.version is None else slot_of(seq) for seq in sequences], dtype=np.int32)
    row_slots = slots[row_sequence]

    prompts: list[tuple[Sequence, int, int]] = []
    prompt_rows: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    sampled: list[Sequence] = []
    sampled_rows: list[int] = []
    for index, item in enumerate(rows):
        seq = item.sequence
        if seq.wants_prompt_logprobs:
            # The logits at position p predict token p + 1; the last prompt position is the sampler's.
            count = min(int(ends[index]), seq.num_prompt - 1) - int(starts[index])
            if count > 0:
                prompts.append((seq, int(starts[index]), count))
                prompt_rows.append(np.arange(row_starts[index], row_starts[index] + count))
        if item.samples:
            sampled.append(seq)
            sampled_rows.append(int(row_starts[index] + lengths[index] - 1))
    logits_rows = np.concatenate([*prompt_rows, np.array(sampled_rows, dtype=np.int64)])

    packed = torch.from_numpy(
        np.concatenate(
            [
                token_ids,
                positions,
                block_tables[row_sequence, positions // page_tokens],
                positions % page_tokens,
                ends,
                logits_rows,
                block_tables.reshape(-1),
            ]
        )
    )
    if device.type != "cpu":
        packed = packed.pin_memory().to(device, non_blocking=True)
    num_rows = len(positions)
    sizes = [num_rows, num_rows, num_rows, num_rows, len(rows), len(logits_rows), block_tables.size]
    token_ids_t, positions_t, row_pages, row_offsets, context_lengths, logits_rows_t, tables = torch.split(
        packed, sizes
    )
    return StepBatch(
        rows=rows,
        token_ids=token_ids_t,
        has_pending=any(seq.has_pending for seq in sequences),
        positions=positions_t,
        attention=AttentionBatch(
            row_pages=row_pages,
            row_offsets=row_offsets,
            query_lengths=lengths.tolist(),
            context_lengths=context_lengths,
            host_context_lengths=ends.tolist(),
            block_tables=tables.view(len(rows), max_pages),
            num_decodes=int((lengths == 1).sum()),
        ),
        segments=build_segments(row_slots, device=device),
        logits_rows=logits_rows_t,
        logits_segments=build_segments(row_slots[logits_rows], device=device),
        sampled=tuple(sampled),
        prompts=tuple(prompts),
        sampling=_sampling(sampled, stop_token_ids),
    )


def _sampling(sampled: list[Sequence], stop_token_ids: frozenset[int]) -> SamplingBatch:
    settings = [seq.request.sampling for seq in sampled]
    return SamplingBatch(
        temperatures=np.array([item.temperature for item in settings], dtype=np.float32),
        top_ps=np.array([item.top_p for item in settings], dtype=np.float32),
        top_ks=np.array([max(item.top_k, 0) for item in settings], dtype=np.int64),
        seeds=[seq.seed for seq in sampled],
        positions=[seq.num_made for seq in sampled],
        forbidden=[
            tuple(stop_token_ids.union(item.stop_token_ids)) if seq.num_made < item.min_tokens else ()
            for seq, item in zip(sampled, settings, strict=True)
        ],
        num_logprobs=max((-1 if item.logprobs is None else item.logprobs for item in settings), default=-1),
    )

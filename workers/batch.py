"""One step's work as tensors: tokens, positions, KV places, segments, logits rows and sampling settings.

Built once a step from what the scheduler chose; every layer reads the same arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorafleet.kernels.segments import BASE_SLOT, Segments, build_segments
from lorafleet.workers.model.attention import AttentionBatch
from lorafleet.workers.model.sampler import SamplingBatch
from lorafleet.workers.sequence import Sequence

Ints = npt.NDArray[np.integer[Any]]

_SETTINGS = np.dtype(
    [("temperature", "f4"), ("top_p", "f4"), ("top_k", "i8"), ("min_tokens", "i8"), ("num_logprobs", "i8")]
)
"""What the sampler needs to know of a sequence."""


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


class BatchBuilder:
    """Makes the batches of one engine. Keeps what does not change from step to step in arrays, a line a sequence."""

    def __init__(
        self, *, page_tokens: int, max_pages: int, stop_token_ids: frozenset[int], device: torch.device
    ) -> None:
        """`max_pages`: KV pages of the longest sequence."""
        self._page_tokens = page_tokens
        self._stop_token_ids = stop_token_ids
        self._device = device
        self._tables = np.zeros((0, max_pages), dtype=np.int32)
        self._settings = np.zeros(0, dtype=_SETTINGS)
        self._free_lines: list[int] = []

    def release(self, sequence: Sequence) -> None:
        """A sequence is over: its line is for another."""
        if sequence.batch_line is not None:
            self._free_lines.append(sequence.batch_line)
            sequence.batch_line = None

    def build(self, scheduled: Iterable[ScheduledRows]) -> StepBatch:
        """Lay out the scheduled rows. Sequences with an adapter hold a lease on it, which is resident."""
        rows = tuple(sorted(scheduled, key=_has_several_rows))
        sequences = [item.sequence for item in rows]
        lines = np.array([self._line(seq) for seq in sequences])
        lengths = np.array([item.num_rows for item in rows])
        starts = np.array([seq.num_computed for seq in sequences])
        num_decodes = int(np.count_nonzero(lengths == 1))
        ends = starts + lengths
        row_starts = np.cumsum(lengths) - lengths
        row_sequence = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(lengths.sum()) - np.repeat(row_starts - starts, lengths)
        token_ids = [seq.token_ids[start] for seq, start in zip(sequences[:num_decodes], starts.tolist(), strict=False)]
        for seq, start, end in zip(sequences[num_decodes:], starts[num_decodes:], ends[num_decodes:], strict=True):
            token_ids += seq.token_ids[start:end]
        slots = np.array([BASE_SLOT if seq.lease is None else seq.lease.slot for seq in sequences], dtype=np.int32)
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

        num_pages = int(-(-ends.max() // self._page_tokens))
        tables = self._tables[lines, :num_pages]
        packed = _pack(
            (
                np.array(token_ids),
                positions,
                tables[row_sequence, positions // self._page_tokens],
                positions % self._page_tokens,
                ends,
                logits_rows,
                tables.reshape(-1),
            ),
            self._device,
        )
        token_ids_t, positions_t, row_pages, row_offsets, context_lengths, logits_rows_t, tables_t = packed
        return StepBatch(
            rows=rows,
            token_ids=token_ids_t,
            has_pending=any(token_id < 0 for token_id in token_ids),
            positions=positions_t,
            attention=AttentionBatch(
                row_pages=row_pages,
                row_offsets=row_offsets,
                query_lengths=lengths.tolist(),
                context_lengths=context_lengths,
                host_context_lengths=ends.tolist(),
                block_tables=tables_t.view(len(rows), num_pages),
                num_decodes=num_decodes,
            ),
            segments=build_segments(row_slots, device=self._device),
            logits_rows=logits_rows_t,
            logits_segments=build_segments(row_slots[logits_rows], device=self._device),
            sampled=sampled,
            prompts=tuple(prompt for _, prompt in prompts),
            sampling=self._sampling(sampled, lines[samples]),
        )

    def _line(self, sequence: Sequence) -> int:
        """The sequence's line, its page table brought up to date."""
        line = sequence.batch_line
        if line is None:
            if not self._free_lines:
                self._grow()
            line = sequence.batch_line = self._free_lines.pop()
            sequence.num_tabled_pages = 0
            settings = sequence.request.sampling
            self._settings[line] = (
                settings.temperature,
                settings.top_p,
                max(settings.top_k, 0),
                settings.min_tokens,
                -1 if settings.logprobs is None else settings.logprobs,
            )
        pages = sequence.kv_pages
        if len(pages) != sequence.num_tabled_pages:
            self._tables[line, sequence.num_tabled_pages : len(pages)] = pages[sequence.num_tabled_pages :]
            sequence.num_tabled_pages = len(pages)
        return line

    def _grow(self) -> None:
        num_lines = len(self._settings)
        added = max(64, num_lines)
        self._free_lines.extend(range(num_lines, num_lines + added))
        self._tables = np.concatenate([self._tables, np.zeros((added, self._tables.shape[1]), dtype=np.int32)])
        self._settings = np.concatenate([self._settings, np.zeros(added, dtype=_SETTINGS)])

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

    def _sampling(self, sampled: tuple[Sequence, ...], lines: Ints) -> SamplingBatch:
        settings = self._settings[lines]
        num_made = np.array([seq.num_made for seq in sampled], dtype=np.int64)
        forbidden: tuple[tuple[int, ...], ...] = ()
        too_early = num_made < settings["min_tokens"]
        if too_early.any():
            forbidden = tuple(
                tuple(self._stop_token_ids.union(seq.request.sampling.stop_token_ids)) if is_too_early else ()
                for seq, is_too_early in zip(sampled, too_early.tolist(), strict=True)
            )
        return SamplingBatch(
            temperatures=settings["temperature"],
            top_ps=settings["top_p"],
            top_ks=settings["top_k"],
            seeds=[seq.seed for seq in sampled],
            positions=num_made,
            forbidden=forbidden,
            num_logprobs=int(settings["num_logprobs"].max(initial=-1)),
        )


def _has_several_rows(item: ScheduledRows) -> bool:
    return item.num_rows > 1


def _pack(arrays: tuple[Ints, ...], device: torch.device) -> list[Tensor]:
    """The arrays as int64 tensors on the device, by one copy."""
    packed = torch.from_numpy(np.concatenate(arrays, dtype=np.int64, casting="unsafe"))
    if device.type != "cpu":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return list(torch.split(packed, [array.size for array in arrays]))

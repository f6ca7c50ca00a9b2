"""Chooses each sequence's next token from its logits, all rows at once, and reports logprobs.

A row's choice depends on its own logits, settings, seed and position only, never on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Settings of the rows to sample, one entry a row."""

    temperatures: npt.NDArray[np.float32]
    """0: the likeliest token."""
    top_ps: npt.NDArray[np.float32]
    top_ks: npt.NDArray[np.int64]
    """0: all tokens."""
    seeds: list[int]
    positions: npt.NDArray[np.int64]
    """How many tokens the sequence has made so far; with the seed it gives the row's random number."""
    forbidden: tuple[tuple[int, ...], ...]
    """Token ids that may not come yet (stop tokens before `min_tokens`); empty when no row has any."""
    num_logprobs: int
    """Alternatives wanted by the row that wants most; -1: no row wants logprobs."""

    @property
    def is_greedy(self) -> bool:
        return not self.temperatures.any()

    def part(self, start: int, end: int) -> SamplingBatch:
        """The settings of the rows from `start` to `end`, which are sampled apart from the others."""
        if (start, end) == (0, len(self.seeds)):
            return self
        return SamplingBatch(
            temperatures=self.temperatures[start:end],
            top_ps=self.top_ps[start:end],
            top_ks=self.top_ks[start:end],
            seeds=self.seeds[start:end],
            positions=self.positions[start:end],
            forbidden=self.forbidden[start:end],
            num_logprobs=self.num_logprobs,
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tokens and their logprobs, one entry a row; on the device, or copied to the host."""

    token_ids: Tensor
    """(rows,) int64."""
    logprobs: Tensor | None
    """(rows,) float32: of each token under the model, before temperature; None: nobody asked."""
    top_ids: Tensor | None
    """(rows, num_top) int64: the likeliest tokens, best first."""
    top_logprobs: Tensor | None
    """(rows, num_top) float32."""
    peaks: Tensor
    """(rows,) float32: the largest logit; where it is not finite the token means nothing."""

    def top(self, row: int, count: int) -> tuple[tuple[int, float], ...]:
        """The `count` likeliest tokens of a row. On the host."""
        assert self.top_ids is not None
        assert self.top_logprobs is not None
        return tuple(zip(self.top_ids[row, :count].tolist(), self.top_logprobs[row, :count].tolist(), strict=True))

    @staticmethod
    def joined(parts: list[Chosen]) -> Chosen | None:
        """What was chosen in several passes, as if it had been in one; None when nothing was."""
        if len(parts) < 2:
            return parts[0] if parts else None

        def join(of: Callable[[Chosen], Tensor | None]) -> Tensor | None:
            columns = [column for one in parts if (column := of(one)) is not None]
            return torch.cat(columns) if columns else None

        return Chosen(
            token_ids=torch.cat([one.token_ids for one in parts]),
            logprobs=join(lambda one: one.logprobs),
            top_ids=join(lambda one: one.top_ids),
            top_logprobs=join(lambda one: one.top_logprobs),
            peaks=torch.cat([one.peaks for one in parts]),
        )

    def to_host(self) -> Chosen:
        """Begin to copy to the host; complete once the device has caught up with an event recorded after this."""
        parts = (self.token_ids, self.logprobs, self.top_ids, self.top_logprobs, self.peaks)
        token_ids, logprobs, top_ids, top_logprobs, peaks = (
            None if part is None else part.to("cpu", non_blocking=True) for part in parts
        )
        assert token_ids is not None
        assert peaks is not None
        return Chosen(token_ids, logprobs, top_ids, top_logprobs, peaks)


def sample(logits: Tensor, batch: SamplingBatch) -> Chosen:
    """logits: (rows, vocab) any float dtype. Does not synchronise with the device."""
    logits = logits.float()
    allowed = logits
    if batch.forbidden:
        allowed = logits.clone()
        for row, banned in enumerate(batch.forbidden):
            if banned:
                allowed[row, list(banned)] = -torch.inf
    peaks, token_ids = allowed.max(dim=-1)
    if not batch.is_greedy:
        token_ids = _draw(allowed, batch)
    if batch.num_logprobs < 0:
        return Chosen(token_ids, None, None, None, peaks)
    return replace(with_logprobs(logits, token_ids, batch.num_logprobs), peaks=peaks)


def with_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Chosen:
    """`token_ids` (rows,) with their logprobs under logits (rows, vocab), and the `num_top` likeliest tokens."""
    logits = logits.float()
    logprobs = logits.log_softmax(dim=-1)
    of_chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    top_logprobs, top_ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return Chosen(token_ids, of_chosen, top_ids, top_logprobs, logits.amax(dim=-1))


def _draw(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Inverse-transform sampling over the sorted, filtered distribution; (rows,) int64."""
    device = logits.device
    temperatures = torch.from_numpy(batch.temperatures).to(device)[:, None]
    is_greedy = temperatures == 0
    scaled = logits / torch.where(is_greedy, 1.0, temperatures)
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1)
    ranks = torch.arange(logits.shape[-1], device=device)
    top_ks = torch.from_numpy(batch.top_ks).to(device)[:, None]
    probabilities = torch.where((top_ks > 0) & (ranks >= top_ks), 0.0, probabilities)
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    mass = probabilities.cumsum(dim=-1)
    top_ps = torch.from_numpy(batch.top_ps).to(device)[:, None]
    # A token stays while the mass before it is below top_p, so the likeliest always stays.
    probabilities = torch.where((mass - probabilities >= top_ps) & (ranks > 0), 0.0, probabilities)
    mass = probabilities.cumsum(dim=-1)
    uniforms = torch.from_numpy(_uniforms(batch.seeds, batch.positions)).to(device)[:, None]
    drawn = torch.searchsorted(mass, uniforms * mass[:, -1:], right=True)
    # At least 0, so that a row of logits that are no numbers yields some token; its peak says that it is none.
    last = ((probabilities > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    drawn = torch.where(is_greedy, 0, torch.minimum(drawn, last))
    return order.gather(1, drawn)[:, 0]


def _uniforms(seeds: list[int], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(rows,) in [0, 1), a function of seed and position: SplitMix64 (Steele et al. 2014), begun at the mixed seed."""
    state = _mix(np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64))
    bits = _mix(state + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

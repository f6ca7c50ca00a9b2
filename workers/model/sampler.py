"""Chooses each sequence's next token from its logits, all rows at once, and reports logprobs.

A row's choice depends on its own logits, settings, seed and position only, never on the batch it is in.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    positions: list[int]
    """How many tokens the sequence has made so far; with the seed it gives the row's random number."""
    forbidden: list[tuple[int, ...]]
    """Token ids that may not come yet (stop tokens before `min_tokens`)."""
    num_logprobs: int
    """Alternatives wanted by the row that wants most; -1: no row wants logprobs."""

    @property
    def is_greedy(self) -> bool:
        return not self.temperatures.any()


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the sampler chose; on the host."""

    token_ids: list[int]
    logprobs: list[float] | None
    """Logprob of each chosen token under the model, before temperature."""
    top: tuple[list[list[int]], list[list[float]]] | None
    """Token ids and logprobs of the likeliest alternatives, best first."""


def sample(logits: Tensor, batch: SamplingBatch) -> Sampled:
    """logits: (rows, vocab) any float dtype. One synchronisation, to fetch what was chosen."""
    logits = logits.float()
    if any(batch.forbidden):
        logits = logits.clone()
        for row, token_ids in enumerate(batch.forbidden):
            if token_ids:
                logits[row, list(token_ids)] = -torch.inf
    chosen = logits.argmax(dim=-1) if batch.is_greedy else _draw(logits, batch)
    if batch.num_logprobs < 0:
        return Sampled(chosen.tolist(), None, None)
    logprobs, top = logprobs_of(logits, chosen, batch.num_logprobs)
    return Sampled(chosen.tolist(), logprobs, top)


def logprobs_of(
    logits: Tensor, token_ids: Tensor, num_top: int
) -> tuple[list[float], tuple[list[list[int]], list[list[float]]]]:
    """Logprobs of `token_ids` (rows,) and of the `num_top` likeliest tokens of each row of logits (rows, vocab)."""
    logprobs = logits.float().log_softmax(dim=-1)
    of_chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return of_chosen.tolist(), (ids.tolist(), values.tolist())


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
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    drawn = torch.where(is_greedy, 0, torch.minimum(drawn, last))
    return order.gather(1, drawn)[:, 0]


def _uniforms(seeds: list[int], positions: list[int]) -> npt.NDArray[np.float32]:
    """(rows,) in [0, 1): counter-based random numbers (Philox, Salmon et al. 2011), a function of seed and position."""
    draws = [
        np.random.Generator(np.random.Philox(key=seed & (2**64 - 1), counter=position)).random(dtype=np.float32)
        for seed, position in zip(seeds, positions, strict=True)
    ]
    return np.array(draws, dtype=np.float32)

"""Chooses each sequence's next token from its logits, all rows at once, and reports logprobs.

A row's choice depends on its own logits, settings, random number and tokens only, never on the batch it is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafleet.workers.model.token_counts import TokenCounts
from lorafleet.workers.step.sampling import (
    DRAW,
    SamplingBatch,
)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tokens and their logprobs, one entry a row; on the device, or copied to the host."""

    token_ids: Tensor
    """(rows,) int64."""
    logprobs: Tensor | None
    """(rows,) float32: of each token under the model, before biases, penalties and temperature; None: nobody asked."""
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
        """Join the choices of several passes into one; None if there are none."""
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


class Sampler:
    """Samples the steps of one engine, in their order; remembers the tokens of those that are penalised for them."""

    def __init__(self) -> None:
        self._counts = TokenCounts()

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Chosen:
        """logits: (rows, vocab) any float dtype, left as they are. Does not synchronise with the device."""
        if batch.is_plain:
            peaks, token_ids = _likeliest(logits)
        else:
            peaks, token_ids = self._choose(logits.float(), batch)
        if batch.num_logprobs < 0:
            return Chosen(token_ids, None, None, None, peaks)
        return replace(with_logprobs(logits, token_ids, batch.num_logprobs), peaks=peaks)

    def _choose(self, logits: Tensor, batch: SamplingBatch) -> tuple[Tensor, Tensor]:
        draws, biases, penalties, starts, prompts = _on_device(batch, logits.device)
        if len(batch.biases) or len(batch.penalties) or len(batch.masked):
            logits = logits.clone()
        if len(batch.biases):
            places = biases["row"] * logits.shape[-1] + biases["token_id"]
            logits.view(-1).scatter_add_(0, places, biases["bias"])
        if len(batch.penalties):
            self._counts.grow(int(batch.penalties["line"].max()) + 1, logits)
            if len(batch.starts):
                self._counts.start(starts["line"], prompts["line"], prompts["token_id"])
            self._counts.penalise(logits, penalties)
        if len(batch.masked):
            _forbid(logits, batch)
        peaks, token_ids = _likeliest(logits)
        if not batch.is_greedy:
            token_ids = _draw(logits, draws)
        if len(batch.penalties):
            self._counts.add(penalties["line"], token_ids[penalties["row"]])
        return peaks, token_ids


def _forbid(logits: Tensor, batch: SamplingBatch) -> None:
    """Let only those tokens come, in the rows that have a mask, whose bits are set. logits: (rows, vocab), changed."""
    rows, words = torch.from_numpy(batch.masked), torch.from_numpy(batch.masks)
    if logits.device.type == "cuda":
        rows, words = rows.pin_memory(), words.pin_memory()
    rows, words = rows.to(logits.device, non_blocking=True), words.to(logits.device, non_blocking=True)
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device) & 1
    may_come = bits.view(len(batch.masked), -1)[:, : logits.shape[-1]] != 0
    # A grammar knows the base's tokens only.
    may_come = F.pad(may_come, (0, logits.shape[-1] - may_come.shape[-1]))
    logits[rows] = logits[rows].masked_fill(~may_come, -torch.inf)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(rows,) float32, the largest logit, and (rows,) int64, where it first is; logits (rows, vocab).

    By parts of a row first: a program a row leaves most of a GPU idle.
    """
    num_rows, width = logits.shape
    num_parts = math.gcd(width, 64)
    in_parts, places = logits.reshape(num_rows, num_parts, width // num_parts).max(dim=-1)
    peaks, parts = in_parts.max(dim=-1)
    within = places.gather(1, parts[:, None])[:, 0]
    return peaks.float(), parts * (width // num_parts) + within


def with_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Chosen:
    """`token_ids` (rows,) with their logprobs under logits (rows, vocab), and the `num_top` likeliest tokens."""
    logits = logits.float()
    logprobs = logits.log_softmax(dim=-1)
    of_chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    top_logprobs, top_ids = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return Chosen(token_ids, of_chosen, top_ids, top_logprobs, logits.amax(dim=-1))


def _on_device(batch: SamplingBatch, device: torch.device) -> list[dict[str, Tensor]]:
    """The columns of the batch's records, int64 and float32, by one copy that nobody waits for."""
    records = (batch.draws, batch.biases, batch.penalties, batch.starts, batch.prompts)
    words = torch.from_numpy(np.concatenate([each.view(np.int32) for each in records]))
    if device.type == "cuda":
        words = words.pin_memory()
    sizes = [len(each) * each.dtype.itemsize // 4 for each in records]
    parts = torch.split(words.to(device, non_blocking=True), sizes)
    return [_columns(each.dtype, part) for each, part in zip(records, parts, strict=True)]


def _columns(kind: np.dtype[np.void], words: Tensor) -> dict[str, Tensor]:
    num_fields = kind.itemsize // 4
    return {
        name: column.view(torch.float32) if kind[name].kind == "f" else column.long()
        for name, column in zip(
            kind.names or (), words.view(len(words) // num_fields, num_fields).unbind(1), strict=True
        )
    }


def _draw(logits: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
    """Inverse-transform sampling over the sorted, filtered distribution; (rows,) int64."""
    temperatures, top_ps, top_ks, min_ps, chances = (draws[name][:, None] for name in DRAW.names or ())
    is_greedy = temperatures == 0
    scaled = logits / torch.where(is_greedy, 1.0, temperatures)
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    likely_enough = probabilities >= min_ps * probabilities[:, :1]
    probabilities = torch.where((top_ks > 0) & (ranks >= top_ks), 0.0, probabilities)
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    mass = probabilities.cumsum(dim=-1)
    # A token stays while the mass before it is below top_p, so the likeliest always stays.
    stays = (mass - probabilities < top_ps) & likely_enough | (ranks == 0)
    probabilities = torch.where(stays, probabilities, 0.0)
    mass = probabilities.cumsum(dim=-1)
    drawn = torch.searchsorted(mass, chances * mass[:, -1:], right=True)
    # At least 0, so that a row of logits that are no numbers yields some token; its peak says that it is none.
    last = ((probabilities > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    drawn = torch.where(is_greedy, 0, torch.minimum(drawn, last))
    return order.gather(1, drawn)[:, 0]

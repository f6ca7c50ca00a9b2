"""Counts each token of each penalised sequence, on the device.

A token is counted in the step that chooses it, so the next step knows it before the host does. A sequence keeps its
line from its first token to its end, preempted or not, and leaves it as it is for the next one to start anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

IN_PROMPT = 1 << 30
"""Set in the count of a token of the prompt; what is below it counts the tokens made."""


class TokenCounts:
    """A line a sequence, made when the first one needs it."""

    def __init__(self) -> None:
        self._counts = torch.zeros((0, 0), dtype=torch.int32)
        """(lines, vocab)."""

    def grow(self, num_lines: int, logits: Tensor) -> None:
        """Have that many lines, of the logits' vocabulary or a larger one before, on their device."""
        old_lines, old_width = self._counts.shape
        if old_lines < num_lines or old_width < logits.shape[-1]:
            shape = max(num_lines, old_lines), max(logits.shape[-1], old_width)
            counts = torch.zeros(shape, dtype=torch.int32, device=logits.device)
            counts[:old_lines, :old_width] = self._counts
            self._counts = counts

    def start(self, lines: Tensor, prompt_lines: Tensor, prompt_token_ids: Tensor) -> None:
        """Empty `lines`; note the tokens of their prompts, pair by pair."""
        self._counts.index_fill_(0, lines, 0)
        places = prompt_lines * self._counts.shape[1] + prompt_token_ids
        self._counts.view(-1).index_fill_(0, places, IN_PROMPT)

    def penalise(self, logits: Tensor, penalties: Mapping[str, Tensor]) -> None:
        """Lower the logits (rows, vocab; in place) of tokens that came before; penalties: columns of `PENALTY`.

        repetition divides a positive logit of any token seen, and multiplies a negative one; frequency is subtracted
        for each time that a token was made, presence once.
        """
        presence, frequency, repetition = (penalties[name][:, None] for name in ("presence", "frequency", "repetition"))
        counts = self._counts[penalties["line"], : logits.shape[-1]]
        own = logits[penalties["row"]]
        own = torch.where(counts > 0, torch.where(own > 0, own / repetition, own * repetition), own)
        made = counts & (IN_PROMPT - 1)
        own -= frequency * made + presence * (made > 0)
        logits.index_copy_(0, penalties["row"], own)

    def add(self, lines: Tensor, token_ids: Tensor) -> None:
        """Each line's sequence has made its token."""
        places = lines * self._counts.shape[1] + token_ids
        self._counts.view(-1).index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

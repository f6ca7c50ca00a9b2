"""The rules by which an attention layer makes weights of its scores, beside causality."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores are products of queries and keys; their softmax weighs the values."""

    scaling: float
    """What products are multiplied with."""
    window: int | None = None
    """Only the last so many tokens, the row's own among them; None: all that came before."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""
    sinks: Tensor | None = None
    """(num_heads,): a score more for each head, which takes weight and gives nothing."""
    key_bias: Tensor | None = None
    """(num_heads, positions up to the longest context) float32: added to a head's scores by the key's position."""

    @property
    def is_plain(self) -> bool:
        """True if there are products and a window alone."""
        return self.softcap is None and self.sinks is None and self.key_bias is None

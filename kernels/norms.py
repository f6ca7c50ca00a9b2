"""Arithmetic between a layer's products as plain data: norms, a branch's way into the residual, and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class NormRule:
    """The norm's arithmetic: weight * x / sqrt(mean(x^2) + eps) over the last dimension, in float32."""

    eps: float
    offset: float = 0.0
    """Added to the weight."""
    is_wide: bool = False
    """Whether only the product with the weight is rounded to the dtype, not what is multiplied with it."""
    is_centred: bool = False
    """Whether x's mean is taken from it first."""


NO_RULE = NormRule(0.0)
"""Stands where there is no norm."""


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A norm with its weight."""

    weight: Tensor
    """(width,)"""
    rule: NormRule


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """The way of a branch's output into the residual: factor * norm(output)."""

    norm: Norm | None = None
    factor: float = 1.0


PLAIN = Branch()

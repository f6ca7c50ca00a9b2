"""Matrices in 8-bit floating point (e4m3) with their scales: what `fp8` and its kernels hand to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest finite value of e4m3."""


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Rows:
    """Activations: values * scales[:, None]."""

    values: Tensor
    """(rows, width) e4m3, contiguous."""
    scales: Tensor
    """(rows,) float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A weight: values * scales[:, None]."""

    values: Tensor
    """(out_dim, in_dim) e4m3, contiguous."""
    scales: Tensor
    """(out_dim,) float32."""
    is_uniform: bool = True
    """True if all scales are the same, as those of weights that are rounded here."""

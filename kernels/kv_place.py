"""Arguments of rotary embedding beside its rows: the place of keys and values, the pairs, and the norms ahead of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafleet.kernels.fp8_values import DTYPE
from lorafleet.kernels.norms import Norm


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """Norms over each head of the query and of the key before they are rotated."""

    query: Norm
    key: Norm
    """Their weights are (head_dim,); they differ in nothing else."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """Pairs of a head's elements that are rotated, and the place of each pair's angle in a row of cos and sin."""

    width: int
    """The first so many elements of a head are rotated, 0: none are."""
    is_interleaved: bool = False
    """A pair is two neighbours; otherwise element i and element width / 2 + i."""
    step: int = 1
    """Pair i has entry i * step."""

    @property
    def num_angles(self) -> int:
        """Entries that a row of cos and sin has at least."""
        return (self.width // 2 - 1) * self.step + 1 if self.width else 0


@dataclass(frozen=True, slots=True)
class KVPlace:
    """Place in one layer's cache of the keys and values of the running pass's rows."""

    keys: Tensor
    """(num_pages, num_kv_heads, page_tokens, head_dim): the layer's cache."""
    values: Tensor
    """The same shape and strides as `keys`."""
    row_pages: Tensor
    """(rows,) int32: page that takes each row's key and value. The caller guarantees that the cache has it."""
    row_offsets: Tensor
    """(rows,) int32: token of that page."""
    key_scales: Tensor | None = None
    """(num_pages, num_kv_heads, page_tokens) float32, of keys in fp8: what they are to be multiplied with."""
    value_scales: Tensor | None = None
    """The same of values."""


def check_scales(name: str, scales: Tensor | None, cache: Tensor) -> None:
    """Raise ValueError unless a cache in fp8 has scales of its shape, and another none."""
    if (cache.dtype == DTYPE) != (scales is not None):
        raise ValueError(
            f"keys and values in fp8 have scales, and others have none; got {cache.dtype} with {name} {scales}"
        )
    if scales is None:
        return
    head_dim = cache.shape[3]
    strides = (cache.stride(0) // head_dim, cache.stride(1) // head_dim, 1)
    if scales.shape != cache.shape[:3] or scales.stride() != strides or scales.dtype != torch.float32:
        raise ValueError(
            f"{name} must be float32 {tuple(cache.shape[:3])} with strides {strides}, got {scales.dtype} "
            f"{tuple(scales.shape)} with {scales.stride()}"
        )
    if scales.device != cache.device:
        raise ValueError(f"{name} must be on {cache.device}, got {scales.device}")

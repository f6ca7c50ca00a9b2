"""Arguments of rotary embedding beside its rows: the place of keys and values, and the norms ahead of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMSNorm over each head of the query and of the key before they are rotated (Qwen3)."""

    query_weight: Tensor
    """(head_dim,)"""
    key_weight: Tensor
    """(head_dim,)"""
    eps: float


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

"""Keys and values of all sequences of one worker, in pages, and who holds each page.

One engine thread calls it. A page is free, held by one or more live sequences, or idle: held by the prefix cache alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafleet.kernels.fp8_values import DTYPE as FP8
from lorafleet.workers.memory.pages import PageAllocator
from lorafleet.workers.memory.prefix_cache import PrefixCache, Tokens


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values that one attention layer keeps of each token."""

    num_kv_heads: int
    head_dim: int
    has_values: bool = True
    """False: values are the first columns of keys, and nothing beside these is kept (latent attention)."""

    @property
    def width(self) -> int:
        """Elements of keys and values of a token."""
        return (1 + self.has_values) * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class KVPageCounts:
    """Pages by holder: `used` by live sequences, `cached` what the prefix cache could give back; the rest is free."""

    used: int
    cached: int
    total: int


class KVCache:
    """The paged K and V tensors of every layer; a page id means the same page in all of them.

    `keys[layer]`, `values[layer]`: (num_pages, num_kv_heads, page_tokens, head_dim). Where they are in fp8,
    `key_scales[layer]`, `value_scales[layer]`: (num_pages, num_kv_heads, page_tokens) float32. The values of a layer
    that keeps none beside its keys are its keys. Every page id that `allocate`, `acquire_prefix` or `insert` returned
    is held until `free` is called with it.
    """

    def __init__(
        self,
        layers: Sequence[LayerKV],
        *,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        prefix_cache: bool = True,
    ) -> None:
        self.page_tokens = page_tokens
        self._device = device
        # Torch's attention multiplies what lies in a sequence's last page beyond its end by a probability of zero.
        # Whoever had the page may have left an infinity there, and zero times that is no number. Our kernels do not
        # read so far.
        self._zeroes_pages = device.type == "cpu"
        self.keys: tuple[Tensor, ...] = tuple(self._zeros(layer, num_pages, dtype, device) for layer in layers)
        self.values: tuple[Tensor, ...] = tuple(
            self._zeros(layer, num_pages, dtype, device) if layer.has_values else keys
            for layer, keys in zip(layers, self.keys, strict=True)
        )
        self.key_scales = self._scales(layers, num_pages, device) if dtype == FP8 else None
        self.value_scales = self._scales(layers, num_pages, device) if dtype == FP8 else None
        self._pages = PageAllocator(num_pages)
        self._num_holders = [0] * num_pages
        self._prefixes = PrefixCache(page_tokens) if prefix_cache else None

    def _zeros(self, layer: LayerKV, num_pages: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = (num_pages, layer.num_kv_heads, self.page_tokens, layer.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device)

    def _scales(self, layers: Sequence[LayerKV], num_pages: int, device: torch.device) -> tuple[Tensor, ...]:
        shapes = ((num_pages, layer.num_kv_heads, self.page_tokens) for layer in layers)
        return tuple(torch.zeros(shape, device=device) for shape in shapes)

    def pages_for(self, num_tokens: int) -> int:
        """Return the number of pages that a sequence's tokens take."""
        return -(-num_tokens // self.page_tokens)

    @staticmethod
    def page_bytes(layers: Sequence[LayerKV], page_tokens: int, dtype: torch.dtype) -> int:
        """Bytes that one page takes over all layers, K and V, with their scales where they are in fp8."""
        of_scale = torch.float32.itemsize if dtype == FP8 else 0
        of_token = sum(
            layer.width * dtype.itemsize + (1 + layer.has_values) * layer.num_kv_heads * of_scale for layer in layers
        )
        return page_tokens * of_token

    @property
    def counts(self) -> KVPageCounts:
        cached = self._prefixes.num_idle if self._prefixes else 0
        return KVPageCounts(used=self._pages.num_used - cached, cached=cached, total=self._pages.num_total)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could give now: free ones and those that the prefix cache would give back."""
        return self._pages.num_free + (self._prefixes.num_idle if self._prefixes else 0)

    def can_allocate(self, num_pages: int) -> bool:
        return num_pages <= self.num_available

    def allocate(self, num_pages: int) -> list[int]:
        """Hold `num_pages` pages of unknown content, taken from the prefix cache where none is free."""
        assert self.can_allocate(num_pages), (num_pages, self.num_available)
        missing = num_pages - self._pages.num_free
        if missing > 0:
            assert self._prefixes is not None
            self._pages.free(self._prefixes.evict(missing))
        pages = self._pages.allocate(num_pages)
        for page in pages:
            self._num_holders[page] = 1
        if pages and self._zeroes_pages:
            self._zero(pages)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """End one hold on each of a sequence's pages, given in the sequence's order. Cached pages become idle."""
        unused = []
        for page in reversed(pages):
            self._num_holders[page] -= 1
            assert self._num_holders[page] >= 0, f"KV page {page} is freed twice"
            if self._num_holders[page] == 0:
                if self._prefixes is not None and page in self._prefixes:
                    self._prefixes.release(page)
                else:
                    unused.append(page)
        self._pages.free(unused)

    def scrub(self, pages: Sequence[int]) -> None:
        """Forget what a sequence computed, for it is not finite: the pages are shared no more, and those that only it
        holds are zeroed. They stay held. A sequence that shares one is no better, and scrubs it in its turn.
        """
        if self._prefixes is not None:
            self._prefixes.forget(pages)
        self._zero([page for page in pages if self._num_holders[page] == 1])

    def match(self, version: str | None, tokens: Tokens, salt: str = "", num_base: int = 0) -> list[int]:
        """Pages that `acquire_prefix` would hold, without holding them."""
        return self._prefixes.match(version, tokens, salt, num_base) if self._prefixes else []

    def acquire_prefix(self, version: str | None, tokens: Tokens, salt: str = "", num_base: int = 0) -> list[int]:
        """Hold the pages of the longest prefix of a prompt that was cached with the same salt; never all of it.

        num_base: how many of the first tokens are computed without the adapter, and shared with the base's requests.
        """
        pages = self.match(version, tokens, salt, num_base)
        for page in pages:
            self._hold(page)
        return pages

    def insert(
        self, version: str | None, tokens: Tokens, pages: Sequence[int], salt: str = "", num_base: int = 0
    ) -> list[int]:
        """Offer a sequence's full pages for sharing; `tokens` are those whose KV is computed, `pages` all its pages.

        Returns the pages that the sequence holds from now on: where another sequence had cached the same prefix first,
        its page replaces this one's, which is freed. Cheap to call again as the sequence grows.
        """
        if self._prefixes is None:
            return list(pages)
        kept = self._prefixes.insert(version, tokens, pages, salt, num_base)
        for mine, shared in zip(pages, kept, strict=True):
            if mine != shared:
                self._hold(shared)
                self.free([mine])
        return kept

    def drop(self, version: str) -> None:
        """Forget the cached pages of an adapter version that is gone for good; live sequences keep theirs."""
        if self._prefixes is not None:
            self._pages.free(self._prefixes.drop(version))

    def _zero(self, pages: list[int]) -> None:
        """After all that was launched before, on a GPU."""
        if not pages:
            return
        indices = torch.tensor(pages, device=self._device)
        for tensor in (*self.keys, *self.values, *(self.key_scales or ()), *(self.value_scales or ())):
            # Zero is zero bytes, and torch cannot index fp8.
            (tensor.view(torch.uint8) if tensor.dtype == FP8 else tensor).index_fill_(0, indices, 0)

    def _hold(self, page: int) -> None:
        if self._num_holders[page] == 0:
            assert self._prefixes is not None
            self._prefixes.hold(page)
        self._num_holders[page] += 1

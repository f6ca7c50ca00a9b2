"""Finds KV pages by their tokens, so that prompts that start alike share them. Knows ids only; `KVCache` calls it.

Full pages form a tree: a page is keyed by the page before it and by its own tokens, and the first page of a prompt by
the adapter version and by who shares it. Where the first tokens are the base's, their pages are shared with the base's
requests, and the page in which the adapter begins is keyed by its version and by that place, too. Keys are compared
whole, never by hash alone, so a page can only match tokens that it was made of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = Sequence[int] | npt.NDArray[np.integer]
"""Token ids; an int32 array packs fastest."""

Root = tuple[str | None, str]
"""The version and the salt."""
Parent = int | Root | tuple[int | Root, str | None, int]
"""The serial of the page before, or what the first page has instead; of the page in which the adapter begins also its
version, and after how many tokens of the page it does."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A cached page. `serial` is never used twice, so a child cannot outlive its parent into another prompt."""

    serial: int
    key: tuple[Parent, bytes]
    version: str | None


class PrefixCache:
    """Cached pages and, of those that no sequence holds (idle), the order in which they were used last.

    A sequence holds whole prefixes and lets them go last page first, so a page becomes idle after the pages that follow
    it and is evicted after them.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._page_bytes = page_tokens * np.dtype(np.int32).itemsize
        self._pages: dict[tuple[Parent, bytes], int] = {}
        self._nodes: dict[int, _Node] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._next_serial = 0

    @property
    def num_pages(self) -> int:
        """Pages that are cached, idle or held."""
        return len(self._nodes)

    @property
    def num_idle(self) -> int:
        """Pages that `evict` could give back."""
        return len(self._idle)

    def __contains__(self, page: int) -> bool:
        return page in self._nodes

    def match(self, version: str | None, tokens: Tokens, salt: str = "", num_base: int = 0) -> list[int]:
        """Pages of the longest cached prefix of `tokens` under `version`; at least one token stays to be computed.

        salt: pages are shared by those that give the same one. num_base: how many of the first tokens are the base's.
        """
        data, size = _pack(tokens), self._page_bytes
        pages: list[int] = []
        serial: int | None = None
        for index in range((len(tokens) - 1) // self._page_tokens):
            parent = self._parent(serial, index, version, salt, num_base)
            page = self._pages.get((parent, data[index * size : (index + 1) * size]))
            if page is None:
                break
            pages.append(page)
            serial = self._nodes[page].serial
        return pages

    def insert(
        self, version: str | None, tokens: Tokens, pages: Sequence[int], salt: str = "", num_base: int = 0
    ) -> list[int]:
        """Cache the full pages of a sequence; `tokens` are those whose KV is computed, `pages` hold them in order.

        Returns `pages`, each replaced by the page that was cached before with the same prefix, if there is one: the
        caller swaps its hold. Costs time in the pages that are new since the last call for the sequence.
        """
        kept = list(pages)
        num_full = min(len(tokens) // self._page_tokens, len(kept))
        first = num_full
        while first > 0 and kept[first - 1] not in self._nodes:
            first -= 1
        serial: int | None = None
        if first > 0:
            node = self._nodes[kept[first - 1]]
            is_base = first * self._page_tokens <= num_base
            assert node.version == (None if is_base else version), "a sequence holds a page of another adapter version"
            serial = node.serial
        data, size = _pack(tokens[first * self._page_tokens : num_full * self._page_tokens]), self._page_bytes
        for index in range(num_full - first):
            parent = self._parent(serial, first + index, version, salt, num_base)
            key = (parent, data[index * size : (index + 1) * size])
            page = self._pages.get(key)
            if page is None:
                page = kept[first + index]
                self._pages[key] = page
                is_base = (first + index + 1) * self._page_tokens <= num_base
                self._nodes[page] = _Node(self._next_serial, key, None if is_base else version)
                self._next_serial += 1
            kept[first + index] = page
            serial = self._nodes[page].serial
        return kept

    def _parent(self, serial: int | None, index: int, version: str | None, salt: str, num_base: int) -> Parent:
        """Return the key of the page at `index`, beside its tokens. `serial`: of the page before it."""
        if num_base == 0:
            return (version, salt) if serial is None else serial
        before: int | Root = (None, salt) if serial is None else serial
        num_base_pages, rest = divmod(num_base, self._page_tokens)
        return (before, version, rest) if index == num_base_pages else before

    def hold(self, page: int) -> None:
        """A sequence uses the cached page again: it cannot be evicted."""
        self._idle.pop(page, None)

    def release(self, page: int) -> None:
        """No sequence uses the cached page any more; it is now the most recently used of the idle ones."""
        assert page in self._nodes, page
        assert page not in self._idle, page
        self._idle[page] = None

    def forget(self, pages: Sequence[int]) -> None:
        """Cache these pages no more; sequences hold them. Pages that follow one of them can be found no more."""
        for page in pages:
            assert page not in self._idle, page
            node = self._nodes.pop(page, None)
            if node is not None:
                del self._pages[node.key]

    def evict(self, num_pages: int) -> list[int]:
        """Forget the `num_pages` idle pages that were used longest ago; they are the caller's."""
        assert num_pages <= len(self._idle), (num_pages, len(self._idle))
        evicted = []
        for _ in range(num_pages):
            page, _ = self._idle.popitem(last=False)
            del self._pages[self._nodes.pop(page).key]
            evicted.append(page)
        return evicted

    def drop(self, version: str | None) -> list[int]:
        """Forget all pages of a version; the idle ones are the caller's, the held ones are no longer cached."""
        dropped = [page for page, node in self._nodes.items() if node.version == version]
        for page in dropped:
            del self._pages[self._nodes.pop(page).key]
        idle = [page for page in dropped if page in self._idle]
        for page in idle:
            del self._idle[page]
        return idle


def _pack(tokens: Tokens) -> bytes:
    return np.asarray(tokens, dtype=np.int32).tobytes()

"""Owners of the pages of a paged memory. Knows ids only; the memory itself belongs to the callers."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out ids `0 .. num_total - 1` of equal pages. Each page has at most one owner; freeing twice asserts.

    A page freed last is given out first, and the pages of one `allocate` come in rising order, so pages that were freed
    together come back as runs of neighbours.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 0, num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_pages

    @property
    def num_total(self) -> int:
        return len(self._is_free)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_free

    def can_allocate(self, num_pages: int) -> bool:
        return num_pages <= len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """`num_pages` ids, rising. The caller has asked `can_allocate`."""
        assert 0 <= num_pages <= len(self._free), (num_pages, len(self._free))
        start = len(self._free) - num_pages
        ids = self._free[start:]
        del self._free[start:]
        ids.sort()
        for page in ids:
            self._is_free[page] = 0
        return ids

    def free(self, ids: Iterable[int]) -> None:
        """Take pages back. Asserts that each of them is out."""
        ids = sorted(ids, reverse=True)
        for page in ids:
            assert 0 <= page < self.num_total, f"page {page} of {self.num_total}"
            assert not self._is_free[page], f"page {page} is freed twice"
            self._is_free[page] = 1
        self._free.extend(ids)

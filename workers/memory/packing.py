"""First-fit decreasing for rows of few distinct widths: thousands of rows take a handful of numpy calls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packing:
    """Places of rows in an image of `num_pages` pages."""

    num_pages: int
    offsets: Ints
    """(num_rows,) first element of each row in the image, rows in the order they were given."""
    page_ends: Ints
    """(num_pages,) elements of each page in use; they are its first."""


@dataclass(frozen=True, slots=True)
class _Runs:
    """All rows of one width: run `i` is `counts[i]` rows side by side from element `starts[i]` of page `pages[i]`."""

    width: int
    pages: Ints
    starts: Ints
    counts: Ints


def count_pages(widths: Ints, counts: Ints, page_elements: int) -> int:
    """Pages that `pack_rows` takes for `counts[i]` rows of `widths[i]` elements."""
    return len(_first_fit(widths, counts, page_elements)[1])


def pack_rows(widths: Ints, counts: Ints, page_elements: int) -> Packing:
    """Lay `counts[i]` rows of `widths[i]` elements into pages, none across a page's end.

    The widest go first, each into the first page with room. Rows of one width keep their order, so the rows of an
    entry are neighbours as far as pages let them. `widths` are at most `page_elements`.
    """
    runs, page_ends = _first_fit(widths, counts, page_elements)
    offsets = np.empty(int(counts.sum()), dtype=np.int64)
    row_widths = np.repeat(widths, counts)
    for run in runs:
        before = np.cumsum(run.counts) - run.counts
        within = np.arange(int(run.counts.sum())) - np.repeat(before, run.counts)
        firsts = run.pages * page_elements + run.starts
        offsets[row_widths == run.width] = np.repeat(firsts, run.counts) + within * run.width
    return Packing(len(page_ends), offsets, page_ends)


def _first_fit(widths: Ints, counts: Ints, page_elements: int) -> tuple[list[_Runs], Ints]:
    page_ends = np.zeros(0, dtype=np.int64)
    runs = []
    for width in np.unique(widths)[::-1].tolist():
        assert 0 < width <= page_elements, (width, page_elements)
        num_rows = int(counts[widths == width].sum())
        room = (page_elements - page_ends) // width
        into_open = np.clip(num_rows - (np.cumsum(room) - room), 0, room)
        left = num_rows - int(into_open.sum())
        per_page = page_elements // width
        into_new = np.full(-(-left // per_page), per_page, dtype=np.int64)
        if left % per_page:
            into_new[-1] = left % per_page
        taken = np.concatenate([into_open, into_new])
        page_ends = np.concatenate([page_ends, np.zeros_like(into_new)])
        pages = np.flatnonzero(taken)
        runs.append(_Runs(width, pages, page_ends[pages], taken[pages]))
        page_ends = page_ends + taken * width
    return runs, page_ends

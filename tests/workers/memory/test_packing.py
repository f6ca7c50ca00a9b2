from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.workers.memory.packing import count_pages, pack_rows

ENTRIES = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), max_size=12)


def first_fit_decreasing(rows: list[int], page_elements: int) -> tuple[list[int], list[int]]:
    """Row by row, as a textbook has it."""
    offsets, ends = [0] * len(rows), list[int]()
    for row in sorted(range(len(rows)), key=lambda row: -rows[row]):
        page = next((page for page, end in enumerate(ends) if end + rows[row] <= page_elements), len(ends))
        if page == len(ends):
            ends.append(0)
        offsets[row] = page * page_elements + ends[page]
        ends[page] += rows[row]
    return offsets, ends


@given(entries=ENTRIES, page_elements=st.integers(12, 40))
def test_packing_is_first_fit_decreasing(entries: list[tuple[int, int]], page_elements: int) -> None:
    widths = np.array([width for width, _ in entries], dtype=np.int64)
    counts = np.array([count for _, count in entries], dtype=np.int64)
    offsets, ends = first_fit_decreasing([width for width, count in entries for _ in range(count)], page_elements)
    packing = pack_rows(widths, counts, page_elements)
    assert packing.offsets.tolist() == offsets
    assert packing.page_ends.tolist() == ends
    assert packing.num_pages == len(ends) == count_pages(widths, counts, page_elements)

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.workers.memory.pages import PageAllocator


def test_pages_come_in_rising_runs() -> None:
    pages = PageAllocator(8)
    first = pages.allocate(3)
    second = pages.allocate(4)
    assert first == [0, 1, 2]
    assert second == [3, 4, 5, 6]
    pages.free(first)
    assert pages.allocate(2) == [0, 1]
    assert (pages.num_free, pages.num_used, pages.num_total) == (2, 6, 8)


def test_no_more_pages_than_there_are() -> None:
    pages = PageAllocator(2)
    assert pages.can_allocate(2)
    assert not pages.can_allocate(3)
    with pytest.raises(AssertionError):
        pages.allocate(3)
    assert pages.allocate(0) == []


@pytest.mark.parametrize("ids", [[0], [1, 1], [9], [-1]], ids=str)
def test_freeing_what_is_not_out_asserts(ids: list[int]) -> None:
    pages = PageAllocator(4)
    pages.allocate(2)
    pages.free([0])
    with pytest.raises(AssertionError):
        pages.free(ids)


@given(num_pages=st.integers(0, 20), steps=st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=60))
def test_every_page_has_one_owner(num_pages: int, steps: list[tuple[bool, int]]) -> None:
    pages = PageAllocator(num_pages)
    owners: list[list[int]] = []
    for wants, number in steps:
        if wants and pages.can_allocate(number):
            owners.append(pages.allocate(number))
        elif owners:
            pages.free(owners.pop(number % len(owners)))
        out = [page for owner in owners for page in owner]
        assert len(out) == len(set(out)) == pages.num_used
        assert pages.num_free == num_pages - len(out)
        assert set(out) <= set(range(num_pages))
        assert all(owner == sorted(owner) for owner in owners)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.workers.memory.prefix_cache import PrefixCache

TOKENS = st.lists(st.integers(0, 1), max_size=13)
VERSIONS = st.sampled_from([None, "v1", "v2"])
P = 2


def test_some_token_is_always_left_to_compute() -> None:
    cache = PrefixCache(4)
    tokens = list(range(8))
    assert cache.insert(None, tokens, [5, 6]) == [5, 6]
    assert cache.match(None, tokens) == [5]
    assert cache.match(None, [*tokens, 8]) == [5, 6]
    assert cache.match(None, []) == []
    assert cache.match(None, [0, 1, 2, 9, 4]) == []


def test_versions_share_nothing() -> None:
    cache = PrefixCache(1)
    cache.insert("v1", [1, 2, 3], [0, 1, 2])
    assert cache.match("v1", [1, 2, 3, 4]) == [0, 1, 2]
    assert cache.match("v2", [1, 2, 3, 4]) == []
    assert cache.match(None, [1, 2, 3, 4]) == []


def test_salts_share_nothing() -> None:
    cache = PrefixCache(1)
    assert cache.insert("v1", [1, 2, 3], [0, 1, 2], "mine") == [0, 1, 2]
    assert cache.insert("v1", [1, 2, 3], [3, 4, 5], "yours") == [3, 4, 5]
    assert cache.match("v1", [1, 2, 3, 4], "mine") == [0, 1, 2]
    assert cache.match("v1", [1, 2, 3, 4], "yours") == [3, 4, 5]
    assert cache.match("v1", [1, 2, 3, 4]) == []
    assert cache.match("v1", [1, 2, 3, 4], "others") == []
    for page in range(6):
        cache.release(page)
    assert sorted(cache.drop("v1")) == list(range(6))


def test_half_pages_are_not_cached() -> None:
    cache = PrefixCache(4)
    assert cache.insert(None, list(range(6)), [0, 1]) == [0, 1]
    assert cache.num_pages == 1
    assert 0 in cache
    assert 1 not in cache


def test_arrays_and_lists_are_the_same_tokens() -> None:
    cache = PrefixCache(2)
    cache.insert(None, np.arange(4, dtype=np.int64), [0, 1])
    assert cache.match(None, tuple(range(5))) == [0, 1]
    assert cache.match(None, np.arange(5, dtype=np.int32)) == [0, 1]


def test_a_page_computed_twice_is_kept_once() -> None:
    cache = PrefixCache(2)
    cache.insert(None, [1, 2, 3, 4], [0, 1])
    assert cache.insert(None, [1, 2, 5, 6, 7], [2, 3, 4]) == [0, 3, 4]
    # The sequence grows, and calls again with what it holds now.
    assert cache.insert(None, [1, 2, 5, 6, 7, 8], [0, 3, 4]) == [0, 3, 4]
    assert cache.match(None, [1, 2, 5, 6, 7, 8, 9]) == [0, 3, 4]
    assert cache.num_pages == 4


def test_idle_pages_go_least_recently_used_first() -> None:
    cache = PrefixCache(1)
    cache.insert(None, [1, 2], [0, 1])
    cache.insert(None, [3], [2])
    for page in (1, 0, 2):
        cache.release(page)
    cache.hold(1)
    cache.hold(0)
    cache.release(1)
    cache.release(0)
    assert cache.num_idle == 3
    assert cache.evict(2) == [2, 1]
    assert cache.match(None, [1, 2, 9]) == [0]
    with pytest.raises(AssertionError):
        cache.evict(2)


def test_dropping_a_version_gives_back_what_is_idle() -> None:
    cache = PrefixCache(1)
    cache.insert("v1", [1, 2], [0, 1])
    cache.insert("v2", [1, 2], [2, 3])
    cache.release(1)
    cache.release(3)
    assert cache.drop("v1") == [1]
    assert 0 not in cache
    assert cache.num_idle == 1
    assert cache.match("v2", [1, 2, 3]) == [2, 3]
    # A sequence that still runs may offer its pages again.
    assert cache.insert("v1", [1, 2, 3], [0, 4, 5]) == [0, 4, 5]
    assert cache.match("v1", [1, 2, 4]) == [0, 4]


def test_the_bases_tokens_are_shared_with_the_base() -> None:
    cache = PrefixCache(2)
    cache.insert(None, [1, 2, 3, 4, 5, 6], [0, 1, 2])
    assert cache.match("v1", [1, 2, 3, 4, 5, 6, 7], num_base=5) == [0, 1]
    assert cache.insert("v1", [1, 2, 3, 4, 5, 6], [3, 4, 5], num_base=5) == [0, 1, 5]
    assert cache.match("v1", [1, 2, 3, 4, 5, 6, 7], num_base=5) == [0, 1, 5]
    assert cache.match("v1", [1, 2, 3, 4, 5, 6, 7], num_base=4) == [0, 1]
    assert cache.match("v1", [1, 2, 3, 4, 5, 6, 7], num_base=1 << 62) == [0, 1, 2]
    assert cache.match("v2", [1, 2, 3, 4, 5, 6, 7], num_base=5) == [0, 1]
    assert cache.match("v1", [1, 2, 3, 4, 5, 6, 7], "salt", num_base=5) == []
    cache.release(5)
    assert cache.drop("v1") == [5]
    assert cache.match(None, [1, 2, 3, 4, 5, 6, 7]) == [0, 1, 2]


NUM_BASE = st.integers(0, 14)
Owned = tuple[tuple[int, str | None], ...]


def owned(version: str | None, tokens: list[int], num_base: int) -> Owned:
    """Each token, and whose adapter computes it."""
    return tuple((token, None if place < num_base else version) for place, token in enumerate(tokens))


@given(st.lists(st.tuples(VERSIONS, TOKENS, NUM_BASE), max_size=12), VERSIONS, TOKENS, NUM_BASE)
def test_matches_are_those_of_a_dictionary(
    inserted: list[tuple[str | None, list[int], int]], version: str | None, prompt: list[int], num_base: int
) -> None:
    cache = PrefixCache(P)
    model: dict[Owned, int] = {}
    next_page = 0
    for of_version, tokens, of_base in inserted:
        of_base = 0 if of_version is None else of_base
        pages = list(range(next_page, next_page + len(tokens) // P + 1))
        next_page += len(pages)
        kept = cache.insert(of_version, tokens, pages, num_base=of_base)
        for index in range(len(tokens) // P):
            key = owned(of_version, tokens[: (index + 1) * P], of_base)
            assert kept[index] == model.setdefault(key, pages[index])
        assert kept[len(tokens) // P :] == pages[len(tokens) // P :]
    num_base = 0 if version is None else num_base
    expected = []
    for end in range(P, len(prompt), P):
        page = model.get(owned(version, prompt[:end], num_base))
        if page is None:
            break
        expected.append(page)
    assert cache.match(version, prompt, num_base=num_base) == expected
    assert cache.num_pages == len(model)

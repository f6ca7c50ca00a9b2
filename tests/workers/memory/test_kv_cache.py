from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorafleet.workers.memory.kv_cache import KVCache, KVPageCounts, LayerKV

CPU = torch.device("cpu")
P = 2


def make(num_pages: int, *, prefix_cache: bool = True) -> KVCache:
    layers = [LayerKV(2, 4), LayerKV(1, 8)]
    return KVCache(
        layers, num_pages=num_pages, page_tokens=P, dtype=torch.float16, device=CPU, prefix_cache=prefix_cache
    )


def test_layers_have_their_own_shapes() -> None:
    cache = make(5)
    assert [tuple(keys.shape) for keys in cache.keys] == [(5, 2, P, 4), (5, 1, P, 8)]
    assert [tuple(values.shape) for values in cache.values] == [(5, 2, P, 4), (5, 1, P, 8)]
    tensors = [*cache.keys, *cache.values]
    assert sum(t.nbytes for t in tensors) == 5 * KVCache.page_bytes([LayerKV(2, 4), LayerKV(1, 8)], P, torch.float16)


def test_finished_prompts_are_found_again_and_given_back_when_memory_is_short() -> None:
    cache = make(4)
    pages = cache.allocate(3)
    pages = cache.insert("v", [1, 2, 3, 4, 5], pages)
    assert cache.counts == KVPageCounts(used=3, cached=0, total=4)
    cache.free(pages)
    assert cache.counts == KVPageCounts(used=0, cached=2, total=4)
    assert cache.match("v", [1, 2, 3, 4, 9]) == pages[:2]
    assert cache.counts.used == 0
    shared = cache.acquire_prefix("v", [1, 2, 3, 9])
    assert shared == pages[:1]
    assert cache.counts == KVPageCounts(used=1, cached=1, total=4)
    assert cache.can_allocate(3)
    assert not cache.can_allocate(4)
    more = cache.allocate(3)
    assert cache.counts == KVPageCounts(used=4, cached=0, total=4)
    assert cache.match("v", [1, 2, 3, 4, 9]) == pages[:1]
    cache.free([*shared, *more])
    assert cache.counts == KVPageCounts(used=0, cached=1, total=4)


def test_the_end_of_a_prefix_is_evicted_before_its_start() -> None:
    cache = make(3)
    pages = cache.insert(None, list(range(6)), cache.allocate(3))
    cache.free(pages)
    cache.free(cache.allocate(1))
    assert cache.match(None, list(range(7))) == pages[:2]


def test_two_sequences_that_computed_the_same_page_share_one() -> None:
    cache = make(4)
    first = cache.insert(None, [1, 2, 3, 4], cache.allocate(2))
    second = cache.insert(None, [1, 2, 3, 4], cache.allocate(2))
    assert second == first
    assert cache.counts == KVPageCounts(used=2, cached=0, total=4)
    cache.free(first)
    assert cache.counts.used == 2
    cache.free(second)
    assert cache.counts == KVPageCounts(used=0, cached=2, total=4)


def test_pages_of_a_dead_version_are_free_when_the_last_sequence_ends() -> None:
    cache = make(4)
    pages = cache.insert("v", [1, 2, 3, 4], cache.allocate(2))
    shared = cache.acquire_prefix("v", [1, 2, 3])
    cache.drop("v")
    assert cache.match("v", [1, 2, 3]) == []
    cache.free(pages)
    cache.free(shared)
    assert cache.counts == KVPageCounts(used=0, cached=0, total=4)


def test_scrubbed_pages_are_finite_and_shared_no_more() -> None:
    cache = make(6)
    mine = cache.insert("v", [1, 2, 3, 4, 5], cache.allocate(3))
    sharing = cache.acquire_prefix("v", [1, 2, 9])
    for tensor in (*cache.keys, *cache.values):
        tensor[mine] = float("nan")
    cache.scrub(mine)
    assert cache.match("v", [1, 2, 3, 4, 5]) == []
    cache.free(mine)
    assert cache.counts == KVPageCounts(used=1, cached=0, total=6)
    cache.scrub(sharing)
    cache.free(sharing)
    assert cache.counts == KVPageCounts(used=0, cached=0, total=6)
    assert all(bool(tensor.isfinite().all()) for tensor in (*cache.keys, *cache.values))


def test_without_a_prefix_cache_nothing_is_kept() -> None:
    cache = make(2, prefix_cache=False)
    pages = cache.allocate(2)
    assert cache.insert(None, [1, 2, 3, 4], pages) == pages
    cache.free(pages)
    cache.drop("v")
    assert cache.acquire_prefix(None, [1, 2, 3]) == []
    assert cache.counts == KVPageCounts(used=0, cached=0, total=2)


def test_freeing_twice_asserts() -> None:
    cache = make(2)
    pages = cache.allocate(1)
    cache.free(pages)
    with pytest.raises(AssertionError):
        cache.free(pages)


@dataclass
class Running:
    version: str | None
    tokens: list[int]
    pages: list[int] = field(default_factory=list)


class KVCacheMachine(RuleBasedStateMachine):
    """Sequences come, grow, offer their pages and go, against a dictionary from prefix to page and an LRU list."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.cache = make(num_pages)
        self.running: list[Running] = []
        self.cached: dict[tuple[str | None, tuple[int, ...]], int] = {}
        self.idle: list[int] = []

    def holders(self, page: int) -> int:
        return sum(sequence.pages.count(page) for sequence in self.running)

    def allocate(self, sequence: Running) -> bool:
        """Room for all the sequence's tokens."""
        missing = -(-len(sequence.tokens) // P) - len(sequence.pages)
        free = self.cache.counts.total - len({p for s in self.running for p in s.pages}) - len(self.idle)
        assert self.cache.can_allocate(missing) == (missing <= free + len(self.idle))
        if not self.cache.can_allocate(missing):
            return False
        for _ in range(missing - free):
            evicted = self.idle.pop(0)
            self.cached = {key: page for key, page in self.cached.items() if page != evicted}
        in_use = {p for s in self.running for p in s.pages} | set(self.idle)
        pages = self.cache.allocate(missing)
        assert not in_use & set(pages)
        sequence.pages += pages
        return True

    def finish(self, sequence: Running) -> None:
        self.running.remove(sequence)
        self.cache.free(sequence.pages)
        for page in reversed(sequence.pages):
            if page in self.cached.values() and not self.holders(page):
                self.idle.append(page)

    @rule(version=st.sampled_from([None, "v"]), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def admit(self, version: str | None, tokens: list[int]) -> None:
        expected = []
        for end in range(P, len(tokens), P):
            if (version, tuple(tokens[:end])) not in self.cached:
                break
            expected.append(self.cached[version, tuple(tokens[:end])])
        assert self.cache.match(version, tokens) == expected
        sequence = Running(version, tokens, self.cache.acquire_prefix(version, tokens))
        assert sequence.pages == expected
        self.idle = [page for page in self.idle if page not in expected]
        self.running.append(sequence)
        if not self.allocate(sequence):
            self.finish(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        sequence.tokens += more
        if not self.allocate(sequence):
            self.finish(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        num_computed = data.draw(st.integers(0, len(sequence.tokens)))
        kept = self.cache.insert(sequence.version, sequence.tokens[:num_computed], sequence.pages)
        for index in range(num_computed // P):
            key = (sequence.version, tuple(sequence.tokens[: (index + 1) * P]))
            sequence.pages[index] = self.cached.setdefault(key, sequence.pages[index])
            if sequence.pages[index] in self.idle:
                self.idle.remove(sequence.pages[index])
        assert kept == sequence.pages

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.finish(data.draw(st.sampled_from(self.running)))

    @rule()
    def drop(self) -> None:
        self.cache.drop("v")
        dropped = {page for (version, _), page in self.cached.items() if version == "v"}
        self.cached = {key: page for key, page in self.cached.items() if page not in dropped}
        self.idle = [page for page in self.idle if page not in dropped]

    @invariant()
    def accounts_are_exact(self) -> None:
        used = {page for sequence in self.running for page in sequence.pages}
        counts = self.cache.counts
        assert (counts.used, counts.cached) == (len(used), len(self.idle))
        assert self.cache.num_available == counts.total - len(used)

    def teardown(self) -> None:
        for sequence in list(getattr(self, "running", [])):
            self.finish(sequence)
        if hasattr(self, "cache"):
            self.accounts_are_exact()
            self.cache.free(self.cache.allocate(self.cache.counts.total))


TestKVCacheMachine = KVCacheMachine.TestCase
TestKVCacheMachine.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


def test_a_cache_in_fp8_has_scales() -> None:
    fp8, fp8_layers = torch.float8_e4m3fn, (LayerKV(2, 4), LayerKV(1, 8))
    cache = KVCache(fp8_layers, num_pages=5, page_tokens=P, dtype=fp8, device=torch.device("cpu"))
    assert cache.key_scales is not None
    assert cache.value_scales is not None
    assert [tuple(scales.shape) for scales in cache.key_scales] == [(5, 2, P), (5, 1, P)]
    tensors = [*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales]
    assert sum(tensor.nbytes for tensor in tensors) == 5 * KVCache.page_bytes(fp8_layers, P, fp8)
    pages = cache.allocate(2)
    for tensor in tensors:
        tensor.copy_(torch.full(tensor.shape, torch.nan))
    cache.scrub(pages)
    for tensor in tensors:
        is_zero = [not bool(page.float().any()) for page in tensor]
        assert is_zero == [index in pages for index in range(5)]


def test_what_two_share_is_scrubbed_by_the_last() -> None:
    """Two like sequences have no page of their own, once a full one has been offered by both."""
    cache = make(4)
    first = cache.insert("v", [1, 2], cache.allocate(1))
    second = cache.insert("v", [1, 2], cache.allocate(1))
    assert first == second
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    cache.scrub(first)
    cache.free(first)
    cache.scrub(second)
    assert all(tensor[second].eq(0).all() for tensor in (*cache.keys, *cache.values))
    cache.free(second)
    assert cache.counts == KVPageCounts(used=0, cached=0, total=4)

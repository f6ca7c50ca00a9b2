"""The cache against a list that is kept in order by hand."""

from __future__ import annotations

from contextlib import ExitStack

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorafleet.adapter_store.host_cache import HostCache

CAPACITY = 100
versions = st.sampled_from("abcdef")


class CacheMachine(RuleBasedStateMachine):
    """`order` holds (version, value, bytes), least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: HostCache[int] = HostCache(CAPACITY)
        self.order: list[tuple[str, int, int]] = []
        self.holds: list[tuple[str, ExitStack]] = []
        self.counter = 0

    def used(self) -> int:
        return sum(num_bytes for _, _, num_bytes in self.order)

    def evict(self) -> None:
        held = {version for version, _ in self.holds}
        for entry in list(self.order):
            if self.used() > CAPACITY and entry[0] not in held:
                self.order.remove(entry)

    @rule(version=versions, num_bytes=st.integers(0, 120))
    def put(self, version: str, num_bytes: int) -> None:
        self.counter += 1
        self.cache.put(version, self.counter, num_bytes)
        self.order = [entry for entry in self.order if entry[0] != version]
        if num_bytes <= CAPACITY:
            self.order.append((version, self.counter, num_bytes))
            self.evict()

    @rule(version=versions)
    def get(self, version: str) -> None:
        entry = next((entry for entry in self.order if entry[0] == version), None)
        assert self.cache.get(version) == (entry[1] if entry else None)
        if entry:
            self.order.remove(entry)
            self.order.append(entry)

    @rule(version=versions)
    def drop(self, version: str) -> None:
        self.cache.drop(version)
        self.order = [entry for entry in self.order if entry[0] != version]

    @rule(version=versions)
    def hold(self, version: str) -> None:
        stack = ExitStack()
        stack.enter_context(self.cache.hold(version))
        self.holds.append((version, stack))

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        version, stack = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        stack.close()
        if all(version != other for other, _ in self.holds):
            self.evict()

    @invariant()
    def is_the_same(self) -> None:
        assert len(self.cache) == len(self.order)
        assert all(version in self.cache for version, _, _ in self.order)
        assert self.cache.num_bytes == self.used()
        held = {version for version, _ in self.holds}
        assert self.cache.num_bytes <= CAPACITY or all(entry[0] in held for entry in self.order)


TestCache = CacheMachine.TestCase

"""10,000 random steps over pool, residency and leases, against a dictionary."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.workers.memory.adapter_pool import AdapterPool, UploadedAdapter
from lorafleet.workers.memory.page_plan import pack
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.memory.residency import AdapterLease, Residency
from tests.workers.memory.geometries import (
    BIASES,
    EVERYTHING,
    LAYER,
    MATRICES,
    NORMS,
    TINY,
    groups_of,
    manifest_of,
    weights_of,
)
from tests.workers.memory.readback import assert_serves

GROUPS = groups_of(TINY)
LAYOUT = PoolLayout.of(TINY, GROUPS, 8)
KINDS = [
    (1, ("q_proj",), ()),
    (2, ("q_proj", "v_proj"), NORMS),
    (8, ("k_proj", "o_proj"), ()),
    (3, LAYER, (*BIASES, *NORMS)),
    (5, EVERYTHING, MATRICES[1:]),
    (4, ("q_proj",), (*MATRICES, *BIASES, *NORMS)),
    (5, EVERYTHING, ()),
    (0, (), NORMS[:1]),
]
CATALOGUE: list[AdapterWeights] = [
    weights_of(TINY, manifest_of(TINY, f"v{index}", rank, targets, extras=extras), index)
    for index, (rank, targets, extras) in enumerate(2 * KINDS)
]
PAGES = {weights.manifest.version: pack(weights.manifest, LAYOUT).num_pages for weights in CATALOGUE}
STEPS, EXAMPLES = 100, 100


@dataclass
class Model:
    """What should be true of one version that has pages."""

    weights: AdapterWeights
    uploaded: UploadedAdapter | None = None
    leases: list[AdapterLease] = field(default_factory=list)
    holds: int = 0
    loaded: bool = False
    pinned: bool = False
    retired: bool = False

    @property
    def stays(self) -> bool:
        return not self.loaded or bool(self.leases) or self.holds > 0


class ResidencyMachine(RuleBasedStateMachine):
    num_steps = 0

    @initialize(num_pages=st.integers(max(PAGES.values()) // 2, 2 * max(PAGES.values())), max_slots=st.integers(1, 6))
    def start(self, num_pages: int, max_slots: int) -> None:
        pool_bytes = num_pages * LAYOUT.page_bytes
        self.pool = AdapterPool(LAYOUT, pool_bytes=pool_bytes, max_slots=max_slots, device=torch.device("cpu"))
        self.residency = Residency(self.pool)
        self.model: dict[str, Model] = {}  # least recently used first
        self.evicted: set[str] = set()
        self.loads = self.evictions = self.reloads = 0

    def touch(self, version: str) -> None:
        """A use ended."""
        entry = self.model.pop(version)
        if not entry.retired or entry.stays:
            self.model[version] = entry

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.model)))

    def has_room(self, free_pages: int, free_slots: int, version: str) -> bool:
        return PAGES[version] <= free_pages and free_slots >= 1

    @rule(index=st.integers(0, len(CATALOGUE) - 1))
    def reserve(self, index: int) -> None:
        weights = CATALOGUE[index]
        version = weights.manifest.version
        if version in self.model:
            return
        free_pages = self.pool.num_pages_total - sum(PAGES[v] for v in self.model)
        free_slots = self.pool.num_slots - len(self.model)
        unused = [v for v, entry in self.model.items() if not entry.stays and not entry.pinned]
        fits = self.has_room(free_pages + sum(PAGES[v] for v in unused), free_slots + len(unused), version)
        assert (self.residency.victims(weights.manifest) is not None) == fits
        if not fits:
            before = self.residency.snapshot()
            assert self.residency.try_reserve(weights.manifest) is None
            assert self.residency.snapshot() == before
            return
        # The shortest run of least recently used ones, less those that the later ones make needless.
        gone: list[str] = []
        while not self.has_room(free_pages + sum(PAGES[v] for v in gone), free_slots + len(gone), version):
            gone.append(unused.pop(0))
        for victim in list(reversed(gone)):
            rest = [v for v in gone if v != victim]
            if self.has_room(free_pages + sum(PAGES[v] for v in rest), free_slots + len(rest), version):
                gone = rest
        assert self.residency.victims(weights.manifest) == tuple(gone)
        allocation = self.residency.try_reserve(weights.manifest)
        assert allocation is not None
        for victim in gone:
            del self.model[victim]
            self.evicted.add(victim)
            self.evictions += 1
        self.model[version] = Model(weights, self.pool.upload(allocation, weights))

    @precondition(lambda self: any(not entry.loaded for entry in self.model.values()))
    @rule(data=st.data(), fails=st.integers(0, 4))
    def end_load(self, data: st.DataObject, fails: int) -> None:
        version = data.draw(st.sampled_from(sorted(v for v, entry in self.model.items() if not entry.loaded)))
        entry = self.model[version]
        if fails == 0 and not entry.leases and not entry.holds:
            self.residency.abandon(version)
            del self.model[version]
            return
        assert entry.uploaded is not None
        self.residency.publish(entry.uploaded)
        entry.loaded = True
        self.loads += 1
        if version in self.evicted:
            self.evicted.remove(version)
            self.reloads += 1
        self.touch(version)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        version = self.pick(data)
        self.model[version].leases.append(self.residency.acquire(version))
        self.model[version] = self.model.pop(version)

    @precondition(lambda self: any(entry.leases for entry in self.model.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(v for v, entry in self.model.items() if entry.leases)))
        self.model[version].leases.pop().release()
        self.touch(version)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        version = self.pick(data)
        self.residency.hold(version)
        self.model[version].holds += 1
        self.model[version].retired = False

    @precondition(lambda self: any(entry.holds for entry in self.model.values()))
    @rule(data=st.data())
    def unhold(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(v for v, entry in self.model.items() if entry.holds)))
        self.residency.unhold(version)
        self.model[version].holds -= 1
        self.touch(version)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), pins=st.integers(0, 2))
    def pin(self, data: st.DataObject, pins: int) -> None:
        version = self.pick(data)
        if pins == 0:
            self.residency.pin(version)
            self.model[version].pinned = True
            self.model[version].retired = False
        else:
            self.residency.unpin(version)
            self.model[version].pinned = False

    @precondition(lambda self: self.model)
    @rule(data=st.data(), restores=st.integers(0, 2))
    def retire(self, data: st.DataObject, restores: int) -> None:
        version = self.pick(data)
        entry = self.model[version]
        if restores == 0:
            self.residency.restore(version)
            entry.retired = False
            return
        self.residency.retire(version)
        self.evicted.discard(version)
        entry.retired, entry.pinned = True, False
        if not entry.stays:
            del self.model[version]

    @rule()
    def contents_are_right(self) -> None:
        for lease in [entry.leases[0] for entry in self.model.values() if entry.leases and entry.loaded]:
            assert_serves(self.pool, GROUPS, lease.slot, self.model[lease.version].weights)

    @invariant()
    def accounts_are_exact(self) -> None:
        type(self).num_steps += 1
        snapshot = self.residency.snapshot()
        assert snapshot.pages_used == self.pool.num_pages_used == sum(PAGES[version] for version in self.model)
        assert snapshot.pages_total == self.pool.num_pages_total
        assert self.pool.ideal_bytes == sum(entry.weights.manifest.num_bytes for entry in self.model.values())
        assert self.pool.num_slots_free == self.pool.num_slots - len(self.model)
        assert len({use.slot for use in snapshot.adapters}) == len(self.model)
        loaded = [version for version, entry in self.model.items() if entry.loaded and entry.weights.extras]
        assert {use.slot for use in snapshot.adapters if use.version in loaded} == self.pool.extras.keys()
        assert (snapshot.loads, snapshot.evictions, snapshot.reloads_after_eviction) == (
            self.loads,
            self.evictions,
            self.reloads,
        )
        assert [use.version for use in snapshot.adapters] == list(self.model)
        for use, entry in zip(snapshot.adapters, self.model.values(), strict=True):
            state = "retired" if entry.retired else "resident" if entry.loaded else "loading"
            assert (use.state, use.leases, use.holds, use.pinned) == (
                state,
                len(entry.leases),
                entry.holds,
                entry.pinned,
            )
            assert (use.pages, use.rank) == (PAGES[use.version], entry.weights.manifest.rank)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.contents_are_right()
        for version, entry in list(self.model.items()):
            for lease in entry.leases:
                lease.release()
            for _ in range(entry.holds if version in self.residency else 0):
                self.residency.unhold(version)
            if version in self.residency and not entry.loaded:
                self.residency.abandon(version)
            self.residency.retire(version)
        assert (self.pool.num_pages_used, self.pool.ideal_bytes, len(self.residency)) == (0, 0, 0)
        assert self.pool.num_slots_free == self.pool.num_slots
        assert not self.pool.extras


@pytest.mark.slow
def test_ten_thousand_random_steps_leak_nothing() -> None:
    ResidencyMachine.num_steps = 0
    limits = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    while ResidencyMachine.num_steps < 10_000:
        run_state_machine_as_test(ResidencyMachine, settings=limits)

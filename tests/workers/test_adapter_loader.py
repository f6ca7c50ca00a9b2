"""The loader with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.workers.adapter_loader import FORGET_S, REFRESH_S, AdapterLoader
from lorafleet.workers.detokenizer import Detokenizer
from lorafleet.workers.errors import AdapterUnavailable, EngineFailed, NoRoomError
from lorafleet.workers.memory.adapter_pool import AdapterPool
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.memory.residency import Residency
from lorafleet.workers.request import EngineRequest, SamplingParams
from lorafleet.workers.sequence import AdapterReadiness, Sequence
from tests.support.clock import Clock
from tests.support.wait import eventually
from tests.workers.memory.geometries import ATTENTION, TINY, groups_of, manifest_of, weights_of

WEIGHTS = {
    version: weights_of(TINY, manifest_of(TINY, version, 8, ATTENTION), seed)
    for seed, version in enumerate(("a", "b", "c"))
}


class Loading:
    """A loader over a pool with room for `capacity` adapters."""

    def __init__(self, capacity: int = 2) -> None:
        layout = PoolLayout.of(TINY, groups_of(TINY), 8)
        probe = AdapterPool(layout, pool_bytes=1 << 22, max_slots=8, device=torch.device("cpu"))
        pages = probe.num_pages(WEIGHTS["a"].manifest)
        self.pool = AdapterPool(
            layout, pool_bytes=capacity * pages * layout.page_bytes, max_slots=8, device=torch.device("cpu")
        )
        self.residency = Residency(self.pool)
        self.clock = Clock()
        self.fetched: list[str] = []
        self.gone: list[str] = []
        self.loader = AdapterLoader(self.pool, self.residency, self.fetch, on_gone=self.gone.append, clock=self.clock)

    def fetch(self, version: str) -> AdapterWeights:
        self.fetched.append(version)
        if version not in WEIGHTS:
            raise KeyError(version)
        return WEIGHTS[version]

    def until(self, condition: Callable[[], bool]) -> None:
        """Let the loader's threads work; its clock stands still."""

        def is_so() -> bool:
            if condition():
                return True
            self.loader.publish_ready()
            return False

        eventually(is_so)

    def load(self, version: str, *, hold_s: float = 0.0, pinned: bool = False) -> None:
        future = self.loader.make_resident(version, hold_s=hold_s, pinned=pinned)
        self.until(future.done)
        future.result()

    def use(self, version: str) -> tuple[int, bool, str]:
        return next((u.holds, u.pinned, u.state) for u in self.residency.snapshot().adapters if u.version == version)

    def tick(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.loader.publish_ready()


def sequence_of(version: str) -> Sequence:
    request = EngineRequest("one", version, (1, 2, 3), SamplingParams())
    detokenizer = Detokenizer(None, (), request.prompt_token_ids)
    return Sequence(request, arrival_s=0.0, max_tokens=4, seed=0, detokenizer=detokenizer, token_ids=[1, 2, 3])


def test_a_hold_runs_out() -> None:
    run = Loading(capacity=1)
    run.load("a", hold_s=5.0)
    run.load("a", hold_s=9.0)
    assert run.use("a") == (2, False, "resident")
    with pytest.raises(NoRoomError):
        run.load("b")
    run.tick(6.0)
    assert run.use("a") == (1, False, "resident")
    run.tick(4.0)
    assert run.use("a") == (0, False, "resident")
    run.load("b")
    assert "a" not in run.residency


def test_what_nobody_asks_for_any_more_is_let_go() -> None:
    """Weights that came when there was no room for them, for a request that has gone since."""
    run = Loading(capacity=1)
    run.load("a", hold_s=1000.0)
    run.loader.want("b")
    run.until(lambda: run.loader._loads["b"].weights is not None)
    run.tick(FORGET_S - 1)
    assert "b" in run.loader._loads
    run.tick(2.0)
    assert "b" not in run.loader._loads
    run.tick(1000.0)
    run.load("b")
    assert run.fetched == ["a", "b", "b"]


def test_resident_versions_are_fresh_enough() -> None:
    run = Loading()
    run.load("a")
    run.tick(REFRESH_S)
    assert run.loader.resident_versions == ("a",)
    run.load("b")
    run.loader.publish_ready()
    assert set(run.loader.resident_versions) == {"a", "b"}
    run.load("c")
    run.tick(REFRESH_S)
    assert set(run.loader.resident_versions) == {"b", "c"}


def test_a_version_is_gone_when_its_last_user_is() -> None:
    run = Loading()
    run.load("a")
    run.load("b")
    lease = run.residency.acquire("a")
    run.loader.reconcile({})
    run.tick(REFRESH_S)
    assert run.gone == ["b"]
    lease.release()
    run.tick(REFRESH_S)
    assert run.gone == ["b", "a"]


def test_a_version_that_is_named_again_is_not_gone() -> None:
    run = Loading()
    run.load("a")
    lease = run.residency.acquire("a")
    run.loader.reconcile({})
    run.loader.reconcile({"a": False})
    lease.release()
    run.tick(REFRESH_S)
    assert run.gone == []
    assert run.use("a") == (0, False, "resident")


def test_loads_are_timed_from_the_first_wish() -> None:
    run = Loading()
    run.loader.want("a")
    run.clock.now_s = 3.0
    run.load("a")
    assert list(run.loader.load_s) == [3.0]


def test_a_version_is_coming_while_it_has_pages_and_is_not_live() -> None:
    run = Loading()
    assert not run.loader.is_coming("a")
    future = run.loader.make_resident("a", hold_s=0.0, pinned=False)
    assert not run.loader.is_coming("a"), "it may find no room yet"
    run.until(lambda: "a" in run.residency)
    assert run.loader.is_coming("a")
    run.until(future.done)
    assert not run.loader.is_coming("a")


def test_a_failure_is_forgotten_and_tried_again() -> None:
    run = Loading()
    with pytest.raises(AdapterUnavailable):
        run.load("absent")
    assert list(run.loader.take_failures()) == ["absent"]
    run.loader.forget("absent")
    with pytest.raises(AdapterUnavailable):
        run.load("absent")
    assert run.fetched == ["absent"] * 2


def test_close_fails_who_waits() -> None:
    run = Loading(capacity=1)
    future = run.loader.make_resident("a", hold_s=0.0, pinned=False)
    run.loader.close()
    assert isinstance(future.exception(timeout=1), EngineFailed)


def test_a_version_that_found_room_after_all_has_not_failed() -> None:
    """It found none beside a pinned one, which then was unpinned before the engine took the failure."""
    run = Loading(capacity=1)
    told: list[None] = []
    run.load("a", pinned=True)
    run.loader.on_progress = lambda: told.append(None)
    run.loader.want("b")
    run.until(lambda: run.loader._loads["b"].weights is not None)
    told.clear()
    sequence = sequence_of("b")
    assert run.loader.try_ready(sequence) is AdapterReadiness.NO_ROOM
    assert told, "the engine learns of it at once"
    run.loader.reconcile({"a": False, "b": True})
    for version in run.loader.take_failures():
        run.loader.forget(version)
    run.until(lambda: run.loader.try_ready(sequence) is AdapterReadiness.READY)
    assert run.use("b") == (0, True, "resident")
    assert "a" not in run.residency


def test_only_what_the_store_was_asked_about_can_have_lost_its_name() -> None:
    run = Loading()
    run.load("a")
    run.load("b")
    run.loader.reconcile({"a": False}, asked=("a",))
    assert run.use("b") == (0, False, "resident")
    run.loader.reconcile({"a": False}, asked=("a", "b"))
    assert "b" not in run.residency

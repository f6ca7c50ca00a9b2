from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.workers.errors import NoRoomError
from lorafleet.workers.memory.adapter_pool import AdapterPool, Allocation, UploadedAdapter
from lorafleet.workers.memory.pool_layout import PoolLayout
from lorafleet.workers.memory.residency import Residency
from tests.workers.memory.geometries import TINY, groups_of, manifest_of, weights_of

LAYOUT = PoolLayout.of(TINY, groups_of(TINY), 8)


def small(version: str) -> AdapterManifest:
    return manifest_of(TINY, version, 4, ("q_proj", "o_proj"))


def large(version: str) -> AdapterManifest:
    return manifest_of(TINY, version, 8, ("q_proj", "o_proj"))


def make(num_smalls: int, *, max_slots: int = 16) -> tuple[Residency, AdapterPool]:
    """A pool that holds `num_smalls` of `small`; a `large` takes two of their places."""
    scratch = AdapterPool(LAYOUT, pool_bytes=1 << 20, max_slots=1, device=torch.device("meta"))
    num_bytes = num_smalls * scratch.num_pages(small("v")) * LAYOUT.page_bytes
    pool = AdapterPool(LAYOUT, pool_bytes=num_bytes, max_slots=max_slots, device=torch.device("cpu"))
    return Residency(pool), pool


def reserved(residency: Residency, manifest: AdapterManifest) -> Allocation:
    allocation = residency.try_reserve(manifest)
    assert allocation is not None
    return allocation


def upload(residency: Residency, pool: AdapterPool, manifest: AdapterManifest) -> UploadedAdapter:
    return pool.upload(reserved(residency, manifest), weights_of(TINY, manifest))


def load(residency: Residency, pool: AdapterPool, *manifests: AdapterManifest) -> None:
    for manifest in manifests:
        residency.publish(upload(residency, pool, manifest))


def versions(residency: Residency) -> list[str]:
    return [use.version for use in residency.snapshot().adapters]


def test_a_large_is_two_smalls() -> None:
    _, pool = make(1)
    assert pool.num_pages(large("l")) == 2 * pool.num_pages(small("s"))


def test_the_least_recently_used_goes_first() -> None:
    residency, pool = make(3)
    load(residency, pool, small("a"), small("b"), small("c"))
    residency.acquire("a").release()
    assert residency.victims(small("d")) == ("b",)
    load(residency, pool, small("d"))
    assert versions(residency) == ["c", "a", "d"]
    load(residency, pool, small("b"))
    snapshot = residency.snapshot()
    assert (snapshot.loads, snapshot.evictions, snapshot.reloads_after_eviction) == (5, 2, 1)
    assert snapshot.pages_used == snapshot.pages_total == pool.num_pages_total


def test_no_more_is_evicted_than_makes_room() -> None:
    residency, pool = make(4)
    load(residency, pool, small("a"), large("b"), small("c"))
    # The two least recently used are `a` and `b`, of which `b` alone is enough.
    assert residency.victims(large("d")) == ("b",)
    lease = residency.acquire("b")
    assert residency.victims(large("d")) == ("a", "c")
    lease.release()


def test_nothing_is_evicted_in_vain() -> None:
    residency, pool = make(3)
    load(residency, pool, small("a"), small("b"), small("c"))
    leases = [residency.acquire("b"), residency.acquire("c")]
    assert residency.victims(large("d")) is None
    assert residency.try_reserve(large("d")) is None
    assert versions(residency) == ["a", "b", "c"]
    pages = pool.num_pages(small("a"))
    error = residency.no_room(large("d"))
    assert (error.code, error.needed, error.free, error.in_use, error.pinned) == ("no_room", 2 * pages, 0, 2 * pages, 0)
    assert f"needs {2 * pages} pages" in str(error)
    leases[0].release()
    assert residency.victims(large("d")) == ("a", "b")


@pytest.mark.parametrize("keep", ["lease", "pin", "hold", "load"])
def test_what_is_in_use_stays(keep: str) -> None:
    residency, pool = make(2)
    undo: Callable[[], object]
    if keep == "load":
        uploaded = upload(residency, pool, small("a"))
        undo = lambda: residency.publish(uploaded)  # noqa: E731
        assert residency.state("a") == "loading"
    else:
        load(residency, pool, small("a"))
        assert residency.state("a") == "resident"
    if keep == "lease":
        undo = residency.acquire("a").release
    elif keep == "pin":
        residency.pin("a")
        undo = lambda: residency.unpin("a")  # noqa: E731
    elif keep == "hold":
        residency.hold("a")
        undo = lambda: residency.unhold("a")  # noqa: E731
    load(residency, pool, small("b"), small("c"))
    assert versions(residency) == ["a", "c"]
    assert residency.victims(large("d")) is None
    pages = pool.num_pages(small("a"))
    error = residency.no_room(large("d"))
    assert (error.in_use, error.pinned) == ((0, pages) if keep == "pin" else (pages, 0))
    undo()
    assert residency.victims(large("d")) is not None


def test_slots_run_out_before_pages() -> None:
    residency, pool = make(8, max_slots=2)
    load(residency, pool, small("a"), small("b"))
    lease = residency.acquire("b")
    assert residency.victims(small("c")) == ("a",)
    residency.pin("a")
    assert residency.victims(small("c")) is None
    lease.release()
    assert residency.victims(small("c")) == ("b",)


def test_a_retired_version_goes_with_its_last_lease() -> None:
    residency, pool = make(2)
    load(residency, pool, small("a"))
    residency.pin("a")
    first, second = residency.acquire("a"), residency.acquire("a")
    residency.retire("a")
    assert residency.state("a") == "retired"
    first.release()
    late = residency.acquire("a")
    second.release()
    assert residency.state("a") == "retired"
    late.release()
    assert residency.state("a") is None
    assert "a" not in residency
    assert pool.num_pages_used == 0
    assert residency.snapshot().evictions == 0


def test_an_unused_version_goes_when_it_is_retired() -> None:
    residency, pool = make(2)
    load(residency, pool, small("a"))
    residency.retire("a")
    residency.retire("unknown")
    assert len(residency) == pool.num_pages_used == 0


def test_a_version_that_is_retired_while_it_loads_goes_when_its_load_ends() -> None:
    residency, pool = make(2)
    uploaded = upload(residency, pool, small("a"))
    residency.retire("a")
    assert residency.state("a") == "retired"
    assert pool.num_pages_used > 0
    residency.publish(uploaded)
    assert pool.num_pages_used == 0


@pytest.mark.parametrize("wanted_again", ["hold", "pin", "restore"])
def test_a_retired_version_can_be_wanted_again(wanted_again: str) -> None:
    residency, pool = make(2)
    load(residency, pool, small("a"))
    lease = residency.acquire("a")
    residency.retire("a")
    getattr(residency, wanted_again)("a")
    lease.release()
    assert residency.state("a") == "resident"


def test_a_roll_out_holds_the_new_version_until_it_ends() -> None:
    residency, pool = make(2)
    load(residency, pool, small("new"))
    residency.hold("new")
    residency.hold("new")
    residency.retire("new")
    residency.unhold("new")
    assert residency.state("new") == "retired"
    residency.unhold("new")
    assert residency.state("new") is None
    load(residency, pool, small("other"))
    with pytest.raises(AssertionError):
        residency.unhold("other")


def test_a_failed_load_leaves_nothing() -> None:
    residency, pool = make(2)
    reserved(residency, small("a"))
    lease = residency.acquire("a")
    with pytest.raises(AssertionError):
        residency.abandon("a")
    lease.release()
    residency.abandon("a")
    assert len(residency) == pool.num_pages_used == 0
    load(residency, pool, small("a"))
    with pytest.raises(AssertionError):
        residency.abandon("a")


def test_a_lease_is_released_exactly_once_and_then_useless() -> None:
    residency, pool = make(2)
    uploaded = upload(residency, pool, small("a"))
    lease = residency.acquire("a")
    assert not lease.is_ready
    with pytest.raises(AssertionError):
        _ = lease.slot
    residency.publish(uploaded)
    assert lease.is_ready
    assert lease.slot == residency.snapshot().adapters[0].slot
    lease.release()
    assert lease.version == "a"
    for use in (lease.release, lambda: lease.slot, lambda: lease.is_ready):
        with pytest.raises(AssertionError):
            use()


def test_absent_versions() -> None:
    residency, pool = make(2)
    assert residency.try_acquire("a") is None
    load(residency, pool, small("a"))
    lease = residency.try_acquire("a")
    assert lease is not None
    with pytest.raises(AssertionError):
        reserved(residency, small("a"))
    lease.release()


def test_no_room_survives_pickling() -> None:
    residency, _ = make(1)
    error = residency.no_room(large("l"))
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, NoRoomError)
    assert str(again) == str(error)
    assert again.code == "no_room"
    assert again.total == error.total


def test_of_evicted_versions_the_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafleet.workers.memory.residency.MAX_EVICTED", 2)
    residency, pool = make(1)
    load(residency, pool, *(small(version) for version in ("a", "b", "c", "d")))
    assert list(residency._evicted) == ["b", "c"]
    load(residency, pool, small("a"))
    assert residency.snapshot().reloads_after_eviction == 0
    load(residency, pool, small("d"))
    assert residency.snapshot().reloads_after_eviction == 1

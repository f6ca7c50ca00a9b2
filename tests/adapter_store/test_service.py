"""The store as its callers see it."""

from __future__ import annotations

import asyncio
import errno
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from lorafleet.adapter_store import catalog, service
from lorafleet.adapter_store.errors import (
    AdapterRefused,
    AdapterStoreError,
    InvalidKey,
    InvalidName,
    SourceUnavailable,
    StaleGeneration,
    StoreUnusable,
    UnknownAdapter,
    UnknownKey,
    UnknownSource,
    UnknownVersion,
    UnknownWorker,
)
from lorafleet.adapter_store.manifest import (
    AdapterManifest,
    AdapterWeights,
    BaseGeometry,
    shared_module,
)
from lorafleet.adapter_store.names import NamedAdapter, NameRecord, NameTable
from lorafleet.adapter_store.service import AdapterStore, StoreUsage
from lorafleet.adapter_store.source_config import DirectoryConfig, ObjectStoreConfig
from tests.adapter_store.conftest import Base, CopyOf, OpenStore, load, staged_files

BAD_NAMES = ["", ".a", "-a", "a//b", "a/../b", "a b", "a\n", "a\0", "ä", "x" * 129, "../a", "base:a"]


async def test_life_of_a_name(store: AdapterStore, base: Base, copy_of: CopyOf) -> None:
    adapter = copy_of("rank4_qv")
    manifest = await store.publish("disk", "a")
    assert await store.manifest(manifest.version) == manifest
    assert (await store.table()).adapters == ()
    named = await store.flip(NameRecord("mine", manifest.version, "disk", "a", False, "all", "config"))
    assert (named.name, named.version, named.source, named.key) == ("mine", manifest.version, "disk", "a")
    assert (named.pinned, named.warm, named.origin, named.manifest) == (False, "all", "config", manifest)
    assert await store.resolve("mine") == named
    assert (await store.table()).adapters == (named,)
    assert (await store.set_pinned("mine", True)).pinned
    assert (await store.reconcile("w", ())).versions == {manifest.version: True}
    weights = await store.fetch(manifest.version)
    expected = base.reader().read(adapter.folder)
    assert weights.manifest == expected.manifest
    for module, pair in expected.tensors.items():
        for array, wanted in zip(weights.tensors[module], pair, strict=True):
            np.testing.assert_array_equal(array, wanted)
    assert (await store.delete("mine")).version == manifest.version
    assert (await store.table()).adapters == ()
    assert (await store.reconcile("w", ())).versions == {}


async def test_replacement_keeps_both_versions(store: AdapterStore, copy_of: CopyOf) -> None:
    copy_of("rank4_qv")
    old = await load(store, "a")
    copy_of("rank4_qv", seed=2)
    new = await load(store, "a")
    assert old != new
    assert (await store.resolve("a")).version == new
    assert (await store.fetch(old)).manifest.version == old
    assert (await store.fetch(new)).manifest.version == new


async def test_generation_grows_with_every_change(store: AdapterStore, copy_of: CopyOf) -> None:
    copy_of("rank4_qv")
    seen = [await store.generation()]
    await load(store, "a")
    seen.append(await store.generation())
    await load(store, "b", "a")
    seen.append((await store.table()).generation)
    await store.set_pinned("b", True)
    seen.append((await store.reconcile("w", ())).generation)
    await store.delete("a")
    seen.append(await store.generation())
    assert seen == sorted(set(seen))


async def test_validate_leaves_nothing_behind(store: AdapterStore, copy_of: CopyOf, tmp_path: Path) -> None:
    copy_of("rank4_qv")
    manifest = await store.validate("disk", "a")
    assert staged_files(tmp_path) == []
    with pytest.raises(UnknownVersion):
        await store.manifest(manifest.version)
    with pytest.raises(UnknownVersion):
        await store.fetch(manifest.version)
    assert await store.publish("disk", "a") == manifest


async def test_answers_survive_pickling(store: AdapterStore, copy_of: CopyOf) -> None:
    copy_of("embeddings_all")
    version = await load(store, "a")
    for value in (await store.table(), await store.resolve("a"), await store.reconcile("w", (version,))):
        assert pickle.loads(pickle.dumps(value)) == value
    weights: AdapterWeights = pickle.loads(pickle.dumps(await store.fetch(version), protocol=5))
    assert all(not array.flags.writeable for pair in weights.tensors.values() for array in pair)


ERRORS = [
    InvalidKey,
    InvalidName,
    UnknownSource,
    UnknownAdapter,
    UnknownKey,
    UnknownVersion,
    UnknownWorker,
    AdapterRefused,
    SourceUnavailable,
    StaleGeneration,
    StoreUnusable,
]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_survive_pickling(error: type[AdapterStoreError]) -> None:
    before = error("some_code", "in words", "field")
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is error
    assert (after.code, after.message, after.param, str(after)) == ("some_code", "in words", "field", "in words")
    assert set(ERRORS) == set(AdapterStoreError.__subclasses__())


class TestUnknown:
    @pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
    async def test_names_outside_the_grammar(self, store: AdapterStore, copy_of: CopyOf, name: str) -> None:
        copy_of("rank4_qv")
        manifest = await store.publish("disk", "a")
        with pytest.raises(InvalidName) as caught:
            await store.flip(NameRecord(name, manifest.version, "disk", "a", False, 0, "admin"))
        assert caught.value.code == "invalid_name"
        with pytest.raises(UnknownAdapter):
            await store.resolve(name)
        with pytest.raises(UnknownAdapter):
            await store.delete(name)
        with pytest.raises(UnknownAdapter):
            await store.set_pinned(name, True)

    async def test_source_key_and_version(self, store: AdapterStore) -> None:
        with pytest.raises(UnknownSource):
            await store.publish("elsewhere", "a")
        with pytest.raises(UnknownSource):
            await store.validate("elsewhere", "a")
        with pytest.raises(UnknownKey):
            await store.publish("disk", "nothing")
        for version in ("0" * 40, "", "../versions", "a/b"):
            with pytest.raises(UnknownVersion):
                await store.fetch(version)
            with pytest.raises(UnknownVersion):
                await store.flip(NameRecord("a", version, "disk", "a", False, 0, "admin"))


class TestRestart:
    async def test_all_is_as_it_was(self, open_store: OpenStore, copy_of: CopyOf) -> None:
        store = open_store()
        copy_of("rank4_qv")
        copy_of("embeddings", "b")
        version = await load(store, "a", pinned=True, warm="all", origin="config")
        await load(store, "b", warm=3)
        await load(store, "c", "a")
        await store.delete("c")
        before = await store.table()
        # Neither the source nor the base's checkpoint is needed again.
        again = open_store(sources=[], base_weights=None)
        assert await again.table() == before
        for named in before.adapters:
            assert (await again.fetch(named.version)).manifest == named.manifest
        assert (await again.reconcile("w", ())).versions[version]
        with pytest.raises(UnknownAdapter):
            await open_store().resolve("c")

    async def test_names_are_those_of_one_base(self, open_store: OpenStore, base: Base, copy_of: CopyOf) -> None:
        copy_of("rank4_qv")
        await load(open_store(), "a")
        smaller = {name: shape for name, shape in base.geometry.modules.items() if "layers.1." not in name}
        other = open_store(geometry=BaseGeometry(smaller, "float32"), sources=[])
        assert (await other.table()).adapters == ()
        assert [named.name for named in (await open_store().table()).adapters] == ["a"]

    async def test_another_dtype_is_the_same_base(self, open_store: OpenStore, base: Base, copy_of: CopyOf) -> None:
        copy_of("rank4_qv")
        version = await load(open_store(), "a")
        store = open_store(geometry=BaseGeometry(base.geometry.modules, "bfloat16"))
        weights = await store.fetch(version)
        assert weights.dtype == "bfloat16"
        assert weights.manifest.num_bytes == (await store.manifest(version)).num_bytes
        assert weights.manifest.num_bytes == sum(a.nbytes + b.nbytes for a, b in weights.tensors.values())

    async def test_a_lower_limit_refuses_what_was_loaded(self, open_store: OpenStore, copy_of: CopyOf) -> None:
        copy_of("rank16")
        version = await load(open_store(), "a")
        with pytest.raises(AdapterRefused) as caught:
            await open_store(max_rank=8).fetch(version)
        assert caught.value.code == "rank_too_large"
        assert (await open_store().fetch(version)).manifest.version == version


class TestDisk:
    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
    async def test_damage_is_found_and_mended_by_loading_again(
        self, open_store: OpenStore, copy_of: CopyOf, tmp_path: Path, name: str
    ) -> None:
        copy_of("rank4_qv")
        store = open_store(host_cache_bytes=0)
        version = await load(store, "a")
        (path,) = tmp_path.glob(f"state/*/versions/{version}/{name}")
        content = bytearray(path.read_bytes())
        content[-1] ^= 255
        path.write_bytes(content)
        with pytest.raises(StoreUnusable) as caught:
            await store.fetch(version)
        assert caught.value.code == "store_damaged"
        assert await load(store, "a") == version
        assert (await store.fetch(version)).manifest.version == version

    async def test_health(self, store: AdapterStore, tmp_path: Path) -> None:
        store.check_health()
        shutil.rmtree(tmp_path / "state")
        with pytest.raises(StoreUnusable):
            store.check_health()


async def test_what_changed_since_a_generation(store: AdapterStore, copy_of: CopyOf) -> None:
    copy_of("rank4_qv")
    await load(store, "a")
    await load(store, "b", "a")
    before = await store.generation()
    await store.set_pinned("a", True)
    await store.delete("b")
    changes = await store.names_since(before)
    assert changes.adapters == (await store.named("a"),) == (await store.table()).adapters
    assert (changes.deleted, changes.is_complete) == (("b",), True)
    with pytest.raises(UnknownAdapter):
        await store.named("b")


async def test_damage_is_named(open_store: OpenStore, copy_of: CopyOf, tmp_path: Path) -> None:
    copy_of("rank4_qv")
    store = open_store(host_cache_bytes=0)
    version = await load(store, "a")
    assert await store.damaged() == []
    shutil.rmtree(next(tmp_path.glob(f"state/*/versions/{version}")))
    with pytest.raises(StoreUnusable):
        await store.fetch(version)
    assert [(damage.kind, damage.entry) for damage in await store.damaged()] == [("version", version)]
    await load(store, "a")
    assert await store.damaged() == []


async def test_desired_state_outlives_the_store(open_store: OpenStore) -> None:
    wanted = service.DesiredRecord("a", "disk", "a", pinned=True)
    await open_store().set_desired([wanted], 3)
    store = open_store()
    assert await store.desired() == service.DesiredState(3, (wanted,))
    with pytest.raises(StaleGeneration):
        await store.set_desired([], 2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_is_named_and_leaves_nothing(
    store: AdapterStore, copy_of: CopyOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    copy_of("rank4_qv")

    def full(*_: object, **__: object) -> None:
        raise OSError(number, "full")

    for owner, name in ((catalog, "make_folder_durable"), (Path, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(StoreUnusable) as caught:
                await store.publish("disk", "a")
        assert caught.value.code == "store_full"
        assert staged_files(tmp_path) == []
    await load(store, "a")


async def test_a_full_disk_is_a_problem_until_a_write_succeeds(
    open_store: OpenStore, copy_of: CopyOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    copy_of("rank4_qv")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(StoreUnusable):
            await store.publish("disk", "a")
    (problem,) = await store.problems()
    assert isinstance(problem, StoreUnusable)
    assert problem.code == "store_full"
    await load(store, "a")
    assert await store.problems() == ()


async def test_names_are_listed_in_pages(open_store: OpenStore, copy_of: CopyOf) -> None:
    store = open_store()
    copy_of("rank4_qv")
    for name in ("c", "a", "b/x", "b"):
        await load(store, name, "a")
    everything = [adapter.name for adapter in await store.page("", None)]
    assert everything == sorted(record.name for record in await store.records()) == ["a", "b", "b/x", "c"]
    pages, after = [], ""
    while page := await store.page(after, 3):
        pages.append([adapter.name for adapter in page])
        after = page[-1].name
    assert pages == [["a", "b", "b/x"], ["c"]]
    assert [adapter.name for adapter in await store.page("b/w", 1)] == ["b/x"]


async def test_a_worker_says_what_it_holds_once(open_store: OpenStore, copy_of: CopyOf) -> None:
    store = open_store()
    copy_of("rank4_qv")
    with pytest.raises(UnknownWorker):
        await store.reconcile_again("w", 0)
    version = await load(store, "a")
    told = await store.reconcile("w", (version, "gone"))
    assert told.versions == {version: False}
    assert await store.reconcile_again("w", told.generation) is None
    await store.delete("a")
    again = await store.reconcile_again("w", told.generation)
    assert again is not None
    assert again.versions == {}


class TestHostMemory:
    async def test_what_put_returns_is_what_fetch_gives(self, open_store: OpenStore, copy_of: CopyOf) -> None:
        put: list[AdapterWeights] = []
        store = open_store(put=lambda weights: put.append(weights) or f"ref {len(put)}")
        copy_of("rank4_qv")
        version = await load(store, "a")
        assert [await store.fetch(version) for _ in range(3)] == ["ref 1"] * 3
        assert [weights.manifest.version for weights in put] == [version]

    async def test_single_flight(self, open_store: OpenStore, copy_of: CopyOf) -> None:
        entered, go = threading.Semaphore(0), threading.Event()

        def put(weights: AdapterWeights) -> object:
            entered.release()
            assert go.wait(30)
            return object()

        copy_of("rank4_qv")
        version = await load(open_store(), "a")
        store = open_store(put=put)
        fetches = [asyncio.create_task(store.fetch(version)) for _ in range(8)]
        await asyncio.to_thread(entered.acquire)
        fetches[0].cancel()  # who goes away takes nothing from the others
        go.set()
        values = await asyncio.gather(*fetches[1:])
        assert len({id(value) for value in values}) == 1
        assert not entered.acquire(blocking=False)

    async def test_least_recently_used_goes_first(self, open_store: OpenStore, copy_of: CopyOf) -> None:
        for seed in (1, 2, 3):
            copy_of("rank4_qv", f"a{seed}", seed=seed)
        store = open_store()
        versions = [await load(store, f"a{seed}") for seed in (1, 2, 3)]
        size = (await store.manifest(versions[0])).num_bytes
        puts: list[str] = []
        store = open_store(host_cache_bytes=2 * size, put=lambda w: puts.append(w.manifest.version) or w)
        one, two, three = versions
        for version in (one, two, one, three, one, two):
            await store.fetch(version)
        assert puts == [one, two, three, two]

    async def test_usage(self, open_store: OpenStore, copy_of: CopyOf) -> None:
        copy_of("rank4_qv")
        store = open_store()
        assert store.usage == StoreUsage(num_versions=0, num_cached=0, cached_bytes=0)
        version = await load(store, "a")
        size = (await store.manifest(version)).num_bytes
        assert store.usage == StoreUsage(num_versions=1, num_cached=1, cached_bytes=size)
        assert open_store().usage == StoreUsage(num_versions=1, num_cached=0, cached_bytes=0)


async def test_object_store_source(open_store: OpenStore, adapter_of: Callable[..., Path]) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.put(f"{adapter_of('rank4_qv')}/", "/bucket/a", recursive=True)
    store = open_store(sources=[ObjectStoreConfig(name="bucket", url="memory://bucket", resolve=True)])
    assert (await store.resolve("a")).source == "bucket"
    memory.store.clear()


def test_sources_have_names_of_their_own(open_store: OpenStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same name"):
        open_store(sources=[DirectoryConfig(name="disk", root=tmp_path)] * 2)


def test_many_names_make_a_small_table() -> None:
    modules = tuple(shared_module(f"model.layers.{n}.self_attn.q_proj", 16, 1.0) for n in range(200))
    named = [
        NamedAdapter(
            f"a{n}",
            f"{n:040}",
            "disk",
            f"a{n}",
            False,
            1,
            "admin",
            manifest=AdapterManifest(f"{n:040}", 16, ("q_proj",), modules, 1),
        )
        for n in range(100)
    ]
    sizes = [len(pickle.dumps(NameTable(1, tuple(named[:count])))) for count in (1, 100)]
    assert sizes[1] - sizes[0] < 99 * 300

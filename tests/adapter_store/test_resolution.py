"""Names that were never loaded: which source gives them, who waits, and what is remembered."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorafleet.adapter_store import resolution
from lorafleet.adapter_store.errors import (
    AdapterRefused,
    SourceUnavailable,
    UnknownAdapter,
)
from lorafleet.adapter_store.service import AdapterStore
from lorafleet.adapter_store.source_config import DirectoryConfig
from tests.adapter_store.conftest import CopyOf, OpenStore, load
from tests.support.clock import Clock


class TestResolve:
    async def test_first_use(self, store: AdapterStore, copy_of: CopyOf) -> None:
        copy_of("rank4_qv")
        named = await store.resolve("a")
        assert (named.name, named.key, named.source, named.origin) == ("a", "a", "disk", "resolve")
        assert (named.pinned, named.warm) == (False, 0)
        assert (await store.table()).adapters == (named,)

    async def test_only_from_sources_that_are_marked(
        self, open_store: OpenStore, copy_of: CopyOf, tmp_path: Path
    ) -> None:
        copy_of("rank4_qv")
        store = open_store(sources=[DirectoryConfig(name="disk", root=tmp_path / "adapters")])
        with pytest.raises(UnknownAdapter):
            await store.resolve("a")

    async def test_once_for_all_who_ask(self, open_store: OpenStore, copy_of: CopyOf) -> None:
        puts: list[object] = []
        store = open_store(put=lambda weights: puts.append(1) or weights)
        copy_of("rank4_qv")
        named = await asyncio.gather(*(store.resolve("a") for _ in range(10)))
        assert len(set(map(id, named))) == 1
        assert len(puts) == 1

    async def test_absence_is_remembered_for_a_while(
        self, store: AdapterStore, copy_of: CopyOf, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        publish = store.publish
        monkeypatch.setattr(store, "publish", lambda source, key: asked.append(key) or publish(source, key))
        for _ in range(3):
            with pytest.raises(UnknownAdapter):
                await store.resolve("a")
        assert asked == ["a"]
        copy_of("rank4_qv")
        clock.now_s += resolution.ABSENT_S
        assert (await store.resolve("a")).name == "a"

    async def test_refusals_are_told_and_remembered(self, store: AdapterStore, copy_of: CopyOf, clock: Clock) -> None:
        adapter = copy_of("rank4_qv")
        adapter.set_config(use_qalora=True)
        for _ in range(2):
            with pytest.raises(AdapterRefused) as caught:
                await store.resolve("a")
            assert caught.value.param == "use_qalora"
        adapter.set_config(use_qalora=False)
        with pytest.raises(AdapterRefused):
            await store.resolve("a")
        clock.now_s += resolution.ABSENT_S
        await store.resolve("a")

    async def test_remembered_absences_are_bounded(self, clock: Clock) -> None:
        absent = resolution.AbsentNames(clock)
        for number in range(10_000):
            absent.put(f"a{number}", resolution.unknown_adapter("a"))
        assert absent.get("a0") is None
        assert absent.get("a9999") is not None

    async def test_loading_ends_absence(self, store: AdapterStore, copy_of: CopyOf) -> None:
        with pytest.raises(UnknownAdapter):
            await store.resolve("b")
        copy_of("rank4_qv")
        version = await load(store, "b", "a")
        assert (await store.resolve("b")).version == version

    async def test_deleted_names_stay_away_until_loaded_again(self, open_store: OpenStore, copy_of: CopyOf) -> None:
        copy_of("rank4_qv")
        store = open_store()
        await store.resolve("a")
        await store.delete("a")
        with pytest.raises(UnknownAdapter):
            await store.resolve("a")
        store = open_store()
        with pytest.raises(UnknownAdapter):
            await store.resolve("a")
        await load(store, "a")
        assert (await store.resolve("a")).origin == "admin"
        await store.delete("a", explicit=False)
        assert (await store.resolve("a")).origin == "resolve"

    async def test_a_link_out_of_the_root_is_not_there(
        self, store: AdapterStore, copy_of: CopyOf, tmp_path: Path
    ) -> None:
        adapter = copy_of("rank4_qv")
        adapter.folder.rename(tmp_path / "outside")
        (tmp_path / "adapters" / "a").symlink_to(tmp_path / "outside")
        with pytest.raises(UnknownAdapter):
            await store.resolve("a")


class SlowSource:
    """In place of a source's `fetch`: waits until it may go on, or fails."""

    def __init__(self, store: AdapterStore, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.asked: list[str] = []
        self.entered = threading.Semaphore(0)
        self._fetch = store._sources[source].source.fetch
        monkeypatch.setattr(store._sources[source].source, "fetch", self.fetch)

    def fetch(self, key: str, into: Path, max_weights_bytes: int) -> None:
        self.asked.append(key)
        self.entered.release()
        assert self.go.wait(30)
        self._fetch(key, into, max_weights_bytes)


class TestSlowSources:
    """One that is slow or fails holds up nobody but those who need it."""

    @pytest.fixture
    def two(self, open_store: OpenStore, tmp_path: Path) -> AdapterStore:
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
        return open_store(
            sources=[
                DirectoryConfig(name="first", root=tmp_path / "first", resolve=True, timeout_s=30),
                DirectoryConfig(name="second", root=tmp_path / "second", resolve=True),
                DirectoryConfig(name="disk", root=tmp_path / "adapters"),
            ]
        )

    @pytest.fixture
    def slow(self, two: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowSource]:
        slow = SlowSource(two, "first", monkeypatch)
        yield slow
        slow.go.set()

    async def test_others_go_on(
        self, two: AdapterStore, slow: SlowSource, adapter_of: Callable[..., Path], copy_of: CopyOf, tmp_path: Path
    ) -> None:
        copy_of("rank4_qv", "known")
        await load(two, "known")
        waiting = [asyncio.create_task(two.resolve(f"missing{n}")) for n in range(40)]
        await asyncio.to_thread(slow.entered.acquire)
        version = (await two.resolve("known")).version
        await two.fetch(version)
        await two.publish("disk", "known")
        await two.set_pinned("known", True)
        assert not any(task.done() for task in waiting)
        slow.go.set()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, UnknownAdapter) for result in results)

    async def test_a_later_source_is_waited_with_only_for_a_moment(
        self,
        two: AdapterStore,
        slow: SlowSource,
        adapter_of: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(resolution, "PATIENCE_S", 0.01)
        shutil.copytree(adapter_of("rank4_qv"), tmp_path / "second" / "a")
        assert (await two.resolve("a")).source == "second"
        assert slow.asked == ["a"]

    async def test_the_first_source_that_offers_a_name_gives_it(
        self, two: AdapterStore, slow: SlowSource, adapter_of: Callable[..., Path], tmp_path: Path
    ) -> None:
        shutil.copytree(adapter_of("rank4_qv"), tmp_path / "first" / "a")
        shutil.copytree(adapter_of("rank4_qv", seed=2), tmp_path / "second" / "a")
        slow.go.set()
        assert (await two.resolve("a")).source == "first"

    async def test_a_source_that_fails_is_passed_over(
        self, two: AdapterStore, adapter_of: Callable[..., Path], tmp_path: Path, clock: Clock
    ) -> None:
        (tmp_path / "first").rmdir()
        shutil.copytree(adapter_of("rank4_qv"), tmp_path / "second" / "a")
        assert (await two.resolve("a")).source == "second"
        # What the others lack may be there: that cannot be known.
        with pytest.raises(SourceUnavailable):
            await two.resolve("b")
        (tmp_path / "first").mkdir()
        clock.now_s += resolution.UNAVAILABLE_S
        with pytest.raises(UnknownAdapter):
            await two.resolve("b")

    async def test_one_that_hangs_ends_in_a_clear_error(
        self, open_store: OpenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = DirectoryConfig(name="disk", root=tmp_path / "adapters", timeout_s=0.05)
        store = open_store(sources=[source])
        slow = SlowSource(store, "disk", monkeypatch)
        with pytest.raises(SourceUnavailable, match="did not answer"):
            await store.publish("disk", "a")
        slow.go.set()

    async def test_loading_while_it_is_looked_for_wins(
        self, two: AdapterStore, slow: SlowSource, adapter_of: Callable[..., Path], copy_of: CopyOf, tmp_path: Path
    ) -> None:
        shutil.copytree(adapter_of("rank4_qv"), tmp_path / "first" / "a")
        copy_of("rank4_qv", "mine", seed=2)
        looked_for = asyncio.create_task(two.resolve("a"))
        await asyncio.to_thread(slow.entered.acquire)
        version = await load(two, "a", "mine")
        slow.go.set()
        assert (await looked_for).version == version

    async def test_deleting_while_it_is_looked_for_wins(
        self, two: AdapterStore, slow: SlowSource, adapter_of: Callable[..., Path], copy_of: CopyOf, tmp_path: Path
    ) -> None:
        shutil.copytree(adapter_of("rank4_qv"), tmp_path / "first" / "a")
        copy_of("rank4_qv", "mine", seed=2)
        looked_for = asyncio.create_task(two.resolve("a"))
        await asyncio.to_thread(slow.entered.acquire)
        await load(two, "a", "mine")
        await two.delete("a")
        slow.go.set()
        with pytest.raises(UnknownAdapter):
            await looked_for

"""Names at the store, and from memory while it is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from lorafleet.adapter_store.errors import SourceUnavailable
from lorafleet.cluster.errors import ModelNotFound, StoreUnavailable
from lorafleet.cluster.serving.names import Names
from lorafleet.cluster.wire import NamedVersion
from tests.cluster.fakes import VERSIONS, FakeStore
from tests.support.wait import until


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def names(store: FakeStore) -> AsyncGenerator[Names, None]:
    names = Names(store, patience_s=0.05, first_use_s=0.2)
    names.start()
    yield names
    names.stop()


async def test_the_store_is_asked_every_time(names: Names, store: FakeStore) -> None:
    assert (await names.resolve("shout")).version == VERSIONS["shout"]
    store.flip("shout", "cc" * 32)
    assert (await names.resolve("shout")).version == "cc" * 32
    store.flip("shout", None)
    with pytest.raises(ModelNotFound):
        await names.resolve("shout")
    assert store.num_resolved >= 3


async def test_requests_that_come_while_the_store_is_asked_share_the_next_call(names: Names, store: FakeStore) -> None:
    await names.await_table(30.0)
    first = asyncio.create_task(names.resolve("shout"))
    await until(lambda: store.num_resolved == 1)
    store.flip("shout", "cc" * 32)
    store.flip("whisper", None)
    late = [asyncio.create_task(names.resolve(name)) for name in ("shout", "whisper", "shout")]
    late.append(asyncio.create_task(names.resolve("shout")))
    await asyncio.sleep(0)
    late[2].cancel()
    found = await asyncio.gather(first, *late, return_exceptions=True)
    assert [getattr(entry, "version", type(entry)) for entry in found[1:]] == [
        "cc" * 32,
        ModelNotFound,
        asyncio.CancelledError,
        "cc" * 32,
    ]
    assert store.num_resolved == 3, "one for the first, one for the others, one for the name that is gone"


@pytest.mark.parametrize("name", ["", "-a", "a//b", "..", "a b", "ä", "a" * 129, "a\n", "a:b"])
async def test_a_name_outside_the_grammar_is_unknown_and_not_asked_for(
    names: Names, store: FakeStore, name: str
) -> None:
    with pytest.raises(ModelNotFound):
        await names.resolve(name)
    assert store.num_resolved == 0


async def test_a_death_shows_at_once_and_names_go_on(names: Names, store: FakeStore) -> None:
    await names.resolve("shout")
    await until(lambda: store.is_watched)
    store.leave()
    await until(lambda: names.is_away)
    num_resolved = store.num_resolved
    assert (await names.resolve("shout")).version == VERSIONS["shout"]
    assert (await names.resolve("whisper")).version == VERSIONS["whisper"]  # never asked for, seen in the table
    assert [entry.name for entry in await names.entries()] == ["shout", "whisper"]
    with pytest.raises(StoreUnavailable) as caught:
        await names.resolve("stranger")
    assert caught.value.retry_after_s is not None
    assert store.num_resolved == num_resolved  # nobody waited


async def test_the_store_comes_back(names: Names, store: FakeStore) -> None:
    await names.resolve("shout")
    store.leave()
    await until(lambda: names.is_away)
    store.versions["shout"] = "cc" * 32
    store.come_back()
    await until(lambda: not names.is_away)
    assert (await names.resolve("shout")).version == "cc" * 32


async def test_a_new_ingress_waits_for_the_first_table(store: FakeStore) -> None:
    names = Names(store, patience_s=0.05)
    store.gone.set()
    assert not await names.await_table(0.01)
    store.gone.clear()
    assert await names.await_table(30.0)
    store.gone.set()
    assert await names.await_table(0.0)  # once is enough
    names.stop()


async def test_what_the_store_has_told_already_is_kept(names: Names) -> None:
    known = replace(await names.resolve("shout"), created_s=7)
    names.observe("shout", known)
    names.observe("shout", replace(known, created_s=0))
    assert names._names["shout"] == known
    other = replace(known, created_s=0, version="cc" * 32)
    names.observe("shout", other)
    assert names._names["shout"] == other


async def test_a_call_in_flight_does_not_outlive_the_store(names: Names, store: FakeStore) -> None:
    await until(lambda: store.is_watched)
    store.is_silent = True
    asking = asyncio.create_task(names.resolve("stranger"))
    await asyncio.sleep(0)
    store.leave()
    with pytest.raises(StoreUnavailable):
        await asking


async def test_a_silent_store_costs_a_known_name_its_patience_once(names: Names, store: FakeStore) -> None:
    await names.resolve("shout")
    store.is_silent = True
    assert (await names.resolve("shout")).version == VERSIONS["shout"]
    assert names.is_away
    num_resolved = store.num_resolved
    assert (await names.resolve("shout")).version == VERSIONS["shout"]
    assert store.num_resolved == num_resolved


async def test_a_slow_first_use_is_no_absence(names: Names, store: FakeStore) -> None:
    await until(lambda: store.is_watched)
    store.is_silent = True
    with pytest.raises(StoreUnavailable, match="still being fetched"):
        await names.resolve("stranger")
    assert not names.is_away


async def test_what_a_first_use_raises_comes_through(names: Names, store: FakeStore) -> None:
    store.raises = SourceUnavailable("source_unavailable", "the hub does not answer")
    with pytest.raises(SourceUnavailable):
        await names.resolve("stranger")
    assert not names.is_away


async def test_a_flip_that_this_process_made_is_known_without_the_store(names: Names, store: FakeStore) -> None:
    await names.resolve("shout")
    names.observe("shout", NamedVersion("shout", "cc" * 32, "demo/shout"))
    names.observe("new", NamedVersion("new", "dd" * 32, "demo/new"))
    names.observe("whisper", None)
    store.leave()
    await until(lambda: names.is_away)
    assert (await names.resolve("shout")).version == "cc" * 32
    assert (await names.resolve("new")).version == "dd" * 32
    with pytest.raises(StoreUnavailable):
        await names.resolve("whisper")
    assert NamedVersion("shout", "cc" * 32, "demo/shout") in await names.entries()


async def test_a_table_read_before_a_flip_does_not_undo_it(names: Names, store: FakeStore) -> None:
    await until(lambda: store.is_watched)
    reading = asyncio.create_task(names.entries())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    names.observe("shout", NamedVersion("shout", "cc" * 32, "demo/shout"))
    entries = {entry.name: entry.version for entry in await reading}
    assert entries["shout"] == "cc" * 32


async def test_what_changed_is_asked_for_and_nothing_else(names: Names, store: FakeStore) -> None:
    assert {entry.name for entry in await names.entries()} == {"shout", "whisper"}
    store.flip("new", "cc" * 32)
    store.flip("whisper", None)
    store.flip("shout", "dd" * 32)
    entries = {entry.name: entry.version for entry in await names.entries()}
    assert entries == {"new": "cc" * 32, "shout": "dd" * 32}
    assert await names.entry("whisper") is None

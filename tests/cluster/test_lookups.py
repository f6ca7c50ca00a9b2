"""The connection over which an ingress looks up names, with both of its sides in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest

from lorafleet.adapter_store.manifest import AdapterChat, OwnToken
from lorafleet.cluster.errors import StoreUnavailable
from lorafleet.cluster.listener import Listener
from lorafleet.cluster.store import lookups
from lorafleet.cluster.store.lookups import Lookups, answer
from lorafleet.cluster.wire import KEY_BYTES, Address, Found, Lookup, NamedVersion
from tests.support.wait import until

CHAT = AdapterChat("{{ messages }}", (1, 2), (OwnToken(3, "<ü>", special=True),))
NAMES = {"a": NamedVersion("a", "ab" * 32, "demo/a"), "b": NamedVersion("b", "cd" * 32, "demo/b", 7, CHAT, 9)}


class Store:
    """A store that knows `NAMES`."""

    def __init__(self) -> None:
        self.asked: list[Lookup] = []
        self.num_connects = 0
        self.listener = Listener("127.0.0.1", partial(answer, self._found))

    async def address(self) -> Address:
        self.num_connects += 1
        return await self.listener.address()

    def _found(self, names: Lookup) -> Found:
        self.asked.append(names)
        return tuple(map(NAMES.get, names))


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    store = Store()
    yield store
    store.listener.close()


async def connected(store: Store, address: Address | None = None) -> Lookups:
    async def other() -> Address:
        assert address is not None
        return address

    made = Lookups(store.address if address is None else other)
    async with asyncio.timeout(5):
        while await made.ask(()) is None:
            await asyncio.sleep(0.01)
    return made


async def test_each_question_gets_its_own_answer_and_nothing_is_lost_on_the_way(store: Store) -> None:
    asked = await connected(store)
    answers = await asyncio.gather(*(asked.ask(names) for names in (("a",), ("b", "none", "a"), (), ("none",))))
    assert answers == [(NAMES["a"],), (NAMES["b"], None, NAMES["a"]), (), (None,)]


async def test_a_question_that_is_given_up_ends_the_connection_so_that_no_dead_one_is_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "PAUSE_S", 0.01)
    asked = await connected(store)
    first, second = asyncio.ensure_future(asked.ask(("a",))), asyncio.ensure_future(asked.ask(("b",)))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(StoreUnavailable):
        await second
    async with asyncio.timeout(5):
        while (found := await asked.ask(("b",))) is None:
            await asyncio.sleep(0.01)
    assert found == (NAMES["b"],)
    assert store.num_connects == 2


async def test_a_question_under_way_fails_with_the_connection_and_another_one_is_made(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "PAUSE_S", 0.01)
    asked = await connected(store)
    question = asyncio.ensure_future(asked.ask(("a",)))
    await asyncio.sleep(0)
    store.listener.close()
    with pytest.raises(StoreUnavailable):
        await question
    assert await asked.ask(("a",)) is None
    store.listener = Listener("127.0.0.1", partial(answer, store._found))
    async with asyncio.timeout(5):
        while (found := await asked.ask(("a",))) is None:
            await asyncio.sleep(0.01)
    assert found == (NAMES["a"],)


async def test_one_connection_is_made_at_a_time_and_a_wrong_key_is_not_heard(store: Store) -> None:
    right = await store.listener.address()
    stranger = Lookups(lambda: asyncio.sleep(0, Address(right.host, right.port, b"x" * KEY_BYTES)))
    for _ in range(20):
        try:
            assert await stranger.ask(("a",)) is None
        except StoreUnavailable:
            break
        await asyncio.sleep(0.01)
    assert store.asked == []
    mine = Lookups(store.address)
    await asyncio.gather(*(mine.ask(("a",)) for _ in range(9)))
    await until(lambda: mine._writer is not None)
    assert store.num_connects == 1

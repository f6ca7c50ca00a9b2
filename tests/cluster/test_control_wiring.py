"""The ways from an ingress to the controller and on to the store, over handles that call in this process."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from lorafleet.adapter_store.errors import StaleGeneration, StoreUnusable, UnknownAdapter, UnknownWorker
from lorafleet.adapter_store.names import NameRecord
from lorafleet.adapter_store.records import DesiredRecord
from lorafleet.cluster.admin.client import ControllerClient
from lorafleet.cluster.admin.controller import Controller
from lorafleet.cluster.admin.desired import DesiredSet
from lorafleet.cluster.config import AppConfig
from lorafleet.cluster.errors import StoreUnavailable
from lorafleet.cluster.store.client import StoreClient
from lorafleet.cluster.store.replica import StoreReplica
from lorafleet.cluster.wire import PART, from_parts, in_parts
from tests.support.adapters import make_adapter
from tests.support.bases import BaseKind
from tests.support.wait import until


class Handle:
    """A deployment's handle whose replica is an object of this process; what goes either way is pickled."""

    def __init__(self, replica: object, method: str = "") -> None:
        self._replica = replica
        self._method = method

    def options(self, *, method_name: str = "", **_: object) -> Handle:
        return Handle(self._replica, method_name or self._method)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        async def call() -> Any:
            given, named = pickle.loads(pickle.dumps((args, kwargs)))
            result = getattr(self._replica, self._method)(*given, **named)
            return pickle.loads(pickle.dumps(await result if inspect.isawaitable(result) else result))

        return call()


@pytest.fixture
def config(base_of: Callable[[BaseKind], Path], tmp_path: Path) -> AppConfig:
    base = base_of("llama")
    make_adapter(tmp_path / "adapters" / "a", base, "rank4_qv")
    return AppConfig.model_validate(
        {
            "model": {"id": "tiny", "source": str(base), "dtype": "float32"},
            "adapters": {
                "sources": [{"name": "demo", "kind": "directory", "root": str(tmp_path / "adapters")}],
                "state_dir": str(tmp_path / "state"),
            },
        }
    )


@pytest.fixture
async def replica(config: AppConfig) -> AsyncIterator[StoreReplica]:
    replica = StoreReplica(config)
    yield replica
    replica.__del__()


@pytest.fixture
async def store(replica: StoreReplica) -> StoreClient:
    return StoreClient(Handle(replica))


@pytest.mark.parametrize("is_of_this_service", [True, False])
async def test_the_folder_goes_over_to_the_replica_that_serve_starts_elsewhere(
    config: AppConfig,
    store: StoreClient,
    replica: StoreReplica,
    monkeypatch: pytest.MonkeyPatch,
    is_of_this_service: bool,
) -> None:
    wanted = (DesiredRecord("x", "demo", "a", warm="all"),)
    await store.set_desired(wanted, 2)
    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("lorafleet.adapter_store.files._LOCK_PATIENCE_S", 0.1)
    stranger = Handle(object())
    successor = StoreReplica(config, lambda: Handle(replica) if is_of_this_service else stranger)
    try:
        if is_of_this_service:
            await successor.check_health()
            assert (await successor.desired()).adapters == wanted
            await until(lambda: ended == [0])
        else:
            with pytest.raises(StoreUnusable, match="another adapter store uses this state folder"):
                await successor.check_health()
            await replica.check_health()
            assert not ended
    finally:
        successor.__del__()


@pytest.mark.slow
async def test_everything_that_is_asked_of_the_store_is_answered(store: StoreClient) -> None:
    manifest = await store.publish("demo", "a")
    record = NameRecord("x", manifest.version, "demo", "a", False, 1, "admin")
    await store.flip(record)
    assert (await store.named("x")).version == manifest.version
    with pytest.raises(UnknownAdapter):
        await store.named("y")
    assert [each.name for each in await store.records()] == ["x"]
    assert [each.name for each in await store.page("", 1)] == ["x"]
    assert await store.page("x", None) == ()
    assert await store.problems() == ()
    everything = await store.names(-1)
    assert everything.is_whole
    assert [each.name for each in everything.entries] == ["x"]
    await store.delete("x")
    since = await store.names(everything.generation)
    assert (since.is_whole, since.entries, since.deleted) == (False, (), ("x",))
    assert await store.watch(-1) == since.generation


async def test_a_long_list_comes_in_parts_between_which_others_have_their_turn() -> None:
    items = [(number, "x" * 40) for number in range(3 * PART + 1)]

    class Controller:
        async def adapters(self, after: str, limit: int | None) -> list[bytes]:
            assert (after, limit) == ("m", None)
            return in_parts(items)

    client = ControllerClient(cast("Any", Handle(Controller())), lambda name, entry: None)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    found: list[Any] = await client.adapters("m")
    counting.cancel()
    assert found == items
    assert turns >= len(in_parts(items)) == 4
    assert await from_parts(in_parts([])) == []


async def test_the_collector_passes_over_what_the_store_had_at_its_start(
    replica: StoreReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = 0

    def settle() -> None:
        nonlocal settled
        settled += 1

    monkeypatch.setattr("lorafleet.cluster.heap.settle", settle)
    await replica.check_health()
    await replica.check_health()
    assert settled == 1


async def test_the_desired_state_is_kept_with_its_generation(store: StoreClient) -> None:
    assert (await store.desired()).generation == 0
    wanted = (DesiredRecord("x", "demo", "a", warm="all"),)
    await store.set_desired(wanted, 2)
    with pytest.raises(StaleGeneration):
        await store.set_desired((), 1)
    assert (await store.desired()).adapters == wanted


async def test_a_worker_is_told_what_changed(store: StoreClient) -> None:
    with pytest.raises(UnknownWorker):
        await store.reconcile("w", None, 0)
    told = await store.reconcile("w", (), -1)
    assert told is not None
    assert await store.reconcile("w", None, told.generation) is None


async def test_a_desired_state_that_cannot_be_read_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of an older version, for instance. What is told later would else never be applied."""
    monkeypatch.setattr("lorafleet.cluster.admin.controller.ASK_S", 0.01)
    answers: list[Exception | bool] = [RuntimeError("a bad record"), StoreUnavailable("away", None, 1.0), True]
    has_run = asyncio.Event()

    class Desired:
        async def resume(self) -> bool:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        async def run(self) -> None:
            has_run.set()

    controller = Controller.__new__(Controller)
    controller._desired, controller._is_told = cast("DesiredSet", Desired()), asyncio.Event()
    await asyncio.wait_for(controller._apply(), 5)
    assert has_run.is_set()
    assert not answers

"""The dispatcher over fake workers: retries, merging, cancellation, and what counts as gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from lorafleet.cluster.errors import (
    BadRequest,
    ModelNotFound,
    NoWorker,
    Overloaded,
    StoreUnavailable,
    StreamBroken,
    WorkerGone,
)
from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.serving.dispatch import MAX_ATTEMPTS, Dispatcher
from lorafleet.cluster.serving.names import Names
from lorafleet.cluster.serving.prompts import Prompts
from lorafleet.workers.errors import AdapterUnavailable, EngineFailed
from lorafleet.workers.request import GenerateDelta, GenerateRequest
from tests.cluster.fakes import VERSIONS, FakeStore, FakeWorkers, answer_token_ids, make_prompts

BASE_ID = "tiny"
REQUEST = GenerateRequest(model="shout", prompt="Hello", seed=1)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return make_prompts()


@pytest.fixture
def workers(prompts: Prompts) -> FakeWorkers:
    return FakeWorkers(prompts)


@pytest.fixture
async def dispatcher(prompts: Prompts, workers: FakeWorkers) -> AsyncGenerator[Dispatcher, None]:
    names = Names(FakeStore())
    yield Dispatcher(BASE_ID, prompts, names, workers, RequestMetrics())
    names.stop()


async def collect(deltas: AsyncGenerator[GenerateDelta, None]) -> dict[int, list[GenerateDelta]]:
    answers: dict[int, list[GenerateDelta]] = {}
    async for delta in deltas:
        answers.setdefault(delta.index, []).append(delta)
    return answers


async def test_one_answer(dispatcher: Dispatcher, workers: FakeWorkers, prompts: Prompts) -> None:
    answers = await collect(dispatcher.generate(REQUEST))
    [(worker_id, request)] = workers.started
    assert request.version == VERSIONS["shout"]
    made = [token for delta in answers[0] for token in delta.token_ids]
    assert made == answer_token_ids(request, prompts)
    assert {delta.worker_id for delta in answers[0]} == {worker_id}
    assert workers.num_open == workers.num_cancelled == 0


async def test_answers_are_merged_and_seeds_move_on(dispatcher: Dispatcher, workers: FakeWorkers) -> None:
    answers = await collect(dispatcher.generate(REQUEST.model_copy(update={"n": 4})))
    assert sorted(answers) == [0, 1, 2, 3]
    for index, deltas in answers.items():
        assert f"seed {1 + index};" in "".join(delta.text for delta in deltas)
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    order = [request.sampling.seed for _, request in workers.started]
    assert order == [1, 2, 3, 4]
    assert len({request.request_id for _, request in workers.started}) == 4


@pytest.mark.parametrize(
    "error", [WorkerGone("died"), EngineFailed("stopped"), AdapterUnavailable("cold"), StoreUnavailable("away")]
)
async def test_another_worker_before_the_first_delta(
    dispatcher: Dispatcher, workers: FakeWorkers, error: Exception
) -> None:
    workers.fail = lambda worker_id, num_sent: error if worker_id == "w0" else None
    answers = await collect(dispatcher.generate(REQUEST))
    assert [worker_id for worker_id, _ in workers.started] == ["w0", "w1"]
    assert {delta.worker_id for delta in answers[0]} == {"w1"}
    first, second = (request for _, request in workers.started)
    assert first.request_id != second.request_id
    assert workers.only_resident == [False, isinstance(error, StoreUnavailable)]
    assert workers.num_open == 0


async def test_while_the_store_is_away_requests_go_where_their_adapter_is(
    prompts: Prompts, workers: FakeWorkers
) -> None:
    store = FakeStore()
    names = Names(store)
    dispatcher = Dispatcher(BASE_ID, prompts, names, workers, RequestMetrics())
    await collect(dispatcher.generate(REQUEST))
    store.leave()
    while not names.is_away:
        await asyncio.sleep(0.001)
    await collect(dispatcher.generate(REQUEST))
    names.stop()
    assert workers.only_resident == [False, True]


async def test_tries_are_bounded(dispatcher: Dispatcher, workers: FakeWorkers) -> None:
    workers.fail = lambda worker_id, num_sent: WorkerGone("died")
    with pytest.raises(NoWorker):
        await collect(dispatcher.generate(REQUEST))
    assert len(workers.started) == MAX_ATTEMPTS
    assert workers.num_open == 0


async def test_no_other_worker_after_the_first_delta(dispatcher: Dispatcher, workers: FakeWorkers) -> None:
    workers.fail = lambda worker_id, num_sent: WorkerGone("died") if num_sent == 3 else None
    deltas = dispatcher.generate(REQUEST)
    for _ in range(3):
        await anext(deltas)
    with pytest.raises(StreamBroken):
        await anext(deltas)
    assert len(workers.started) == 1
    assert workers.num_open == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_an_answer_that_nobody_has_seen_of_is_made_again(
    dispatcher: Dispatcher, workers: FakeWorkers, n: int
) -> None:
    request = REQUEST.model_copy(update={"n": n})
    prepared = await dispatcher.prepare(request, caller="")
    want = await collect(dispatcher.stream([prepared], is_whole=True))
    assert len(want[0]) > 3
    workers.fail = lambda worker_id, num_sent: WorkerGone("died") if worker_id == "w0" and num_sent == 3 else None
    prepared = await dispatcher.prepare(request, caller="")
    got = await collect(dispatcher.stream([prepared], is_whole=True))
    for index in range(n):
        assert [delta.token_ids for delta in got[index]] == [delta.token_ids for delta in want[index]]
        assert {delta.worker_id for delta in got[index]} == {"w1"}
    assert prepared.timer.num_tokens == sum(len(deltas) for deltas in want.values())
    assert workers.num_open == 0


async def test_an_end_without_a_finish_reason_is_a_loss(
    dispatcher: Dispatcher, workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.cluster.fakes.answer_token_ids", lambda request, prompts: [])
    with pytest.raises(NoWorker):
        await collect(dispatcher.generate(REQUEST))
    assert workers.num_open == 0


@pytest.mark.parametrize("error", [Overloaded("full"), ZeroDivisionError("bug")])
async def test_other_errors_are_not_tried_again(dispatcher: Dispatcher, workers: FakeWorkers, error: Exception) -> None:
    workers.refuse = error
    with pytest.raises(type(error)):
        await collect(dispatcher.generate(REQUEST))
    assert len(workers.started) == 1
    assert workers.num_open == 0


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_stops_the_workers(dispatcher: Dispatcher, workers: FakeWorkers, n: int) -> None:
    async with aclosing(dispatcher.generate(REQUEST.model_copy(update={"n": n}))) as deltas:
        await anext(deltas)
    assert workers.num_open == 0
    assert workers.num_cancelled == n


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_before", [0, 2], ids=["waiting", "streaming"])
async def test_cancelling_stops_the_workers(
    dispatcher: Dispatcher, workers: FakeWorkers, n: int, num_before: int
) -> None:
    workers.hang_after = num_before
    task = asyncio.create_task(collect(dispatcher.generate(REQUEST.model_copy(update={"n": n}))))
    for _ in range(50):
        await asyncio.sleep(0)
    assert workers.num_open == n
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert workers.num_open == 0
    assert workers.num_cancelled == n


async def test_one_failed_answer_stops_the_others(dispatcher: Dispatcher, workers: FakeWorkers) -> None:
    failed: list[str] = []

    def fail_once(worker_id: str, num_sent: int) -> Exception | None:
        if num_sent == 2 and not failed:
            failed.append(worker_id)
            return WorkerGone("died")
        return None

    workers.fail = fail_once
    with pytest.raises(StreamBroken):
        await collect(dispatcher.generate(REQUEST.model_copy(update={"n": 3})))
    assert workers.num_open == 0
    assert workers.num_cancelled == 3


async def test_nothing_starts_for_a_bad_request(dispatcher: Dispatcher, workers: FakeWorkers) -> None:
    for update, error in (
        ({"model": "nobody"}, ModelNotFound),
        ({"model": "tiny:tiny:shout"}, ModelNotFound),
        ({"prompt": ""}, BadRequest),
        ({"prompt": (5,) * 600}, BadRequest),
        ({"stop_token_ids": (10_000,)}, BadRequest),
        ({"logit_bias": {10_000: 1.0}}, BadRequest),
    ):
        with pytest.raises(error):
            await collect(dispatcher.generate(REQUEST.model_copy(update=update)))
    assert workers.started == []

"""Requests on their way to workers and back: what is sent, what comes, and what a fault, a drain or a hang-up costs."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from msgspec.structs import replace
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from lorafleet.cluster.errors import NoWorker, Overloaded, StreamBroken, WorkerGone
from lorafleet.cluster.metrics import RequestMetrics
from lorafleet.cluster.routing.whereabouts import live_workers, note_resident
from lorafleet.cluster.serving.dispatch import Dispatcher
from lorafleet.cluster.serving.names import Names
from lorafleet.cluster.worker import connection, front
from lorafleet.cluster.worker import outbox as outbox_module
from lorafleet.workers.errors import EngineFailed, NoRoomError
from lorafleet.workers.request import GenerateDelta, GenerateRequest, StructuredOutputs, TokenLogprobs
from tests.cluster.fakes import FakeStore, make_prompts
from tests.cluster.fronts import DELTA, LAST, Handle, begin, front_of, request_of
from tests.support.wait import until

NO_ROOM = NoRoomError("ab" * 32, 5, 1, 3, 1, 5)
SHOUT = "aa" * 32


def test_serve_still_sends_by_value() -> None:
    assert "_by_reference" in inspect.signature(DeploymentHandle.options).parameters


async def test_requests_of_one_moment_go_over_one_connection_and_their_deltas_come_over_it() -> None:
    handle = Handle("w1")
    front = front_of(handle)
    outputs = StructuredOutputs(json_schema={"maximum": 2**90, "enum": ["\ud800", 1.5]}, thought="begun")
    one = request_of("one", SHOUT, logit_bias={7: -1.0}, stop=("a", "b"), structured_outputs=outputs, seed=-(2**63))
    two = request_of("two")
    streams = [front.generate(each, frozenset()) for each in (one, two)]
    server = handle.servers["w1"]
    await until(lambda: len(server.requests) == 2)
    assert list(server.requests.values()) == [one, two]
    assert server.loads() == ((front._queue.ingress_id, 2),)
    server.put("two", DELTA, LAST)
    server.put("one", DELTA)
    assert [await streams[0].next(), (await streams[1].next()).token_ids] == [DELTA, (5, 6)]
    assert server.loads() == ((front._queue.ingress_id, 1),)
    server.put("one", LAST)
    assert await streams[0].next() == LAST
    await begin(front, handle, "three")
    assert handle.num_calls == 1


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (NO_ROOM, NoRoomError),
        (EngineFailed("stopped"), EngineFailed),
        (KeyError("bug"), RuntimeError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("when", ["at once", "while it runs"])
async def test_what_a_worker_raises_of_a_request(outcome: Exception, expected: type[Exception], when: str) -> None:
    handle = Handle("w1")
    if when == "at once":
        handle.servers["w1"].refusal = outcome
        stream = front_of(handle).generate(request_of("r"), frozenset())
    else:
        (stream,) = await begin(front_of(handle), handle, "r")
        handle.servers["w1"].put("r", DELTA, outcome)
        assert await stream.next() == DELTA, "what came before an error is still said"
    with pytest.raises(expected) as caught:
        await stream.next()
    assert caught.value.args == outcome.args or expected is RuntimeError
    assert handle.servers["w1"].loads() == ()


@pytest.mark.parametrize(
    "outcome",
    [
        StopAsyncIteration(),
        ActorDiedError(),
        ActorUnavailableError("gone", None),
        RayTaskError("f", "Traceback", ActorDiedError()).as_instanceof_cause(),
        RequestCancelledError("x"),
        AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata()),
        asyncio.CancelledError(),
        WorkerGone("worker w1 is gone"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("when", ["before it connects", "while it runs"])
async def test_whatever_ends_the_call_loses_the_worker(outcome: BaseException, when: str) -> None:
    handle = Handle("w1")
    if when == "before it connects":
        handle.answers["w1"] = [outcome]
        stream = front_of(handle).generate(request_of("r"), frozenset())
    else:
        (stream,) = await begin(front_of(handle), handle, "r")
        handle.calls["w1"].words.put_nowait(outcome)
    with pytest.raises(WorkerGone):
        await stream.next()
    await until(lambda: handle.servers["w1"].loads() == ())


# --- through the dispatcher ---


async def ask(dispatcher: Dispatcher, taken: list[GenerateDelta]) -> None:
    async for delta in dispatcher.generate(GenerateRequest(model="tiny", prompt="Hello")):
        taken.append(delta)


@pytest.fixture
async def handle() -> Handle:
    return Handle("w1", "w2")


@pytest.fixture
async def dispatcher(handle: Handle) -> AsyncGenerator[Dispatcher, None]:
    names = Names(FakeStore())
    yield Dispatcher("tiny", make_prompts(), names, front_of(handle), RequestMetrics())
    names.stop()


async def begun(handle: Handle, excluded: str = "") -> tuple[str, str]:
    """The worker that has the request, and the request's id."""
    others = {key: server for key, server in handle.servers.items() if key != excluded}
    await until(lambda: any(server.requests for server in others.values()))
    worker_id = next(key for key, server in others.items() if server.requests)
    return worker_id, next(iter(others[worker_id].requests))


async def test_a_broken_connection_costs_nothing_before_the_first_token(handle: Handle, dispatcher: Dispatcher) -> None:
    taken: list[GenerateDelta] = []
    asking = asyncio.create_task(ask(dispatcher, taken))
    first, request_id = await begun(handle)
    handle.servers[first].die()
    second, again = await begun(handle, excluded=first)
    assert second != first
    assert again != request_id
    handle.servers[second].put(again, DELTA, LAST)
    await asking
    assert "".join(delta.text for delta in taken) == "xy"


async def test_a_broken_connection_ends_a_begun_stream_once(handle: Handle, dispatcher: Dispatcher) -> None:
    taken: list[GenerateDelta] = []
    asking = asyncio.create_task(ask(dispatcher, taken))
    worker_id, request_id = await begun(handle)
    handle.servers[worker_id].put(request_id, DELTA)
    await until(lambda: bool(taken))
    handle.servers[worker_id].die()
    with pytest.raises(StreamBroken):
        await asking
    assert taken == [DELTA]
    assert sum(len(server.requests) for server in handle.servers.values()) == 1


async def test_a_hang_up_aborts_the_sequence_and_gives_its_place_back(handle: Handle, dispatcher: Dispatcher) -> None:
    asking = asyncio.create_task(ask(dispatcher, []))
    worker_id, request_id = await begun(handle)
    asking.cancel()
    server = handle.servers[worker_id]
    await until(lambda: server.aborted == [request_id])
    assert server.loads() == ()
    server.put(request_id, DELTA)  # made meanwhile; nobody takes it


async def test_what_cannot_be_sent_fails_alone(handle: Handle) -> None:
    outputs = StructuredOutputs(json_schema={"enum": [object()]})
    sender = front_of(handle, max_load=1)
    with pytest.raises(TypeError):
        await sender.generate(request_of("odd", structured_outputs=outputs), frozenset()).next()
    await begin(sender, handle, "a", "b")


# --- who waits, who is passed over, who leaves ---


async def test_beyond_the_bound_a_request_is_refused_at_once_and_those_that_wait_go_in_order() -> None:
    handle = Handle("w1")
    front = front_of(handle, max_load=1, max_queued=2)
    await begin(front, handle, "a")
    waiting = [front.generate(request_of(request_id), frozenset()) for request_id in "bcd"]
    with pytest.raises(Overloaded) as caught:
        await asyncio.wait_for(waiting[2].next(), 1)
    assert caught.value.retry_after_s
    waiting[2].cancel()
    server = handle.servers["w1"]
    server.put("a", LAST)
    await until(lambda: list(server.requests) == ["a", "b"])
    server.put("b", NO_ROOM)
    await until(lambda: list(server.requests) == ["a", "b", "c"])


async def test_one_that_leaves_while_it_waits_or_runs_makes_room() -> None:
    handle = Handle("w1")
    front = front_of(handle, max_load=1)
    (running,) = await begin(front, handle, "a")
    waiting = [front.generate(request_of(request_id), frozenset()) for request_id in "bc"]
    waiting[0].cancel()
    assert waiting[1].worker_id is None
    for _ in range(2):
        running.cancel()
    server = handle.servers["w1"]
    await until(lambda: list(server.requests) == ["a", "c"])
    assert server.aborted == ["a"]


async def test_excluded_and_just_lost_workers_are_passed_over_while_there_are_others() -> None:
    handle = Handle("w1", "w2")
    front = front_of(handle)
    streams = await begin(front, handle, *"abcd", excluded=["w1"])
    assert {stream.worker_id for stream in streams} == {"w2"}
    handle.servers["w2"].die()
    with pytest.raises(WorkerGone):
        await streams[0].next()
    streams = [front.generate(request_of(request_id), frozenset()) for request_id in "efgh"]
    assert {stream.worker_id for stream in streams} == {"w1"}
    handle.leave("w1")
    await until(lambda: live_workers(handle.deployment_id) == {"w2"})
    await asyncio.sleep(0)
    assert front.generate(request_of("i"), frozenset({"w2"})).worker_id == "w2"


async def test_a_worker_that_drains_gets_nothing_new_and_is_left_alone_once_its_streams_are_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(front, "SWEEP_S", 0.001)
    handle = Handle("w1")
    sender = front_of(handle)
    (stream,) = await begin(sender, handle, "old")
    handle.come("w2")
    handle.leave("w1")
    await asyncio.sleep(0.02)
    assert {each.worker_id for each in await begin(sender, handle, "a", "b", "c")} == {"w2"}
    assert not handle.calls["w1"].is_cancelled, "Serve would end it, and it has a stream"
    handle.servers["w1"].put("old", DELTA, LAST)
    assert (await stream.next()).token_ids == (5, 6)
    await until(lambda: handle.calls["w1"].is_cancelled)
    assert not handle.calls["w2"].is_cancelled


async def test_requests_wait_for_the_first_worker_and_hear_of_it_from_any_thread() -> None:
    handle = Handle()
    stream = front_of(handle).generate(request_of("r"), frozenset())
    assert stream.worker_id is None
    threading.Thread(target=handle.come, args=("w1",)).start()
    await until(lambda: stream.worker_id == "w1")


async def test_nobody_waits_for_workers_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "SWEEP_S", 0.001)
    handle = Handle()
    handle.state = lambda: WorkerGone("worker  is gone")
    stream = front_of(handle).generate(request_of("r"), frozenset())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.next(), 0.05)
    handle.state = lambda: DeploymentUnavailableError(handle.deployment_id)
    with pytest.raises(NoWorker):
        await asyncio.wait_for(stream.next(), 5)


async def test_a_worker_that_an_admin_call_has_loaded_is_chosen_before_it_says_so() -> None:
    handle = Handle("w1", "w2")
    sender = front_of(handle)
    await begin(sender, handle, "first")
    note_resident(SHOUT, ["w2"])
    chosen = {sender.generate(request_of(str(i), SHOUT), frozenset()).worker_id for i in range(6)}
    assert chosen == {"w2"}


async def test_a_lost_connection_ends_the_streams_of_its_worker_and_the_next_request_gets_a_new_one() -> None:
    handle = Handle("w1", "w2")
    sender = front_of(handle)
    (one,) = await begin(sender, handle, "one", excluded=["w2"])
    (two,) = await begin(sender, handle, "two", excluded=["w1"])
    handle.calls["w1"].words.put_nowait(ActorUnavailableError("gone", None))
    with pytest.raises(WorkerGone):
        await one.next()
    handle.servers["w2"].put("two", DELTA)
    assert await two.next() == DELTA
    (late,) = await begin(sender, handle, "late", excluded=["w2"])
    handle.servers["w1"].put("late", DELTA)
    assert await late.next() == DELTA
    assert handle.num_calls == 3


# --- one stream ---


@pytest.mark.slow
async def test_a_worker_that_falls_silent_loses_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LOOK_S", 0.1)
    monkeypatch.setattr(outbox_module, "BEAT_S", 0.05)
    handle = Handle("w1")
    (stream,) = await begin(front_of(handle), handle, "r")
    server = handle.servers["w1"]
    await asyncio.sleep(1.2)  # it lives, and has nothing to say
    server.put("r", DELTA)
    assert await stream.next() == DELTA
    time.sleep(1.2)  # the ingress itself is paused
    server.put("r", DELTA)
    assert await stream.next() == DELTA
    monkeypatch.setattr(outbox_module, "BEAT_S", 60.0)
    with pytest.raises(WorkerGone, match="silent"):
        await asyncio.wait_for(stream.next(), 10)


async def test_what_comes_while_the_reader_is_late_is_one_delta() -> None:
    scored = [replace(DELTA, token_ids=(i,), text=str(i), logprobs=(TokenLogprobs(i, -0.5, ()),)) for i in range(3)]
    prompt_logprobs = (TokenLogprobs(9, None, ()),)
    handle = Handle("w1")
    (stream,) = await begin(front_of(handle), handle, "r")
    for delta in (replace(scored[0], prompt_logprobs=prompt_logprobs), scored[1], replace(scored[2], stop_reason="x")):
        stream.put(delta)
    delta = await stream.next()
    assert (delta.token_ids, delta.text, delta.stop_reason) == ((0, 1, 2), "012", "x")
    assert delta.logprobs == tuple(one.logprobs[0] for one in scored if one.logprobs)
    assert delta.prompt_logprobs == prompt_logprobs


async def settle() -> None:
    await asyncio.sleep(0.02)


async def test_a_sink_takes_the_middle_of_an_answer_while_its_reader_waits() -> None:
    handle = Handle("w1")
    (stream,) = await begin(front_of(handle), handle, "r")
    server, taken = handle.servers["w1"], list[str]()
    open_ = True

    def sink(delta: GenerateDelta) -> bool:
        if open_:
            taken.append(delta.text)
        return open_

    async def put(text: str) -> None:
        server.put("r", replace(DELTA, text=text))
        await settle()

    stream.pour_into(sink)
    await put("a")
    assert (await stream.next()).text == "a", "nobody waited for it, so nobody has seen what came before it"
    reading = asyncio.create_task(stream.next())
    for text in "bc":
        await put(text)
    assert taken == ["b", "c"]
    assert not reading.done()
    open_ = False
    await put("d")
    assert (await reading).text == "d"
    open_ = True
    await put("e")
    await put("f")
    assert (await stream.next()).text == "ef", "its reader was busy with what came before"
    reading = asyncio.create_task(stream.next())
    await settle()
    server.put("r", DELTA, LAST)
    assert (await reading).finish_reason == "length"
    assert taken[:2] == ["b", "c"]
    assert "".join(taken[2:]) + (await reading).text == "xy"


async def test_what_a_sink_raises_ends_the_stream() -> None:
    handle = Handle("w1")
    (stream,) = await begin(front_of(handle), handle, "r")

    def sink(delta: GenerateDelta) -> bool:
        raise KeyError("bug")

    handle.servers["w1"].put("r", DELTA)
    await stream.next()
    stream.pour_into(sink)
    reading = asyncio.create_task(stream.next())
    await settle()
    handle.servers["w1"].put("r", DELTA)
    with pytest.raises(KeyError):
        await reading
    stream.cancel()


async def test_a_stream_is_read_in_its_turn_but_at_once_when_it_begins_or_ends() -> None:
    handle = Handle("w1")
    sender = front_of(handle)
    sender.pace.event_s = 1.0
    (stream,) = await begin(sender, handle, "r")
    server = handle.servers["w1"]
    server.put("r", DELTA)
    assert await asyncio.wait_for(stream.next(), 1) == DELTA
    server.put("r", DELTA, DELTA)
    reading = asyncio.ensure_future(stream.next())
    await settle()
    assert not reading.done(), "its turn has not come"
    server.put("r", LAST)
    assert (await asyncio.wait_for(reading, 1)).token_ids == (5, 5, 6)


async def test_a_cancellation_of_ones_own_stays_one() -> None:
    handle = Handle("w1")
    (stream,) = await begin(front_of(handle), handle, "r")
    task: asyncio.Task[Any] = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream.cancel()

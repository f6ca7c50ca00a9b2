"""What Ray and Serve may say and raise of a worker's answers, as the dispatcher sees it."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from msgspec.structs import replace
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from lorafleet.cluster.errors import Overloaded, WorkerGone
from lorafleet.cluster.routing.whereabouts import note_request, worker_of
from lorafleet.cluster.wire import OUTBOX_KEY_BYTES, Failure, read_batch
from lorafleet.cluster.worker import client
from lorafleet.cluster.worker import outbox as outbox_module
from lorafleet.cluster.worker.client import ServeStream, WorkersClient
from lorafleet.cluster.worker.delta_server import DeltaServer
from lorafleet.cluster.worker.outbox import KEEP_S, Outboxes
from lorafleet.workers.errors import EngineFailed, NoRoomError
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams, TokenLogprobs
from tests.support.wait import until

DELTA = GenerateDelta(0, (5,), "x", None, None, 3, 0)
LAST = GenerateDelta(0, (6,), "y", None, "length", 3, 0)
OUTBOX_ID = b"0123456789abcdef" * 2
NO_ROOM = NoRoomError("ab" * 32, 5, 1, 3, 1, 5)


class Response:
    """Stands in for Serve's DeploymentResponseGenerator: says `words`, then goes on for ever or ends."""

    def __init__(self, words: Sequence[Any] = (), *, ends: bool = False) -> None:
        self.words: asyncio.Queue[Any] = asyncio.Queue()
        for word in words:
            self.words.put_nowait(word)
        if ends:
            self.words.put_nowait(StopAsyncIteration())
        self.is_cancelled = False

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        word = await self.words.get()
        if isinstance(word, BaseException):
            raise word
        return word

    def cancel(self) -> None:
        self.is_cancelled = True
        if not self.words.empty():
            raise BackPressureError(5, 4)  # as Serve does with whatever kept a request from its replica


class Box:
    """The outbox of one worker for one ingress: a real one, behind a real connection."""

    def __init__(self, outbox_id: str) -> None:
        self.boxes = Outboxes()
        self.server = DeltaServer(self.boxes, "127.0.0.1")
        self.call = Response()
        self._outbox_id = outbox_id
        self._telling = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        self.call.words.put_nowait(await self.server.address())

    def put(self, *batch: tuple[str, GenerateDelta]) -> None:
        with self.boxes.using(self._outbox_id) as outbox:
            for request_id, delta in batch:
                outbox.put(request_id, delta)


class Handle:
    """Stands in for Serve's handle: every answer runs on worker w1, whose outboxes are `boxes`."""

    deployment_id = DeploymentID(name="worker", app_name="test")

    def __init__(self, answers: Sequence[Response] = ()) -> None:
        self.answers = list(answers)
        self.boxes: dict[str, Box] = {}
        self.calls: list[tuple[str, str, frozenset[str]]] = []

    def options(
        self,
        *,
        method_name: str,
        stream: bool = False,
        _by_reference: bool = True,
        request_serialization: Literal["cloudpickle", "pickle"] = "cloudpickle",
    ) -> Any:
        assert stream is not _by_reference
        handle = self

        class Method:
            deployment_id = handle.deployment_id

            def remote(self, *args: Any, **kwargs: Any) -> Response:
                return getattr(handle, method_name)(*args, **kwargs)  # type: ignore[no-any-return]

        return Method()

    def generate(
        self, request: EngineRequest, outbox_id: str, *, excluded: frozenset[str], only_resident: bool
    ) -> Response:
        self.calls.append((request.request_id, outbox_id, excluded))
        return self.answers.pop(0)

    def deltas(self, outbox_id: str, *, worker_id: str) -> Response:
        assert worker_id not in self.boxes or self.boxes[worker_id].call.is_cancelled
        self.boxes[worker_id] = Box(outbox_id)
        return self.boxes[worker_id].call


def start(handle: Handle, *request_ids: str, workers: WorkersClient | None = None) -> list[ServeStream]:
    workers = workers or WorkersClient(handle)
    requests = [EngineRequest(request_id, None, (5,), SamplingParams()) for request_id in request_ids]
    return [workers.generate(request, frozenset({"w0"})) for request in requests]


async def settle() -> None:
    await asyncio.sleep(0.02)


def test_serve_still_sends_by_value() -> None:
    assert "_by_reference" in inspect.signature(DeploymentHandle.options).parameters


@pytest.mark.parametrize("place", ["before it runs", "while it runs"])
@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (StopAsyncIteration(), WorkerGone),
        (ActorDiedError(), WorkerGone),
        (ActorUnavailableError("gone", None), WorkerGone),
        (RayTaskError("f", "Traceback", ActorDiedError()).as_instanceof_cause(), WorkerGone),
        (RequestCancelledError("x"), WorkerGone),
        (AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata()), WorkerGone),
        (asyncio.CancelledError(), WorkerGone),
        (BackPressureError(5, 4), Overloaded),
        (Overloaded("full"), Overloaded),
        (RayTaskError("f", "Traceback", EngineFailed("stopped")).as_instanceof_cause(), EngineFailed),
        (RayTaskError("f", "Traceback", KeyError("bug")), KeyError),
        (Failure(NO_ROOM), NoRoomError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
async def test_what_is_raised(outcome: Any, expected: type[Exception], place: str) -> None:
    words = [outcome] if place == "before it runs" else ["w1", outcome]
    (stream,) = start(Handle([Response(words)]), "r")
    with pytest.raises(expected) as caught:
        await stream.next()
    assert not isinstance(caught.value, RayTaskError)
    stream.cancel()


async def test_deltas_of_many_come_by_one_stream_whatever_comes_first() -> None:
    handle = Handle([Response(["w1", None], ends=True), Response()])
    known, unknown = start(handle, "known", "unknown")
    await settle()
    handle.boxes["w1"].put(("known", DELTA), ("unknown", DELTA), ("gone", DELTA))
    assert await unknown.next() == DELTA, "its deltas may come before it is said where it runs"
    assert await known.next() == DELTA
    handle.boxes["w1"].put(("known", LAST))
    assert await known.next() == LAST
    assert [call[0] for call in handle.calls] == ["known", "unknown"]
    assert len({call[1] for call in handle.calls}) == 1
    assert {call[2] for call in handle.calls} == {frozenset({"w0"})}
    unknown.cancel()


@pytest.mark.slow
async def test_a_worker_that_falls_silent_loses_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LOOK_S", 0.1)
    monkeypatch.setattr(outbox_module, "BEAT_S", 0.05)
    handle = Handle([Response(["w1"])])
    (stream,) = start(handle, "r")
    await settle()
    await asyncio.sleep(1.2)  # it lives, and has nothing to say
    handle.boxes["w1"].put(("r", DELTA))
    assert await stream.next() == DELTA
    time.sleep(1.2)  # the ingress itself is paused
    handle.boxes["w1"].put(("r", DELTA))
    assert await stream.next() == DELTA
    monkeypatch.setattr(outbox_module, "BEAT_S", 60.0)
    with pytest.raises(WorkerGone, match="silent"):
        await asyncio.wait_for(stream.next(), 10)
    stream.cancel()


async def test_what_comes_while_the_reader_is_late_is_one_delta() -> None:
    scored = [replace(DELTA, token_ids=(i,), text=str(i), logprobs=(TokenLogprobs(i, -0.5, ()),)) for i in range(3)]
    prompt_logprobs = (TokenLogprobs(9, None, ()),)
    handle = Handle([Response(["w1", Failure(NO_ROOM)])])
    (stream,) = start(handle, "r")
    for delta in (replace(scored[0], prompt_logprobs=prompt_logprobs), scored[1], replace(scored[2], stop_reason="x")):
        stream.put(delta)
    delta = await stream.next()
    assert (delta.token_ids, delta.text, delta.stop_reason) == ((0, 1, 2), "012", "x")
    assert delta.logprobs == tuple(one.logprobs[0] for one in scored if one.logprobs)
    assert delta.prompt_logprobs == prompt_logprobs
    stream.put(DELTA)
    await settle()
    assert await stream.next() == DELTA, "what came before an error is still said"
    with pytest.raises(NoRoomError):
        await stream.next()


async def test_a_sink_takes_the_middle_of_an_answer_while_its_reader_waits() -> None:
    handle = Handle([Response(["w1"])])
    (stream,) = start(handle, "r")
    await settle()
    box, taken = handle.boxes["w1"], list[str]()
    open_ = True

    def sink(delta: GenerateDelta) -> bool:
        if open_:
            taken.append(delta.text)
        return open_

    async def put(text: str) -> None:
        box.put(("r", replace(DELTA, text=text)))
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
    box.put(("r", DELTA), ("r", LAST))
    assert (await reading).finish_reason == "length"
    assert taken[:2] == ["b", "c"]
    assert "".join(taken[2:]) + (await reading).text == "xy"


async def test_what_a_sink_raises_ends_the_stream() -> None:
    handle = Handle([Response(["w1"])])
    (stream,) = start(handle, "r")
    await settle()

    def sink(delta: GenerateDelta) -> bool:
        raise KeyError("bug")

    handle.boxes["w1"].put(("r", DELTA))
    await stream.next()
    stream.pour_into(sink)
    reading = asyncio.create_task(stream.next())
    await settle()
    handle.boxes["w1"].put(("r", DELTA))
    with pytest.raises(KeyError):
        await reading
    stream.cancel()


async def test_a_stream_is_read_in_its_turn_but_at_once_when_it_begins_or_ends() -> None:
    handle = Handle([Response(["w1"])])
    workers = WorkersClient(handle)
    workers.pace.event_s = 1.0
    (stream,) = start(handle, "r", workers=workers)
    await settle()
    box = handle.boxes["w1"]
    box.put(("r", DELTA))
    assert await asyncio.wait_for(stream.next(), 1) == DELTA
    box.put(("r", DELTA))
    box.put(("r", DELTA))
    reading = asyncio.ensure_future(stream.next())
    await settle()
    assert not reading.done(), "its turn has not come"
    box.put(("r", LAST))
    assert (await asyncio.wait_for(reading, 1)).token_ids == (5, 5, 6)


async def test_a_lost_outbox_ends_the_streams_of_its_worker_and_the_next_gets_a_new_one() -> None:
    handle = Handle([Response(["w1"]), Response(["w2"]), Response(), Response(["w1"])])
    workers = WorkersClient(handle)
    one, two, early = start(handle, "one", "two", "early", workers=workers)
    early_response = early._response
    await settle()
    handle.boxes["w1"].call.words.put_nowait(ActorUnavailableError("gone", None))
    with pytest.raises(WorkerGone):
        await one.next()
    handle.boxes["w2"].put(("two", DELTA))
    assert await two.next() == DELTA
    early_response.words.put_nowait("w1")
    with pytest.raises(WorkerGone, match="was lost"):
        await early.next()  # what it said may have been in the lost outbox
    (late,) = start(handle, "late", workers=workers)
    await settle()
    handle.boxes["w1"].put(("late", DELTA))
    assert await late.next() == DELTA
    for stream in (one, two, early, late):
        stream.cancel()


async def test_a_worker_that_left_the_service_is_left_alone_once_its_streams_are_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "SWEEP_S", 0.001)
    live = {"w1"}
    monkeypatch.setattr(client, "live_workers", lambda deployment_id: frozenset(live))
    handle = Handle([Response(["w1", None], ends=True)])
    (stream,) = start(handle, "r")
    await asyncio.sleep(0.02)
    live.clear()
    await asyncio.sleep(0.02)
    assert not handle.boxes["w1"].call.is_cancelled, "it has a stream"
    handle.boxes["w1"].put(("r", LAST))
    assert await stream.next() == LAST
    await asyncio.sleep(0.02)
    assert handle.boxes["w1"].call.is_cancelled


async def test_a_cancellation_of_ones_own_stays_one() -> None:
    (stream,) = start(Handle([Response()]), "r")
    task = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    stream.cancel()


async def test_where_a_request_went_and_how_it_is_cancelled() -> None:
    response = Response()
    (stream,) = start(Handle([response]), "request-2")
    assert stream.worker_id is None
    note_request("request-2", "w7")
    assert stream.worker_id == "w7"
    stream.cancel()
    assert response.is_cancelled
    assert worker_of("request-2") is None  # nothing of it is kept


async def test_cancelling_what_was_refused_raises_nothing() -> None:
    (stream,) = start(Handle([Response([BackPressureError(5, 4)])]), "r")
    stream.cancel()


async def test_an_outbox_gathers_what_is_put_between_two_messages() -> None:
    boxes = Outboxes()
    with boxes.using("a") as box:
        box.put("r1", DELTA)
        box.put("r2", DELTA)
        batches = box.batches()
        assert await anext(batches) == [("r1", DELTA), ("r2", DELTA)]
        box.put("r1", LAST)
        assert await anext(batches) == [("r1", LAST)]
        waiting = asyncio.ensure_future(anext(batches, None))
        await settle()
        later = box.batches()
        box.put("r2", LAST)
        assert await anext(later) == [("r2", LAST)]
        assert await waiting is None, "the later reader took over"
        with boxes.using("a") as same, boxes.using("b") as other:
            assert same is box
            assert other is not box
    with boxes.using("a") as fresh:
        assert fresh is not box


async def test_an_outbox_is_kept_for_a_reader_that_comes_after_all_answers_are_over() -> None:
    now = 0.0
    boxes = Outboxes(clock=lambda: now)
    for outbox_id in ("late", "dead"):
        with boxes.using(outbox_id) as box:
            box.put("r", LAST)
    with boxes.using("late") as box:
        batches = box.batches()
        assert await anext(batches) == [("r", LAST)]
    now += KEEP_S + 1
    with boxes.using("other"):
        pass
    with boxes.using("dead") as box:
        assert box.is_empty, "its ingress has died"


async def reading(server: DeltaServer, key: bytes | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = await server.address()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write((key or address.key) + OUTBOX_ID)
    return reader, writer


async def test_an_outbox_is_read_over_a_connection_by_whom_has_the_key_only() -> None:
    boxes = Outboxes()
    server = DeltaServer(boxes, "127.0.0.1")
    with boxes.using(OUTBOX_ID.decode()) as box:
        stranger, lost = await reading(server, b"x" * OUTBOX_KEY_BYTES)
        assert await asyncio.wait_for(stranger.read(), 5) == b""
        lost.close()
        scored = replace(DELTA, logprobs=(TokenLogprobs(1, float("-inf"), ((2, -0.5),)),), text="wörld 🦊")
        box.put("r1", scored)
        reader, writer = await reading(server)
        assert await read_batch(reader) == [("r1", scored)]
        box.put("r1", LAST)
        box.put("r2", LAST)
        assert await read_batch(reader) == [("r1", LAST), ("r2", LAST)]
        num_users = box.num_users
        writer.close()
        await until(lambda: box.num_users == num_users - 1)
        assert "key" not in repr(await server.address())
    server.close()


async def test_what_a_late_reader_has_not_taken_waits_in_the_outbox() -> None:
    boxes = Outboxes()
    server = DeltaServer(boxes, "127.0.0.1")
    long = replace(DELTA, text="x" * 100_000)
    with boxes.using(OUTBOX_ID.decode()) as box:
        reader, writer = await reading(server)
        for i in range(200):
            box.put(str(i), long)
            await asyncio.sleep(0)
        await until(lambda: not box.is_empty)
        seen: list[str] = []
        num_frames = 0
        while len(seen) < 200:
            seen += [request_id for request_id, _ in await read_batch(reader)]
            num_frames += 1
        assert seen == [str(i) for i in range(200)]
        assert num_frames < 200, "what waited came together"
        writer.close()
    server.close()


async def test_a_worker_tells_how_many_answers_it_makes_for_whom() -> None:
    boxes = Outboxes()
    assert boxes.loads() == ()
    with boxes.using("c"), boxes.answering("b"), boxes.answering("a"), boxes.answering("b"):
        assert boxes.loads() == (("a", 1), ("b", 2))
    assert boxes.loads() == ()

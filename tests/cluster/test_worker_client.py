"""What Ray and Serve may raise in the middle of a stream, as the dispatcher sees it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from lorafleet.cluster.errors import Overloaded, WorkerGone
from lorafleet.cluster.outcome import Failure
from lorafleet.cluster.whereabouts import note_request
from lorafleet.cluster.worker_client import ServeStream, ServeWorkers
from lorafleet.workers.errors import EngineFailed, NoRoomError
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams

DELTA = GenerateDelta(0, (5,), "x", None, None, 3, 0)
NO_ROOM = NoRoomError("ab" * 32, 5, 1, 3, 1, 5)


class Response:
    """Stands in for Serve's DeploymentResponseGenerator."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome
        self.is_cancelled = False

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        self.is_cancelled = True
        if isinstance(self._outcome, BackPressureError):
            raise self._outcome  # as Serve does with whatever kept a request from its replica


def stream_of(outcome: Any) -> ServeStream:
    return ServeStream(Response(outcome), "request-1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (StopAsyncIteration(), WorkerGone),
        (ActorDiedError(), WorkerGone),
        (ActorUnavailableError("gone", None), WorkerGone),
        (RayTaskError("f", "Traceback", ActorDiedError()).as_instanceof_cause(), WorkerGone),
        (RequestCancelledError("x"), WorkerGone),
        (asyncio.CancelledError(), WorkerGone),
        (BackPressureError(5, 4), Overloaded),
        (Overloaded("full"), Overloaded),
        (RayTaskError("f", "Traceback", EngineFailed("stopped")).as_instanceof_cause(), EngineFailed),
        (RayTaskError("f", "Traceback", KeyError("bug")), KeyError),
        (Failure(NO_ROOM), NoRoomError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
async def test_what_is_raised(outcome: Any, expected: type[Exception]) -> None:
    with pytest.raises(expected) as caught:
        await stream_of(outcome).next()
    assert not isinstance(caught.value, RayTaskError)


async def test_deltas_come_through() -> None:
    assert await stream_of(DELTA).next() is DELTA


async def test_a_cancellation_of_ones_own_stays_one() -> None:
    stream = stream_of(asyncio.CancelledError())
    task = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_where_a_request_went_and_how_it_is_cancelled() -> None:
    response = Response(DELTA)
    stream = ServeStream(response, "request-2")  # type: ignore[arg-type]
    assert stream.worker_id is None
    note_request("request-2", "w7")
    assert stream.worker_id == "w7"
    stream.cancel()
    assert response.is_cancelled


def test_cancelling_what_was_refused_raises_nothing() -> None:
    stream_of(BackPressureError(5, 4)).cancel()


async def test_the_router_is_told_whom_to_avoid() -> None:
    calls: list[tuple[Any, Any]] = []

    class Handle:
        def options(self, **options: Any) -> Handle:
            assert options == {"method_name": "generate", "stream": True}
            return self

        def remote(self, request: EngineRequest, *, excluded: frozenset[str]) -> Response:
            calls.append((request, excluded))
            return Response(DELTA)

    request = EngineRequest("request-3", None, (5,), SamplingParams())
    stream = ServeWorkers(Handle()).generate(request, frozenset({"w1"}))  # type: ignore[arg-type]
    assert await stream.next() is DELTA
    assert calls == [(request, frozenset({"w1"}))]

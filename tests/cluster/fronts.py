"""A front over workers that are real servers in this process: only their engines and Serve are stand-ins."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError

from lorafleet.cluster.routing.placement import Placement
from lorafleet.cluster.routing.whereabouts import note_router, tell
from lorafleet.cluster.routing.worker_queue import WorkerQueue
from lorafleet.cluster.wire import RoutingReport
from lorafleet.cluster.worker.answer_server import AnswerServer
from lorafleet.cluster.worker.front import Front
from lorafleet.cluster.worker.stream import AnswerStream
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams
from lorafleet.workers.worker import Take
from tests.support.wait import until

DELTA = GenerateDelta(0, (5,), "x", None, None, 3, 0)
LAST = GenerateDelta(0, (6,), "y", None, "length", 3, 0)
INGRESS_ID = "0123456789abcdef" * 2

_numbers = itertools.count()


class Response:
    """Stands in for Serve's DeploymentResponseGenerator: says `words`, then goes on for ever."""

    def __init__(self, *words: Any) -> None:
        self.words: asyncio.Queue[Any] = asyncio.Queue()
        for word in words:
            self.words.put_nowait(word)
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


class Server(AnswerServer):
    """An AnswerServer over an engine that makes what the test says."""

    def __init__(self) -> None:
        super().__init__(self._take_request, "127.0.0.1")
        self.requests: dict[str, EngineRequest] = {}
        """Begun, by id, whether over or not."""
        self.aborted: list[str] = []
        self.refusal: Exception | None = None
        """What the engine raises for a request."""
        self._takes: dict[str, Take] = {}

    def put(self, request_id: str, *items: GenerateDelta | Exception) -> None:
        """The engine has made something."""
        for item in items:
            self._takes[request_id](item)

    def die(self) -> None:
        """All connections break, as when the process is killed."""
        self.close()

    def _take_request(self, request: EngineRequest, take: Take) -> Callable[[], None]:
        if self.refusal is not None:
            raise self.refusal
        self.requests[request.request_id] = request
        self._takes[request.request_id] = take
        return partial(self.aborted.append, request.request_id)


class Handle:
    """Stands in for Serve's handle and for its router, which knows the workers `servers`."""

    def __init__(self, *worker_ids: str) -> None:
        self.deployment_id = DeploymentID(name="worker", app_name=f"test-{next(_numbers)}")
        self.servers: dict[str, Server] = {}
        self.workers: Mapping[str, RoutingReport] = {}
        self.calls: dict[str, Response] = {}
        """By worker: the last call for a connection."""
        self.num_calls = 0
        self.answers: dict[str, Sequence[Any]] = {}
        """By worker: what the calls for a connection say in the place of its address."""
        self.state: Callable[[], Exception] = lambda: AssertionError("no such call")
        note_router(self)
        self.come(*worker_ids)

    def come(self, *worker_ids: str, resident: Sequence[str] = ()) -> None:
        """Workers join, or report anew."""
        for worker_id in worker_ids:
            self.servers.setdefault(worker_id, Server())
            self.workers = {**self.workers, worker_id: RoutingReport(tuple(resident), 10)}
        tell(self.deployment_id)

    def leave(self, *worker_ids: str) -> None:
        """Workers take no more requests, and Serve waits for those that they have."""
        self.workers = {each: report for each, report in self.workers.items() if each not in worker_ids}
        tell(self.deployment_id)

    def options(self, *, method_name: str, stream: bool = False, _by_reference: bool = True) -> Any:
        assert stream is not _by_reference
        handle = self

        class Method:
            deployment_id = handle.deployment_id

            def remote(self, *, worker_id: str) -> Any:
                return handle._connect(worker_id) if method_name == "connection" else handle._ask()

        return Method()

    async def _ask(self) -> None:
        raise self.state()

    def _connect(self, worker_id: str) -> Response:
        self.num_calls += 1
        response = self.calls[worker_id] = Response(*self.answers.get(worker_id, ()))
        if worker_id not in self.answers:
            asyncio.get_running_loop().create_task(self._tell_address(worker_id, response))
        return response

    async def _tell_address(self, worker_id: str, response: Response) -> None:
        response.words.put_nowait(await self.servers[worker_id].address())


def front_of(handle: Handle, *, max_load: int = 100, max_queued: int = 100) -> Front:
    placement = Placement(max_load=max_load, spill_gap=8, memory_s=5.0, rng=random.Random(0))
    return Front(handle, WorkerQueue(placement, max_queued=max_queued, ingress_id=INGRESS_ID))


def request_of(request_id: str, version: str | None = None, **sampling: Any) -> EngineRequest:
    return EngineRequest(request_id, version, (5, 6), SamplingParams(**sampling))


async def begin(front: Front, handle: Handle, *request_ids: str, excluded: Sequence[str] = ()) -> list[AnswerStream]:
    """Sequences that a worker has."""
    streams = [front.generate(request_of(request_id), frozenset(excluded)) for request_id in request_ids]
    for request_id, stream in zip(request_ids, streams, strict=True):
        worker_id = stream.worker_id
        assert worker_id is not None, "it waits"
        server = handle.servers[worker_id]
        await until(lambda server=server, request_id=request_id: request_id in server.requests)  # type: ignore[misc]
    return streams

"""The client of the workers: a stream of deltas for each sequence, and calls to one worker. Hides Ray's error types.

Each sequence has its own call, which says where it runs and how it ended. The deltas of all sequences on one worker
come together over one connection, from the outbox that the worker keeps for this process.

Worker ids come from the handle's request router, which hears of deaths and joins first. A call to a worker that is not
there fails; no other worker gets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import ObjectLostError, RayActorError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from lorafleet.adapter_store.manifest import AdapterManifest
from lorafleet.cluster.errors import NoWorker, Overloaded, ServiceUnavailable, WorkerGone, unwrap
from lorafleet.cluster.ray_internals import by_value
from lorafleet.cluster.routing.calls import answer_of
from lorafleet.cluster.routing.whereabouts import forget_request, live_workers, worker_of
from lorafleet.cluster.wire import Batch, OutboxAddress, WorkerCounts, read_batch, result_of
from lorafleet.cluster.worker.pace import Pace, Turns
from lorafleet.workers.errors import EngineFailed
from lorafleet.workers.request import EngineRequest, GenerateDelta
from lorafleet.workers.state import WorkerState

logger = logging.getLogger(__name__)

CALL_S = 10.0
"""How long a worker may take to answer what needs no loading."""
COUNTS_S = 3.0
"""How long a worker may take to report its counts: a scrape does not wait for long."""
STATE_S = 3.0
"""How long a worker may take to say what it holds: a listing goes on without one that is silent."""
LOAD_S = 600.0
"""How long a worker may take to make an adapter resident."""
SILENT_LOOKS = 10
"""How often in a row it is looked, every `LOOK_S`, and a worker has said nothing. Then its streams are lost.

Looks are counted and no seconds: after a pause of its own an ingress reads what came meanwhile before it looks again.
"""
LOOK_S = 1.0
"""A worker that lives says something every `outbox.BEAT_S`."""
SWEEP_S = 0.5
"""How often it is looked for workers that take no more requests, whose outbox must not keep them."""

_GONE = (RayActorError, WorkerCrashedError, ObjectLostError, TaskCancelledError, AioRpcError)


class WorkersClient:
    """Workers behind the handle of a `WorkerReplica` deployment, routed by `WorkerRouter`. One event loop uses it."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        # The first `options` starts the handle's router, which then begins to hear of replicas.
        self._handle = handle.options(method_name="state")
        # Serve's default, cloudpickle, takes four times as long for a request.
        self._generate = by_value(handle, method_name="generate", stream=True, request_serialization="pickle")
        self._deltas = by_value(handle, method_name="deltas", stream=True)
        self._outbox_id = uuid.uuid4().hex
        self._streams: dict[str, ServeStream] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        """By worker: what reads its outbox."""
        self._sweeper: asyncio.Task[None] | None = None
        self._serials = itertools.count()
        self.pace = Pace()
        self._lost: dict[str, int] = {}
        """By worker: the serial at which an outbox of it was lost last, with what was in it."""

    def generate(self, request: EngineRequest, excluded: frozenset[str], *, only_resident: bool = False) -> ServeStream:
        """Start a sequence on the worker that the router chooses, not on one of `excluded` while there are others.

        only_resident: where its adapter is resident, if it is anywhere.
        """
        response = self._generate.remote(request, self._outbox_id, excluded=excluded, only_resident=only_resident)
        return ServeStream(self, response, request.request_id, next(self._serials))

    async def worker_ids(self) -> frozenset[str]:
        return live_workers(self._handle.deployment_id)

    async def state(self, worker_id: str) -> WorkerState:
        state: WorkerState = await self._call(worker_id, "state", STATE_S)
        return state

    async def counts(self) -> list[WorkerCounts]:
        """Return the counts of every worker that answers in time."""
        asked = [self._call(worker_id, "counts", COUNTS_S) for worker_id in sorted(await self.worker_ids())]
        found = await asyncio.gather(*asked, return_exceptions=True)
        return [each for each in found if isinstance(each, WorkerCounts)]

    async def make_resident(self, worker_id: str, version: str, *, hold_s: float, pinned: bool) -> None:
        await self._call(worker_id, "make_resident", LOAD_S, version, hold_s=hold_s, pinned=pinned)

    async def release_hold(self, worker_id: str, version: str) -> None:
        await self._call(worker_id, "release_hold", CALL_S, version)

    async def estimate(self, worker_id: str, manifest: AdapterManifest) -> tuple[int, tuple[str, ...]]:
        num_pages, evicted = await self._call(worker_id, "estimate", CALL_S, manifest)
        return num_pages, evicted

    async def reconcile(self, worker_id: str) -> None:
        await self._call(worker_id, "reconcile", CALL_S)

    async def _call(self, worker_id: str, method: str, timeout_s: float, *args: Any, **kwargs: Any) -> Any:
        gone = WorkerGone(f"worker {worker_id} is gone")
        try:
            return await answer_of(
                self._handle.options(method_name=method).remote(*args, worker_id=worker_id, **kwargs),
                timeout_s,
                late=ServiceUnavailable(f"worker {worker_id} does not answer", None, 5.0),
                away=gone,
            )
        except EngineFailed as error:
            # A worker whose step loop has ended is about to be replaced.
            raise gone from error

    def join(self, stream: ServeStream) -> None:
        """From now on the stream gets its deltas, whichever worker makes them."""
        self._streams[stream.request_id] = stream

    def leave(self, stream: ServeStream) -> None:
        """Its deltas are wanted no more."""
        self._streams.pop(stream.request_id, None)
        forget_request(stream.request_id)

    def read_outbox(self, worker_id: str, stream: ServeStream) -> None:
        """A stream's deltas come from this worker. Raises WorkerGone if some were lost already."""
        if self._lost.get(worker_id, -1) > stream.serial:
            raise WorkerGone("the worker's answer was lost on its way")
        if worker_id not in self._readers:
            # In a context of its own: Serve ends the calls that a request made with the request.
            context = contextvars.Context()
            loop = asyncio.get_running_loop()
            self._readers[worker_id] = loop.create_task(self._read(worker_id), context=context)
            if self._sweeper is None:
                self._sweeper = loop.create_task(self._sweep(), context=context.copy())

    async def _read(self, worker_id: str) -> None:
        """Hand out a worker's deltas until it ends or is left alone."""
        response = self._deltas.remote(self._outbox_id, worker_id=worker_id)
        turns = Turns(self.pace, lambda: len(self._streams))
        reason = "the worker ended the stream before the answer"
        try:
            address: OutboxAddress = await anext(response)
            # The call says nothing more; it ends when the worker is lost, also where no connection tells of it.
            heard = asyncio.Event()
            tasks = (
                asyncio.ensure_future(self._read_frames(address, turns, heard)),
                asyncio.ensure_future(anext(response, None)),
                asyncio.ensure_future(_while_heard(heard)),
            )
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    await task
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        except TimeoutError:
            reason = "the worker has fallen silent"
            logger.warning("worker %s has fallen silent", worker_id)
        except asyncio.CancelledError:
            reason = "the worker is left alone"
            raise
        except Exception as error:
            reason = "the worker died"
            logger.info("the outbox of worker %s is lost: %s", worker_id, error)
        finally:
            with contextlib.suppress(Exception):
                response.cancel()
            turns.end()
            del self._readers[worker_id]
            self._lost[worker_id] = next(self._serials)
            for stream in list(self._streams.values()):
                if stream.runs_on == worker_id:
                    stream.put(WorkerGone(reason))

    async def _read_frames(self, address: OutboxAddress, turns: Turns, heard: asyncio.Event) -> None:
        """Hand out what comes over a connection to the worker, until it breaks; set `heard` each time."""
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            writer.write(address.key + self._outbox_id.encode())
            while True:
                batch = await read_batch(reader)
                heard.set()
                turns.add(self._distribute(batch))
        finally:
            writer.close()

    def _distribute(self, batch: Batch) -> Iterator[ServeStream]:
        """Put deltas into their streams, which are to be woken."""
        for request_id, delta in batch:
            stream = self._streams.get(request_id)
            if stream is not None:
                stream.put(delta)
                yield stream

    async def _sweep(self) -> None:
        """Leave workers that have left the service alone once they have no stream of ours, so that they can end."""
        while self._readers:
            await asyncio.sleep(SWEEP_S)
            live = live_workers(self._deltas.deployment_id)
            busy = {stream.runs_on for stream in self._streams.values()}
            for worker_id, reader in list(self._readers.items()):
                if worker_id not in live and worker_id not in busy:
                    reader.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await reader
        self._sweeper = None


async def _while_heard(heard: asyncio.Event) -> None:
    """Return never; raises TimeoutError when `heard` has not been set for `SILENT_LOOKS` looks."""
    num_silent = 0
    while num_silent < SILENT_LOOKS:
        heard.clear()
        await asyncio.sleep(LOOK_S)
        num_silent = 0 if heard.is_set() else num_silent + 1
    raise TimeoutError


class ServeStream:
    """The deltas of one sequence on one worker."""

    def __init__(
        self, workers: WorkersClient, response: DeploymentResponseGenerator[Any], request_id: str, serial: int
    ) -> None:
        self.request_id = request_id
        self.serial = serial
        """Of the time it was begun."""
        self.runs_on: str | None = None
        """The worker that has said that it runs there."""
        self._workers = workers
        self._response = response
        self._items: deque[GenerateDelta | Exception] = deque()
        self._may_read = asyncio.Event()
        self._has_begun = False
        self._is_awaited = False
        """Whether a reader waits in `next`, so that all earlier items are with the client."""
        self._sink: Callable[[GenerateDelta], bool] | None = None
        workers.join(self)
        self._follower = asyncio.get_running_loop().create_task(self._follow())

    @property
    def worker_id(self) -> str | None:
        """The worker that the router chose; None before it has."""
        return self.runs_on or worker_of(self.request_id)

    def put(self, item: GenerateDelta | Exception) -> None:
        """Queue a delta or an error for `next`.

        The first and the last item wake the reader at once; others wait for `wake`.
        """
        last = self._items[-1] if self._items else None
        if isinstance(last, GenerateDelta) and isinstance(item, GenerateDelta):
            # Not read yet: all on the way to the client get one message for several steps.
            self._items[-1] = last.then(item)
        else:
            self._items.append(item)
        if not self._has_begun or isinstance(item, Exception) or item.finish_reason is not None:
            self.wake()

    def wake(self) -> None:
        """Hand the sink what it may take, and let `next` have the rest."""
        if self._sink is not None and self._is_awaited and not self._may_read.is_set():
            self._pour(self._sink)
        if self._items:
            self._may_read.set()

    def pour_into(self, sink: Callable[[GenerateDelta], bool]) -> None:
        """Give deltas in the middle of the answer to `sink` while a reader waits in `next`, in the place of waking it.

        sink: returns False where it does not take the delta, which `next` then returns. What it raises, `next` raises.
        """
        self._sink = sink

    def _pour(self, sink: Callable[[GenerateDelta], bool]) -> None:
        while self._items:
            item = self._items[0]
            if isinstance(item, Exception) or item.finish_reason is not None:
                return
            try:
                if not sink(item):
                    return
            except Exception as error:
                self._items = deque([error])
                return
            self._items.popleft()
            self._workers.pace.note_event()

    async def next(self) -> GenerateDelta:
        """The next delta. Raises WorkerGone, Overloaded, NoWorker, or what the worker raised."""
        self._is_awaited = True
        try:
            await self._may_read.wait()
        finally:
            self._is_awaited = False
        self._has_begun = True
        item = self._items.popleft()
        if not self._items:
            self._may_read.clear()
        self._workers.pace.note_event()
        if isinstance(item, Exception):
            raise item
        if item.finish_reason is not None:
            self._workers.leave(self)
        return item

    def cancel(self) -> None:
        """Stop the worker, or the wait for one."""
        self._workers.leave(self)
        self._follower.cancel()
        with contextlib.suppress(Exception):  # Serve raises once more what kept the request from any worker
            self._response.cancel()

    async def _follow(self) -> None:
        """Wait for what the worker's call says: where it runs, and that it has ended, well or with an error."""
        try:
            self.runs_on = await self._next_word()
            self._workers.read_outbox(self.runs_on, self)
            # None: all deltas are in the outbox.
            await self._next_word()
            # To the end of the call, so that Serve counts it as over.
            with contextlib.suppress(StopAsyncIteration):
                await self._response.__anext__()
        except Exception as error:
            self.put(error)

    async def _next_word(self) -> Any:
        """Return the call's next item. Raises the errors of `next`."""
        try:
            word: Any = result_of(await self._response.__anext__())
        except StopAsyncIteration:
            raise WorkerGone("the worker ended the stream before the answer") from None
        except asyncio.CancelledError:
            # Ray says so too when a worker's call was cancelled from elsewhere, say while the worker shuts down.
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise WorkerGone("the worker dropped the request") from None
        except BackPressureError as error:
            raise Overloaded("too many requests wait for a worker; try again later", None, 1.0) from error
        except DeploymentUnavailableError as error:
            raise NoWorker("the workers cannot be started", None, 5.0) from error
        except _GONE as error:
            raise WorkerGone("the worker died") from error
        except Exception as error:
            cause = unwrap(error)
            if isinstance(cause, _GONE):
                raise WorkerGone("the worker died") from error
            if cause is error:
                raise
            raise cause from error
        return word

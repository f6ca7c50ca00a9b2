"""Sends sequences to workers, over a connection of our own to each, and gives back their deltas.

A queue chooses the worker. It hears of workers from the handle's request router, which hears of deaths and joins first.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from functools import partial
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from lorafleet.cluster.errors import NoWorker
from lorafleet.cluster.ray_internals import by_value
from lorafleet.cluster.routing.whereabouts import watch, workers_of
from lorafleet.cluster.routing.worker_queue import Waiter, WorkerQueue
from lorafleet.cluster.wire import packed_request
from lorafleet.cluster.worker.connection import Connection
from lorafleet.cluster.worker.pace import Pace, Turns
from lorafleet.cluster.worker.stream import AnswerStream
from lorafleet.workers.request import EngineRequest

SWEEP_S = 0.5
"""How often it is looked for workers that take no more requests, whose connection must not keep them."""
ASK_S = 3.0
"""How long Serve may take to say whether there will be workers."""


class Front:
    """Workers behind the handle of a `WorkerReplica` deployment, for sequences. One event loop uses it."""

    def __init__(self, handle: DeploymentHandle[Any], queue: WorkerQueue) -> None:
        # The first `options` starts the handle's router, which then begins to hear of replicas.
        self._handle = handle.options(method_name="state")
        self._connecting = by_value(handle, method_name="connection", stream=True)
        self._queue = queue
        self._connections: dict[str, Connection] = {}
        """By worker."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self.pace = Pace()

    def generate(
        self, request: EngineRequest, excluded: frozenset[str], *, only_resident: bool = False
    ) -> AnswerStream:
        """Start a sequence on the worker that the queue chooses, not on one of `excluded` while there are others.

        only_resident: where its adapter is resident, if it is anywhere.
        """
        if self._loop is None:
            self._start()
        stream = AnswerStream(self.pace)
        try:
            place = partial(self._send, request.request_id, packed_request(request), stream)
            waiter = Waiter(request.version, excluded, only_resident, place, fail=stream.put)
            stream.end = partial(self._queue.remove, waiter)
            self._queue.add(waiter)
        except Exception as error:
            stream.put(error)
        return stream

    def hear(self) -> None:
        """The workers may have changed."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the event loop is closed, so nobody asks
            self._loop.call_soon_threadsafe(self._update)

    def note_resident(self, version: str, worker_id: str) -> None:
        """A worker has an adapter and has not reported it yet."""
        self._queue.note_resident(version, worker_id)

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        watch(self, self._handle.deployment_id)
        self._update()
        # In a context of its own: Serve ends the calls that a request made with the request.
        self._sweeper = self._loop.create_task(self._sweep(), context=contextvars.Context())

    def _update(self) -> None:
        self._queue.update(workers_of(self._handle.deployment_id))

    def _send(self, request_id: str, packed: bytes, stream: AnswerStream, worker_id: str) -> None:
        connection = self._connections.get(worker_id)
        if connection is None:
            connection = self._connections[worker_id] = Connection(
                worker_id,
                self._connecting,
                self._queue.ingress_id,
                Turns(self.pace, self._num_streams),
                on_over=self._queue.release,
                on_end=self._forget,
            )
        stream.worker_id = worker_id
        stream.end = partial(connection.leave, request_id)
        connection.begin(request_id, packed, stream)

    def _forget(self, connection: Connection) -> None:
        del self._connections[connection.worker_id]
        self._queue.avoid(connection.worker_id)

    def _num_streams(self) -> int:
        return sum(connection.num_streams for connection in self._connections.values())

    async def _sweep(self) -> None:
        """Leave workers that have left the service alone once they have no stream of ours, so that they can end.

        And end the wait for workers that cannot be started.
        """
        while True:
            await asyncio.sleep(SWEEP_S)
            for worker_id, connection in list(self._connections.items()):
                if worker_id not in self._queue.workers and not connection.num_streams:
                    await connection.close()
            if self._queue.is_stuck:
                with contextlib.suppress(Exception):
                    await self._ask_for_workers()

    async def _ask_for_workers(self) -> None:
        """Fail what waits if Serve says that there will be no worker."""
        try:
            async with asyncio.timeout(ASK_S):
                await self._handle.remote(worker_id="")
        except DeploymentUnavailableError:
            self._queue.refuse(NoWorker("the workers cannot be started", None, 5.0))

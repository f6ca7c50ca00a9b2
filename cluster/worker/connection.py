"""The connection of an ingress to one worker: requests go there, and the deltas of all of them come back.

A call through Serve gives the address. It lasts as long as the connection, so that Serve knows that the worker is in
use, and tells of the worker's death also where the connection does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

from ray.serve.handle import DeploymentHandle

from lorafleet.cluster.errors import WorkerGone
from lorafleet.cluster.wire import Address, Batch, Order, frame, read_batch, unpacked_error
from lorafleet.cluster.worker.pace import Turns
from lorafleet.cluster.worker.race import until_one_ends
from lorafleet.cluster.worker.stream import AnswerStream
from lorafleet.workers.request import GenerateDelta

logger = logging.getLogger(__name__)

SILENT_LOOKS = 10
"""How often in a row it is looked, every `LOOK_S`, and a worker has said nothing. Then its streams are lost.

Looks are counted and no seconds: after a pause of its own an ingress reads what came meanwhile before it looks again.
"""
LOOK_S = 1.0
"""A worker that lives says something every `outbox.BEAT_S`."""


class Connection:
    """Sends requests to one worker from the first moment on: they wait for the connection. One event loop uses it."""

    def __init__(
        self,
        worker_id: str,
        handle: DeploymentHandle[Any],
        ingress_id: str,
        turns: Turns,
        *,
        on_over: Callable[[str], None],
        on_end: Callable[[Connection], None],
    ) -> None:
        """handle: of the worker's `connection`; on_over: called with the worker's id when a sequence is over or left.

        on_end: called when the connection has ended, and before its sequences get the error.
        """
        self.worker_id = worker_id
        self._handle = handle
        self._ingress_id = ingress_id
        self._turns = turns
        self._on_over = on_over
        self._on_end = on_end
        self._streams: dict[str, AnswerStream] = {}
        self._unsent: list[bytes] = []
        """Frames of orders."""
        self._writer: asyncio.StreamWriter | None = None
        # In a context of its own: Serve ends the calls that a request made with the request.
        self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    @property
    def num_streams(self) -> int:
        """Sequences that are not over."""
        return len(self._streams)

    def begin(self, request_id: str, packed: bytes, stream: AnswerStream) -> None:
        """Send a request as `packed_request` writes it; its deltas go into the stream."""
        self._streams[request_id] = stream
        self._send((request_id, packed))

    def leave(self, request_id: str) -> None:
        """The deltas of a sequence are wanted no more; the worker aborts it. Does nothing once it is over."""
        if self._streams.pop(request_id, None) is not None:
            self._send((request_id, None))
            self._on_over(self.worker_id)

    async def close(self) -> None:
        """End it."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _send(self, order: Order) -> None:
        """In one piece with what else is said in this turn of the event loop."""
        self._unsent.append(frame(order))
        if len(self._unsent) == 1 and self._writer is not None:
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.write(b"".join(self._unsent))
            self._unsent.clear()

    async def _run(self) -> None:
        """Send and hand out until the worker ends, or is left alone."""
        reason = "the worker ended the stream before the answer"
        response = self._handle.remote(worker_id=self.worker_id)
        try:
            async with asyncio.timeout(SILENT_LOOKS * LOOK_S):
                address: Address = await anext(response)
            # The call says nothing more; it ends when the worker is lost, also where no connection tells of it.
            heard = asyncio.Event()
            await until_one_ends(self._talk(address, heard), anext(response, None), _while_heard(heard))
        except TimeoutError:
            reason = "the worker has fallen silent"
            logger.warning("worker %s has fallen silent", self.worker_id)
        except asyncio.CancelledError:
            reason = "the worker is left alone"
            raise
        except Exception as error:
            reason = "the worker died"
            logger.info("the connection to worker %s is lost: %s", self.worker_id, error)
        finally:
            with contextlib.suppress(Exception):
                response.cancel()
            self._turns.end()
            self._on_end(self)
            while self._streams:
                _, stream = self._streams.popitem()
                stream.put(WorkerGone(reason))
                self._on_over(self.worker_id)

    async def _talk(self, address: Address, heard: asyncio.Event) -> None:
        """Hand out what comes over the connection until it breaks; set `heard` each time."""
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            writer.write(address.key + self._ingress_id.encode())
            self._writer = writer
            self._flush()
            while True:
                batch = await read_batch(reader)
                heard.set()
                self._turns.add(self._distribute(batch))
        finally:
            self._writer = None
            writer.close()

    def _distribute(self, batch: Batch) -> Iterator[AnswerStream]:
        """Put deltas into their streams, which are to be woken."""
        for request_id, item in batch:
            stream = self._streams.get(request_id)
            if stream is None:
                continue  # it was left
            self._take(request_id, stream, unpacked_error(item) if isinstance(item, bytes) else item)
            yield stream

    def _take(self, request_id: str, stream: AnswerStream, item: GenerateDelta | Exception) -> None:
        stream.put(item)
        if isinstance(item, Exception) or item.finish_reason is not None:
            del self._streams[request_id]
            self._on_over(self.worker_id)


async def _while_heard(heard: asyncio.Event) -> None:
    """Return never; raises TimeoutError when `heard` has not been set for `SILENT_LOOKS` looks."""
    num_silent = 0
    while num_silent < SILENT_LOOKS:
        heard.clear()
        await asyncio.sleep(LOOK_S)
        num_silent = 0 if heard.is_set() else num_silent + 1
    raise TimeoutError

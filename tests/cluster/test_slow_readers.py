"""A client that reads slowly: what the ingress keeps for it is bounded, and the others do not feel it."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import uvicorn
from msgspec.structs import replace

from lorafleet.cluster.worker.stream import AnswerStream
from lorafleet.workers.request import GenerateDelta
from tests.cluster.fronts import DELTA, LAST, Handle, front_of
from tests.cluster.serving import BASE_ID, Service
from tests.support.wait import until

WORD = "x" * 16_384
NUM_DELTAS = 150
SEND_BUFFER = 65_536
HIGH_WATER = 65_536
"""At which uvicorn's transport is full."""


async def ask(address: tuple[str, int], limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a streamed request. The reader stops reading its socket at `limit` bytes."""
    reader, writer = await asyncio.open_connection(*address, limit=limit)
    body = json.dumps({"model": BASE_ID, "prompt": "Hello", "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def test_what_is_kept_for_a_slow_reader_is_bounded() -> None:
    """One joined delta, and what the server's transport holds; no more, however much the worker makes."""
    handle = Handle("w1")
    worker = handle.servers["w1"]
    front = front_of(handle)
    streams: list[AnswerStream] = []

    class Recorded:
        def generate(self, *args: Any, **kwargs: Any) -> AnswerStream:
            streams.append(front.generate(*args, **kwargs))
            return streams[-1]

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    listener.bind(("127.0.0.1", 0))
    app = Service(workers=Recorded()).app()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve([listener]))
    await until(lambda: server.started)
    try:
        slow_reader, slow_writer = await ask(listener.getsockname(), 1024)
        await until(lambda: len(worker.requests) == 1)
        eager_reader, eager_writer = await ask(listener.getsockname(), 2**24)
        await until(lambda: len(worker.requests) == 2)
        slow_id, eager_id = worker.requests
        slow = streams[0]
        eager_body = asyncio.create_task(eager_reader.read())
        for i in range(NUM_DELTAS):
            delta = replace(DELTA, text=f"{i}{WORD}")
            worker.put(slow_id, delta)
            worker.put(eager_id, delta)
            await asyncio.sleep(0.002)
            assert len(slow._items) <= 1
        worker.put(eager_id, LAST)
        body = await asyncio.wait_for(eager_body, 20)
        texts = [
            json.loads(line[6:])["choices"][0]["text"] for line in body.split(b"\n") if line.startswith(b"data: {")
        ]
        assert "".join(texts) == "".join(f"{i}{WORD}" for i in range(NUM_DELTAS)) + LAST.text
        (connection,) = server.server_state.connections  # the eager one is closed
        kept = connection.transport.get_write_buffer_size()
        assert 0 < kept <= HIGH_WATER + 2 * (len(WORD) + 512)
        (waiting,) = slow._items
        assert isinstance(waiting, GenerateDelta)
        assert len(waiting.text) > NUM_DELTAS * len(WORD) / 2
        # It gets all of it as soon as it reads.
        worker.put(slow_id, LAST)
        body = b""
        while piece := await asyncio.wait_for(slow_reader.read(2**20), 20):
            body += piece
        lines = [line for line in body.split(b"\n") if line.startswith(b"data: {")]
        assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == "".join(texts)
        assert len(lines) < NUM_DELTAS / 2
        slow_writer.close()
        eager_writer.close()
    finally:
        server.should_exit = True
        await serving

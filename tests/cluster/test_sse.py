"""Clients that go away: by hanging up, and by Serve's cancellation."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from lorafleet.cluster.http.sse import ClientGone, EventStream, while_connected
from tests.cluster.serving import BASE_ID, Service
from tests.support.wait import eventually, until


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def hang_up() -> Message:
    return {"type": "http.disconnect"}


async def test_work_goes_on_while_connected() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 3

    assert await while_connected(never, work()) == 3


async def test_work_ends_before_the_client_counts_as_gone() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    with pytest.raises(ClientGone):
        await while_connected(hang_up, work())
    assert ended


async def test_events_are_closed_however_the_stream_ends() -> None:
    closed = []

    async def events(num: int) -> AsyncGenerator[bytes, None]:
        try:
            for _ in range(num):
                yield b"x"
            if num == 2:
                await asyncio.Event().wait()
        finally:
            closed.append(num)

    async def send(message: Message) -> None:
        if num == 3 and message["type"] == "http.response.body":
            await asyncio.Event().wait()  # a client that does not read

    for num, receive in ((1, never), (2, hang_up), (2, never), (3, never)):
        serving = asyncio.create_task(EventStream(events(num), {})({"type": "http"}, receive, send))
        for _ in range(20):
            await asyncio.sleep(0)
        serving.cancel()  # does nothing to what has ended
        await asyncio.wait([serving])
    assert closed == [1, 2, 2, 3]


async def test_events_written_beside_the_generator_keep_their_order() -> None:
    """Also where the server does not take one at once: then it comes before what the generator has next."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    sent: list[bytes] = []
    may_send = asyncio.Event()
    may_send.set()

    async def events() -> AsyncGenerator[bytes, None]:
        while (event := await queue.get()) is not None:
            yield event

    async def send(message: Message) -> None:
        await may_send.wait()
        sent.append(message.get("body", b"start"))

    async def settle() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    stream = EventStream(events(), {})
    assert not stream.may_write
    serving = asyncio.create_task(stream({"type": "http"}, never, send))
    await settle()
    stream.write(b"1")
    assert sent == [b"start", b"1"]
    may_send.clear()
    stream.write(b"2")
    assert not stream.may_write
    queue.put_nowait(b"3")
    await settle()
    assert sent == [b"start", b"1"]
    may_send.set()
    await settle()
    assert sent == [b"start", b"1", b"2", b"3"]
    stream.write(b"4")
    may_send.clear()
    stream.write(b"lost with its client")
    serving.cancel()
    await asyncio.wait([serving])
    may_send.set()
    await settle()
    assert sent == [b"start", b"1", b"2", b"3", b"4"]


def connect(service: Service, *, stream: bool, n: int = 1) -> socket.socket:
    """A client that has sent its request and can vanish without a word."""
    host, port = service.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)))
    body = json.dumps({"model": BASE_ID, "prompt": "Hello", "stream": stream, "n": n}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("num_before", [0, 2], ids=["before-first-token", "after"])
def test_a_client_that_hangs_up_stops_its_workers(service: Service, stream: bool, num_before: int) -> None:
    service.workers.hang_after = num_before
    client = connect(service, stream=stream, n=2)
    eventually(lambda: service.workers.num_open == 2)
    if stream and num_before:
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    client.close()
    eventually(lambda: service.workers.num_open == 0)
    assert service.workers.num_cancelled == 2


def test_many_clients_vanish_and_the_others_go_on(service: Service) -> None:
    service.workers.hang_after = 4
    clients = [connect(service, stream=True) for _ in range(100)]
    eventually(lambda: service.workers.num_open == 100, timeout_s=20)
    begun = time.monotonic()
    for client in clients[:80]:
        client.close()
    eventually(lambda: service.workers.num_open == 20)
    assert time.monotonic() - begun < 2
    assert service.workers.num_cancelled == 80
    for client in clients[80:]:
        client.close()
    eventually(lambda: service.workers.num_open == 0)


async def test_a_client_that_reads_nothing_stops_its_own_stream_and_no_other() -> None:
    """What is made ahead of it is bounded by the server's buffer and the sockets' alone."""
    event, num_events = b"x" * 65_536, 4096
    made = {"idle": 0, "eager": 0}

    async def events(name: str) -> AsyncGenerator[bytes, None]:
        for _ in range(num_events):
            made[name] += 1
            yield event

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await EventStream(events(scope["path"].strip("/")), {})(scope, receive, send)

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server.serve([listener]))
    await until(lambda: server.started)
    try:
        writers = []
        for name in made:
            reader, writer = await asyncio.open_connection(*listener.getsockname(), limit=1024)
            writer.write(f"GET /{name} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            writers.append(writer)
        while await reader.read(2**20) and made["eager"] < num_events:
            pass
        assert made["eager"] == num_events
        assert made["idle"] < num_events / 4
        for writer in writers:
            writer.close()
    finally:
        server.should_exit = True
        await serving

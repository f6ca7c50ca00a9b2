"""Heads of requests that are too long or too slow, at the server that Serve's proxy runs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import uvicorn

from lorafleet.cluster.http import heads
from lorafleet.cluster.http.heads import MAX_HEAD_BYTES


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Says how many bytes the body had, and whether a header came behind it."""
    size, is_more = 0, True
    while is_more:
        message = await receive()
        size += len(message.get("body", b""))
        is_more = message.get("more_body", False)
    body = str(size).encode() + b" late" * any(name == b"late" for name, _ in scope["headers"])
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[int, None]:
    monkeypatch.setattr(heads, "HEAD_S", 0.5)
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    heads.bound_heads()
    server = uvicorn.Server(uvicorn.Config(echo, port=0, lifespan="off", log_config=None, timeout_keep_alive=30))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await serving


async def reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")]
    return int(head.split()[1]), await reader.readexactly(length)


async def test_what_is_in_bounds_is_served_also_on_a_kept_connection(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b"x" * 300_000
    long = b"a: " + b"b" * (MAX_HEAD_BYTES - 100)
    for headers in (b"a: b", long, b"a: b"):
        writer.write(b"POST / HTTP/1.1\r\n%s\r\ncontent-length: %d\r\n\r\n%s" % (headers, len(body), body))
        assert await reply(reader) == (200, b"300000")
        await asyncio.sleep(0.6)  # between two requests nothing is late
    writer.close()


@pytest.mark.parametrize("field", [b"a: " + b"b" * 40_000_000, b"a: b\r\n" * 20_000], ids=["one", "many"])
async def test_long_heads_are_refused_at_once(port: int, field: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began_s = time.monotonic()
    writer.write(b"GET / HTTP/1.1\r\n" + field)
    status, body = await reply(reader)
    assert status == 431
    assert json.loads(body)["error"]["message"] == f"the headers are over {MAX_HEAD_BYTES} bytes"
    assert time.monotonic() - began_s < 2
    writer.close()


CHUNKED = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"


async def test_trailers_are_no_headers(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(CHUNKED + b"0\r\nlate: yes\r\n\r\n")
        assert await reply(reader) == (200, b"3")
    writer.close()


@pytest.mark.parametrize(
    "rest",
    [b"0\r\na: " + b"b" * 40_000_000, b"0\r\n" + b"a: b\r\n" * 100_000, b"3;" + b"e" * 1_000_000],
    ids=["one trailer", "many", "a chunk's extension"],
)
async def test_long_trailers_are_refused_at_once(port: int, rest: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began_s = time.monotonic()
    writer.write(CHUNKED)
    await asyncio.sleep(0.05)  # the app has the request
    writer.write(rest)
    status, body = await reply(reader)
    assert (status, json.loads(body)["error"]["code"]) == (431, "headers_refused")
    assert time.monotonic() - began_s < 2
    writer.close()


async def test_a_body_of_many_small_pieces_is_no_head(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(CHUNKED + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
    assert await reply(reader) == (200, b"100003")
    writer.close()


async def test_a_connection_without_a_request_is_closed(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


@pytest.mark.parametrize("head", [b"GET / HT", b"GET / HTTP/1.1\r\na: b\r\n"])
async def test_late_heads_are_closed(port: int, head: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head)
    status, _ = await asyncio.wait_for(reply(reader), 5)
    assert status == 408
    assert await reader.read() == b""
    writer.close()

"""A worker's side of the connections: who is heard, what comes together, and what ends with a connection."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from lorafleet.cluster.wire import KEY_BYTES, frame, packed_request, read_batch, unpacked_error
from lorafleet.workers.errors import NoRoomError
from lorafleet.workers.request import TokenLogprobs
from tests.cluster.fronts import DELTA, INGRESS_ID, LAST, Server, request_of
from tests.support.wait import until

NO_ROOM = NoRoomError("ab" * 32, 5, 1, 3, 1, 5)


async def connect(
    server: Server, *, key: bytes | None = None, ingress_id: str = INGRESS_ID
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = await server.address()
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write((key or address.key) + ingress_id.encode())
    return reader, writer


def order_of(request_id: str) -> bytes:
    return frame((request_id, packed_request(request_of(request_id))))


async def test_only_who_has_the_key_is_heard() -> None:
    server = Server()
    stranger, lost = await connect(server, key=b"x" * KEY_BYTES)
    lost.write(order_of("r0"))
    assert await asyncio.wait_for(stranger.read(), 5) == b""
    lost.close()
    reader, writer = await connect(server)
    writer.write(order_of("r1") + order_of("r2"))
    await until(lambda: list(server.requests) == ["r1", "r2"])
    scored = replace(DELTA, logprobs=(TokenLogprobs(1, float("-inf"), ((2, -0.5),)),), text="wörld 🦊")
    server.put("r1", scored)
    assert await read_batch(reader) == [("r1", scored)]
    server.put("r1", LAST)
    server.put("r2", NO_ROOM)
    (_, last), (request_id, error) = await read_batch(reader)
    assert last == LAST
    assert request_id == "r2"
    assert isinstance(error, bytes)
    assert unpacked_error(error).args == NO_ROOM.args
    assert "key" not in repr(await server.address())
    writer.close()


async def test_what_runs_ends_with_its_connection_or_when_it_is_told_so_and_nothing_else_does() -> None:
    server = Server()
    _, one = await connect(server, ingress_id="a" * 32)
    _, two = await connect(server, ingress_id="b" * 32)
    for writer, request_ids in ((one, "rst"), (two, "xyz")):
        writer.write(b"".join(order_of(request_id) for request_id in request_ids))
    await until(lambda: len(server.requests) == 6)
    assert server.loads() == (("a" * 32, 3), ("b" * 32, 3))
    one.write(frame(("s", None)) + frame(("unknown", None)) + frame(("x", None)))
    await until(lambda: server.aborted == ["s"])
    server.put("r", LAST)
    one.write(frame(("r", None)))
    assert server.loads() == (("a" * 32, 1), ("b" * 32, 3))
    one.close()
    await until(lambda: server.aborted == ["s", "t"])
    two.write(b"\0\0\0\1\xc1")  # no MessagePack
    await until(lambda: server.loads() == ())
    assert sorted(server.aborted) == ["s", "t", "x", "y", "z"]


async def test_a_request_that_nobody_can_read_fails_alone() -> None:
    server = Server()
    reader, writer = await connect(server)
    odd = packed_request(request_of("odd", ignore_eos=True))
    writer.write(order_of("r") + frame(("odd", odd.replace(b"ignore_eos", b"ignore_all"))) + frame(("cut", odd[:9])))
    failed: list[str] = []
    while len(failed) < 2:
        for request_id, error in await read_batch(reader):
            assert isinstance(error, bytes)
            assert isinstance(unpacked_error(error), RuntimeError)
            failed.append(request_id)
    assert failed == ["odd", "cut"]
    server.put("r", LAST)
    assert await read_batch(reader) == [("r", LAST)]
    writer.close()


async def test_what_a_late_reader_has_not_taken_comes_together() -> None:
    server = Server()
    long = replace(DELTA, text="x" * 100_000)
    reader, writer = await connect(server)
    writer.write(b"".join(order_of(str(i)) for i in range(200)))
    await until(lambda: len(server.requests) == 200)
    for i in range(200):
        server.put(str(i), long)
        await asyncio.sleep(0)
    seen: list[str] = []
    num_frames = 0
    while len(seen) < 200:
        seen += [request_id for request_id, _ in await read_batch(reader)]
        num_frames += 1
    assert seen == [str(i) for i in range(200)]
    assert num_frames < 200
    writer.close()

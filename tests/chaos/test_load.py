"""The clients of chaos tell every way in which an answer may end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import aiohttp
import pytest

from tests.chaos.load import Question, ask
from tests.chaos.soak import slope
from tests.chaos.table import rows, siege_of, trial_of

EXPECTED = (5, 6, 7)


def event(*token_ids: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"token_ids": token_ids}]}).encode() + b"\n\n"


def reply(status: str, body: bytes, *, length: int | None = None) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body) if length is None else length}\r\n\r\n".encode() + body


ERROR = b'data: {"error": {"code": "stream_broken"}}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWERS = {
    "whole": reply("200 OK", event(5) + event(6, 7) + DONE),
    "error_event": reply("200 OK", event(5) + ERROR),
    "cut": reply("200 OK", event(5, 6), length=1000),
    "refused": reply("503 Service Unavailable", b'{"error": {"code": "store_unavailable"}}'),
    "plain": reply("500 Internal Server Error", b"Internal Server Error"),
    "unreachable": b"",
    "short": reply("200 OK", event(5, 6) + DONE),
    "other": reply("200 OK", event(5) + event(9, 7) + DONE),
    "twice": reply("200 OK", event(5) + ERROR + ERROR),
    "more": reply("200 OK", event(5, 6, 7) + DONE + event(8)),
}
"""Prompt -> what a server answers, byte by byte."""


@pytest.fixture
async def url() -> AsyncGenerator[str, None]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line]
        body = json.loads(await reader.readexactly(length))
        writer.write(ANSWERS[body["prompt"]])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("prompt", ANSWERS)
async def test_every_end_of_a_stream_is_told(url: str, prompt: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        outcome = await ask(session, Question("tiny", prompt, 3), is_streamed=True, expected=EXPECTED)
    assert outcome.kind == (prompt if prompt not in ("short", "other", "twice", "more") else "wrong")
    assert outcome.is_failed == (prompt != "whole")
    trial = trial_of("a fault", 1, outcome.began_s, outcome.ended_s, [outcome])
    assert (trial.num_requests, trial.num_whole, trial.num_wrong) == (1, prompt == "whole", outcome.kind == "wrong")
    assert trial.num_unbegun == (prompt in ("refused", "plain", "unreachable"))
    assert (trial.num_error_events, trial.num_cut) == (prompt == "error_event", prompt == "cut")
    (row,) = rows([trial.row()])
    assert row[:3] == ("a fault", "1", "1")
    siege = siege_of("a client", 1, [], [outcome], {})
    assert (siege.num_requests, siege.num_failed) == (1, outcome.is_failed)


def test_the_slope_is_that_of_the_line() -> None:
    samples = [(second, 1_000_000 * second + 7) for second in range(10)]
    assert slope([(float(at), size) for at, size in samples]) == pytest.approx(3600.0)

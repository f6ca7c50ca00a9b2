"""Clients that mean ill, in a process of their own: `python -m tests.chaos.hostile URL KIND SECONDS`.

It yields its core to everybody else, as if it attacked from another machine. Prints `ready` when what it sends is made,
waits for a line, and then attacks. At the end it prints the replies that it got, as JSON: status, or how the connection
ended, and how often.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

NUM_SLOW = 1000
"""Connections that a slow client holds."""
MODEL = "tiny"


def post(path: str, body: dict[str, object]) -> bytes:
    """A request as bytes."""
    content = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    ).encode() + content


LARGE: dict[str, Callable[[], bytes]] = {
    "a header of 200 MB": lambda: b"GET /v1/models HTTP/1.1\r\nhost: x\r\na: " + b"b" * 200_000_000 + b"\r\n\r\n",
    "500,000 messages": lambda: post(
        "/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "x"}] * 500_000}
    ),
    "16 MB of token ids": lambda: post("/v1/completions", {"model": MODEL, "prompt": [100] * 3_200_000}),
    "a million `logit_bias` entries": lambda: post(
        "/v1/completions", {"model": MODEL, "prompt": "x", "logit_bias": {str(i): 1 for i in range(1_000_000)}}
    ),
    "a text of 10 MB": lambda: post("/v1/completions", {"model": MODEL, "prompt": "quick fox " * 1_000_000}),
}
"""One request after the other."""
SLOW: dict[str, bytes] = {
    f"{NUM_SLOW:,} slow headers": b"GET /v1/models HTTP/1.1\r\nhost: x\r\n",
    f"{NUM_SLOW:,} half bodies": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{",
}
"""Beginnings of requests, which go on by a byte every few seconds."""
KINDS = (*LARGE, *SLOW)


async def _send(host: str, port: int, request: bytes, replies: Counter[str], deadline_s: float) -> None:
    """Send one request; note what it is answered."""
    try:
        async with asyncio.timeout_at(deadline_s + 20):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(request)
                line = await reader.readline()
                replies[line.split()[1].decode() if line else "closed"] += 1
            finally:
                writer.close()
    except (OSError, TimeoutError, IndexError) as error:
        replies[type(error).__name__] += 1


async def _dawdle(host: str, port: int, start: bytes, replies: Counter[str], deadline_s: float) -> None:
    """Hold a connection with a request that does not end."""
    loop = asyncio.get_running_loop()
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(start)
        reading = asyncio.ensure_future(reader.readline())
        while loop.time() < deadline_s and not reading.done():
            await asyncio.wait({reading}, timeout=3.0)
            with contextlib.suppress(OSError):
                writer.write(b"x")
        replies["closed in time" if reading.done() else "still open"] += 1
        reading.cancel()
        writer.close()
    except OSError as error:
        replies[type(error).__name__] += 1


async def attack(url: str, kind: str, seconds: float) -> Counter[str]:
    """Attack for so long; returns what was answered."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    host, port = parts.hostname, parts.port
    replies: Counter[str] = Counter()
    request = LARGE[kind]() if kind in LARGE else b""
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    deadline_s = asyncio.get_running_loop().time() + seconds
    if kind in SLOW:
        await asyncio.gather(*(_dawdle(host, port, SLOW[kind], replies, deadline_s) for _ in range(NUM_SLOW)))
    while request and asyncio.get_running_loop().time() < deadline_s:
        await _send(host, port, request, replies, deadline_s)
    return replies


@contextlib.contextmanager
def attacker(url: str, kind: str, seconds: float) -> Iterator[Callable[[], dict[str, int]]]:
    """A process that is ready. Calling what this gives attacks, waits for the end, and returns the replies."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.hostile", url, kind, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    try:
        assert stdout.readline() == "ready\n"

        def begin() -> dict[str, int]:
            stdin.write("\n")
            stdin.flush()
            replies: dict[str, int] = json.loads(stdout.readline())
            return replies

        yield begin
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    os.nice(19)
    print(json.dumps(asyncio.run(attack(sys.argv[1], sys.argv[2], float(sys.argv[3])))), flush=True)

"""Measures the CPU time of the way from a worker to its clients, with metronomes in the place of engines.

    python benchmarks/serve_metronome.py --haproxy                            # 1 worker, 64 streams of 50 tokens/s each
    python benchmarks/serve_metronome.py --haproxy --workers 8 --streams 512  # as many a worker: 8 times the tokens
    python benchmarks/serve_metronome.py --haproxy --workers 8 --streams 512 --beats 6.25  # as many tokens in all
    python benchmarks/serve_metronome.py --haproxy --burst 256                # 256 first tokens at once
    python benchmarks/serve_metronome.py --haproxy --adapters                 # requests for two adapters in turn

A metronome gives each stream a token a beat, so nothing but the way is measured. Three loads tell three costs apart:
nothing at all (CPU a second), answers of one token (CPU a request) and long answers (CPU a token). A token's cost has
the idle time and the request taken off; `cpu_us_per_token_all` has them in it. A burst is answers of one token that
begin at once; a wait of up to one beat is in its times, and the client's own work. Each event is checked: its text, its
token ids, and how many there are. Appends a line of JSON to results/serve_metronome.jsonl. A case takes some 40 s after
the start of the service, and a burst 10 s.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import bars
import metronome
import uvloop
from serve_overhead import ADAPTERS, BASE_ID, DEMO, HAPROXY, free_port, machine, service, tree
from serve_overhead import cpu_seconds as cpu_of_processes

from lorafleet.cluster import app
from lorafleet.cluster.config import AppConfig

OURS = ("haproxy", "proxy", "ingress", "worker")
"""Roles on the way of a token."""
SHORT_TOKENS = 1
LONG_S = 8.0
"""How long a long answer takes, unless told otherwise."""
SHORT_REQUESTS = 1024
"""About as many answers of one token are asked for, unless told otherwise."""
BURST_ROUNDS = 12
BURST_BEATS = 200.0
WORKERS_PER_INGRESS = 4
BURST_INGRESSES = 8
IDLE_S = 10.0
SHAPE = ("streams", "beats", "max_tokens", "workers", "ingresses", "haproxy", "adapters")


def cpu_seconds() -> Counter[str]:
    """CPU seconds so far by role. The metronomes' threads are a role of their own: they stand for engines."""
    found = cpu_of_processes()
    for pid in tree():
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                if (task / "comm").read_text().strip() == metronome.THREAD_NAME:
                    fields = (task / "stat").read_text().rpartition(")")[2].split()
                    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                    found.update(engine=seconds, worker=-seconds)
    return found


class Client(asyncio.Protocol):
    """One streamed request on a socket of its own. It keeps what comes and reads it when the answer is over."""

    def __init__(self, body: bytes) -> None:
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        self._request = f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.begun_s = 0.0
        self.times_s: list[float] = []
        """When something of the answer came, its head included."""
        self.pieces: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.begun_s = time.perf_counter()
        cast(asyncio.WriteTransport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Keep a piece."""
        self.times_s.append(time.perf_counter())
        self.pieces.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        """The server closes the connection behind the answer."""
        if not self.done.done():
            self.done.set_result(None)

    def first_token_s(self) -> float:
        """From the request to the first piece with an event."""
        seen = b""
        for time_s, piece in zip(self.times_s, self.pieces, strict=True):
            seen += piece
            if b"data: " in seen:
                return time_s - self.begun_s
        raise RuntimeError("an answer had no event")

    def num_events(self, num_tokens: int) -> int:
        """Events with tokens. Raises RuntimeError where the answer is not the metronome's."""
        head, _, rest = b"".join(self.pieces).partition(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise RuntimeError(f"the service answered {head + rest[:300]!r}")
        lines = [line for line in rest.split(b"\n") if line.startswith(b"data: ")]
        if not lines or lines[-1] != b"data: [DONE]":
            raise RuntimeError("a stream did not end with [DONE]")
        choices = [json.loads(line[6:])["choices"][0] for line in lines[:-1]]
        token_ids = [token_id for choice in choices for token_id in choice["token_ids"]]
        text = "".join(choice["text"] for choice in choices)
        if token_ids != [metronome.TOKEN_ID] * num_tokens or text != metronome.TEXT * num_tokens:
            raise RuntimeError(f"an answer of {num_tokens} tokens came as {len(token_ids)}: {text[:80]!r}")
        return len(choices)


@dataclass(slots=True)
class Load:
    """Rounds of one kind: so many seconds, requests and tokens, and what they took."""

    cpu_s: Counter[str]
    wall_s: float
    num_requests: int = 0
    num_tokens: int = 0
    num_events: int = 0
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


async def run_rounds(port: int, models: Sequence[str], num_rounds: int, num_streams: int, max_tokens: int) -> Load:
    """Rounds of streams that begin at once, for these models in turn."""
    loop = asyncio.get_running_loop()
    sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    options = {"stream": True, "return_token_ids": True}
    bodies = [
        json.dumps({"model": models[i % len(models)], "prompt": f"{i}. Say something.", **sampling, **options}).encode()
        for i in range(num_streams)
    ]
    clients: list[Client] = []
    before, began_s = cpu_seconds(), time.perf_counter()
    for _ in range(num_rounds):
        made = await asyncio.gather(
            *(loop.create_connection(lambda body=body: Client(body), "127.0.0.1", port) for body in bodies)  # type: ignore[misc]
        )
        latest = [client for _, client in made]
        await asyncio.gather(*(client.done for client in latest))
        clients += latest
    load = Load(cpu_seconds() - before, time.perf_counter() - began_s)
    load.num_requests = len(clients)
    load.num_tokens = len(clients) * max_tokens
    load.num_events = sum(client.num_events(max_tokens) for client in clients)
    load.first_s = sorted(client.first_token_s() for client in clients)
    load.gaps_s = sorted(b - a for client in clients for a, b in pairwise(client.times_s))
    return load


async def run_idle() -> Load:
    """Nothing, for `IDLE_S`."""
    before, began_s = cpu_seconds(), time.perf_counter()
    await asyncio.sleep(IDLE_S)
    return Load(cpu_seconds() - before, time.perf_counter() - began_s)


def costs(idle: Load, short: Load, long: Load) -> dict[str, dict[str, float]]:
    """By role: CPU of an idle second (ms), of a request (ms) and of a token (us), each without the ones before."""
    found: dict[str, dict[str, float]] = {"idle_ms_per_s": {}, "request_ms": {}, "token_us": {}}
    for role in sorted(long.cpu_s):
        idle_rate = idle.cpu_s[role] / idle.wall_s
        # Two unknowns, two loads: the short answers have tokens too.
        a1, b1, y1 = short.num_requests, short.num_tokens, short.cpu_s[role] - idle_rate * short.wall_s
        a2, b2, y2 = long.num_requests, long.num_tokens, long.cpu_s[role] - idle_rate * long.wall_s
        determinant = a1 * b2 - a2 * b1
        found["idle_ms_per_s"][role] = round(idle_rate * 1e3, 2)
        found["request_ms"][role] = round((y1 * b2 - y2 * b1) / determinant * 1e3, 3)
        found["token_us"][role] = round((a1 * y2 - a2 * y1) / determinant * 1e6, 2)
    return found


async def measure(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """All loads, after one that does not count."""
    await run_rounds(port, args.models, 1, args.streams, 20)
    await asyncio.sleep(3.0)
    idle = await run_idle()
    short = await run_rounds(port, args.models, args.short_rounds, args.streams, SHORT_TOKENS)
    long = await run_rounds(port, args.models, args.rounds, args.streams, args.max_tokens)
    found = costs(idle, short, long)
    return {
        "tokens_per_s": round(long.num_tokens / long.wall_s, 1),
        "events_per_token": round(long.num_events / long.num_tokens, 3),
        "cpu_us_per_token": round(sum(found["token_us"].get(role, 0.0) for role in OURS), 1),
        "cpu_us_per_token_all": round(sum(long.cpu_s[role] for role in OURS) / long.num_tokens * 1e6, 1),
        "cpu_ms_per_request": round(sum(found["request_ms"].get(role, 0.0) for role in OURS), 2),
        **found,
        "first_token_ms_p50": round(statistics.median(short.first_s) * 1e3, 1),
        "first_token_ms_p99": round(percentile(short.first_s, 99) * 1e3, 1),
        "gap_ms_p50": round(statistics.median(long.gaps_s) * 1e3, 1),
        "gap_ms_p99": round(percentile(long.gaps_s, 99) * 1e3, 1),
    }


async def measure_burst(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """Bursts of answers of one token, after two that do not count."""
    await run_rounds(port, args.models, 2, args.burst, SHORT_TOKENS)
    await asyncio.sleep(3.0)
    load = await run_rounds(port, args.models, BURST_ROUNDS, args.burst, SHORT_TOKENS)
    return {
        **{f"first_token_ms_p{share}": round(percentile(load.first_s, share) * 1e3, 1) for share in (50, 90, 99)},
        "cpu_ms_per_request": round(sum(load.cpu_s[role] for role in OURS) / load.num_requests * 1e3, 2),
        "request_ms": {role: round(s / load.num_requests * 1e3, 3) for role, s in sorted(load.cpu_s.items())},
        "requests_per_s": round(load.num_requests / load.wall_s, 1),
    }


def verdicts(path: Path, line: bars.Line) -> list[bars.Bar]:
    """Bars of a case. One of many workers is held against the last one of a single worker on this machine."""
    if line["case"] == "burst":
        return [bars.at_most("first tokens of a burst, p99, ms", line["first_token_ms_p99"], 100)]
    held = [bars.at_most("CPU of a token, us", line["cpu_us_per_token"], 60)]
    if line["workers"] > 1:
        alone = bars.read(path, case="costs", workers=1, haproxy=line["haproxy"], machine=line["machine"])
        ratio = bars.ratio(line["cpu_us_per_token"], alone[-1]["cpu_us_per_token"] if alone else None)
        held.append(bars.at_most("CPU of a token against one worker's", ratio, 1.1))
    return held


def percentile(ordered: Sequence[float], share: int) -> float:
    """Of values in ascending order. share: percent."""
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)]


def shape_of(args: argparse.Namespace) -> None:
    """Fill in what was not said."""
    args.models = ADAPTERS if args.adapters else (BASE_ID,)
    args.streams = args.burst or args.streams
    args.ingresses = args.ingresses or (BURST_INGRESSES if args.burst else -(-args.workers // WORKERS_PER_INGRESS))
    args.beats = args.beats or (BURST_BEATS if args.burst else 50.0)
    args.max_tokens = SHORT_TOKENS if args.burst else args.max_tokens or round(LONG_S * args.beats)
    args.short_rounds = args.short_rounds or max(2, SHORT_REQUESTS // args.streams)


def main() -> None:
    """Measure and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "serve_metronome.jsonl")
    parser.add_argument("--beats", type=float, help="tokens a second of each stream; 50, in a burst 200")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, help=f"of a long answer; as many as it takes to last {LONG_S:.0f} s")
    parser.add_argument("--rounds", type=int, default=2, help="of long answers")
    parser.add_argument("--short-rounds", type=int, help=f"of answers of one token; about {SHORT_REQUESTS} in all")
    parser.add_argument("--burst", type=int, metavar="STREAMS", help="measure nothing but so many first tokens at once")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--ingresses", type=int, help=f"one to {WORKERS_PER_INGRESS} workers; in a burst {BURST_INGRESSES}"
    )
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--adapters", action="store_true", help="ask for adapters, whose names the store resolves")
    args = parser.parse_args()
    shape_of(args)
    os.environ["METRONOME_BEATS_PER_S"] = str(args.beats)
    if args.haproxy:
        os.environ |= HAPROXY
    app.WorkerReplica = metronome.replica_class()  # type: ignore[misc]
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="lorafleet-", ignore_cleanup_errors=True) as folder:
        config = AppConfig.model_validate(
            {
                "model": {"id": BASE_ID, "source": str(DEMO / "base")},
                "adapters": {
                    "state_dir": f"{folder}/state",
                    "sources": [{"name": "demo", "kind": "directory", "root": str(DEMO / "adapters")}],
                    "preload": [{"name": name, "source": "demo", "key": name} for name in ADAPTERS],
                },
                "worker": {
                    "num_replicas": args.workers,
                    "num_cpus": 0.01,  # many metronomes go on few cores
                    "device": "cpu",
                    "max_running": 512,
                },
                "ingress": {"num_replicas": args.ingresses},
            }
        )
        with service(config, folder, port):
            figures = uvloop.run((measure_burst if args.burst else measure)(args, port))
    shape = {key: getattr(args, key) for key in SHAPE}
    line = {"case": "burst" if args.burst else "costs", **figures, **shape, **machine()}
    bars.append(args.out, line)
    print(json.dumps(line, indent=1))
    bars.print_bars(verdicts(args.out, line))


if __name__ == "__main__":
    main()

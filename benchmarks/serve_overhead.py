"""Measures the cost of HTTP, proxy, ingress, router and worker, against the same engine called in this process.

    python benchmarks/serve_overhead.py [--streams 16] [--rounds 9] [--threads 1]

The demo's base with two of its adapters, one worker, the same prompts in turn on both ways; answers must be equal. The
engine gets `--threads` threads on both, so that other cores are left for the rest. Time to first token, tokens/s, CPU
time of each process a token, and events that reach a client: at most one a step and stream. Appends a line of JSON a
way, and draws a plot beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import platform
import re
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import bars
import httpx
import ray
import torch
from ray import serve
from transformers import AutoTokenizer

from lorafleet.adapter_store.base_weights import CheckpointWeights
from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.adapter_store.peft_format import AdapterReader
from lorafleet.cluster.app import build
from lorafleet.cluster.config import AppConfig
from lorafleet.workers.config import ModelConfig
from lorafleet.workers.model.geometry import read_geometry
from lorafleet.workers.request import EngineRequest, SamplingParams
from lorafleet.workers.worker import Worker

DEMO = Path(__file__).parents[1] / "examples" / "demo"
BASE_ID = "demo"
ADAPTERS = ("pirate", "french")
OBJECT_STORE_BYTES = 200 * 2**20
SUBJECTS = ("the cat", "the sky", "an elephant", "Japan", "bread", "the sea", "winter", "a fox")
WAYS = ("in-process", "HTTP")


@dataclass(slots=True)
class Stream:
    """One answer as it came in."""

    begun_s: float
    times_s: list[float] = field(default_factory=list)
    """When each message with tokens came."""
    token_ids: list[int] = field(default_factory=list)

    def take(self, token_ids: Sequence[int]) -> None:
        """A message came."""
        self.times_s.append(time.perf_counter())
        self.token_ids.extend(token_ids)


@dataclass(frozen=True, slots=True)
class Round:
    """All streams of one round, and the CPU seconds of the processes that made them."""

    streams: list[Stream]
    cpu_s: Counter[str]

    @property
    def num_tokens(self) -> int:
        return sum(len(stream.token_ids) for stream in self.streams)

    @property
    def num_messages(self) -> int:
        return sum(len(stream.times_s) for stream in self.streams)

    def figures(self) -> dict[str, float]:
        """Times of this round."""
        first = sorted(stream.times_s[0] - stream.begun_s for stream in self.streams)
        gaps = [b - a for stream in self.streams for a, b in pairwise(stream.times_s)]
        seconds = max(s.times_s[-1] for s in self.streams) - min(s.begun_s for s in self.streams)
        return {
            "first_token_ms_p50": statistics.median(first) * 1e3,
            "first_token_ms_max": first[-1] * 1e3,
            "gap_ms_p50": statistics.median(gaps) * 1e3,
            "tokens_per_s": self.num_tokens / seconds,
            **{f"cpu_us_per_token_{role}": s * 1e6 / self.num_tokens for role, s in sorted(self.cpu_s.items())},
        }


HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Environment in which Serve starts HAProxy."""
Prompt = str | Sequence[int]
Ask = Callable[[str, Prompt], AsyncIterator[Sequence[int]]]
"""Model and prompt to the token ids of one message after another."""


async def run_round(ask: Ask, jobs: Sequence[tuple[str, str]]) -> Round:
    """All jobs at once."""

    async def follow(model: str, prompt: str) -> Stream:
        stream = Stream(time.perf_counter())
        async for token_ids in ask(model, prompt):
            stream.take(token_ids)
        return stream

    before = cpu_seconds()
    streams = await asyncio.gather(*(follow(model, prompt) for model, prompt in jobs))
    return Round(list(streams), cpu_seconds() - before)


# --- the two ways ---


@contextmanager
def engine_in_process(config: AppConfig, max_tokens: int) -> Iterator[Ask]:
    """A worker here, and how to ask it."""
    base = Path(config.model.source)
    reader = AdapterReader(read_geometry(ModelConfig(id=BASE_ID, source=str(base)), "cpu"), 64, CheckpointWeights(base))
    weights = {name: reader.read(DEMO / "adapters" / name) for name in ADAPTERS}
    by_version = {each.manifest.version: each for each in weights.values()}
    tokenizer = AutoTokenizer.from_pretrained(base)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)

    async def fetch(version: str) -> AdapterWeights:
        return by_version[version]

    torch.set_num_threads(config.worker.cpu_threads or 1)
    worker = Worker(
        worker_id="here", model=config.model, engine=config.worker.engine, pool=config.adapters.pool, fetch=fetch
    )

    async def ask(model: str, prompt: Prompt) -> AsyncIterator[Sequence[int]]:
        version = None if model == BASE_ID else weights[model].manifest.version
        token_ids = tuple(tokenizer(prompt)["input_ids"])
        async for delta in worker.generate(EngineRequest(str(prompt), version, token_ids, sampling)):
            yield delta.token_ids

    try:
        yield ask
    finally:
        worker.close()


@contextmanager
def service(
    config: AppConfig,
    folder: str,
    port: int,
    *,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    num_gpus: int | None = None,
    max_start_s: float = 180,
) -> Iterator[None]:
    """The service on a Ray of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_USE_GRPC", "1")
    os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "lorafleet.cluster.http.proxy.prepare")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # on a busy machine it needs more than 5
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=object_store_bytes,
            num_gpus=num_gpus,
            _temp_dir=folder,
            _system_config={"metrics_report_interval_ms": 1000},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(config), name="lorafleet", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            deadline = time.monotonic() + max_start_s
            while client.get("/readyz").status_code != 200:
                if time.monotonic() > deadline:
                    raise TimeoutError("the service did not become ready")
                time.sleep(0.2)
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def over_http(port: int, max_tokens: int) -> Ask:
    """Client of the service: HTTP on a bare socket, because a stock client spends more than the measured cost."""

    async def ask(model: str, prompt: Prompt) -> AsyncIterator[Sequence[int]]:
        sampling = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        options = {"stream": True, "return_token_ids": True}
        body = json.dumps({"model": model, "prompt": prompt, **sampling, **options}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(f"the service answered {status.decode().strip()}")
            while True:
                line = await reader.readline()
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])["choices"][0]["token_ids"]
                elif line.startswith(b"data: [DONE]"):
                    return
                elif not line:
                    raise RuntimeError("the stream was cut")
        finally:
            writer.close()

    return ask


# --- what the machine says ---


def cpu_seconds() -> Counter[str]:
    """CPU seconds so far of this process and of the service's processes, by role. Reads /proc."""
    tick = os.sysconf("SC_CLK_TCK")
    found: Counter[str] = Counter()
    for pid, role in roles().items():
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found["here" if pid == os.getpid() else role] += (int(fields[11]) + int(fields[12])) / tick
    return found


def roles() -> dict[int, str]:
    """The roles of this process and of the service's processes."""
    found = {}
    for pid in tree():
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found[pid] = role_of(title)
    return found


def role_of(title: str) -> str:
    """The role of a process of the service, by its command line."""
    replica = re.match(r"ray::.*lorafleet[#:](\w+)", title)
    if replica:
        return replica[1]
    if "/haproxy " in title.split(" -")[0] + " ":
        return "haproxy"
    return "proxy" if title.startswith(("ray::ProxyActor", "ray::HAProxyManager")) else "ray"


def tree() -> set[int]:
    """Ids of this process and of all that it started, directly or not."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return found


async def engine_steps() -> int:
    """Steps that the worker's engine has made, as its metrics say once they have stood still for a while."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    seen: list[float] = []
    async with httpx.AsyncClient() as client:
        while len(seen) < 6 or len(set(seen[-6:])) > 1:
            await asyncio.sleep(1.0)
            text = (await client.get(url)).text
            seen.append(sum(float(n) for n in re.findall(r"^ray_lorafleet_steps(?:_total)?\{.*\} (\S+)$", text, re.M)))
    return int(seen[-1])


def machine() -> dict[str, str]:
    """Machine and versions of this run."""
    return {
        "machine": f"{bars.cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "commit": bars.commit(),
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- what came of it ---


def medians(rounds: Sequence[Round]) -> dict[str, float]:
    """Over all rounds."""
    figures = [each.figures() for each in rounds]
    names = dict.fromkeys(name for each in figures for name in each)
    return {name: round(statistics.median(each.get(name, 0.0) for each in figures), 3) for name in names}


def print_table(lines: Sequence[dict[str, Any]]) -> None:
    """A row a figure, a column a way."""
    names = [name for name in lines[0] | lines[1] if isinstance((lines[0] | lines[1])[name], int | float)]
    print(f"\n{'':32}" + "".join(f"{line['way']:>14}" for line in lines))
    for name in names:
        print(f"{name:32}" + "".join(f"{line[name]:>14,.2f}" if name in line else " " * 14 for line in lines))


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens/s and time to first token of both ways."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 2.4), layout="constrained")
    for axis, name, label in zip(
        axes, ("tokens_per_s", "first_token_ms_p50"), ("tokens/s", "time to first token, ms"), strict=True
    ):
        bars = axis.barh([line["way"] for line in lines], [line[name] for line in lines], color=["#888", "#2a7"])
        axis.bar_label(bars, fmt="{:,.0f}", padding=3)
        axis.set(xlabel=label)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{lines[0]['streams']} streams of {lines[0]['max_tokens']} tokens, {lines[0]['machine']}", size=9)
    figure.savefig(path, dpi=120)


async def measure(ways: Sequence[Ask], jobs: Sequence[tuple[str, str]], num_rounds: int) -> list[list[Round]]:
    """Rounds of all ways in turn, after two of each that do not count. Raises RuntimeError when answers differ."""
    rounds: list[list[Round]] = [[] for _ in ways]
    for number in range(-2, num_rounds):
        for way, ask in enumerate(ways):
            done = await run_round(ask, jobs)
            if number >= 0:
                rounds[way].append(done)
    answers = [[stream.token_ids for stream in each.streams] for way in rounds for each in way]
    if any(answer != answers[0] for answer in answers):
        raise RuntimeError("the ways answered differently")
    return rounds


async def count_messages(
    ask: Ask, jobs: Sequence[tuple[str, str]], steps: Callable[[], Awaitable[int]]
) -> Counter[str]:
    """Messages, tokens and steps of one round. A stream is in as many steps as it gets tokens, or more."""
    before = await steps()
    done = await run_round(ask, jobs)
    return Counter(messages=done.num_messages, tokens=done.num_tokens, steps=await steps() - before)


def main() -> None:
    """Measure both ways and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "serve_overhead.jsonl")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    args = parser.parse_args()
    models = (BASE_ID, *ADAPTERS)
    jobs = [
        (models[i % len(models)], f"{i}. Say something about {SUBJECTS[i % len(SUBJECTS)]}.")
        for i in range(args.streams)
    ]
    with tempfile.TemporaryDirectory(prefix="lorafleet-", ignore_cleanup_errors=True) as folder:
        source = {"name": "demo", "kind": "directory", "root": DEMO / "adapters"}
        preload = [{"name": name, "source": "demo", "key": name} for name in ADAPTERS]
        config = AppConfig.model_validate(
            {
                "model": {"id": BASE_ID, "source": str(DEMO / "base")},
                "adapters": {"sources": [source], "preload": preload, "state_dir": f"{folder}/state"},
                "worker": {"num_replicas": 1, "cpu_threads": args.threads, "device": "cpu"},
            }
        )
        port = free_port()
        with service(config, folder, port), engine_in_process(config, args.max_tokens) as ask_engine:
            ask_service = over_http(port, args.max_tokens)
            rounds = asyncio.run(measure((ask_engine, ask_service), jobs, args.rounds))
            counts = asyncio.run(count_messages(ask_service, jobs, engine_steps))
    here, http = (medians(each) for each in rounds)
    http |= {
        "messages": counts["messages"],
        "steps": counts["steps"],
        "messages_per_step_and_stream": round(counts["messages"] / counts["tokens"], 3),
    }
    shape = {"streams": args.streams, "max_tokens": args.max_tokens, "rounds": args.rounds, "threads": args.threads}
    lines = [{"way": way, **figures, **shape, **machine()} for way, figures in zip(WAYS, (here, http), strict=True)]
    for line in lines:
        bars.append(args.out, line)
    print_table(lines)
    plot(lines, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

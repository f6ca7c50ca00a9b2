"""Measures HTTP streaming through Ray Serve on a GPU, against the same engines called in their own processes.

    python benchmarks/serve_gpu.py --out benchmarks/results/serve_gpu.jsonl [--workers 2] [--haproxy] [--seconds 400]
    python benchmarks/serve_gpu.py --gpus 2 --ingresses 2 --haproxy --ways engine,http  # a worker on each of two GPUs

Llama-3.1-8B geometry with random weights, 64 adapters of rank 16 all resident, 64 clients that each send one request
after another: 512 prompt tokens, 128 output tokens; 64 for each of several GPUs. Three ways are measured, each in
processes of its own:

- `engine`: one engine on one whole GPU, with 64 clients;
- `engines`: one for each worker, side by side on the GPUs, each with its share of the clients;
- `http`: the service, whose workers take equal shares of the GPUs. With `--kills`, its only worker is then killed so
  many times, and the next answer's first token says when the next one serves.

Processes on one GPU take turns, unless CUDA's Multi-Process Service lets them run at once. To have it, start
`nvidia-cuda-mps-control -d` with CUDA_MPS_PIPE_DIRECTORY set, and set that here too. Each way prints a line of JSON;
the bars come last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from queue import Empty
from typing import Any

import bars
import numpy as np
import ray
import torch
from random_models import GEOMETRIES, MAX_MODEL_LEN, RandomAdapters, kv_bytes, write_adapter, write_base
from serve_overhead import HAPROXY, Ask, Prompt, cpu_seconds, free_port, machine, over_http, roles, service

from lorafleet.adapter_store.manifest import AdapterWeights
from lorafleet.cluster.config import AppConfig
from lorafleet.workers.request import EngineRequest, SamplingParams
from lorafleet.workers.worker import Worker

WAYS = ("engine", "engines", "http")
SETUP = ("workers", "mps", "gpus", "haproxy", "rate", "max_batch_tokens")
"""Fields of lines that can be held against each other where they are the same."""
MAX_RANK = 64
BAR = 0.97
BAR_OF_GPUS = 1.94
"""Tokens/s of two GPUs over those of one, in the service."""
FIRST_TOKEN_MS = 30
"""How much later it may come than from the engine, in the median."""
GAP_P99 = 1.15
BACK_S = 20.0
"""Until a killed worker's successor serves."""
SETTLED_S = 30.0
"""After a start, until the next kill: by then there is a process in reserve again."""


@dataclass(frozen=True, slots=True)
class Work:
    """Amounts of work."""

    geometry: str = "llama-8b"
    adapters: int = 64
    clients: int = 64
    requests: int = 4
    """Of each client."""
    rate: float | None = None
    """Requests a second of all clients together, at random times; None: each client sends one after another."""
    prompt: int = 512
    output: int = 128
    max_batch_tokens: int = 8192
    gpus: int = 1
    ingresses: int = 1
    client_processes: int = 8
    """That ask over HTTP: one would be busy with reading."""
    adapter_files: int = 4
    """Adapters that differ in scaling alone share a file."""


FULL = Work()
TINY = Work("tiny", adapters=4, clients=4, requests=2, prompt=12, output=5, max_batch_tokens=64, client_processes=1)


@dataclass(frozen=True, slots=True)
class Share:
    """The clients of one process."""

    work: Work
    number: int
    of: int
    seed: int

    def jobs(self) -> list[list[tuple[str, list[int]]]]:
        """Of each client: adapter and prompt, one request after another."""
        work, rng = self.work, random.Random(self.seed * 1000 + self.number)
        high = GEOMETRIES[work.geometry]["vocab_size"] - 10
        return [
            [
                (f"a{(client + turn) % work.adapters}", [rng.randrange(10, high) for _ in range(work.prompt)])
                for turn in range(work.requests)
            ]
            for client in range(self.number, work.clients, self.of)
        ]

    def starts_s(self) -> list[list[float]]:
        """Of each client: when its requests are due if they come at random times, seconds from the beginning."""
        work, rng = self.work, random.Random(self.seed)
        assert work.rate is not None
        starts = list(accumulate(rng.expovariate(work.rate) for _ in range(work.clients * work.requests)))
        return [starts[client :: work.clients] for client in range(self.number, work.clients, self.of)]


@dataclass(frozen=True, slots=True)
class Taken:
    """Results of the clients of one process. Times are of the machine's monotonic clock."""

    began_s: float
    ended_s: float
    num_tokens: int
    first_token_s: list[float]
    gaps_s: list[float]


async def be_clients(ask: Ask, share: Share) -> Taken:
    """All clients of a share: each with one request after another, or with all of them at their times."""
    first, gaps, counts = [], [], []
    began_s = time.monotonic()

    async def send(model: str, prompt: list[int]) -> None:
        before, is_first, count = time.monotonic(), True, 0
        async for token_ids in ask(model, prompt):
            now = time.monotonic()
            (first if is_first else gaps).append(now - before)
            before, is_first, count = now, False, count + len(token_ids)
        if count != share.work.output:
            raise RuntimeError(f"{count} tokens came instead of {share.work.output}")
        counts.append(count)

    async def send_at(start_s: float, job: tuple[str, list[int]]) -> None:
        await asyncio.sleep(began_s + start_s - time.monotonic())
        await send(*job)

    async def be_client(jobs: list[tuple[str, list[int]]]) -> None:
        for job in jobs:
            await send(*job)

    if share.work.rate is not None:
        due = zip(chain(*share.starts_s()), chain(*share.jobs()), strict=True)
        await asyncio.gather(*(send_at(start_s, job) for start_s, job in due))
    else:
        await asyncio.gather(*(be_client(jobs) for jobs in share.jobs()))
    return Taken(began_s, time.monotonic(), sum(counts), first, gaps)


# --- the ways: each runs in processes, which begin together ---

Outcome = tuple[int, "Taken | str"]


def drive_engine(share: Share, base: str, config: dict[str, Any], barrier: Any, outcomes: Any) -> None:
    """A worker in this process, asked by a share of the clients. Its adapters are made up."""
    # CUDA has not begun here, so this still counts.
    os.environ["CUDA_VISIBLE_DEVICES"] = str(share.number % share.work.gpus)
    _report(outcomes, share.number, lambda: _drive_engine(share, base, config, barrier))


def _drive_engine(share: Share, base: str, values: dict[str, Any], barrier: Any) -> Taken:
    config, adapters = AppConfig.model_validate(values), RandomAdapters(Path(base))
    if config.worker.cpu_threads is not None:
        torch.set_num_threads(config.worker.cpu_threads)

    async def fetch(version: str) -> AdapterWeights:
        return adapters.fetch(version)

    worker = Worker(
        worker_id=str(share.number),
        model=config.model,
        engine=config.worker.engine,
        pool=config.adapters.pool,
        fetch=fetch,
    )
    sampling = SamplingParams(max_tokens=share.work.output, temperature=0.0, ignore_eos=True)

    async def ask(model: str, prompt: Prompt) -> AsyncIterator[Sequence[int]]:
        request = EngineRequest(model, f"{model}-r16", tuple(map(int, prompt)), sampling)
        async for delta in worker.generate(request):
            yield delta.token_ids

    async def run() -> Taken:
        await be_clients(ask, Share(share.work, share.number, share.of, seed=0))
        await asyncio.to_thread(barrier.wait)
        return await be_clients(ask, share)

    try:
        return asyncio.run(run())
    finally:
        worker.close()


def drive_http(share: Share, port: int, barrier: Any, outcomes: Any) -> None:
    """A share of the clients of the service."""

    async def run() -> Taken:
        ask = over_http(port, share.work.output)
        await be_clients(ask, Share(share.work, share.number, share.of, seed=0))
        await asyncio.to_thread(barrier.wait)
        return await be_clients(ask, share)

    _report(outcomes, share.number, lambda: asyncio.run(run()))


def _report(outcomes: Any, number: int, work: Callable[[], Taken]) -> None:
    try:
        outcomes.put((number, work()))
    except BaseException as error:
        outcomes.put((number, f"{type(error).__name__}: {error}"))
        raise


def together(target: Callable[..., None], shares: Sequence[Share], *arguments: object, seconds: float) -> list[Taken]:
    """A process for each share, all past their warm-up before any of them is measured. Raises RuntimeError."""
    context = multiprocessing.get_context("spawn")
    barrier, outcomes = context.Barrier(len(shares)), context.Queue()
    processes = [
        context.Process(target=target, args=(share, *arguments, barrier, outcomes), daemon=True) for share in shares
    ]
    for process in processes:
        process.start()
    taken: list[Taken] = []
    deadline = time.monotonic() + seconds
    try:
        while len(taken) < len(shares):
            try:
                number, outcome = outcomes.get(timeout=max(0.0, min(1.0, deadline - time.monotonic())))
            except Empty:
                dead = [process.exitcode for process in processes if process.exitcode]
                if dead or time.monotonic() > deadline:
                    raise RuntimeError(f"{len(taken)} of {len(shares)} processes ended, {dead} badly") from None
                continue
            if isinstance(outcome, str):
                raise RuntimeError(f"process {number} failed: {outcome}")
            taken.append(outcome)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return taken


def figures_of(taken: Sequence[Taken]) -> dict[str, float]:
    """Over all processes, from the first request to the last token."""
    seconds = max(each.ended_s for each in taken) - min(each.began_s for each in taken)
    tokens = sum(each.num_tokens for each in taken)
    first, gaps = (np.concatenate([getattr(each, name) for each in taken]) for name in ("first_token_s", "gaps_s"))
    return {
        "seconds": seconds,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / seconds,
        "first_token_ms_p50": float(np.median(first)) * 1e3,
        "first_token_ms_p99": float(np.quantile(first, 0.99)) * 1e3,
        "gap_ms_p50": float(np.median(gaps)) * 1e3,
        "gap_ms_p99": float(np.quantile(gaps, 0.99)) * 1e3,
    }


def app_values(work: Work, folder: Path, workers: int, *, has_gpu: bool) -> dict[str, Any]:
    """`args` of the service: as `deploy/serve/gpu.yaml`, but with several workers on one GPU."""
    adapters = RandomAdapters(folder / "base")
    clients = -(-work.clients // workers)
    # A quarter more than an even share: workers of a real service have room as well.
    tokens = int(1.25 * clients) * (work.prompt + work.output + 32) + 2 * MAX_MODEL_LEN
    preload = [
        {"name": f"a{i}", "source": "made", "key": f"a{i}", "pinned": True, "warm": "all"} for i in range(work.adapters)
    ]
    return {
        "model": {
            "id": "base",
            "source": str(folder / "base"),
            "dtype": "bfloat16",
            "max_model_len": MAX_MODEL_LEN,
            "load": "dummy",
        },
        "adapters": {
            "sources": [{"name": "made", "kind": "directory", "root": str(folder / "adapters")}],
            "preload": preload,
            "max_rank": MAX_RANK,
            "max_slots": work.adapters,
            # Whole pages, so more than the bytes that go in.
            "pool_bytes": int(1.1 * (work.adapters + 1) * adapters.num_bytes(16)),
            "host_cache_bytes": int(1.1 * (work.adapters + 1) * adapters.num_bytes(16)),
            "state_dir": str(folder / "state"),
        },
        "worker": {
            "num_replicas": workers,
            "num_gpus": work.gpus / workers if has_gpu else 0,
            "cpu_threads": None if has_gpu else 1,
            "max_batch_tokens": work.max_batch_tokens,
            "max_running": work.clients,
            "kv_bytes": kv_bytes(work.geometry, tokens),
            "prefix_cache": False,
            "max_queued_requests": work.clients,
        },
        "ingress": {"num_replicas": work.ingresses},
    }


def write_adapters(work: Work, folder: Path) -> None:
    """Adapters that all are versions of their own, in few files."""
    for i in range(work.adapters):
        target = folder / "adapters" / f"a{i}"
        if i < work.adapter_files:
            write_adapter(target, folder / "base", 16, seed=i)
        else:
            original = folder / "adapters" / f"a{i % work.adapter_files}"
            target.mkdir()
            os.link(original / "adapter_model.safetensors", target / "adapter_model.safetensors")
            config = json.loads((original / "adapter_config.json").read_text())
            scaled = {**config, "lora_alpha": 16 + i / 64}
            (target / "adapter_config.json").write_text(json.dumps(scaled))


def recoveries(port: int, kills: int) -> list[float]:
    """Seconds from each kill of the only worker to the first token of a request that is sent at once."""

    async def first_token() -> None:
        async for _ in over_http(port, 1)("base", [20, 21, 22]):
            return

    times_s = []
    for _ in range(kills):
        time.sleep(SETTLED_S)
        (worker,) = (pid for pid, role in roles().items() if role == "worker")
        os.kill(worker, signal.SIGKILL)
        killed_s = time.monotonic()
        asyncio.run(first_token())
        times_s.append(time.monotonic() - killed_s)
    return times_s


def measure(
    way: str,
    work: Work,
    folder: Path,
    workers: int,
    seconds: float,
    kills: int,
    keep: Callable[[dict[str, float]], None],
) -> None:
    """One way, from nothing to its figures; `start_s`: until its measured part began."""
    begun_s = time.monotonic()
    has_gpu = torch.cuda.is_available()

    def figures(taken: Sequence[Taken]) -> dict[str, float]:
        start_s = min(each.began_s for each in taken) - begun_s
        return {**figures_of(taken), "start_s": start_s, "workers": workers}

    if way == "http":
        config = AppConfig.model_validate(app_values(work, folder, workers, has_gpu=has_gpu))
        shares = [Share(work, i, work.client_processes, seed=1) for i in range(work.client_processes)]
        object_store = max(200 * 2**20, int(1.2 * config.adapters.host_cache_bytes))
        port = free_port()
        options = {"object_store_bytes": object_store, "num_gpus": work.gpus * has_gpu, "max_start_s": seconds}
        with service(config, str(folder / "ray"), port, **options):
            before = cpu_seconds()
            taken = together(drive_http, shares, port, seconds=seconds)
            cpu_s = cpu_seconds() - before
            back_s = recoveries(port, kills)
            tokens = sum(each.num_tokens for each in taken)
            # The clients' warm-up is in it too, which is as much again.
            cpu = {f"cpu_us_per_token_{role}": s * 1e6 / (2 * tokens) for role, s in cpu_s.items() if role != "here"}
            if back_s:
                cpu |= {"worker_back_s_p50": float(np.median(back_s)), "worker_back_s_max": max(back_s)}
            keep({**figures(taken), **cpu})  # the service may take its time to end
    else:
        count = workers if way == "engines" else 1
        if way == "engine":
            work = replace(work, clients=work.clients // work.gpus, gpus=1)
        shares = [Share(work, i, count, seed=1) for i in range(count)]
        values = app_values(work, folder, count, has_gpu=has_gpu)
        keep(figures(together(drive_engine, shares, str(folder / "base"), values, seconds=seconds)))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the time is up: Serve waits for its replicas without an end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def show_logs(folder: Path, chars: int = 3000) -> None:
    """The ends of what the service's processes logged, which goes with the folder."""
    logs = [*folder.glob("ray/session_latest/logs/serve/*.log"), *folder.glob("ray/session_latest/logs/worker*.err")]
    for log in sorted(logs, key=lambda path: path.stat().st_mtime)[-8:]:
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-chars:]}", flush=True)


def report(path: Path) -> None:
    """The last run, and what else was measured of as many workers, held against its bars."""
    *_, last = bars.read(path)
    results = bars.latest(path, **{name: last.get(name) for name in SETUP})
    for way, lines in results.items():
        print(way, ", ".join(f"{k} {v:,.5g}" for k, v in lines[-1].items() if isinstance(v, int | float)))
    speeds = {way: bars.median(results.get(way), "output_tokens_per_s") for way in WAYS}
    what, gpus = "tokens/s over HTTP, of", int(last.get("gpus", 1))
    of_engine = bars.ratio(speeds["http"], speeds["engine"])
    held = [bars.at_least(f"{what} the same engines in-process", bars.ratio(speeds["http"], speeds["engines"]), BAR)]
    if gpus > 1:
        held.append(bars.at_least(f"{what} one engine, with {gpus} GPUs", of_engine, BAR_OF_GPUS * gpus / 2))
    else:
        held.append(bars.at_least(f"{what} one engine on the whole GPU", of_engine, BAR))
        first, gap = (
            [bars.median(results.get(way), name) for way in ("http", "engine")]
            for name in ("first_token_ms_p50", "gap_ms_p99")
        )
        if None not in first:
            held.append(
                bars.at_most("first token later than the engine's, p50, ms", first[0] - first[1], FIRST_TOKEN_MS)
            )
        held.append(bars.at_most("gap p99 over the engine's", bars.ratio(*gap), GAP_P99))
        back_s = bars.median(results.get("http"), "worker_back_s_max")
        if back_s is not None:
            held.append(bars.at_most("a killed worker's successor serves after, s", back_s, BACK_S))
    bars.print_bars(held)


def main(arguments: list[str] | None = None) -> None:
    """Measure each way, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "serve_gpu.jsonl")
    parser.add_argument("--workers", type=int, default=2, help="that share the GPUs")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--ingresses", type=int, default=1)
    parser.add_argument("--requests", type=int, help="of each client")
    parser.add_argument("--rate", type=float, help="requests a second, at random times")
    parser.add_argument("--max-batch-tokens", type=int, help="of a worker's step")
    parser.add_argument("--haproxy", action="store_true", help="in the place of Serve's own proxy")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--kills", type=int, default=0, help="of the only worker, after the load")
    parser.add_argument("--tiny", action="store_true", help="everything small")
    parser.add_argument("--seconds", type=float, default=1800.0, help="for all ways together")
    parser.add_argument("--commit", default=bars.commit(), help="what is measured, where git cannot say")
    parser.add_argument("--report", action="store_true", help="only hold what `--out` has against the bars")
    args = parser.parse_args(arguments)
    if args.kills and args.workers > 1:
        parser.error("--kills needs --workers 1: another worker would answer")
    if args.report:
        report(args.out)
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    work = TINY if args.tiny else FULL
    sizes = {"clients": work.clients * args.gpus, "client_processes": work.client_processes * args.gpus}
    work = replace(work, **sizes, gpus=args.gpus, ingresses=args.ingresses, rate=args.rate)
    given = {"requests": args.requests, "max_batch_tokens": args.max_batch_tokens}
    work = replace(work, **{name: value for name, value in given.items() if value is not None})
    if args.haproxy:
        os.environ |= HAPROXY
    deadline = time.monotonic() + args.seconds
    meta = {
        **machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "ray": ray.__version__,
        "haproxy": args.haproxy,
        "mps": "CUDA_MPS_PIPE_DIRECTORY" in os.environ,
        "commit": args.commit,
        "run": time.strftime("%Y-%m-%dT%H:%M:%S"),
        **asdict(work),
    }

    def keep(figures: dict[str, float]) -> None:
        line = {"case": way, **{k: round(v, 4) for k, v in figures.items()}, **meta}
        bars.append(args.out, line)
        print(json.dumps(line), flush=True)

    with tempfile.TemporaryDirectory(prefix="lfg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_base(folder / "base", work.geometry)
        for way in args.ways.split(","):
            left = deadline - time.monotonic()
            print(f"[{left:5.0f} s left] {way}", flush=True)
            if way == "http":
                write_adapters(work, folder)
            try:
                with time_limit(left):
                    measure(way, work, folder, args.workers, left, args.kills, keep)
            except Exception:
                show_logs(folder)
                raise
    report(args.out)


if __name__ == "__main__":
    main()

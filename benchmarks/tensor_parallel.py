"""Measures workers of several GPUs: decode steps of an 8B and a 70B, collectives, and answers against one GPU's.

    python benchmarks/tensor_parallel.py --out benchmarks/results/tensor_parallel.jsonl [--cases collectives,check]

Needs two GPUs of one machine and downloads nothing: weights, adapters (rank 16, all seven projections) and tokens are
random. Each case has processes of its own, takes at most about 150 s, and writes its lines of JSON at once.

| case | what it measures |
| --- | --- |
| `collectives` | each collective in a CUDA graph, by rows of a step: microseconds |
| `check` | logprobs of a small base with real weights on two ranks against one, in the mean and at most |
| `8b` | decode steps of 64 sequences and of one stream, without and with adapters, on one GPU and on two |
| `70b` | the same on two GPUs, and the floor: bytes of one GPU over its bandwidth, plus the collectives |

`--sizes 1,2` chooses the numbers of ranks of `8b` and `70b`. `--geometry tiny` makes everything small; without a GPU
the ranks are processes on the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bars
import numpy as np
import torch
import torch.distributed as dist
from random_models import GEOMETRIES, RandomAdapters, kv_bytes, write_base, write_weights
from running_engine import Figures, Inbox, running_engine
from torch._C._distributed_c10d import FileStore

from lorafleet.workers.config import EngineConfig, PoolConfig
from lorafleet.workers.engine import Delivery
from lorafleet.workers.ranks import ConnectedRanks, connect
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams

CASES = {"collectives": "llama-70b", "check": "qwen-0.5b", "8b": "llama-8b", "70b": "llama-70b"}
"""Case -> its geometry."""
RANK = 16
PAGE_ROUND = 1.1
SEQUENCES = 64
PROMPT = 64
OUTPUT = 192
CHECKED = 8
"""Sequences of `check`: half of them have an adapter."""
CHECKED_OUTPUT = 24
LIMIT_S = 120.0
CALLS = 64
"""Collectives of one graph."""
Lines = Iterator[tuple[str, Figures]]


def has_gpu() -> bool:
    """False where ranks are processes on the CPU."""
    return torch.cuda.is_available()


def seconds_of(launch: Callable[[], object], repeats: int) -> float:
    """Seconds of one launch, in the mean of `repeats` after three."""
    for _ in range(3):
        launch()
    if not has_gpu():
        start_s = time.perf_counter()
        for _ in range(repeats):
            launch()
        return (time.perf_counter() - start_s) / repeats
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        launch()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


# --- collectives ---


def captured(launch: Callable[[], object]) -> Callable[[], object]:
    """`CALLS` launches as one graph; without a GPU the launches themselves."""

    def all_of_them() -> None:
        for _ in range(CALLS):
            launch()

    if not has_gpu():
        return all_of_them
    all_of_them()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        all_of_them()
    return graph.replay


def two_shot_of(ranks: ConnectedRanks, rows: int, width: int, like: torch.Tensor) -> Callable[[], object] | None:
    """Torch's two-shot sum of the same memory; None where there is none."""
    part = ranks.partial(rows, width, like)
    if not has_gpu() or ranks._direct is None or part.data_ptr() != ranks._direct._memory.data_ptr():
        return None
    name = ranks._group.group_name
    return lambda: torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", name)


def measure_collectives(ranks: ConnectedRanks, geometry: str) -> Lines:
    """Microseconds of each collective for steps of so many rows."""
    shape = GEOMETRIES[geometry]
    device = torch.device("cuda", ranks.rank) if has_gpu() else torch.device("cpu")
    like = torch.zeros(1, dtype=torch.bfloat16 if has_gpu() else torch.float32, device=device)
    width, part_width = shape["hidden_size"], shape["vocab_size"] // ranks.size
    for rows in (1, 8, 16, 64, 128, 256, 1024):
        plain = like.new_zeros((rows, width))
        logits, ids = like.new_zeros((rows, part_width)), torch.zeros(rows, dtype=torch.int64, device=device)
        launches: dict[str, Callable[[], object] | None] = {
            "all_reduce_us": lambda rows=rows: ranks.all_reduce(ranks.partial(rows, width, like)),
            "nccl_us": lambda plain=plain: dist.all_reduce(plain),
            "two_shot_us": two_shot_of(ranks, rows, width, like),
            "gather_logits_us": lambda logits=logits: ranks.gather_columns(logits),
            "broadcast_us": lambda ids=ids: ranks.broadcast(ids),
        }
        figures = {"rows": float(rows), "kib": rows * width * like.itemsize / 1024}
        for name, launch in launches.items():
            if launch is not None:
                figures[name] = seconds_of(captured(launch), 20) / CALLS * 1e6
        yield "collectives", figures


# --- engines ---


def bandwidth() -> float:
    """Bytes a second of one GPU's memory, read and written by a copy."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), 10)
    return 2 * source.numel() / seconds


def settings(geometry: str, size: int, adapters: RandomAdapters) -> tuple[EngineConfig, PoolConfig]:
    """Of an engine for decode steps of `SEQUENCES`."""
    num_tokens = (SEQUENCES + 2) * (PROMPT + OUTPUT + 32)
    engine = EngineConfig(
        device="cuda" if has_gpu() else "cpu",
        tensor_parallel_size=size,  # type: ignore[arg-type]
        max_running=SEQUENCES,
        max_batch_tokens=max(SEQUENCES, 512),
        kv_bytes=2 * kv_bytes(geometry, num_tokens) // min(size, GEOMETRIES[geometry]["num_key_value_heads"])
        + (64 << 20),
        prefix_cache="off",
        stall_s=120.0,
    )
    pool_bytes = int(PAGE_ROUND * (SEQUENCES + 4) * adapters.num_bytes(RANK) * (1 if size == 1 else 0.5 + 0.4 / size))
    return engine, PoolConfig(max_rank=RANK, max_slots=SEQUENCES + 4, pool_bytes=pool_bytes)


def measure_engine(geometry: str, size: int, folder: Path) -> Lines:
    """Decode steps on `size` ranks."""
    base = write_base(folder / "base", geometry)
    adapters = RandomAdapters(base)
    engine, pool = settings(geometry, size, adapters)
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, GEOMETRIES[geometry]["vocab_size"] - 10, (SEQUENCES, PROMPT)).tolist()
    gb_s = bandwidth() if has_gpu() else 1e10
    torch.cuda.empty_cache()
    with running_engine(base, adapters, engine, pool) as running:
        parts = running.parts
        yield "start", dict(parts.startup_s)
        names = [f"a{i}-r{RANK}" for i in range(SEQUENCES)]
        running.run(prompts, names, 4)
        weights = sum(value.nbytes for value in parts.runner.base.model.parameters())
        of_adapters = parts.pool.ideal_bytes
        per_token = sum(each.width for each in parts.runner.base.layers)
        per_token *= parts.cache.keys[0].itemsize
        yield (
            "memory",
            {
                "weights_bytes": weights,
                "adapter_bytes": of_adapters,
                "adapter_page_bytes": parts.pool.used_bytes,
                "file_bytes": SEQUENCES * adapters.num_bytes(RANK),
                "kv_bytes_of_a_token": per_token,
                "bandwidth_gb_s": gb_s / 1e9,
            },
        )
        for count, kind in itertools.product((SEQUENCES, 1), ("base", "lora")):
            versions = names[:count] if kind == "lora" else [None] * count
            running.run(prompts[:count], versions, 8)
            read = weights + count * per_token * (PROMPT + OUTPUT // 2)
            read += of_adapters * count // SEQUENCES if kind == "lora" else 0
            for _ in range(2):
                figures = running.run(prompts[:count], versions, OUTPUT)
                kept = {name: figures[name] for name in ("output_tokens_per_s", "gap_ms_p50", "gap_ms_p99")}
                yield f"decode_{kind}{count}", {**kept, "bytes_floor_ms": read / gb_s * 1e3}


# --- answers ---


@dataclass(slots=True)
class KeepingInbox(Inbox):
    """An inbox that keeps what came."""

    deltas: dict[str, list[GenerateDelta]] = field(default_factory=dict)

    def take(self, deliveries: list[Delivery]) -> None:
        """On the engine's thread."""
        for request_id, item in deliveries:
            if isinstance(item, GenerateDelta):
                self.deltas.setdefault(request_id, []).append(item)
        Inbox.take(self, deliveries)


def loud(adapters: RandomAdapters) -> RandomAdapters:
    """The adapters with factors three times as large, so that one which is computed wrongly shows."""
    flat = adapters.fetch(f"a-r{RANK}").flat
    flat.setflags(write=True)
    torch.from_numpy(flat).view(torch.bfloat16).mul_(3)
    flat.setflags(write=False)
    return adapters


def write_answers(geometry: str, size: int, folder: Path, out: Path) -> None:
    """Logprobs of fixed prompts and of what comes after them, half with adapters, in one batch on `size` ranks.

    Writes a line a sequence: the logprobs of its prompt's tokens, its answer's tokens and their logprobs.
    """
    torch.manual_seed(0)
    adapters = loud(RandomAdapters(folder / "base"))
    engine, pool = settings(geometry, size, adapters)
    rng = np.random.default_rng(1)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=CHECKED_OUTPUT, ignore_eos=True, logprobs=0, prompt_logprobs=True
    )
    inbox = KeepingInbox()
    with running_engine(folder / "base", adapters, engine, pool, "weights", inbox=inbox) as running:
        ids = [str(number) for number in range(CHECKED)]
        inbox.expect(ids)
        for number, request_id in enumerate(ids):
            prompt = rng.integers(10, GEOMETRIES[geometry]["vocab_size"] - 10, PROMPT).tolist()
            version = f"a{number}-r{RANK}" if number % 2 else None
            running.parts.engine.submit(EngineRequest(request_id, version, tuple(prompt), sampling))
        if not inbox.is_done.wait(LIMIT_S) or inbox.errors:
            raise RuntimeError(f"not all is answered: {inbox.errors[:3]}")
    with out.open("w") as lines:
        for request_id in ids:
            deltas = inbox.deltas[request_id]
            prompt_logprobs = [entry.logprob for entry in (deltas[0].prompt_logprobs or ())[1:]]
            tokens = [token for delta in deltas for token in delta.token_ids]
            logprobs = [entry.logprob for delta in deltas for entry in delta.logprobs or ()]
            lines.write(json.dumps([prompt_logprobs, tokens, logprobs]) + "\n")


def differences(one: Path, two: Path) -> Lines:
    """Distances of logprobs: of prompts, and of answers as far as both chose the same tokens."""
    pairs = [tuple(map(json.loads, lines)) for lines in zip(one.open(), two.open(), strict=True)]
    for kind, first in (("base", 0), ("lora", 1)):
        prompts, decodes, same = [], [], 0
        for (own, tokens, logprobs), (other, other_tokens, other_logprobs) in pairs[first::2]:
            prompts += [abs(a - b) for a, b in zip(own, other, strict=True)]
            alike = next((i for i, (a, b) in enumerate(zip(tokens, other_tokens, strict=True)) if a != b), len(tokens))
            decodes += [abs(a - b) for a, b in zip(logprobs[:alike], other_logprobs[:alike], strict=True)]
            same += alike
        figures = {"prompt_mean": np.mean(prompts), "prompt_max": np.max(prompts), "same_tokens": float(same)}
        if decodes:
            figures |= {"decode_mean": np.mean(decodes), "decode_max": np.max(decodes)}
        yield f"check_{kind}", {name: float(value) for name, value in figures.items()}


# --- processes ---


def run_part(arguments: Sequence[str], seconds: float) -> bool:
    """A process of this script; True if it did all that it should."""
    command = [sys.executable, str(Path(__file__)), *arguments]
    try:
        return subprocess.run(command, check=False, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def run_collectives(arguments: Sequence[str], size: int, folder: Path, seconds: float) -> bool:
    """A process a rank."""
    script = [sys.executable, str(Path(__file__)), *arguments, "--part", "collectives", "--folder", str(folder)]
    ranks = [subprocess.Popen([*script, "--size", str(size), "--rank", str(rank)]) for rank in range(size)]
    end_s = time.monotonic() + seconds
    try:
        codes = [rank.wait(max(0.0, end_s - time.monotonic())) for rank in ranks]
    except subprocess.TimeoutExpired:
        return False
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return not any(codes)


def run_case(case: str, args: argparse.Namespace, keep: Callable[[str, Figures], None]) -> bool:
    """One case, in processes of its own; False if not all is measured."""
    geometry = args.geometry or CASES[case]
    common = ["--out", str(args.out), "--run", args.run, "--commit", args.commit, "--geometry", geometry]
    with tempfile.TemporaryDirectory(prefix="lorafleet-ranks-") as name:
        folder = Path(name)
        if case == "collectives":
            return run_collectives(common, args.largest, folder, args.seconds)
        if case == "check":
            write_weights(write_base(folder / "base", geometry))
            found = [folder / f"{size}.jsonl" for size in (1, args.largest)]
            for size, path in zip((1, args.largest), found, strict=True):
                own = ["--part", "answers", "--size", str(size), "--folder", name, "--answers", str(path)]
                if not run_part([*common, *own], args.seconds):
                    return False
            for line, figures in differences(*found):
                keep(line, figures)
            return True
        sizes = [size for size in args.sizes if size > 1 or geometry != "llama-70b"]
        own = ["--part", "engine", "--folder", name]
        return not [n for n in sizes if not run_part([*common, *own, "--size", str(n)], args.seconds)]


def run_own_part(args: argparse.Namespace, keep: Callable[[str, Figures], None]) -> None:
    """Do the work of a process that `run_case` started."""
    if args.part == "answers":
        write_answers(args.geometry, args.size, args.folder, args.answers)
        return
    if args.part == "engine":
        for case, figures in measure_engine(args.geometry, args.size, args.folder):
            keep(case, figures)
        return
    device = torch.device("cuda", args.rank) if has_gpu() else torch.device("cpu")
    store = FileStore(str(args.folder / "store"), args.size)
    ranks = connect(args.rank, args.size, device=device, store=store)
    for case, figures in measure_collectives(ranks, args.geometry):
        if args.rank == 0:
            keep(case, figures)
    ranks.close()


def main(arguments: list[str] | None = None) -> None:
    """Run the cases, each in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="lines of JSON")
    parser.add_argument("--cases", default=",".join(CASES), help="which, with commas between")
    parser.add_argument("--sizes", default="1,2", help="numbers of ranks, with commas between")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="of every base")
    parser.add_argument("--seconds", type=float, default=240.0, help="a process that takes longer is ended")
    parser.add_argument("--commit", default=bars.commit(), help="what is measured, where git cannot say")
    parser.add_argument("--run", default=time.strftime("%Y-%m-%dT%H:%M:%S"), help="the run that the lines are of")
    parser.add_argument("--part", choices=("collectives", "answers", "engine"), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.sizes = [int(size) for size in args.sizes.split(",")]
    args.largest = max(args.sizes)
    cases = args.cases.split(",")
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        parser.error(f"there is no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    meta = {
        "gpu": torch.cuda.get_device_name() if has_gpu() else "none",
        "torch": torch.__version__,
        "commit": args.commit,
        "run": args.run,
    }

    def keep(case: str, figures: Figures) -> None:
        values = {name: round(value, 4) for name, value in figures.items()}
        of = {"geometry": args.geometry, "size": args.size} if args.part else {}
        bars.append(args.out, {"case": case, **values, **of, **meta})
        print(case, of, ", ".join(f"{name} {value:,.5g}" for name, value in figures.items()), flush=True)

    if args.part:
        run_own_part(args, keep)
        # Without the clean-up of torch, which waits for NCCL, and NCCL for graphs.
        sys.stdout.flush()
        os._exit(0)
    failed = [case for case in cases if not run_case(case, args, keep)]
    if failed:
        sys.exit(f"not all is measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()

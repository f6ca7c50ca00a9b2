"""The engine on a GPU: what many adapters cost against none, in one run.

    python benchmarks/engine.py --out benchmarks/results/engine.jsonl [--geometry llama-8b] [--cases base,lora64]

Random weights and random token ids, so nothing is downloaded: 256 requests of 512 prompt and 128 output tokens;
adapters of rank 16 on all seven projections. Every case is run after a warm-up of itself; a line of JSON each.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import triton

from lorafleet.adapter_store.manifest import AdapterManifest, AdapterWeights, ModuleManifest
from lorafleet.workers.assembly import WorkerParts, assemble
from lorafleet.workers.config import EngineConfig, ModelConfig, PoolConfig
from lorafleet.workers.engine import Delivery
from lorafleet.workers.model.geometry import read_geometry
from lorafleet.workers.request import EngineRequest, GenerateDelta, SamplingParams

GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_MODEL_LEN = 2048
MIXES = ("base", "one", "lora64", "decode_base", "decode_lora64")
ALONE = ("zipf_resident", "zipf_pool64", "gsm8k")
"""Cases that need an engine of another shape."""


def write_base(folder: Path, geometry: str) -> Path:
    """A folder with the configuration of a base; its weights are made up when it is loaded."""
    config = transformers.LlamaConfig(
        **GEOMETRIES[geometry],
        max_position_embeddings=MAX_MODEL_LEN,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    return folder


class RandomAdapters:
    """Adapters of random weights in host memory. Versions of one rank share their bytes: content costs no time here."""

    def __init__(self, base: Path, targets: Sequence[str] = PROJECTIONS, embeddings: bool = False) -> None:
        self._geometry = read_geometry(ModelConfig(id="base", source=str(base), dtype="bfloat16"))
        wanted = (*targets, *(("embed_tokens", "lm_head") if embeddings else ()))
        self._modules = {n: s for n, s in self._geometry.modules.items() if n.rpartition(".")[2] in wanted}
        self._made: dict[int, dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {}
        self.fetches = 0

    def rank_of(self, version: str) -> int:
        """Versions are called `name-r<rank>`."""
        return int(version.rpartition("-r")[2])

    def fetch(self, version: str) -> AdapterWeights:
        """The weights of a version."""
        self.fetches += 1
        rank = self.rank_of(version)
        if rank not in self._made:
            self._made[rank] = {n: self._random(rank, s.in_dim, s.out_dim, s.kind) for n, s in self._modules.items()}
        tensors = self._made[rank]
        manifest = AdapterManifest(
            version=version,
            rank=rank,
            targets=tuple(sorted({n.rpartition(".")[2] for n in self._modules})),
            modules=tuple(ModuleManifest(name, rank, 1.0) for name in self._modules),
            num_bytes=sum(a.nbytes + b.nbytes for a, b in tensors.values()),
        )
        return AdapterWeights(manifest, "bfloat16", tensors)

    def _random(self, rank: int, in_dim: int, out_dim: int, kind: str) -> tuple[np.ndarray[Any, Any], ...]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        a_shape = (in_dim, rank) if kind == "embedding" else (rank, in_dim)
        a = torch.randn(a_shape, device=device) * in_dim**-0.5
        b = torch.randn((rank, out_dim), device=device) * 0.01
        return tuple(t.bfloat16().view(torch.uint16).cpu().numpy() for t in (a, b))


@dataclass(slots=True)
class Inbox:
    """Takes the engine's deliveries and keeps when they came."""

    first_s: dict[str, float] = field(default_factory=dict)
    times_s: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    open_ids: set[str] = field(default_factory=set)
    is_done: threading.Event = field(default_factory=threading.Event)

    def expect(self, ids: Iterable[str]) -> None:
        """Forget what was; wait for these requests."""
        self.first_s, self.times_s, self.num_tokens = {}, {}, 0
        self.open_ids = set(ids)
        self.is_done.clear()

    def take(self, deliveries: list[Delivery]) -> None:
        """On the engine's thread."""
        now = time.perf_counter()
        for request_id, item in deliveries:
            if isinstance(item, GenerateDelta):
                self.num_tokens += len(item.token_ids)
                self.times_s.setdefault(request_id, []).append(now)
                over = item.finish_reason is not None
            else:
                self.errors.append(repr(item))
                over = True
            if over:
                self.open_ids.discard(request_id)
        if not self.open_ids:
            self.is_done.set()


@dataclass(frozen=True, slots=True)
class Bench:
    """A running engine and its adapters."""

    parts: WorkerParts
    inbox: Inbox
    adapters: RandomAdapters

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        versions: Sequence[str | None],
        num_output: int,
        tag: str,
        per_second: float | None = None,
    ) -> dict[str, float]:
        """Submit everything at once, or `per_second` requests a second, and wait for the last token."""
        ids = [f"{tag}-{i}-{time.monotonic_ns()}" for i in range(len(prompts))]
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        self.inbox.expect(ids)
        steps, loads = self.parts.engine.stats.num_steps, self.parts.residency.snapshot().loads
        gc.collect()
        start = time.perf_counter()
        sent_s = {}
        for i, (request_id, prompt, version) in enumerate(zip(ids, prompts, versions, strict=True)):
            if per_second is not None:
                time.sleep(max(0.0, start + i / per_second - time.perf_counter()))
            sent_s[request_id] = time.perf_counter() if per_second is not None else start
            self.parts.engine.submit(EngineRequest(request_id, version, tuple(prompt), sampling))
        if not self.inbox.is_done.wait(300):
            raise TimeoutError(f"{tag}: {len(self.inbox.open_ids)} requests never ended; {self.inbox.errors[:3]}")
        seconds = time.perf_counter() - start
        if self.inbox.errors:
            raise RuntimeError(f"{tag}: {self.inbox.errors[:3]}")
        first = sorted(self.inbox.times_s[request_id][0] - sent_s[request_id] for request_id in ids)
        gaps = np.concatenate([np.diff(self.inbox.times_s[request_id]) for request_id in ids])
        return {
            "seconds": seconds,
            "output_tokens": self.inbox.num_tokens,
            "output_tokens_per_s": self.inbox.num_tokens / seconds,
            "steps": self.parts.engine.stats.num_steps - steps,
            "loads": self.parts.residency.snapshot().loads - loads,
            "first_token_s_p50": first[len(first) // 2],
            "first_token_s_p99": first[min(len(first) - 1, int(len(first) * 0.99))],
            "gap_ms_p50": float(np.median(gaps) * 1e3) if gaps.size else 0.0,
            "gap_ms_p99": float(np.quantile(gaps, 0.99) * 1e3) if gaps.size else 0.0,
        }


def start(base: Path, adapters: RandomAdapters, engine: EngineConfig, pool: PoolConfig) -> tuple[Bench, float]:
    """A started engine, and how long the start took."""
    inbox = Inbox()
    begun = time.perf_counter()
    model = ModelConfig(id="base", source=str(base), dtype="bfloat16", load="dummy", max_model_len=MAX_MODEL_LEN)
    parts = assemble(worker_id="bench", model=model, engine=engine, pool=pool, fetch=adapters.fetch, deliver=inbox.take)
    parts.engine.start()
    return Bench(parts, inbox, adapters), time.perf_counter() - begun


def main() -> None:
    """Run the cases and append a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--geometry", default="llama-8b", choices=GEOMETRIES)
    parser.add_argument(
        "--cases", default="base,one,lora64,decode_base,decode_lora64,cold,hot,zipf_resident,zipf_pool64,gsm8k"
    )
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--commit", default="", help="what is measured, where git cannot say")
    parser.add_argument("--profile", type=Path, help="also write where the device's time goes, a text file a case")
    parser.add_argument("--report", action="store_true", help="only draw what `--out` holds")
    args = parser.parse_args()
    if args.report:
        report(args.out)
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    rng = random.Random(0)
    folder = Path(tempfile.mkdtemp(prefix="lorafleet-bench-"))
    base = write_base(folder / "base", args.geometry)
    adapters = RandomAdapters(base)
    vocab = GEOMETRIES[args.geometry]["vocab_size"]
    prompts = [[rng.randrange(10, vocab - 10) for _ in range(512)] for _ in range(args.requests)]
    versions = [f"a{i}-r16" for i in range(64)]
    meta = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": args.commit or _commit(),
        "geometry": args.geometry,
        "max_batch_tokens": args.max_batch_tokens,
    }

    def emit(case: str, figures: dict[str, float]) -> None:
        line = {"case": case, **{k: round(v, 4) for k, v in figures.items()}, **meta}
        with args.out.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(case, json.dumps({k: round(v, 3) for k, v in figures.items()}), flush=True)

    cases = args.cases.split(",")
    alone = [case for case in cases if case in ALONE]
    if alone and len(cases) > 1:
        # Each of these fills the device with an engine of its own shape.
        for case in alone:
            subprocess.run([sys.executable, *sys.argv, "--cases", case], check=True)
    elif cases == ["gsm8k"]:
        emit("gsm8k", shared_prefix(folder, rng))
        return
    elif alone:
        emit(cases[0], many_adapters(cases[0], base, adapters, prompts, args.max_running, args.max_batch_tokens))
        return
    engine = EngineConfig(max_batch_tokens=args.max_batch_tokens, max_running=args.max_running, prefix_cache=False)
    bench, start_s = start(base, adapters, engine, PoolConfig(max_rank=64, max_slots=256))
    emit("start", {"seconds": start_s})
    num_few = min(64, args.requests)
    mixes: dict[str, tuple[list[list[int]], list[str | None], int]] = {
        "base": (prompts, [None] * args.requests, 128),
        "one": (prompts, [versions[0]] * args.requests, 128),
        "lora64": (prompts, [versions[i % 64] for i in range(args.requests)], 128),
        "decode_base": ([p[:16] for p in prompts[:num_few]], [None] * num_few, 256),
        "decode_lora64": ([p[:16] for p in prompts[:num_few]], versions[:num_few], 256),
    }
    for case in cases:
        if case in mixes:
            these_prompts, these_versions, num_output = mixes[case]
            bench.run(these_prompts, these_versions, min(16, num_output), f"warm-{case}")
            for _ in range(args.repeats):
                emit(case, bench.run(these_prompts, these_versions, num_output, case))
            if args.profile is not None:
                with torch.profiler.profile() as profiler:
                    bench.run(these_prompts, these_versions, min(16, num_output), f"profile-{case}")
                table = profiler.key_averages().table(
                    sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90
                )
                (args.profile / f"profile-{case}.txt").write_text(table)
        elif case == "cold":
            emit(case, cold_start(bench, prompts))
        elif case == "hot":
            emit(case, hot_beside_cold(bench, prompts))
    bench.parts.engine.close()


def cold_start(bench: Bench, prompts: list[list[int]]) -> dict[str, float]:
    """First token of an adapter of rank 16 that is in host memory only, against one that is resident."""
    warm, cold = [], []
    for i in range(12):
        bench.run(prompts[:1], ["warm-r16"], 4, "settle")
        warm.append(bench.run([prompts[i % len(prompts)][:64]], ["warm-r16"], 2, "warm")["first_token_s_p50"])
        cold.append(bench.run([prompts[i % len(prompts)][:64]], [f"cold{i}-r16"], 2, "cold")["first_token_s_p50"])
    warm, cold = sorted(warm[2:]), sorted(cold[2:])
    middle = len(warm) // 2
    return {
        "warm_ms_p50": warm[middle] * 1e3,
        "cold_ms_p50": cold[middle] * 1e3,
        "cold_ms_max": cold[-1] * 1e3,
        "over_warm_ms_p50": (cold[middle] - warm[middle]) * 1e3,
    }


def hot_beside_cold(bench: Bench, prompts: list[list[int]], per_second: float = 10.0) -> dict[str, float]:
    """Inter-token times of 32 hot streams, alone and while cold adapters come in at `per_second`."""
    hot_prompts, hot_versions = [p[:64] for p in prompts[:32]], [f"a{i}-r16" for i in range(32)]
    bench.run(hot_prompts, hot_versions, 16, "warm-hot")
    alone = bench.run(hot_prompts, hot_versions, 512, "hot-alone")
    is_over = threading.Event()

    def bring_cold() -> None:
        for i in range(10_000):
            if is_over.wait(1 / per_second):
                return
            sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
            version = f"stream{i}-r16"
            bench.parts.engine.submit(EngineRequest(f"{version}-{time.monotonic_ns()}", version, (5, 6, 7), sampling))

    bringer = threading.Thread(target=bring_cold)
    bringer.start()
    beside = bench.run(hot_prompts, hot_versions, 512, "hot-beside")
    is_over.set()
    bringer.join()
    return {
        "alone_gap_ms_p50": alone["gap_ms_p50"],
        "alone_gap_ms_p99": alone["gap_ms_p99"],
        "beside_gap_ms_p50": beside["gap_ms_p50"],
        "beside_gap_ms_p99": beside["gap_ms_p99"],
        "loads": beside["loads"],
    }


def many_adapters(
    case: str, base: Path, adapters: RandomAdapters, prompts: list[list[int]], max_running: int, max_batch_tokens: int
) -> dict[str, float]:
    """512 adapters of rank 8 to 64, Zipf 1.0, 60 requests a second: all resident, or in a pool that holds 64."""
    rng = np.random.default_rng(0)
    versions = [f"z{i}-r{rank}" for i, rank in enumerate(rng.choice([8, 16, 32, 64], size=512))]
    weights = 1.0 / np.arange(1, 513)
    chosen = [versions[i] for i in rng.choice(512, size=1024, p=weights / weights.sum())]
    several = [prompts[i % len(prompts)] for i in range(1024)]
    used = sorted(set(chosen))
    sizes = {version: adapters.fetch(version).manifest.num_bytes for version in versions}
    mean_bytes = sum(sizes.values()) / len(sizes)
    pool_bytes = 1.02 * sum(sizes[version] for version in used) if case == "zipf_resident" else 64 * mean_bytes
    engine = EngineConfig(
        max_batch_tokens=max_batch_tokens, max_running=max_running, prefix_cache=False, kv_bytes=int(22e9)
    )
    bench, _ = start(base, adapters, engine, PoolConfig(max_rank=64, max_slots=512, pool_bytes=int(pool_bytes)))
    bench.run([several[0][:32]] * len(used), used, 1, f"warm-{case}")
    figures = bench.run(several, chosen, 64, case, per_second=60.0)
    figures["adapters"] = len(used)
    figures["bytes_moved"] = figures["loads"] * mean_bytes
    figures["loads_per_s"] = figures["loads"] / figures["seconds"]
    bench.parts.engine.close()
    return figures


def shared_prefix(folder: Path, rng: random.Random) -> dict[str, float]:
    """200 requests of 800 tokens, 700 of them shared, 143 out; Llama-2-7B, one adapter with embeddings and head."""
    base = write_base(folder / "base7b", "llama-7b")
    adapters = RandomAdapters(base, embeddings=True)
    engine = EngineConfig(max_batch_tokens=8192, max_running=200, prefix_cache=True)
    bench, _ = start(base, adapters, engine, PoolConfig(max_rank=64, pool_bytes=int(2e9), max_slots=8))
    shared = [rng.randrange(10, 31990) for _ in range(700)]
    prompts = [shared + [rng.randrange(10, 31990) for _ in range(100)] for _ in range(200)]
    bench.run(prompts[:2], ["e-r16"] * 2, 4, "warm-gsm8k")
    figures = bench.run(prompts, ["e-r16"] * 200, 143, "gsm8k")
    bench.parts.engine.close()
    return figures


def report(results: Path) -> None:
    """Draw the last line of each case beside the results."""
    import matplotlib.pyplot as plt  # the machine that measures need not have it

    lines = {line["case"]: line for line in map(json.loads, results.read_text().splitlines())}
    figure, (throughput, step) = plt.subplots(1, 2, figsize=(9, 3.6))
    for axes, cases, key, scale, title in (
        (throughput, ("base", "one", "lora64"), "output_tokens_per_s", 1.0, "output tokens/s"),
        (step, ("decode_base", "decode_lora64"), "gap_ms_p50", 1.0, "decode step of 64 sequences, ms"),
    ):
        shown = [case for case in cases if case in lines]
        bars = axes.bar(shown, [lines[case][key] * scale for case in shown], color=["0.6", "C0", "C1"][: len(shown)])
        axes.bar_label(bars, fmt="{:,.1f}" if axes is step else "{:,.0f}")
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    any_line = next(iter(lines.values()))
    figure.suptitle(f"{any_line['geometry']}, {any_line['gpu']}, torch {any_line['torch']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(results.with_suffix(".png"), dpi=130)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()

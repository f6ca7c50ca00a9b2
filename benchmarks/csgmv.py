"""The csgmv kernels on a GPU against the bytes they must move, beside other servers' kernels.

    python benchmarks/csgmv.py --out benchmarks/results/kernels.jsonl --peers FOLDER
    python benchmarks/csgmv.py --out benchmarks/results/kernels.jsonl --report

Microseconds a layer, by CUDA-graph replay over eight weight sets in turn. The floor counts each byte once, y read and
written, over the copy bandwidth measured in the same run, or the products over the measured bf16 rate if that is more.
Each case is checked against float32 before it is timed. A line of JSON a case, appended: the last of a case counts.
`--report` holds them against the bars and draws them. FOLDER: see `kernels_peers.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bars
import kernels_peers
import kernels_report
import numpy as np
import torch
import triton

from lorafleet.kernels import ops
from lorafleet.kernels.embedding_triton import lookup
from lorafleet.kernels.segments import Segments
from lorafleet.kernels.tune import Workload, random_weights, time_in_graph
from lorafleet.kernels.weights import ROW_ALIGN, LoraEmbeddingWeights, LoraWeights

SLOTS = 64
VOCABULARY = 128256
ROWS_CHECKED = 12
TOLERANCE = 1e-2
EMBEDDING_CALLS = 32
"""Of one graph: a call takes no longer than a graph takes to start."""

Modules = dict[str, tuple[int, tuple[int, ...]]]
MODELS: dict[str, Modules] = {
    "llama-3.1-8b": {
        "qkv": (4096, (4096, 1024, 1024)),
        "o": (4096, (4096,)),
        "gate_up": (4096, (14336, 14336)),
        "down": (14336, (4096,)),
    },
    "qwen2.5-0.5b": {
        "qkv": (896, (896, 128, 128)),
        "o": (896, (896,)),
        "gate_up": (896, (4864, 4864)),
        "down": (4864, (896,)),
    },
    "llama-3.1-70b-shard": {
        "qkv": (8192, (1024, 128, 128)),
        "o": (1024, (8192,)),
        "gate_up": (8192, (3584, 3584)),
        "down": (3584, (8192,)),
    },
    "llama-2-7b": {
        "qkv": (4096, (4096, 4096, 4096)),
        "o": (4096, (4096,)),
        "gate_up": (4096, (11008, 11008)),
        "down": (11008, (4096,)),
    },
}


def batches() -> dict[str, list[int]]:
    """Name -> adapter of each row."""
    draw = random.Random(0)
    weights = [1 / (i + 1) ** 1.5 for i in range(SLOTS)]
    return {
        "decode_1": [3],
        "decode_16_distinct": list(range(16)),
        "decode_64_distinct": list(range(64)),
        "decode_64_same": [5] * 64,
        "decode_256_zipf": draw.choices(range(SLOTS), weights, k=256),
        "decode_256_round": [i % SLOTS for i in range(256)],
        "prefill_2048_one": [7] * 2048,
        "prefill_2048_x8": np.repeat(range(8), 256).tolist(),
        "prefill_8192_x16": np.repeat(range(16), 512).tolist(),
    }


def rank_sets() -> dict[str, tuple[int, ...]]:
    mixed = np.random.default_rng(0).choice([8, 16, 32, 64], SLOTS)
    return {**{str(rank): (rank,) * SLOTS for rank in (16, 64)}, "8-64": tuple(mixed.tolist())} | {
        str(rank): (rank,) * SLOTS for rank in (32, 8, 128)
    }


@dataclass(frozen=True)
class Group:
    """Cases that share their weights."""

    model: str
    module: str
    rank: str

    def workload(self, row_slots: Sequence[int]) -> Workload:
        in_dim, widths = MODELS[self.model][self.module]
        return Workload(in_dim, widths, rank_sets()[self.rank], tuple(row_slots))


def groups() -> Iterator[Group]:
    for rank in rank_sets():
        for module in MODELS["llama-3.1-8b"]:
            yield Group("llama-3.1-8b", module, rank)
    for model in list(MODELS)[1:]:
        for module in MODELS[model]:
            yield Group(model, module, "16")


def ours(
    workload: Workload, weights: list[LoraWeights], x: torch.Tensor, y: torch.Tensor, accumulate: bool
) -> kernels_peers.Call:
    segments = workload.segments(x.device)

    def call(i: int) -> None:
        ops.expand(ops.shrink(x, weights[i], segments), weights[i], segments, y, accumulate=accumulate)

    return call


def error(workload: Workload, weights: LoraWeights, x: torch.Tensor, y: torch.Tensor) -> float:
    """Relative error of the norm of some rows of the delta y."""
    rows = np.unique(np.linspace(0, workload.num_rows - 1, ROWS_CHECKED).astype(int))
    expected = []
    for row in rows.tolist():
        slot = workload.row_slots[row]
        rank = workload.ranks[slot]
        deltas = []
        for part, width in enumerate(weights.part_widths):
            a = _rows(weights.pool, weights.a_rows[slot, part, :rank], weights.in_dim)
            b = _rows(weights.pool, weights.b_rows[slot, part, :rank], width)
            deltas.append(x[row].float() @ a.T @ b)
        expected.append(torch.cat(deltas))
    exact = torch.stack(expected)
    return ((y[rows.tolist()].float() - exact).norm() / exact.norm()).item()


def _rows(pool: torch.Tensor, starts: torch.Tensor, width: int) -> torch.Tensor:
    places = starts.long()[:, None] * ROW_ALIGN + torch.arange(width, device=pool.device)
    return pool[places].float()


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and bf16 operations a second of a large product: the best ones.

    Not in a graph, where a copy is the copy engine's and no faster than that.
    """
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    copy_s, product_s = (
        min(triton.testing.do_bench(call, return_mode="all")) / 1e3
        for call in (lambda: target.copy_(source), lambda: torch.mm(a, b))
    )
    return 2 * source.nbytes / copy_s, 2 * 8192**3 / product_s


def floor(workload: Workload, bandwidth: float, rate: float) -> float:
    out_dim, num_slices = sum(workload.widths), len(workload.widths)
    a_row = num_slices * workload.in_dim + out_dim
    rank_rows = sum(workload.ranks[slot] for slot in set(workload.row_slots))
    num_bytes = 2 * (rank_rows * a_row + workload.num_rows * (workload.in_dim + 2 * out_dim))
    flop = 2 * a_row * sum(workload.ranks[slot] for slot in workload.row_slots)
    return max(num_bytes / bandwidth, flop / rate) * 1e6


def calls_of(
    group: Group, batch: str, weights: list[LoraWeights], peers: dict[str, kernels_peers.Contender]
) -> Iterator[tuple[str, kernels_peers.Call, Callable[[], float]]]:
    """Each contender's name, its call, and how far off float32 what a call of ours left is."""
    workload = group.workload(batches()[batch])
    x = torch.randn(workload.num_rows, workload.in_dim, dtype=torch.bfloat16, device="cuda")
    y = torch.full((workload.num_rows, sum(workload.widths)), float("nan"), dtype=torch.bfloat16, device="cuda")
    yield "ours", ours(workload, weights, x, y, accumulate=False), lambda: error(workload, weights[0], x, y)
    yield "ours_accumulating", ours(workload, weights, x, y, accumulate=True), lambda: 0.0
    row_slots = torch.tensor(workload.row_slots)
    for name, peer in peers.items():
        if name == "sglang128" and workload.num_rows < 64:
            continue  # its chunks are the same as with 16
        case = kernels_peers.DenseCase(workload.in_dim, workload.widths, workload.ranks, row_slots, x, y, len(weights))
        yield name, _prepared(peer, case), lambda: 0.0


def _prepared(peer: kernels_peers.Contender, case: kernels_peers.DenseCase) -> kernels_peers.Call:
    """The peer's call; one that fails where preparing it does."""
    try:
        return peer(case)
    except Exception as failure:
        reason = failure

        def fail(i: int) -> None:
            raise reason

        return fail


def compile_group(group: Group, folder: Path | None) -> list[str]:
    """Run everything once, so that Triton's cache has it. Returns what failed."""
    peers = kernels_peers.contenders(folder) if folder else {}
    weights = random_weights(group.workload([0]), torch.device("cuda"), num_sets=1)
    failed = []
    for batch in batches():
        for name, call, _ in calls_of(group, batch, weights, peers):
            try:
                call(0)
            except Exception as failure:
                failed.append(f"{name} {batch}: {failure!r}"[:300])
    torch.cuda.synchronize()
    return failed


def measure(
    group: Group, peers: dict[str, kernels_peers.Contender], ceiling: tuple[float, float]
) -> Iterator[dict[str, Any]]:
    """A row a batch. What fails or is wrong is noted in the row; the others go on."""
    weights = random_weights(group.workload([0]), torch.device("cuda"))
    for batch in batches():
        workload = group.workload(batches()[batch])
        row: dict[str, Any] = {
            "model": group.model,
            "module": group.module,
            "rank": group.rank,
            "batch": batch,
            "rows": workload.num_rows,
            "adapters": len(set(workload.row_slots)),
            "floor_us": floor(workload, *ceiling),
        }
        for name, call, error_of in calls_of(group, batch, weights, peers):
            try:
                started = time.perf_counter()
                call(0)
                torch.cuda.synchronize()
                slow = time.perf_counter() - started > 1e-3
                off = error_of()
                if not off < TOLERANCE:
                    row[f"{name}_wrong"] = f"relative error {off}"
                row[f"{name}_us"] = time_in_graph(call, replays=7 if slow else 15)
            except Exception as failure:
                row[f"{name}_failure"] = repr(failure)[:200]
        yield row


def measure_embedding(rank: int, has_sglang: bool) -> Iterator[dict[str, Any]]:
    """The embedding's A alone, beside torch's gather over the same layout; and with B behind it."""
    slots, page_elements, width, num_sets = 16, 8 * 14336, 4096, 4
    tokens_a_page = page_elements // rank
    pages = -(-VOCABULARY // tokens_a_page)
    device = torch.device("cuda")
    units = slots * pages * page_elements // ROW_ALIGN
    b_units = slots * rank * width // ROW_ALIGN
    pool = torch.randn(num_sets * (units + b_units) * ROW_ALIGN, dtype=torch.bfloat16, device=device)
    a_places = torch.randperm(num_sets * slots * pages, device=device) * (page_elements // ROW_ALIGN)
    b_places = num_sets * units + torch.randperm(num_sets * slots * rank, device=device) * (width // ROW_ALIGN)
    a_pages, b_rows = a_places.int().view(num_sets, slots, pages), b_places.int().view(num_sets, slots, 1, rank)
    sets = [
        LoraEmbeddingWeights(
            pool=pool,
            ranks=torch.full((slots, 1), rank, dtype=torch.int32, device=device),
            scalings=torch.ones(slots, 1, device=device),
            a_pages=a_pages[i],
            b_rows=b_rows[i],
            num_embeddings=VOCABULARY,
            page_elements=page_elements,
            part_slices=(0,),
            part_starts=(0,),
            part_widths=(width,),
        )
        for i in range(num_sets)
    ]
    flat = [torch.randn(slots, VOCABULARY, rank, dtype=torch.bfloat16, device=device) for _ in range(num_sets)]
    dense = [a.transpose(1, 2).contiguous() for a in flat] if has_sglang else []
    for batch, adapters in batches().items():
        row_slots = [slot % slots for slot in adapters]
        workload = Workload(1, (width,), (rank,) * slots, tuple(row_slots))
        segments = workload.segments(device)
        tokens = torch.randint(0, VOCABULARY, (len(row_slots),), device=device)
        slot_of = torch.tensor(row_slots, device=device)
        y = torch.zeros(len(row_slots), width, dtype=torch.bfloat16, device=device)
        row: dict[str, Any] = {"model": "llama-3.1-8b", "module": "embedding", "rank": str(rank), "batch": batch}
        row["rows"], row["adapters"] = len(row_slots), len(set(row_slots))
        calls = _embedding_calls(tokens, slot_of, segments, sets, flat, y)
        if has_sglang:
            for chunk in (16, 128):
                calls[f"sglang{chunk}"] = kernels_peers.sglang_embedding(tokens, dense, torch.tensor(row_slots), chunk)
        for name, call in calls.items():
            row[f"{name}_us"] = time_in_graph(lambda i, call=call: call(i % num_sets), EMBEDDING_CALLS)
        yield row


def _embedding_calls(
    tokens: torch.Tensor,
    slots: torch.Tensor,
    segments: Segments,
    sets: list[LoraEmbeddingWeights],
    flat: list[torch.Tensor],
    y: torch.Tensor,
) -> dict[str, kernels_peers.Call]:
    return {
        "ours": lambda i: lookup(tokens, sets[i], segments),
        "gather": lambda i: flat[i][slots, tokens],
        "ours_with_b": lambda i: ops.embed(tokens, sets[i], segments, y),
    }


def run(out: Path, folder: Path | None, processes: int, only: str | None, seconds: float, revision: str) -> None:
    """Compile all, then measure a group after another until the time is over; lines are written at once."""
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {what}", file=sys.stderr, flush=True)

    todo = [group for group in groups() if only is None or re.fullmatch(only, f"{group.model} {group.rank}")]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(compile_group, group, folder) for group in todo]
        for done, job in enumerate(as_completed(jobs), 1):
            for failed in job.result():
                say(f"failed: {failed}")
            say(f"compiled {done}/{len(jobs)} groups")
    peers = kernels_peers.contenders(folder) if folder else {}
    bandwidth, rate = ceilings()
    common = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": revision,
        "copy_tb_s": bandwidth / 1e12,
        "bf16_tflop_s": rate / 1e12,
    }
    if only is None:
        for embedding_rank in (16, 64):
            for row in measure_embedding(embedding_rank, "sglang16" in peers):
                bars.append(out, {**common, **row})
            say(f"embedding of rank {embedding_rank}")
    for done, group in enumerate(todo, 1):
        if time.monotonic() - began > seconds:
            say(f"out of time: {len(todo) - done + 1} groups were not measured")
            break
        for row in measure(group, peers, (bandwidth, rate)):
            bars.append(out, {**common, **row})
        torch.cuda.empty_cache()
        say(f"{done}/{len(todo)} {group}")


def main(options: Sequence[str] | None = None) -> None:
    """Measure, unless told not to, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results, a line of JSON a case")
    parser.add_argument("--peers", type=Path, help="folder with other servers' kernels")
    parser.add_argument("--processes", type=int, default=8, help="processes that compile")
    parser.add_argument("--only", help="a regular expression of the model and rank, say 'llama-3.1-8b (16|64)'")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--commit", default=bars.commit(), help="what the results say they are of")
    parser.add_argument("--report", action="store_true", help="only print and draw what `--out` holds")
    arguments = parser.parse_args(options)
    if not arguments.report:
        run(
            arguments.out,
            arguments.peers,
            arguments.processes,
            arguments.only,
            arguments.seconds,
            arguments.commit,
        )
    kernels_report.report(arguments.out)


if __name__ == "__main__":
    main()

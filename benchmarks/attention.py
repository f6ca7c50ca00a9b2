"""Paged attention on a GPU against the bytes it must read and the products it must make, beside torch's own attention.

    python benchmarks/attention.py --out benchmarks/results/attention.jsonl

Llama-3.1-8B heads in bf16, CUDA-graph replays. cuDNN has the same pages, if its package is installed; it takes prompts
only. torch has its keys and values contiguous, one length for all, without pages. Floors use ceilings measured in the
same run. Every case is checked against float64 before it is timed. Writes a line of JSON a case, and a plot.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import bars
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from lorafleet.kernels.attention import DecodeWorkspace, decode, extend
from lorafleet.kernels.attention_cudnn import find
from lorafleet.kernels.scores import Scores

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_TOKENS = 32, 8, 128, 16
DTYPE = torch.bfloat16
SCALING = HEAD_DIM**-0.5
TOLERANCE = 1.2e-2
ROWS_CHECKED = 64


@dataclass(frozen=True)
class Case:
    """Sequences of one forward pass. Decode if every one has a single row."""

    name: str
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def is_decode(self) -> bool:
        return max(self.rows) == 1

    @property
    def is_even(self) -> bool:
        """Return True if torch's attention can run it: one length, and no tokens before the rows of a prefill."""
        return len(set(self.lengths)) == 1 and (self.is_decode or self.rows == self.lengths)

    @property
    def num_bytes(self) -> int:
        """Keys and values read once, queries read and results written once."""
        return 2 * HEAD_DIM * (2 * NUM_KV_HEADS * sum(self.lengths) + 2 * NUM_HEADS * sum(self.rows))

    @property
    def num_flops(self) -> int:
        """Two products over the (row, token) pairs that see each other."""
        pairs = sum(n * length - n * (n - 1) // 2 for n, length in zip(self.rows, self.lengths, strict=True))
        return 4 * HEAD_DIM * NUM_HEADS * pairs


def cases() -> list[Case]:
    """Decodes of even and uneven lengths, whole prompts, and chunks of long ones."""
    even = [
        Case(f"decode_{num}x{length}", (1,) * num, (length,) * num)
        for num in (1, 16, 64, 256)
        for length in (512, 2048, 16384)
    ]
    uneven = [Case("decode_64_uneven", (1,) * 64, (16384, *(512 + 16 * i for i in range(63))))]
    prefill = [
        Case(f"prefill_{num}x{length}", (length,) * num, (length,) * num)
        for num, length in ((4, 512), (16, 512), (1, 2048), (1, 8192))
    ]
    chunks = [
        Case("extend_2048_of_16384", (2048,), (16384,)),
        Case("extend_8192_of_32768", (8192,), (32768,)),
        Case("extend_8192_of_131072", (8192,), (131072,)),
        Case("extend_uneven", (37, 511, 1500, 2000, 4144), (937, 511, 3500, 2000, 12000)),
        Case("extend_20x100_after_700", (100,) * 20, (800,) * 20),
    ]
    return even + uneven + prefill + chunks


class Inputs:
    """One case's tensors, pages shuffled."""

    def __init__(self, case: Case) -> None:
        device = torch.device("cuda")
        num_pages = [-(-length // PAGE_TOKENS) for length in case.lengths]
        shape = (sum(num_pages), NUM_KV_HEADS, PAGE_TOKENS, HEAD_DIM)
        self.keys = torch.randn(shape, dtype=DTYPE, device=device)
        self.values = torch.randn(shape, dtype=DTYPE, device=device)
        self.query = torch.randn((sum(case.rows), NUM_HEADS, HEAD_DIM), dtype=DTYPE, device=device)
        self.out = torch.full_like(self.query, float("nan"))
        self.tables = torch.zeros((len(case.rows), max(num_pages)), dtype=torch.int32)
        for table, pages in zip(self.tables, torch.randperm(sum(num_pages)).split(num_pages), strict=True):
            table[: len(pages)] = pages
        self.tables = self.tables.to(device)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        self.indptr = torch.tensor((0, *case.rows), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
        self.workspace = DecodeWorkspace.allocate(
            num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, device=device
        )

    def contiguous(self, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """(num_kv_heads, length, head_dim) keys and values of one sequence."""
        pages = self.tables[sequence, : -(-length // PAGE_TOKENS)].long()
        keys, values = (cache[pages].transpose(0, 1).flatten(1, 2)[:, :length] for cache in (self.keys, self.values))
        return keys, values


def ours(case: Case, inputs: Inputs) -> Callable[[], None]:
    """The launch under test."""

    def run_decode() -> None:
        decode(
            inputs.query,
            inputs.keys,
            inputs.values,
            inputs.tables,
            inputs.lengths,
            inputs.out,
            inputs.workspace,
            scaling=SCALING,
        )

    def run_extend() -> None:
        extend(
            inputs.query,
            inputs.keys,
            inputs.values,
            inputs.tables,
            inputs.lengths,
            inputs.indptr,
            inputs.out,
            scaling=SCALING,
        )

    return run_decode if case.is_decode else run_extend


def cudnns(case: Case, inputs: Inputs) -> Callable[[], object] | None:
    """The same by cuDNN, if it is installed and the case is prompts."""
    found = find(max_pages=inputs.tables.shape[1], page_tokens=PAGE_TOKENS, device=torch.device("cuda"))
    if case.is_decode or found is None:
        return None
    prompts = found.prompts(inputs.indptr, inputs.lengths, inputs.tables, case.rows, case.lengths)
    if prompts is None:
        return None
    scores = Scores(SCALING)
    return lambda: found.extend(inputs.query, inputs.keys, inputs.values, prompts, inputs.out, scores)


def torchs(case: Case, inputs: Inputs) -> Callable[[], Any] | None:
    """The same with torch's attention, if it can."""
    if not case.is_even:
        return None
    pairs = [inputs.contiguous(index, length) for index, length in enumerate(case.lengths)]
    keys, values = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    query = inputs.query.view(len(case.rows), -1, NUM_HEADS, HEAD_DIM).transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(query, keys, values, is_causal=not case.is_decode, enable_gqa=True)


def check(case: Case, inputs: Inputs) -> float:
    """Relative error of the last rows of the first and last sequence against float64; raises when it is too large."""
    errors = []
    for sequence in (0, len(case.rows) - 1):
        rows, length = min(case.rows[sequence], ROWS_CHECKED), case.lengths[sequence]
        end = sum(case.rows[: sequence + 1])
        keys, values = (
            tensor.double().repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 0)
            for tensor in inputs.contiguous(sequence, length)
        )
        query = inputs.query[end - rows : end].double().transpose(0, 1)
        scores = query @ keys.transpose(1, 2) * SCALING
        is_hidden = torch.arange(length, device="cuda") > torch.arange(length - rows, length, device="cuda")[:, None]
        expected = (scores.masked_fill(is_hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
        got = inputs.out[end - rows : end].double()
        errors.append(float((got - expected).norm() / expected.norm()))
    if not max(errors) <= TOLERANCE:
        raise SystemExit(f"{case.name} is wrong: relative errors {errors}, more than {TOLERANCE}")
    return max(errors)


def time_us(run: Callable[[], object], target_s: float = 0.15) -> tuple[float, float, float]:
    """p20, p50 and p80 of one call, from replays of a graph of several."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    estimate_ms = _replay_ms(run, 1, 3)[1]
    calls = max(1, min(20, int(2 / estimate_ms)))
    p20, p50, p80 = _replay_ms(run, calls, max(5, int(target_s * 1e3 / (calls * estimate_ms))))
    return p20 * 1e3 / calls, p50 * 1e3 / calls, p80 * 1e3 / calls


def _replay_ms(run: Callable[[], object], calls: int, replays: int) -> tuple[float, float, float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in pairwise(events)]
    if len(times) == 1:
        times *= 2
    quantiles = statistics.quantiles(times, n=10, method="inclusive")
    return quantiles[1], quantiles[4], quantiles[7]


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy, read and written; FLOP a second of a large bf16 product."""
    source = torch.empty(1 << 30, dtype=DTYPE, device="cuda")
    target = torch.empty_like(source)
    # By a kernel: in a graph, a plain copy goes to the copy engine, which is slower.
    copy_us = time_us(lambda: torch.neg(source, out=target))[1]
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device="cuda") for _ in range(2))
    product_us = time_us(lambda: a @ b)[1]
    return 2 * source.nbytes / copy_us * 1e6, 2 * 8192**3 / product_us * 1e6


def versions() -> dict[str, str]:
    """Machine and versions behind the numbers."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": bars.commit(),
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Times over the floor, ours and torch's."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    places = range(len(results))
    bars_of = {"p50_us": "Triton, pages", "cudnn_us": "cuDNN, pages", "torch_us": "torch, contiguous"}
    for number, (name, label) in enumerate(bars_of.items()):
        times = [(result[name] or 0.0) / result["floor_us"] for result in results]
        axes.bar([x + 0.27 * (number - 1) for x in places], times, 0.27, label=label)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("time over the floor")
    axes.set_xticks(list(places), [r["case"] for r in results], rotation=60, ha="right")
    axes.set_title(f"Attention, Llama-3.1-8B heads, bf16, {results[0]['gpu']}")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON lines; the plot lies beside it")
    parser.add_argument("--cases", help="only cases whose names contain this")
    options = parser.parse_args()
    torch.manual_seed(0)
    bytes_s, flops_s = ceilings()
    print(f"copy {bytes_s / 1e12:.2f} TB/s, bf16 product {flops_s / 1e12:.0f} TFLOP/s")
    results = []
    for case in cases():
        if options.cases and options.cases not in case.name:
            continue
        inputs = Inputs(case)
        run, torch_run = ours(case, inputs), torchs(case, inputs)
        run()
        error = check(case, inputs)
        p20, p50, p80 = time_us(run)
        floor_us = max(case.num_bytes / bytes_s, case.num_flops / flops_s) * 1e6
        torch_us = time_us(torch_run)[1] if torch_run else None
        cudnn_run = cudnns(case, inputs)
        cudnn_us = None
        if cudnn_run is not None:
            inputs.out.fill_(float("nan"))
            cudnn_run()
            error = max(error, check(case, inputs))
            cudnn_us = time_us(cudnn_run)[1]
        results.append(
            {
                "case": case.name,
                "p20_us": round(p20, 2),
                "p50_us": round(p50, 2),
                "p80_us": round(p80, 2),
                "floor_us": round(floor_us, 2),
                "torch_us": round(torch_us, 2) if torch_us else None,
                "cudnn_us": round(cudnn_us, 2) if cudnn_us else None,
                "error": error,
                "bytes": case.num_bytes,
                "flops": case.num_flops,
                "bytes_s": bytes_s,
                "flops_s": flops_s,
                **versions(),
            }
        )
        others = "".join(
            f", {name} {time:.1f}" for name, time in (("cuDNN", cudnn_us), ("torch", torch_us)) if time is not None
        )
        print(f"{case.name:28} {p50:9.1f} us, {p50 / floor_us:5.2f} floors{others}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(result) + "\n" for result in results))
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

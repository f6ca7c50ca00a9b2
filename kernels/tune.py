"""Measures candidate tilings on this GPU and writes its table: `python -m lorafleet.kernels.tune`.

Every time is a CUDA-graph replay over several weight sets in turn, so that L2 holds none of them. The best few of
shrink and of expand are then timed together, and the best pair is kept. Few rows are timed between a norm and the base
product, as in a decoding step.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lorafleet.kernels import fused
from lorafleet.kernels.expand_triton import expand
from lorafleet.kernels.norms import Norm, NormRule
from lorafleet.kernels.segments import Segments, build_segments
from lorafleet.kernels.shrink_triton import shrink
from lorafleet.kernels.tiling import FEW_ROWS, ExpandTiling, ShrinkTiling, table_path
from lorafleet.kernels.weights import ROW_ALIGN, LoraWeights

NUM_SETS = 8
"""Weight sets of one measurement."""
_FINALISTS = 3
"""Tilings of each kernel that are timed together with each of the other's."""

# rows, columns of x a step, columns a program, warps, stages
_SHRINK_FEW = [
    (16, 128, 128, 4, 1),
    (16, 128, 256, 4, 2),
    (16, 128, 512, 2, 3),
    (16, 128, 512, 4, 4),
    (16, 64, 512, 2, 4),
    (16, 64, 1024, 2, 5),
    (16, 128, 1792, 2, 3),
    (16, 256, 256, 4, 1),
    (16, 512, 512, 4, 1),
    (16, 512, 512, 8, 1),
]
_SHRINK_MANY = [
    (64, 64, 512, 4, 3),
    (64, 64, 1024, 8, 4),
    (64, 64, 2048, 4, 4),
    (128, 64, 512, 8, 4),
    (128, 64, 1792, 8, 4),
    (128, 64, 2048, 8, 4),
    (128, 64, 3584, 8, 3),
    (128, 64, 7168, 8, 4),
]
# rows, columns a step, elements of B a step, columns a program, h in two halves, warps, stages
_EXPAND_FEW = [
    (16, 256, 4096, 256, True, 4, 1),
    (16, 128, 16384, 128, True, 4, 1),
    (16, 256, 16384, 256, True, 8, 1),
    (16, 512, 8192, 512, True, 4, 1),
    (16, 128, 4096, 1024, True, 4, 4),
    (16, 256, 4096, 1024, True, 4, 3),
    (16, 256, 8192, 2048, True, 4, 3),
    (16, 512, 16384, 2048, True, 8, 3),
]
_EXPAND_MANY = [
    (64, 64, 16384, 512, False, 4, 3),
    (64, 128, 16384, 512, False, 4, 3),
    (64, 128, 16384, 1024, False, 4, 3),
    (128, 64, 16384, 512, False, 4, 3),
]


@dataclass(frozen=True, slots=True)
class Workload:
    """A batch on one module."""

    in_dim: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    """Rank of each slot's adapter, the same in every slice."""
    row_slots: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return len(self.row_slots)

    def segments(self, device: torch.device) -> Segments:
        return build_segments(np.array(self.row_slots, dtype=np.int32), device=device)


def random_weights(workload: Workload, device: torch.device, num_sets: int = NUM_SETS) -> list[LoraWeights]:
    """Adapters of random values in one bf16 pool, each row at a random place of it; one set of row tables a set."""
    num_slices, max_rank = len(workload.widths), max(workload.ranks)
    ranks = np.array(workload.ranks, dtype=np.int32)
    used = np.arange(max_rank) < ranks[:, None]
    tables: list[np.ndarray[Any, np.dtype[np.int32]]] = []
    base = 0
    for width, slices in ((workload.in_dim, num_slices), *((width, 1) for width in workload.widths)):
        units, count = -(-width // ROW_ALIGN), num_sets * slices * int(used.sum())
        places = base + np.random.default_rng(len(tables)).permutation(count).astype(np.int64) * units
        base += count * units
        table = np.zeros((num_sets, slices, len(ranks), max_rank), dtype=np.int32)
        table[:, :, used] = places.reshape(num_sets, slices, -1)
        tables.append(table)
    pool = torch.randn(base * ROW_ALIGN, dtype=torch.bfloat16, device=device).mul_(0.02)
    a_rows, b_rows = (
        torch.from_numpy(np.ascontiguousarray(table.transpose(0, 2, 1, 3))).to(device)
        for table in (tables[0], np.concatenate(tables[1:], axis=1))
    )
    slot_ranks = torch.from_numpy(np.repeat(ranks[:, None], num_slices, axis=1)).to(device)
    return [
        LoraWeights(
            pool=pool,
            ranks=slot_ranks,
            scalings=torch.ones_like(slot_ranks, dtype=torch.float32),
            a_rows=a_rows[i],
            b_rows=b_rows[i],
            in_dim=workload.in_dim,
            part_slices=tuple(range(num_slices)),
            part_starts=tuple(accumulate(workload.widths[:-1], initial=0)),
            part_widths=workload.widths,
        )
        for i in range(num_sets)
    ]


def time_in_graph(call: Callable[[int], object], num_sets: int = NUM_SETS, replays: int = 15) -> tuple[float, ...]:
    """p20, p50 and p80 of microseconds a call, over replays of a graph that calls each weight set in turn."""
    for _ in range(2):
        for i in range(num_sets):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_sets):
            call(i)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / num_sets)
    quantiles = statistics.quantiles(times, n=10, method="inclusive")
    return quantiles[1], quantiles[4], quantiles[7]


def default_workloads() -> list[Workload]:
    """Projections of an 8B Llama, ranks 16 to 128, and of a 0.5B Qwen; from one decoding row to long prompts."""
    large = [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))]
    small = [(896, (896, 128, 128)), (896, (896,)), (896, (4864, 4864)), (4864, (896,))]
    batches = [(1, 1), (16, 16), (64, 64), (256, 64), (64, 1), (2048, 8), (8192, 16)]
    return [
        Workload(in_dim, widths, (rank,) * slots, tuple(np.repeat(range(slots), rows // slots).tolist()))
        for modules, ranks in ((large, (16, 32, 64, 128)), (small, (16,)))
        for (in_dim, widths), rank, (rows, slots) in product(modules, ranks, batches)
    ]


class _Bench:
    """One workload on the device, and its candidates."""

    def __init__(self, workload: Workload, num_sets: int = NUM_SETS) -> None:
        device = torch.device("cuda")
        self.num_sets = num_sets
        self.segments = workload.segments(device)
        self.weights = random_weights(workload, device, num_sets)
        self.x = torch.randn(workload.num_rows, workload.in_dim, device=device, dtype=torch.bfloat16)
        self.y = torch.empty(workload.num_rows, sum(workload.widths), device=device, dtype=torch.bfloat16)
        self.norm = torch.ones(workload.in_dim, device=device, dtype=torch.bfloat16)
        self.is_few = self.segments.chunk_length <= FEW_ROWS
        self.shrinks = [ShrinkTiling(*sizes) for sizes in (_SHRINK_FEW if self.is_few else _SHRINK_MANY)]
        self.expands = [ExpandTiling(*sizes) for sizes in (_EXPAND_FEW if self.is_few else _EXPAND_MANY)]

    @cached_property
    def bases(self) -> Tensor:
        """(num_sets, out_dim, in_dim), of the base product: one a set, so that L2 holds none."""
        return self.x.new_zeros(self.num_sets, self.y.shape[1], self.x.shape[1])

    def shrink(self, i: int, tiling: ShrinkTiling) -> Tensor:
        return shrink(self.x, self.weights[i], self.segments, tiling)

    def expand(self, i: int, h: Tensor, tiling: ExpandTiling) -> None:
        expand(h, self.weights[i], self.segments, self.y, accumulate=False, tiling=tiling)

    def pair(self, i: int, shrink_tiling: ShrinkTiling, expand_tiling: ExpandTiling) -> None:
        """Both, amid what is around them in the engine where rows are few: how they begin and end counts then."""
        x = fused.rms_norm(self.x, Norm(self.norm, NormRule(1e-5))) if self.is_few else self.x
        self.expand(i, shrink(x, self.weights[i], self.segments, shrink_tiling), expand_tiling)
        if self.is_few:
            torch.addmm(self.y, x, self.bases[i].t(), out=self.y)

    def time(self, call: Callable[[int], object]) -> float:
        """Microseconds; endless for a candidate that needs more than the GPU has."""
        try:
            return time_in_graph(call, self.num_sets, replays=7)[1]
        except OutOfResources:
            return math.inf

    def best_shrinks(self) -> list[ShrinkTiling]:
        times = [self.time(lambda i, tiling=tiling: self.shrink(i, tiling)) for tiling in self.shrinks]  # type: ignore[misc]
        return [self.shrinks[i] for i in np.argsort(times)[:_FINALISTS]]

    def best_pair(self, shrinks: Sequence[ShrinkTiling]) -> tuple[ShrinkTiling, ExpandTiling, float]:
        h = self.shrink(0, shrinks[0])
        times = [self.time(lambda i, tiling=tiling: self.expand(i, h, tiling)) for tiling in self.expands]  # type: ignore[misc]
        expands = [self.expands[i] for i in np.argsort(times)[:_FINALISTS]]
        pairs = [(replace(s, early=early), e) for s, e, early in product(shrinks, expands, (True, False))]
        times = [self.time(lambda i, s=s, e=e: self.pair(i, s, e)) for s, e in pairs]  # type: ignore[misc]
        best = int(np.argmin(times))
        return *pairs[best], times[best]


def _compile_shrinks(workload: Workload) -> None:
    """Run every candidate once, so that Triton's cache has it."""
    bench = _Bench(workload, num_sets=1)
    for tiling in bench.shrinks:
        with suppress(OutOfResources):
            bench.shrink(0, tiling)
    torch.cuda.synchronize()


def _compile_expands(workload: Workload, shrinks: Sequence[ShrinkTiling]) -> None:
    """The same for expand, after each of these."""
    bench = _Bench(workload, num_sets=1)
    hidden = {h.shape[0]: h for h in (bench.shrink(0, replace(tiling, early=False)) for tiling in shrinks)}
    for h, tiling in product(hidden.values(), bench.expands):
        with suppress(OutOfResources):
            bench.expand(0, h, tiling)
    torch.cuda.synchronize()


def tune(workloads: Sequence[Workload], processes: int) -> dict[str, Any]:
    """The table, as `tiling` reads it."""
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {what}", file=sys.stderr, flush=True)

    # Batches that compile to the same kernels.
    groups: dict[object, list[Workload]] = {}
    for workload in workloads:
        length = workload.segments(torch.device("cpu")).chunk_length
        groups.setdefault((workload.in_dim, workload.widths, max(workload.ranks), length), []).append(workload)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:

        def compile_all(what: str, jobs: list[Future[None]]) -> None:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                say(f"{what} compiled: {done}/{len(jobs)}")

        compile_all("shrink", [pool.submit(_compile_shrinks, group[0]) for group in groups.values()])
        finalists = {workload: _Bench(workload).best_shrinks() for workload in workloads}
        say("shrink timed")
        of_group = [(group[0], sorted({s for w in group for s in finalists[w]}, key=str)) for group in groups.values()]
        compile_all("expand", [pool.submit(_compile_expands, *arguments) for arguments in of_group])
    entries: dict[str, list[dict[str, Any]]] = {"shrink": [], "expand": []}
    for done, workload in enumerate(workloads, 1):
        shrink_tiling, expand_tiling, us = _Bench(workload).best_pair(finalists[workload])
        segments = workload.segments(torch.device("cpu"))
        for kind, width, tiling in (
            ("shrink", workload.in_dim, shrink_tiling),
            ("expand", sum(workload.widths), expand_tiling),
        ):
            shape = {
                "width": width,
                "num_slices": len(workload.widths),
                "max_rank": max(workload.ranks),
                "chunk_length": segments.chunk_length,
                "max_chunks": segments.max_chunks,
            }
            if all(entry["shape"] != shape for entry in entries[kind]):
                entries[kind].append({"shape": shape, "tiling": asdict(tiling)})
        module = f"{workload.in_dim} -> {workload.widths}"
        rows = f"{workload.num_rows} rows of {len(set(workload.row_slots))}"
        say(f"{done}/{len(workloads)} {module}, rank {max(workload.ranks)}, {rows}: {us:.1f} us")
    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    return {**versions, **entries}


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune the csgmv kernels for this GPU.")
    parser.add_argument("--out", type=Path, help="where the table goes; by default where the kernels look for it")
    parser.add_argument("--processes", type=int, default=8, help="processes that compile")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    out: Path = arguments.out or table_path(torch.cuda.get_device_name())
    table = tune(default_workloads(), arguments.processes)
    lines = [f"  {json.dumps(key)}: {json.dumps(table[key])}" for key in ("gpu", "torch", "triton")]
    for kind in ("shrink", "expand"):
        entries = ",\n".join(f"    {json.dumps(entry)}" for entry in table[kind])
        lines.append(f"  {json.dumps(kind)}: [\n{entries}\n  ]")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(out)


if __name__ == "__main__":
    main()

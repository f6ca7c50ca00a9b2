"""Measures candidate tilings on this GPU and writes its table: `python -m lorafleet.kernels.tune`.

Every time is a CUDA-graph replay over several weight sets in turn, so that L2 holds none of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from lorafleet.kernels.weights import ROW_ALIGN, LoraWeights

NUM_SETS = 8
"""Weight sets of one measurement."""


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


def random_weights(workload: Workload, device: torch.device, num_sets: int = NUM_SETS) -> list[LoraWeights]:
    """Adapters of random values in one bf16 pool, each row at a random place of it; one set of row tables a set."""
    num_slices, max_rank = len(workload.widths), max(workload.ranks)
    ranks = np.array(workload.ranks, dtype=np.int32)
    used = np.arange(max_rank) < ranks[:, None]
    count = num_sets * int(used.sum())
    tables = []
    base = 0
    for width in (workload.in_dim, *workload.widths):
        units = -(-width // ROW_ALIGN)
        repeats = num_slices if width == workload.in_dim and not tables else 1
        places = base + np.random.default_rng(len(tables)).permutation(count * repeats).astype(np.int64) * units
        base += count * repeats * units
        table = np.zeros((num_sets, repeats, len(ranks), max_rank), dtype=np.int32)
        table[:, :, used] = places.reshape(num_sets, repeats, -1)
        tables.append(table)
    pool = torch.randn(base * ROW_ALIGN, dtype=torch.bfloat16, device=device).mul_(0.02)
    a_rows = torch.from_numpy(tables[0].transpose(0, 2, 1, 3).copy()).to(device)
    b_rows = torch.from_numpy(np.concatenate(tables[1:], axis=1).transpose(0, 2, 1, 3).copy()).to(device)
    slot_ranks = torch.from_numpy(np.repeat(ranks[:, None], num_slices, axis=1)).to(device)
    starts = tuple(accumulate(workload.widths[:-1], initial=0))
    return [
        LoraWeights(
            pool=pool,
            ranks=slot_ranks,
            scalings=torch.ones_like(slot_ranks, dtype=torch.float32),
            a_rows=a_rows[i],
            b_rows=b_rows[i],
            in_dim=workload.in_dim,
            part_slices=tuple(range(num_slices)),
            part_starts=starts,
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
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) * 1e3 / num_sets for begin, end in events)
    quantiles = statistics.quantiles(times, n=10, method="inclusive")
    return quantiles[1], quantiles[4], quantiles[7]

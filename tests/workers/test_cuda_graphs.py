"""Which kernels are compiled before the first request. Without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lorafleet.kernels import tiling
from lorafleet.kernels.segments import BASE_SLOT, plan_segments
from lorafleet.kernels.tiling import Shape, Table, power_of_two, read_table
from lorafleet.workers.model.cuda_graphs import kernel_shapes

TABLES = sorted((Path(tiling.__file__).parent / "tuned").glob("*.json"))
CPU = torch.device("cpu")
GROUPS = {
    "qkv": (3, 4096, 6144),
    "o": (1, 4096, 4096),
    "gate_up": (2, 4096, 28672),
    "down": (1, 14336, 4096),
    "lm_head": (1, 4096, 128256),
    "small": (3, 896, 1152),
}
"""Slices, input and output width."""


@pytest.fixture(params=[None, *TABLES], ids=lambda path: path.stem if path else "rule")
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tilings of a GPU with that table."""
    found = Table((), ()) if request.param is None else read_table(request.param)
    monkeypatch.setattr(tiling, "_table", lambda device: found)
    for cached in (tiling.shrink_tiling, tiling.expand_tiling):
        cached.cache_clear()
    yield
    for cached in (tiling.shrink_tiling, tiling.expand_tiling):
        cached.cache_clear()


def kernels_of(group: str, max_rank: int, chunk_length: int, max_chunks: int) -> object:
    """What tells the kernels of a batch on a module from those of another batch."""
    num_slices, in_dim, out_dim = GROUPS[group]
    doublings = power_of_two(max_chunks)
    shapes = [
        Shape(num_slices, width, max_rank, chunk_length, doublings, torch.bfloat16, CPU) for width in (in_dim, out_dim)
    ]
    shrink, expand = tiling.shrink_tiling(shapes[0]), tiling.expand_tiling(shapes[1])
    return shrink, expand, -(-chunk_length // shrink.block_rows), -(-chunk_length // expand.block_rows)


@pytest.mark.parametrize("num_slots", [4, 256, 1024])
@pytest.mark.parametrize("group", GROUPS)
def test_any_batch_needs_only_kernels_that_are_compiled_at_start(table: None, group: str, num_slots: int) -> None:
    rng = np.random.default_rng(num_slots)
    max_batch_tokens, max_rank = 4096, 64
    at_start = {kernels_of(group, max_rank, *shape) for shape in kernel_shapes(max_batch_tokens, num_slots)}
    for _ in range(300):
        num_sequences = int(rng.integers(1, 257))
        lengths = np.where(rng.random(num_sequences) < rng.random(), 1, rng.integers(1, 600, num_sequences))
        slots = rng.integers(BASE_SLOT, min(num_slots, rng.choice([1, 8, 64, num_slots])), num_sequences)
        row_slots = np.repeat(slots, lengths)[:max_batch_tokens].astype(np.int32)
        plan = plan_segments(row_slots)
        if plan.shape.num_lora_chunks:
            assert kernels_of(group, max_rank, plan.shape.chunk_length, plan.shape.max_chunks) in at_start, (
                plan.shape.chunk_length,
                plan.shape.max_chunks,
            )

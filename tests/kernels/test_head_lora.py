"""LoRA by heads against float64: in torch, in Triton's interpreter, and on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafleet.kernels import head_lora, head_lora_triton
from lorafleet.kernels.segments import BASE_SLOT, Segments, build_segments
from lorafleet.kernels.weights import HeadColumns, LoraWeights
from tests.kernels.paged import PagedLinear, paged_linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
HEADS, RANK = 3, 40
PLAIN, VALUE = 16, 24
"""Widths of a head's keys and values, side by side in the module's output."""
KEYS, VALUES = HeadColumns(0, PLAIN + VALUE, PLAIN), HeadColumns(PLAIN, PLAIN + VALUE, VALUE)
Add = Callable[[Tensor, LoraWeights, Segments, Tensor, HeadColumns], None]


def by_kernel(is_absorbed: bool) -> Add:
    return lambda x, weights, segments, y, columns: head_lora_triton.add(
        x, weights, segments, y, columns, is_absorbed=is_absorbed
    )


def expected(linear: PagedLinear, x: Tensor, y: Tensor, slots: list[int], columns: HeadColumns) -> Tensor:
    """(rows, heads, width): the oracle, in float64."""
    out = y.double().cpu().clone()
    for row, slot in enumerate(slots):
        if slot != BASE_SLOT:
            a, b, scaling = linear.a[slot][0], linear.b[slot][0], float(linear.weights.scalings[slot, 0])
            for head in range(x.shape[1]):
                own, given = b[:, columns.of(head)], x[row, head].double().cpu()
                out[row, head] += scaling * (given @ own.T @ a if columns is KEYS else given @ a.T @ own)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [KEYS, VALUES], ids=["absorbed", "expanded"])
@pytest.mark.parametrize("max_part", [None, 32], ids=["whole", "in-parts"])
@pytest.mark.parametrize("is_kernel", [False, True], ids=["entry", "kernel"])
def test_matches_float64(is_kernel: bool, max_part: int | None, columns: HeadColumns, dtype: torch.dtype) -> None:
    """Ranks on either side of a block, an adapter that is not on the module, base rows, chunks not full."""
    rng = np.random.default_rng(0)
    ranks = [[5], [0], [17], [67]]
    linear = paged_linear(
        rng, in_dim=RANK, widths=[HEADS * (PLAIN + VALUE)], ranks=ranks, dtype=dtype, device=DEVICE, max_part=max_part
    )
    slots = [2, -1, 0, 1, 3, 0, 0, -1, 3] + [2] * 20
    segments = build_segments(np.array(slots, np.int32), device=DEVICE, chunk_length=16, max_chunks=9)
    widths = (columns.width, RANK) if columns is KEYS else (RANK, columns.width)
    generator = torch.Generator().manual_seed(1)
    # As products by heads leave them.
    x, y = (
        torch.randn(HEADS, len(slots), width, generator=generator).to(dtype).to(DEVICE).transpose(0, 1)
        for width in widths
    )
    before = y.clone()
    entry: Add = head_lora.add_absorbed if columns is KEYS else head_lora.add_expanded
    (by_kernel(columns is KEYS) if is_kernel else entry)(x, linear.weights, segments, y, columns)
    wanted = expected(linear, x, before, slots, columns)
    assert (y.double().cpu() - wanted).norm() / wanted.norm() < TOLERANCE[dtype]
    untouched = [row for row, slot in enumerate(slots) if slot in (BASE_SLOT, 1)]
    assert torch.equal(y[untouched], before[untouched])


def test_refuses_what_does_not_fit() -> None:
    linear = paged_linear(
        np.random.default_rng(0), in_dim=RANK, widths=[120], ranks=[[4]], dtype=torch.float32, device=DEVICE
    )
    segments = build_segments(np.zeros(2, np.int32), device=DEVICE)
    x, y = torch.zeros(2, HEADS, PLAIN, device=DEVICE), torch.zeros(2, HEADS, RANK, device=DEVICE)
    for given, out, columns, reason in (
        (x[:1], y, KEYS, "the input must have shape"),
        (x, y[..., :-1], KEYS, "y must have shape"),
        (x.double(), y, KEYS, "as the pool is"),
        (x[:, :2], y, KEYS, "as many heads"),
        (x, y, HeadColumns(40, 40, PLAIN), "end at column 136"),
    ):
        with pytest.raises(ValueError, match=reason):
            head_lora.add_absorbed(given, linear.weights, segments, out, columns)

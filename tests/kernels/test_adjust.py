"""Scales and biases of some rows' own: Triton (interpreted where there is no GPU) and plain torch, against float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafleet.kernels import adjust_triton
from lorafleet.kernels.adjust import adjust
from lorafleet.kernels.segments import Segments, build_segments
from lorafleet.kernels.weights import ROW_ALIGN, OutputVectors, VectorPart, aligned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
WIDTHS = (37, 1030, 16, 2048)
"""Of the parts of an output; each has two entries in the table."""
NUM_SLOTS, NUM_ROWS = 5, 23
Adjust = Callable[[Tensor, OutputVectors, Segments, Tensor | None], None]


def by_triton(y: Tensor, vectors: OutputVectors, segments: Segments, bias: Tensor | None) -> None:
    """The kernel, on whichever device there is."""
    adjust_triton.adjust(y, vectors, segments.row_slots, bias)


def vectors_of(dtype: torch.dtype, rng: np.random.Generator) -> OutputVectors:
    """Slot 0 has nothing, slot 1 everything, the others some."""
    starts = np.full((NUM_SLOTS, 2 * len(WIDTHS) + 1), -1, dtype=np.int32)
    end = 3 * ROW_ALIGN
    for slot in range(1, NUM_SLOTS):
        for entry in range(2 * len(WIDTHS)):
            if slot == 1 or rng.random() < 0.5:
                starts[slot, 1 + entry] = end // ROW_ALIGN
                end += int(aligned(WIDTHS[entry // 2]))
    columns = np.cumsum((0, *WIDTHS)).tolist()
    parts = [VectorPart(columns[n], width, 1 + 2 * n, 2 + 2 * n) for n, width in enumerate(WIDTHS)]
    pool = torch.from_numpy(rng.standard_normal(end)).to(DEVICE, dtype)
    return OutputVectors(pool, torch.from_numpy(starts).to(DEVICE), tuple(parts))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("run", [by_triton, adjust])
@pytest.mark.slow
def test_own_rows_are_scaled_and_added_to_and_no_others(run: Adjust, has_bias: bool, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    vectors = vectors_of(dtype, rng)
    slots = rng.integers(-1, NUM_SLOTS, NUM_ROWS).astype(np.int32)
    segments = build_segments(slots, device=DEVICE)
    width = sum(WIDTHS)
    wide = torch.from_numpy(rng.standard_normal((NUM_ROWS, width + 5))).to(DEVICE, dtype)
    y, before = wide[:, :width], wide.clone()
    bias = torch.from_numpy(rng.standard_normal(width)).to(DEVICE, dtype) if has_bias else None
    run(y, vectors, segments, bias)
    assert torch.equal(wide[:, width:], before[:, width:])
    for row, slot in enumerate(slots.tolist()):
        for part in vectors.parts:
            columns = slice(part.column, part.column + part.width)
            old, expected = before[row, columns], before[row, columns].double()
            starts = [-1, -1] if slot < 0 else vectors.starts[slot, [part.added, part.scale]].tolist()
            added, scale = (
                None if start < 0 else vectors.pool[start * ROW_ALIGN :][: part.width].double() for start in starts
            )
            if scale is not None:
                expected = expected + scale * (expected - (0.0 if bias is None else bias[columns].double()))
            if added is not None:
                expected = expected + added
            if scale is None and added is None:
                assert torch.equal(y[row, columns], old)
            else:
                error = (y[row, columns].double() - expected).abs()
                assert (error <= TOLERANCE[dtype] * (1 + expected.abs())).all()


def test_what_does_not_fit_is_refused() -> None:
    vectors = vectors_of(torch.float32, np.random.default_rng(0))
    segments = build_segments(np.zeros(2, dtype=np.int32), device=DEVICE)
    y = torch.zeros(2, sum(WIDTHS), device=DEVICE)
    for wrong in (y[:1], y[:, :-1], y.t().contiguous().t(), y.double()):
        with pytest.raises(ValueError, match="y must"):
            adjust(wrong, vectors, segments)
    with pytest.raises(ValueError, match="out of range"):
        adjust(y, vectors, build_segments(np.full(2, NUM_SLOTS, dtype=np.int32), device=DEVICE))

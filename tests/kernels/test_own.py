"""Norms, embeddings and heads of some rows' own, by Triton (interpreted where there is no GPU), against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafleet.kernels import own_triton
from lorafleet.kernels.norms import NormRule
from lorafleet.kernels.segments import Segments, build_segments
from lorafleet.kernels.weights import ROW_ALIGN, OwnMatrix, OwnVector, aligned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NUM_SLOTS, NUM_TOKENS = 6, 150
OWNERS = (1, 4)
"""Slots that have parameters of their own."""
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


class Bench:
    """A pool with a matrix and a vector for each owner, rows at random places."""

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        rng = np.random.default_rng(width)
        self.width, self.dtype = width, dtype
        pitch = int(aligned(width)) // ROW_ALIGN
        places = 3 + pitch * rng.permutation(len(OWNERS) * (NUM_TOKENS + 1))
        elements = (places.max() + pitch) * ROW_ALIGN
        self.pool = torch.from_numpy(rng.standard_normal(elements) * width**-0.5).to(DEVICE, dtype)
        starts = torch.from_numpy(places.astype(np.int32)).to(DEVICE).view(len(OWNERS), NUM_TOKENS + 1)
        self.starts = dict(zip(OWNERS, starts, strict=True))  # kept: the table has their addresses
        vectors = torch.full((NUM_SLOTS, 3), -1, dtype=torch.int32, device=DEVICE)
        pointers = torch.zeros((NUM_SLOTS, 2), dtype=torch.int64, device=DEVICE)
        for slot, own in self.starts.items():
            vectors[slot, 2], pointers[slot, 1] = own[-1], own.data_ptr()
        self.vector, self.matrix = OwnVector(self.pool, vectors, 2), OwnMatrix(self.pool, pointers, 1)
        self.rng = rng

    def random(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape)).to(DEVICE, self.dtype)

    def segments(self, num_rows: int, **options: int) -> Segments:
        slots = self.rng.integers(-1, NUM_SLOTS, num_rows).astype(np.int32)
        return build_segments(slots, device=DEVICE, **options)

    def row(self, slot: int, index: int) -> Tensor:
        """(width,) float64."""
        start = int(self.starts[slot][index]) * ROW_ALIGN
        return self.pool[start : start + self.width].double()

    def check(self, y: Tensor, before: Tensor, segments: Segments, expected: dict[int, Tensor]) -> None:
        """`expected`: what the rows of owners should be; the others keep their bits."""
        for row, slot in enumerate(segments.host_row_slots.tolist()):
            if slot in OWNERS:
                error = (y[row].double() - expected[row]).abs().max()
                assert error <= TOLERANCE[self.dtype] * (1 + expected[row].abs().max()), row
            else:
                assert torch.equal(y[row], before[row]), row


@DTYPES
@pytest.mark.parametrize("width", [37, 64, 1100])
def test_norms(dtype: torch.dtype, width: int) -> None:
    bench = Bench(dtype, width)
    segments = bench.segments(19)
    x, y = bench.random(19, width + 3)[:, :width], bench.random(19, width)
    before = y.clone()
    own_triton.norm_rows(x, y, bench.vector, segments, NormRule(1e-5))
    slots = segments.host_row_slots.tolist()
    expected = {
        row: F.rms_norm(x[row].double(), (width,), bench.row(slot, -1), 1e-5)
        for row, slot in enumerate(slots)
        if slot in OWNERS
    }
    bench.check(y, before, segments, expected)


@DTYPES
@pytest.mark.parametrize("width", [37, 64, 1100])
@pytest.mark.parametrize("token_type", [torch.int32, torch.int64], ids=str)
def test_embeddings(dtype: torch.dtype, width: int, token_type: torch.dtype) -> None:
    bench = Bench(dtype, width)
    segments, y = bench.segments(19), bench.random(19, width)
    tokens = torch.from_numpy(bench.rng.integers(0, NUM_TOKENS, 19)).to(DEVICE, token_type)
    before = y.clone()
    others = torch.tensor([-1, NUM_TOKENS, NUM_TOKENS + 7], dtype=token_type, device=DEVICE)
    tokens[3::6] = others  # of other ranks
    own_triton.take_rows(tokens, y, bench.matrix, segments, NUM_TOKENS)
    slots = segments.host_row_slots.tolist()
    owned = [row for row, slot in enumerate(slots) if slot in OWNERS]
    expected = {row: before[row].double() if row % 6 == 3 else bench.row(slots[row], int(tokens[row])) for row in owned}
    bench.check(y, before, segments, expected)
    assert all(torch.equal(y[row].double(), own) for row, own in expected.items())


@pytest.mark.parametrize(
    ("num_rows", "options"),
    [(1, {}), (40, {}), (40, {"max_chunks": 50}), (200, {"chunk_length": 64}), (200, {"chunk_length": 16})],
    ids=["one", "some", "padded", "long", "short"],
)
@pytest.mark.parametrize("width", [37, 128])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.slow
def test_heads(dtype: torch.dtype, width: int, num_rows: int, options: dict[str, int]) -> None:
    bench = Bench(dtype, width)
    segments = bench.segments(num_rows, **options)
    x, y = bench.random(num_rows, width + 3)[:, :width], bench.random(num_rows, NUM_TOKENS + 2)[:, :NUM_TOKENS]
    before = y.clone()
    own_triton.add_product(x, y, bench.matrix, segments)
    slots = segments.host_row_slots.tolist()
    matrices = {slot: torch.stack([bench.row(slot, token) for token in range(NUM_TOKENS)]) for slot in OWNERS}
    expected = {
        row: before[row].double() + matrices[slot] @ x[row].double() for row, slot in enumerate(slots) if slot in OWNERS
    }
    bench.check(y, before, segments, expected)
    masked = own_triton.without_own(x, bench.matrix, segments)
    for row, slot in enumerate(slots):
        assert torch.equal(masked[row], torch.zeros_like(x[row]) if slot in OWNERS else x[row])

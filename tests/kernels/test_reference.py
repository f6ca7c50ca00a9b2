"""The CPU backend, through the entry points that model layers use, against float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lorafleet.kernels import ops
from lorafleet.kernels.segments import BASE_SLOT, build_segments, plan_segments
from tests.kernels.paged import POPULARITY, paged_embedding, paged_linear

CPU = torch.device("cpu")
ROWS = (1, 2, 3, 7, 16, 33, 133, 1000)
MIXED_RANKS = [[8, 8, 8], [1, 0, 3], [64, 64, 64], [0, 0, 0], [16, 5, 0], [0, 2, 2]]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.isfinite().all()
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[dtype], float(error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("rows", ROWS)
def test_both_forms_match_float64(rows: int, popularity: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(rows)
    linear = paged_linear(rng, in_dim=40, widths=(48, 17, 24), ranks=MIXED_RANKS, dtype=dtype, device=CPU)
    row_slots = POPULARITY[popularity](rng, rows, len(MIXED_RANKS)).astype(np.int32)
    segments = build_segments(row_slots, device=CPU)
    x = torch.randn(rows, 40).to(dtype)
    base = torch.randn(rows, 100).to(dtype)[:, :89]
    expected, touched = linear.delta(x, row_slots), linear.touched(row_slots)

    y = base.clone()
    wide = torch.full((rows, 100), float("nan"), dtype=dtype)
    strided = wide[:, 5:94]
    strided.copy_(base)
    ops.add_lora(x, linear.weights, segments, strided)
    ops.add_lora(x, linear.weights, segments, y)
    _assert_near(strided, base.double() + expected, dtype)
    assert wide[:, [*range(5), *range(94, 100)]].isnan().all()
    _assert_near(y, base.double() + expected, dtype)
    assert torch.equal(y[~touched], base[~touched])

    for bias in (None, torch.randn(89).to(dtype)):
        written = torch.full((rows, 89), float("nan"), dtype=dtype)
        h = ops.shrink(x, linear.weights, segments)
        ops.expand(h, linear.weights, segments, written, accumulate=False, bias=bias)
        whole = expected if bias is None else expected + bias.double()
        _assert_near(written, whole, dtype)
        assert torch.equal(written[~touched].double(), whole[~touched])


def test_untouched_rows_keep_their_sign_of_zero() -> None:
    rng = np.random.default_rng(0)
    linear = paged_linear(rng, in_dim=16, widths=(8, 8), ranks=[[2, 0], [0, 0]], dtype=torch.float32, device=CPU)
    row_slots = np.array([0, 1, BASE_SLOT, 0], dtype=np.int32)
    y = torch.full((4, 16), -0.0)
    ops.add_lora(torch.randn(4, 16), linear.weights, build_segments(row_slots, device=CPU), y)
    assert y[~linear.touched(row_slots)].signbit().all()


def test_parts_share_the_h_of_their_slice() -> None:
    rng = np.random.default_rng(1)
    linear = paged_linear(rng, in_dim=32, widths=(100,), ranks=[[4], [9]], dtype=torch.float32, device=CPU, max_part=48)
    assert linear.weights.num_parts == 3
    row_slots = np.array([1, 0, BASE_SLOT, 1], dtype=np.int32)
    x, y = torch.randn(4, 32), torch.zeros(4, 100)
    ops.add_lora(x, linear.weights, build_segments(row_slots, device=CPU), y)
    _assert_near(y, linear.delta(x, row_slots), torch.float32)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("token_dtype", [torch.int32, torch.int64], ids=str)
def test_embedding_matches_float64(popularity: str, token_dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    embedding = paged_embedding(
        rng, num_embeddings=203, width=40, ranks=[8, 0, 3, 16], page_elements=320, dtype=torch.float32, device=CPU
    )
    row_slots = POPULARITY[popularity](rng, 61, 4).astype(np.int32)
    tokens = torch.randint(0, 203, (61,), dtype=token_dtype)
    tokens[0], tokens[-1] = 0, 202
    base = torch.randn(61, 40)
    y = base.clone()
    ops.embed(tokens, embedding.weights, build_segments(row_slots, device=CPU), y)
    _assert_near(y, base.double() + embedding.delta(tokens, row_slots), torch.float32)


@pytest.mark.usefixtures("multiplies_rows_alike")
@pytest.mark.parametrize("popularity", POPULARITY)
def test_exact_rows_have_the_same_bits_beside_any_others(popularity: str) -> None:
    """All at once and a few at a time, with ranks that make wide products together."""
    rng = np.random.default_rng(3)
    ranks = [[1], [64], [0], [2], [64], [5], [64], [64], [33], [64], [200], [16]]
    linear = paged_linear(rng, in_dim=48, widths=(300,), ranks=ranks, dtype=torch.float32, device=CPU, max_part=128)
    row_slots = POPULARITY[popularity](rng, 90, len(ranks)).astype(np.int32)
    plan = plan_segments(row_slots)
    x, base = torch.randn(90, 48), torch.randn(90, 300)

    def lora(rows: npt.NDArray[np.int64]) -> Tensor:
        derived = plan.select(rows, is_exact=True)
        y = base[rows]
        ops.add_lora(x[rows], linear.weights, derived.view(torch.from_numpy(derived.packed)), y)
        return y

    whole = lora(np.arange(90))
    _assert_near(whole, base.double() + linear.delta(x, row_slots), torch.float32)
    for length in (1, 3, 16, 40):
        rows = rng.permutation(90)
        parts = [lora(rows[start : start + length]) for start in range(0, 90, length)]
        assert torch.equal(torch.cat(parts), whole[rows]), length

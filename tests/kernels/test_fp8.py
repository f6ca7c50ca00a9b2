"""Rows in fp8, their product and what the layer kernels make of them, against float64 and torch's own casts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafleet.kernels import fp8, fp8_triton, fused, fused_triton, kv_place_triton
from lorafleet.kernels.fp8_values import Fp8Rows, Fp8Weight
from lorafleet.kernels.kv_place import KVPlace, Rotation
from lorafleet.kernels.norms import Norm, NormRule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
BACKENDS = ["triton", "torch"]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def powers(length: int, seed: int) -> Tensor:
    return torch.exp2(torch.randint(-4, 5, (length,), generator=torch.Generator().manual_seed(seed)).float()).to(DEVICE)


def rows_of_all_sizes(dtype: torch.dtype) -> Tensor:
    x = randn(8, 40, dtype=torch.float32)
    x *= torch.tensor([1e-4, 1e-2, 1.0, 30.0, 448.0, 900.0, 6e4, 0.0]).to(DEVICE)[:, None] / x.abs().amax(1)[:, None]
    return x.to(dtype)


def quantised(x: Tensor, backend: str) -> Fp8Rows:
    return fp8_triton.quantise_rows(x) if backend == "triton" else fp8.quantise_rows(x.cpu())


def is_exact(backend: str) -> bool:
    """False for Triton's interpreter, whose cast to e4m3 loses a carry into the exponent, and NaN."""
    return backend == "torch" or DEVICE.type == "cuda"


def assert_is_rounded(rows: Fp8Rows, x: Tensor, backend: str) -> None:
    """As torch rounds x / scale, with the smallest power of two that keeps the largest within 448."""
    values, scales, x = rows.values.float().cpu(), rows.scales.cpu(), x.float().cpu()
    largest = x.abs().amax(1)
    used = largest > 0
    assert torch.equal(scales[used].log2(), scales[used].log2().round())
    assert bool((largest <= 448 * scales).all())
    assert bool((largest[used] > 224 * scales[used]).all())
    nearest = (x / scales[:, None]).to(torch.float8_e4m3fn).float()
    if is_exact(backend):
        assert torch.equal(values, nearest)
    else:
        torch.testing.assert_close(values, nearest, rtol=1 / 2, atol=2.0**-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    x = rows_of_all_sizes(dtype)
    wide = torch.full((8, 48), float("nan"), dtype=dtype, device=DEVICE)
    wide[:, :40] = x
    assert_is_rounded(quantised(wide[:, :40], backend), x, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_rounded_is_rounded_to_itself(backend: str) -> None:
    once = quantised(rows_of_all_sizes(torch.float32), backend)
    matrix = fp8.dequantise(once, torch.bfloat16)
    assert torch.equal(matrix.double(), once.values.double() * once.scales[:, None].double())
    if is_exact(backend):
        again = quantised(matrix, backend)
        assert torch.equal(fp8.dequantise(again, torch.float32), fp8.dequantise(once, torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_stays_so(poison: float, backend: str) -> None:
    if not is_exact(backend):
        pytest.skip("the interpreter has no NaN of this format")
    x = randn(3, 32)
    x[1, 5] = poison
    back = fp8.dequantise(quantised(x, backend), torch.float32)
    assert back.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("by_output", [False, True])
@pytest.mark.parametrize("with_delta", [False, True])
def test_rescale(with_delta: bool, by_output: bool, with_bias: bool, backend: str, dtype: torch.dtype) -> None:
    y, scales = randn(5, 40, dtype=dtype), powers(5, 1)
    bias = randn(40, dtype=dtype, seed=3) if with_bias else None
    of_outputs = randn(40, seed=4).abs() if by_output else None
    expected = y.double() * scales[:, None] * (1 if of_outputs is None else of_outputs.double())
    expected += 0 if bias is None else bias.double()
    delta = randn(5, 40, dtype=dtype, seed=5) if with_delta else None
    expected += 0 if delta is None else delta.double()
    run = fp8_triton.rescale if backend == "triton" else fp8.rescale
    torch.testing.assert_close(run(y, scales, bias, of_outputs, delta=delta), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_of_a_dequantised_weight_are_found_again(dtype: torch.dtype) -> None:
    """All 256 values, at scales of all sizes, one of them zero."""
    values = torch.arange(256).byte().view(torch.float8_e4m3fn).repeat(7, 1)
    scales = torch.tensor([3.1e-3, 1.7, 2.0**-20, 1e-6, 999.0, 0.1, 0.0])
    matrix = (values.double() * scales.double()[:, None]).to(dtype)
    found = fp8.values_at(matrix, scales).float()
    assert torch.equal(found[:6].nan_to_num(5e3), values[:6].float().nan_to_num(5e3))
    assert not found[6].nan_to_num(0.0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_scaled", [False, True])
def test_layers_take_and_make_fp8_rows(is_scaled: bool, backend: str, dtype: torch.dtype) -> None:
    """The same as without fp8, of the scaled input; and its output rounded."""
    ours = fused_triton if backend == "triton" else fused
    x, weight, residual = randn(3, 48, dtype=dtype), randn(48, dtype=dtype, seed=1), randn(3, 48, dtype=dtype, seed=2)
    scales = powers(3, 4) if is_scaled else None
    scaled = fp8.scaled(x, scales).to(dtype)
    sums = residual.clone()
    norm = Norm(weight, NormRule(1e-5))
    expected = ours.rms_norm(scaled, norm, sums)
    own_sums = residual.clone()
    assert torch.equal(ours.rms_norm(x, norm, own_sums, scales), expected)
    assert torch.equal(own_sums, sums)
    y, rows = ours.rms_norm_fp8(x, norm, residual.clone(), scales)
    assert torch.equal(y, expected)
    assert_is_rounded(rows, y, backend)

    expected = F.silu(scaled[:, :24]) * scaled[:, 24:]
    torch.testing.assert_close(ours.gated(x, "silu", scales), expected, rtol=4e-3, atol=4e-3)
    y, rows = ours.gated_fp8(x, "silu", scales)
    assert torch.equal(y, ours.gated(x, "silu", scales))
    assert_is_rounded(rows, y, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_heads_are_rotated_and_stored(backend: str, dtype: torch.dtype) -> None:
    """4 query heads and 2 KV heads of 8: the same as of the scaled heads."""
    run = kv_place_triton.rotate_and_store if backend == "triton" else fused.rotate_and_store
    qkv, scales = randn(3, 64, dtype=dtype), powers(3, 6)
    angles = randn(3, 4, seed=8).repeat(1, 2)
    pages, offsets = (torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([2, 0, 3], [5, 0, 15]))

    def place() -> KVPlace:
        keys, values = (torch.full((4, 2, 16, 8), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
        return KVPlace(keys, values, pages, offsets)

    places = [place(), place()]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected, own = fp8.scaled(qkv, scales).to(dtype), qkv.clone()
    run(expected, (cos, sin), places[0], Rotation(8), None)
    run(own, (cos, sin), places[1], Rotation(8), None, scales)
    assert torch.equal(own[:, :32], expected[:, :32])
    torch.testing.assert_close(places[1].keys, places[0].keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(places[1].values, places[0].values, rtol=0, atol=0, equal_nan=True)


def test_a_weight_has_one_scale_for_all_its_parts() -> None:
    """Exact in bfloat16, and rounded to itself, so that what was rounded once can be stored as fp8 later."""
    parts = [randn(16, 32, seed=1) * 0.02, randn(8, 32, seed=2) * 3.0]
    weight = fp8.quantise_weight(*parts)
    largest = max(float(part.abs().amax()) for part in parts)
    scale = float(weight.scales[0])
    assert weight.scales.tolist() == [scale] * 24
    assert 224 * scale < largest <= 448 * scale
    assert torch.equal(weight.values.float(), (torch.cat(parts) / scale).to(torch.float8_e4m3fn).float())
    matrix = fp8.dequantise(weight, torch.bfloat16)
    assert torch.equal(matrix.double(), weight.values.double() * scale)
    again = fp8.quantise_weight(*torch.split(matrix, [16, 8]))
    assert torch.equal(fp8.dequantise(again, torch.float32), matrix.float())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 64, 1000, 4099])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_uniform", [False, True])
def test_product_matches_float64(cuda: torch.device, is_uniform: bool, with_bias: bool, rows: int) -> None:
    x, weight = fp8.quantise_rows(randn(rows, 512, seed=1)), fp8.quantise_weight(randn(96, 512, seed=2) * 0.02)
    if not is_uniform:
        weight = Fp8Weight(weight.values, weight.scales * (0.5 + randn(96, seed=5).abs()), is_uniform=False)
    bias = randn(96, dtype=torch.bfloat16, seed=3) if with_bias else None
    y, scales = fp8.product(x, weight, bias)
    assert (scales is None) == (rows > fp8.FEW_ROWS or not is_uniform)
    if scales is not None:
        fp8.rescale(y, scales, bias)
    expected = fp8.dequantise(x, torch.float64) @ fp8.dequantise(weight, torch.float64).t()
    if bias is not None:
        expected += bias.double()
    # The tensor cores of this format sum in fewer bits than float32.
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
    assert (y.double() - expected).norm() <= 4e-3 * expected.norm()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unit stride along its last dimension"):
        fp8.quantise_rows(torch.zeros(4, 4).t()[:, :3])
    with pytest.raises(ValueError, match=r"scales must be a contiguous float32 \(3,\)"):
        fp8.rescale(torch.zeros(3, 4), torch.ones(2))
    with pytest.raises(ValueError, match=r"delta must be a contiguous \(3, 4\), got \(3, 5\)"):
        fp8.rescale(torch.zeros(3, 4), torch.ones(3), delta=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8.product(fp8.quantise_rows(torch.zeros(2, 24)), fp8.quantise_weight(torch.zeros(16, 24)))
    with pytest.raises(ValueError, match="rows of 32 do not go with a weight of"):
        fp8.product(fp8.quantise_rows(torch.zeros(2, 32)), fp8.quantise_weight(torch.zeros(16, 48)))
